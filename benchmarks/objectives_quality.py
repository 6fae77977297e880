"""The objectives side by side on the handwritten digits: scores of their samples after as many steps each.

    python benchmarks/objectives_quality.py [--only NAME ...] [--steps 1000] [--seeds 3] [--json OUT.json]

Everything but the objective is that of ``soflow demo``: network, draws, optimizer, averages. Settings that have nothing
to do with the data are as published; guidance has an effective scale of 2 where it is fixed in the training, and
improved MeanFlow's one run of each seed is scored at several; sCM has none. A run that is already in the JSON is not
run again.
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from _measure import environment

from soflow_fast import TrainConfig, Trainer
from soflow_fast.config import AlphaFlowConfig, FlowMatchingConfig, ImprovedMeanFlowConfig, MeanFlowConfig, SCMConfig
from soflow_fast.demo import STEPS, demo_config, score
from soflow_fast.dry_run import plan
from soflow_fast.trainer import load_run

_SCALES = (1.0, 2.0, 4.0)

#: What a configuration has in place of the demo's.
METHODS = {
    "SoFlow": {},
    "MeanFlow": {"objective": "meanflow", "meanflow": MeanFlowConfig(guidance_scale=1.0, guidance_mix=0.5)},
    "MeanFlow along its prediction": {
        "objective": "meanflow",
        "meanflow": MeanFlowConfig(guidance_scale=1.0, guidance_mix=0.5, direction="prediction"),
    },
    "improved MeanFlow": {
        "objective": "improved_meanflow",
        "improved_meanflow": ImprovedMeanFlowConfig(guidance_max=4.0, sample_scale=2.0, sample_interval=(0.0, 1.0)),
    },
    "α-Flow": {"objective": "alphaflow", "alphaflow": AlphaFlowConfig()},
    "sCM": {"objective": "scm", "scm": SCMConfig()},
    "flow matching, 32 network calls": {
        "objective": "flow_matching",
        "flow_matching": FlowMatchingConfig(guidance_scale=2.0),
    },
}


def run(name: str, changes: dict, seed: int, steps: int, samples: int) -> list[dict]:
    """Trains the demo's configuration with changes, and scores samples of one and of two steps; improved MeanFlow at
    every scale.
    """
    with TemporaryDirectory() as folder:
        demo = demo_config(folder, seed)
        config: TrainConfig = replace(demo, total_steps=steps, **changes)
        config.output.sample_every, config.evaluation.samples = 0, samples
        Trainer(config).fit()
        _, model, _ = load_run(folder, config.device)
        cost = plan(config).flops / config.batch_size
        scored = []
        for scale in _SCALES if config.objective == "improved_meanflow" else (None,):
            if scale is not None:
                model.set_sample_guidance(scale)
            told = name if scale is None else f"{name}, scale {scale:g}"
            scored.append(
                {"method": name, "told": told, "seed": seed, "flops_per_sample": cost} | score(model, config)[0]
            )
    return scored


def summary(runs: list[dict]) -> dict[str, dict]:
    """Of every method the mean of each score over the seeds, and the standard error of the one-step distance."""
    rows = {}
    for told in dict.fromkeys(run["told"] for run in runs):
        of = [run for run in runs if run["told"] == told]
        distances = [run["one_step"]["frechet_all"] for run in of]
        rows[told] = {
            "seeds": len(of),
            "flops_per_sample": of[0]["flops_per_sample"],
            "standard_error": statistics.stdev(distances) / len(of) ** 0.5 if len(of) > 1 else None,
        }
        for steps in ("one_step", "two_steps"):
            rows[told][steps] = {key: statistics.mean(run[steps][key] for run in of) for key in of[0][steps]}
    return rows


def main(arguments: list[str] | None = None, methods: dict[str, dict] = METHODS, about: str | None = __doc__) -> None:
    """Runs these methods: what each has in place of the demo's."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(methods), default=list(methods), metavar="NAME")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a run (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of a method, from seed 0 (default %(default)s)")
    parser.add_argument("--samples", type=int, default=5000, help="to score (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the scores here, and skip the runs in it")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds} makes no run; give at least 1")
    saved = options.json is not None and options.json.exists()
    settings = {"steps": options.steps, "samples": options.samples}
    report = json.loads(options.json.read_text()) if saved else {"environment": environment(), "runs": [], **settings}
    for name, value in settings.items():
        if (theirs := report.get(name)) != value:
            parser.error(
                f"--{name} {value} is not that of the runs in {options.json}, {theirs}; give --{name} {theirs}, or "
                "another --json"
            )
    done = {(run["method"], run["seed"]) for run in report["runs"]}
    for seed in range(options.seeds):
        for name in options.only:
            if (name, seed) in done:
                continue
            report["runs"] += run(name, methods[name], seed, options.steps, options.samples)
            report["summary"] = summary(report["runs"])
            print(json.dumps(report["runs"][-1]), flush=True)
            if options.json:
                options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{'':36}{'one step':>10}{'two steps':>11}{'recognised':>12}")
    for told, row in report["summary"].items():
        one, two = row["one_step"], row["two_steps"]
        print(f"{told:36}{one['frechet_all']:>10.2f}{two['frechet_all']:>11.2f}{one['recognised']:>12.1%}")


if __name__ == "__main__":
    main()
