"""The published recipe for CIFAR-10 in the small: a UNet without classes on scikit-learn's digits, scored.

python benchmarks/cifar_recipe.py [--steps 1000] [--seeds 1] [--json OUT.json]

All rows on the consistency, RAdam, gaps from 1 to 0.0003125 of s to t; the batch, learning rate and averaging are those
of the digits' demo. With and without augmentation and dropout.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from _measure import environment

from soflow_fast import TrainConfig, Trainer
from soflow_fast.demo import demo_config, score
from soflow_fast.trainer import load_run

RECIPE = {
    "model": {
        "preset": "UNet",
        "input_size": 8,
        "in_channels": 1,
        "num_classes": 0,
        "model_channels": 32,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attention_resolutions": [4],
    },
    "soflow": {
        "velocity_share": 0.0,
        "guidance_scale": 1.0,
        "label_drop": 0.0,
        "p": 0.75,
        "eps": 0.001,
        "time_mean": [-0.9, -4.0, -0.9],
        "time_std": [1.6, 1.6, 1.6],
        "gap_init": 1.0,
        "gap_end": 0.0003125,
    },
}
VARIANTS = {
    "augmentation 0.12, dropout 0.13": (0.12, 0.13),
    "neither": (0.0, 0.0),
}


def config(run_dir: str, augment: float, dropout: float, *, steps: int, seed: int, compile: bool) -> TrainConfig:
    """Of one run."""
    demo = demo_config(run_dir, seed)
    recipe = TrainConfig.from_dict(RECIPE)
    return replace(
        demo,
        total_steps=steps,
        model=replace(recipe.model, dropout=dropout),
        soflow=recipe.soflow,
        data=replace(demo.data, augment=augment),
        optimizer=replace(demo.optimizer, name="radam"),
        compute=replace(demo.compute, compile=compile),
        output=replace(demo.output, sample_every=0),
    )


def run(wanted: TrainConfig) -> dict:
    """Trains, and scores samples of one and of two steps."""
    Trainer(wanted).fit()
    _, model, _ = load_run(wanted.run_dir, wanted.device)
    scores, *_ = score(model, wanted)
    return {"seed": wanted.seed, "parameters": sum(p.numel() for p in model.parameters()), **scores}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="of a run (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of a variant, from seed 0 (default %(default)s)")
    parser.add_argument("--samples", type=int, default=5000, help="to score (default %(default)s)")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the scores here, after every run")
    options = parser.parse_args(arguments)
    report = {"environment": environment(), "steps": options.steps, "samples": options.samples, "runs": []}
    for name, (augment, dropout) in VARIANTS.items():
        for seed in range(options.seeds):
            with TemporaryDirectory() as folder:
                wanted = config(folder, augment, dropout, steps=options.steps, seed=seed, compile=not options.eager)
                wanted.evaluation.samples = options.samples
                report["runs"].append({"variant": name, **run(wanted)})
            print(json.dumps(report["runs"][-1]), flush=True)
            if options.json:
                options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
