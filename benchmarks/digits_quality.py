"""What the precision of the consistency quotient does to the samples, on the handwritten digits.

    python benchmarks/digits_quality.py [--only NAME ...] [--seeds 5] [--json OUT.json] [--plot OUT.png]

Trains the network of ``soflow demo`` once for every variant and seed, on equal draws, and takes the Fréchet distance of
5,000 one-step samples to all real digits. A run that is already in the JSON is not run again, so the table can be
built in several calls.
"""

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from _baselines import Fp32PairSoFlow, ScaledAdamW, ScaledLossSoFlow
from _emulate import RoundedProducts, to_fp8, to_tf32
from _measure import environment

from soflow_fast import DiT, SoFlow
from soflow_fast.data import batches, digits
from soflow_fast.ema import EMA
from soflow_fast.evaluate import digit_scores
from soflow_fast.images import balanced_labels
from soflow_fast.optim import AdamW
from soflow_fast.sample import Sampler
from soflow_fast.step import TrainStep

STEPS, BATCH, SAMPLES = 800, 64, 5000


class _Fp8Forward(SoFlow):
    """Every product of every forward on float8 operands (emulated); the backward as it is."""

    def loss_of_rows(self, *arguments, **keywords):
        with RoundedProducts(to_fp8):
            return super().loss_of_rows(*arguments, **keywords)


#: variant: objective class, its arguments, arguments of the network, of the step, operands of all products
VARIANTS = {
    "two forwards, fp32": (SoFlow, {"quotient": "two_forwards"}, {}, {}, None),
    "two forwards, TF32 (emulated)": (SoFlow, {"quotient": "two_forwards"}, {"attention": "math"}, {}, to_tf32),
    "two forwards, bf16": (
        SoFlow,
        {"quotient": "two_forwards"},
        {"residual_dtype": torch.float32},
        {"precision": "bf16"},
        None,
    ),
    "two forwards, fp16 and loss scale": (
        ScaledLossSoFlow,
        {"quotient": "two_forwards"},
        {"compute_dtype": torch.float16, "residual_dtype": torch.float32},
        {},
        None,
    ),
    "two forwards, bf16 with the pair in fp32": (
        Fp32PairSoFlow,
        {"quotient": "two_forwards"},
        {"compute_dtype": torch.bfloat16, "residual_dtype": torch.float32},
        {},
        None,
    ),
    "two forwards, bf16, r_end 0.02": (
        SoFlow,
        {"quotient": "two_forwards", "gap_end": 0.02},
        {"residual_dtype": torch.float32},
        {"precision": "bf16"},
        None,
    ),
    "difference, fp32": (SoFlow, {}, {}, {}, None),
    "difference, bf16, fp32 streams": (SoFlow, {}, {"residual_dtype": torch.float32}, {"precision": "bf16"}, None),
    "difference, bf16, bf16 streams": (SoFlow, {}, {}, {"precision": "bf16"}, None),
    "difference, fp32, fp8 guidance": (SoFlow, {}, {"float8_guidance": True}, {}, None),
    "difference, fp8 operands (emulated)": (_Fp8Forward, {}, {"attention": "math"}, {}, None),
    "difference, fp32, r_end 1e-4": (SoFlow, {"gap_end": 1e-4, "min_gap": 0.0}, {}, {}, None),
    "difference, fp32, r_end 1e-6": (SoFlow, {"gap_end": 1e-6, "min_gap": 0.0}, {}, {}, None),
    "tangent, fp32": (SoFlow, {"quotient": "tangent"}, {}, {}, None),
}


def train_and_score(name: str, seed: int) -> dict:
    """One run: its scores and its seconds."""
    kind, objective, network, step, rounding = VARIANTS[name]
    torch.manual_seed(seed)
    net = DiT(8, 2, 1, 96, 3, 4, num_classes=10, impl="torch", **network)
    model = kind(net, guidance_scale=2.0, **objective)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if kind is ScaledLossSoFlow:
        optimizer = ScaledAdamW(parameters, lr=1e-3, impl="torch", objective=model)
    else:
        optimizer = AdamW(parameters, lr=1e-3, impl="torch")
    ema = EMA(model, 0.999)
    train_step = TrainStep(model, optimizer=optimizer, ema=ema, total_steps=STEPS, seed=seed, **step)
    data = batches(
        digits("train"), batch=BATCH, steps=range(STEPS), seed=seed, num_classes=10, device=torch.device("cpu")
    )
    start = time.perf_counter()
    with RoundedProducts(rounding) if rounding else nullcontext():
        for x, labels in data:
            train_step(x, labels)
    seconds = time.perf_counter() - start
    net.compute_dtype = net.residual_dtype = torch.float32
    labels = balanced_labels(SAMPLES, 10)
    with ema.applied():
        samples = torch.cat(list(Sampler(model, (1, 8, 8), seed=seed, batch=1000).draw(labels, SAMPLES)))
    return {"variant": name, "seed": seed, "seconds": round(seconds, 1), **digit_scores(samples, labels)}


def summary(runs: list[dict]) -> dict[str, dict]:
    """Of every variant the mean Fréchet distance, and how much it is above that of two forwards in fp32 on the same
    seeds, whose draws are the same; each with its standard error (None of one seed)."""
    rows, exact = {}, {run["seed"]: run["frechet_all"] for run in runs if run["variant"] == next(iter(VARIANTS))}
    for name in VARIANTS:
        values = {run["seed"]: run["frechet_all"] for run in runs if run["variant"] == name}
        above = [value - exact[seed] for seed, value in values.items() if seed in exact]
        if values:
            mean, error = _mean_and_error(list(values.values()))
            rows[name] = {"seeds": len(values), "mean": mean, "standard_error": error}
            rows[name]["above_fp32"], rows[name]["above_fp32_standard_error"] = _mean_and_error(above)
    return rows


def _mean_and_error(values: list[float]) -> tuple[float | None, float | None]:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.mean(values) if values else None, error


def plot(rows: dict[str, dict], path: Path) -> None:
    """Bars of the mean distance with their standard errors."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.4 * len(rows) + 1), layout="constrained")
    colors = ["tab:blue" if "two" not in name else "tab:gray" for name in rows]
    means, errors = zip(*((row["mean"], row["standard_error"] or 0.0) for row in rows.values()), strict=True)
    names = [f"{name} ({row['seeds']})" for name, row in rows.items()]
    axes.barh(names, means, xerr=errors, color=colors, capsize=3)
    axes.invert_yaxis()
    axes.set_xlabel("Fréchet distance of one-step samples to the digits (seeds)")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each variant (default 5)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the runs here, and skip those already in it")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="draw the summary here")
    arguments = parser.parse_args()
    saved = arguments.json is not None and arguments.json.exists()
    result = json.loads(arguments.json.read_text()) if saved else {"environment": environment(), "runs": []}
    result |= {"steps": STEPS, "batch": BATCH, "samples": SAMPLES}
    done = {(run["variant"], run["seed"]) for run in result["runs"]}
    for seed in range(arguments.seeds):
        for name in arguments.only:
            if (name, seed) not in done:
                result["runs"].append(train_and_score(name, seed))
                print(json.dumps(result["runs"][-1]), flush=True)
                if arguments.json:
                    arguments.json.write_text(
                        json.dumps({**result, "summary": summary(result["runs"])}, indent=1) + "\n"
                    )
    rows = summary(result["runs"])
    print(f"{'':44}{'seeds':>6}{'Fréchet':>10}{'± s.e.':>9}")
    for name, row in rows.items():
        error = "" if row["standard_error"] is None else f"{row['standard_error']:.3f}"
        print(f"{name:44}{row['seeds']:>6}{row['mean']:>10.3f}{error:>9}")
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
