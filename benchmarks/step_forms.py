"""The training step side by side: as a user would write it, merged, and compiled.

    python benchmarks/step_forms.py [--seconds 60] [--json benchmarks/results/step_forms_cpu.json]

    plain eager     six network calls, the quotient by two forwards, torch's AdamW, the average in a Python loop
    fast eager      two network calls, the difference forward, one-pass update
    fast compiled   the same as one torch.compile graph; on a GPU the whole step is one CUDA graph

On the digits of ``soflow demo`` and on DiT-S/4, in turns within one process: a round runs one step of each form, and a
ratio is the median over rounds of the plain step's time over the form's. On a CPU all are float32; on a GPU the plain
step is TF32, as published, and the fast ones are bfloat16 with fused ops. Nothing is reported of a form whose first
loss is not the plain one's. The first steps are timed apart: they compile what torch's cache does not have.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from _baselines import EagerSixCalls, LoopEMA
from _measure import environment
from torch import Tensor, nn

from soflow_fast import SoFlow
from soflow_fast.build import build_network, sample_shape
from soflow_fast.config import ModelConfig, TrainConfig
from soflow_fast.demo import demo_config
from soflow_fast.ema import EMA
from soflow_fast.optim import AdamW
from soflow_fast.step import TrainStep

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN = "plain eager"

# Before the first round: compilation, and on a GPU the capture.
_FIRST_STEPS = 5
_ROUNDS_AT_LEAST = 5
_LOSS_TOLERANCE = 0.02


@dataclass(frozen=True)
class Form:
    """A way to run the step.

    Attributes:
        quotient: of SoFlow. compile: of :class:`~soflow_fast.step.TrainStep`. fused: ops, network and update
            as the library has them by default, else plain torch.
    """

    quotient: str
    fused: bool
    compile: bool | str


FORMS = {
    PLAIN: Form(quotient="two_forwards", fused=False, compile=False),
    "fast eager": Form(quotient="difference", fused=True, compile=False),
    "fast compiled": Form(quotient="difference", fused=True, compile=True),
}


def configurations() -> dict[str, TrainConfig]:
    """What the forms run on; the small batch of S/4 is for a CPU."""
    digits = demo_config("unused", device=DEVICE)
    s4 = TrainConfig(batch_size=256 if DEVICE == "cuda" else 16, device=DEVICE, model=ModelConfig(preset="DiT-S/4"))
    return {"digits": digits, "DiT-S/4": s4}


def batch(config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Samples, whose values do not matter to the time, and labels."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(config.batch_size, *sample_shape(config), generator=generator)
    labels = torch.randint(config.model.num_classes, (config.batch_size,), generator=generator)
    return x0.to(config.device), labels.to(config.device)


def build(form: Form, config: TrainConfig) -> TrainStep:
    """The step of a form, with the same weights for all; none is zero, so that every part of the loss is at work."""
    torch.manual_seed(0)
    network = build_network(replace(config.model, impl="auto" if form.fused else "torch"), config.soflow.label_drop)
    for p in network.parameters():
        if p.requires_grad and not p.any():
            nn.init.normal_(p, std=0.02)
    # random numbers by kernels on a GPU also for the plain step: how they are drawn is not what is compared
    objective = SoFlow if form.fused else EagerSixCalls
    model = objective(network, **{**asdict(config.soflow), "quotient": form.quotient})
    model.to(config.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    options = {"lr": config.optimizer.learning_rate, "betas": config.optimizer.betas, "weight_decay": 0.0}
    if form.fused:
        optimizer, ema = AdamW(parameters, **options), EMA(model)
    else:
        optimizer, ema = torch.optim.AdamW(parameters, **options), LoopEMA(model)
    return TrainStep(
        model,
        optimizer=optimizer,
        ema=ema,
        total_steps=config.total_steps,
        precision="fp32" if DEVICE == "cpu" else "bf16" if form.fused else "tf32",
        compile=form.compile,
        cuda_graph=bool(form.compile) and DEVICE == "cuda",
    )


def timed_step(step: TrainStep, data: tuple[Tensor, Tensor]) -> tuple[float, Tensor]:
    """Seconds until a step is done, and its loss."""
    start = time.perf_counter()
    loss = step(*data).loss
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, loss


def measure(config: TrainConfig, seconds: float) -> list[dict]:
    """One row per form, ready for JSON."""
    data = batch(config)
    steps = {name: build(form, config) for name, form in FORMS.items()}
    losses, first = {}, {}
    for name, step in steps.items():
        took, loss = timed_step(step, data)
        losses[name] = loss.item()
        first[name] = took + sum(timed_step(step, data)[0] for _ in range(_FIRST_STEPS - 1))
    times = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while len(times[PLAIN]) < _ROUNDS_AT_LEAST or time.perf_counter() < end:
        for name, step in steps.items():
            times[name].append(timed_step(step, data)[0])
    rows = []
    for name, values in times.items():
        error = abs(losses[name] / losses[PLAIN] - 1)
        row = {"form": name, "loss_error": error, "first_steps_s": first[name]}
        if error > _LOSS_TOLERANCE:
            rows.append({**row, "refused": f"its first loss is {losses[name]:.6g}, the plain one {losses[PLAIN]:.6g}"})
            continue
        ratios = [plain / value for plain, value in zip(times[PLAIN], values, strict=True)]
        low, _, high = statistics.quantiles(values)
        row |= {"ms_per_step": 1e3 * statistics.median(values), "ms_low": 1e3 * low, "ms_high": 1e3 * high}
        row |= {"images_per_s": config.batch_size / statistics.median(values)}
        rows.append({**row, "rounds": len(values), "ratio_to_plain": statistics.median(ratios)})
    return rows


def table(report: dict) -> str:
    """The report as text."""
    lines = [f"{'':10} {'form':14} {'ms/step':>9} {'quartiles':>19} {'images/s':>9} {'ratio':>6} {'first steps':>11}"]
    for name, configuration in report["configurations"].items():
        for row in configuration["forms"]:
            line = f"{name:10} {row['form']:14}"
            if "refused" in row:
                lines.append(f"{line} refused: {row['refused']}")
                continue
            spread = f"{row['ms_low']:.1f} - {row['ms_high']:.1f}"
            line += f" {row['ms_per_step']:9.1f} {spread:>19} {row['images_per_s']:9.1f}"
            lines.append(f"{line} {row['ratio_to_plain']:5.2f}x {row['first_steps_s']:9.1f} s")
    return "\n".join(lines)


def main() -> int:
    """Measures, writes the JSON, prints the table; 1 if a form was refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="of rounds, for each of the two (default: 60)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the report here")
    arguments = parser.parse_args()
    report = {"environment": environment(), "device": DEVICE, "configurations": {}}
    for name, config in configurations().items():
        size = {"batch": config.batch_size, "precision": "fp32" if DEVICE == "cpu" else "plain tf32, fast bf16"}
        report["configurations"][name] = {**size, "forms": measure(config, arguments.seconds)}
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    return any("refused" in row for c in report["configurations"].values() for row in c["forms"])


if __name__ == "__main__":
    sys.exit(main())
