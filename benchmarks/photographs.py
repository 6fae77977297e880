"""Time to quality: one-step samples of a network trained on crops of two photographs, against the seconds of training.

    python benchmarks/photographs.py [--rows ROW ...] [--seconds 300] [--json OUT.json] [--plot OUT.png]

The data are crops of 32×32 pixels, half of them mirrored, of the two photographs that scikit-learn brings along, a
class each, in pixel space. Every row of ``_rows.py`` starts from the same weights and trains on the same crops in the
same order for so many seconds; compiling, capturing and evaluating are not counted and reported apart. At a geometric
series of times its averaged weights are evaluated, all rows in one way: the Fréchet distance of one-step samples to
crops not trained on, in 64 principal components of those. Besides the curves there is one figure for each row: when it
first was as good as ``soflow/public`` is at the end. Averages have the warm-up of :class:`~soflow_fast.ema.EMA` in
every row, without which that of a short run is its initialisation; progress is the share of the seconds, by the
time of a step measured before.

``--resume`` leaves out the rows that are in the JSON. ``--smoke`` tries it with a tiny network, on a CPU too.
"""

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from _baselines import LoopEMA
from _curves import REFERENCE, Results, chart, table
from _measure import environment
from _race import out_of_memory, release
from _rows import SEED, Row, Workload, build, selected
from torch import Tensor

from soflow_fast import DiT, SoFlow
from soflow_fast.data import Resident
from soflow_fast.dit import PRESETS
from soflow_fast.images import balanced_labels
from soflow_fast.objectives.base import Objective
from soflow_fast.objectives.flow_matching import FlowMatching
from soflow_fast.sample import Sampler
from soflow_fast.step import TrainStep

CLASSES = ("china", "flower")
COMPONENTS = 64

#: For a smoke run.
TINY = {"patch_size": 4, "hidden_size": 64, "depth": 2, "num_heads": 1}
_SMOKE = {"model": "tiny", "size": 16, "batch": 8, "seconds": 1.5, "samples": 128, "crops": 256, "held_out": 256}
_SMOKE |= {"points": 4, "rows": [REFERENCE, "soflow/merged-compile"]}

# Steps until a row is compiled and captured, and those whose time says how many fit into the seconds.
_FIRST_STEPS, _TIMED_STEPS = 5, 5
# The series of evaluations begins at this share of the seconds.
_FIRST_POINT = 1 / 50
# The host waits for the device this often, in seconds: its clock is read only then.
_READ_CLOCK = 0.25
_SAMPLES_AT_ONCE = 500
# What a row is assumed to take beside its training, in seconds.
_PREPARATION = 180.0

_SETTINGS = ("model", "size", "batch", "seconds", "learning_rate", "guidance_scale", "samples", "crops", "held_out")

# ------------------------------------------------------------------------------------------------------------ data


def crops(size: int, train: int, held_out: int, device: str) -> tuple[Resident, Tensor]:
    """Different crops to train on and to compare with, drawn without repetition; the same for every run.

    Args:
        size: S, of a crop. train, held_out: how many of each, half of them from each photograph.

    Returns:
        The crops (train, 3, S, S) in [-1, 1] with the photograph's index as label, and the others, (held_out, 3, S, S).
    """
    from sklearn.datasets import load_sample_images

    generator = torch.Generator().manual_seed(SEED)
    samples, labels, others = [], [], []
    for label, image in enumerate(load_sample_images().images):
        photograph = torch.tensor(image, device=device).permute(2, 0, 1).float() / 127.5 - 1
        windows = photograph.unfold(1, size, 1).unfold(2, size, 1)  # (3, rows, columns, S, S), a view
        n_rows, n_columns = windows.shape[1:3]
        total, wanted = 2 * n_rows * n_columns, (train + held_out) // 2
        if wanted > total:
            raise ValueError(f"a photograph has {total} different crops of size {size}, and {wanted} are asked for")
        places = torch.randperm(total, generator=generator)[:wanted].to(device)
        row, column, mirrored = places // 2 // n_columns, places // 2 % n_columns, places % 2
        chosen = windows[:, row, column].transpose(0, 1)
        chosen = torch.where(mirrored.view(-1, 1, 1, 1).bool(), chosen.flip(3), chosen)
        samples.append(chosen[: train // 2])
        others.append(chosen[train // 2 :])
        labels.append(torch.full((train // 2,), label, device=device))
    return Resident(torch.cat(samples), torch.cat(labels)), torch.cat(others)


@dataclass(frozen=True)
class Crops(Workload):
    """The workload of the rows here: pixels, two classes, and weights as training starts from.

    Attributes:
        size: of a crop. guidance_scale: ω of the rows that train with guidance.
    """

    size: int = 32
    guidance_scale: float = 3.0

    def network(self, dit: type[DiT], **options) -> DiT:
        """The network as it is initialised, the same for every row."""
        sizes = {"input_size": self.size, "in_channels": 3, "num_classes": len(CLASSES), **options}
        with torch.device(self.device):
            torch.manual_seed(SEED)
            return dit(**TINY, **sizes) if self.model == "tiny" else dit.from_preset(self.model, **sizes)

    def recipe(self, objective: type[Objective]) -> dict:
        guided = issubclass(objective, SoFlow) and not issubclass(objective, FlowMatching)
        return {"guidance_scale": self.guidance_scale} if guided else super().recipe(objective)


# --------------------------------------------------------------------------------------------------------- quality


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """``|μ₁−μ₂|² + tr(C₁ + C₂ − 2(C₁C₂)^½)`` of two sets of features, (n, D) and (m, D) float64."""
    covariances = [features.T.cov() for features in (first, second)]
    # The eigenvalues of a product of two covariances are real and not negative, but for rounding.
    roots = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt()
    means = (first.mean(0) - second.mean(0)).square().sum()
    return (means + sum(covariance.trace() for covariance in covariances) - 2 * roots.sum()).item()


class Judge:
    """How far one-step samples are from real crops, by the principal components of the latter.

    Args:
        real: (n, 3, S, S). samples: how many are drawn for one distance.

    Attributes:
        explained: share of the crops' variance that the components hold.
    """

    def __init__(self, real: Tensor, samples: int):
        pixels = real.flatten(1).double()
        self.samples, self.shape, self.mean = samples, tuple(real.shape[1:]), pixels.mean(0)
        variances, directions = torch.linalg.eigh(pixels.T.cov())
        self.directions = directions[:, -COMPONENTS:]
        self.explained = (variances[-COMPONENTS:].sum() / variances.sum()).item()
        self.real = self.features(real).cpu()

    def features(self, images: Tensor) -> Tensor:
        """(n, 3, S, S) to (n, ``COMPONENTS``) float64."""
        return (images.flatten(1).double() - self.mean) @ self.directions

    def distance(self, model: Objective) -> float:
        """Of one-step samples, as many of each class, drawn eagerly in the library's precision for the device; nan
        where a sample is not finite."""
        sampler = Sampler(model, self.shape, seed=SEED, batch=min(_SAMPLES_AT_ONCE, self.samples), compile=False)
        drawn = sampler.draw(balanced_labels(self.samples, len(CLASSES)), self.samples, decode=self.features)
        features = torch.cat(list(drawn)).double()
        return frechet_distance(features, self.real) if features.isfinite().all() else math.nan


# -------------------------------------------------------------------------------------------------------- training


class _WarmLoopEMA(LoopEMA):
    """One parameter after the other, as in public code, but with the warm-up of the other rows."""

    @torch.no_grad()
    def update(self, taken: Tensor | bool = True) -> None:
        weight = 1 - self.current_decay()  # on the device, for a captured step
        for name, average in self.averages.items():
            average.lerp_(self._parameters[name], weight)
        self.updates += 1


class Run:
    """One row: its step compiled and captured, and then everything back at the start of training.

    Args:
        step: of the row, not yet run. batch: rows of a step. seconds: that it will train.

    Attributes:
        ms: of a step. preparation: seconds of compiling, capturing and measuring that.
    """

    def __init__(self, step: TrainStep, data: Resident, batch: int, seconds: float, learning_rate: float):
        begin = time.perf_counter()
        self.step, self.data, self.batch, self.on_gpu = step, data, batch, step.step.is_cuda
        for group in self.step.optimizer.param_groups:
            group["lr"] = learning_rate
        if isinstance(self.step.ema, LoopEMA):
            self.step.ema = _WarmLoopEMA(self.step.model)
        # On the device, where a captured step reads it: how many steps fit into the seconds shows only after that.
        self.step.total_steps = torch.ones((), device=step.step.device)
        start = {name: value.clone() for name, value in self.step.model.state_dict().items()}
        batches = self._batches()
        self._advance(batches, _FIRST_STEPS)
        self.ms = 1e3 * self._advance(batches, _TIMED_STEPS) / _TIMED_STEPS
        self._restart(start, total_steps=max(1, round(1e3 * seconds / self.ms)))
        self.preparation = time.perf_counter() - begin

    def _restart(self, start: dict[str, Tensor], total_steps: int) -> None:
        """Back to step 0, in place: a captured graph holds the addresses."""
        step = self.step
        step.model.load_state_dict(start)
        for state in step.optimizer.state.values():
            for value in state.values():
                value.zero_()
        step.ema.load_state_dict(start, updates=0)
        step.step.zero_()
        step.total_steps.fill_(total_steps)

    def train(self, times: list[float]) -> Iterator[tuple[float, int]]:
        """Seconds and steps of training behind it, at each of the times or just after."""
        batches, seconds, steps = self._batches(), 0.0, 0
        at_once = max(1, round(1e3 * _READ_CLOCK / self.ms))
        for due in times:
            while seconds < due:
                n = min(at_once, math.ceil(1e3 * (due - seconds) / self.ms))
                seconds += self._advance(batches, n)
                steps += n
            yield seconds, steps

    def _advance(self, batches: Iterator, steps: int) -> float:
        """Seconds of so many steps."""
        begin = time.perf_counter()
        for x, labels in itertools.islice(batches, steps):
            self.step(x, labels)
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.data.batches(batch=self.batch, steps=range(2**31), seed=SEED, rows=slice(None))


def times(seconds: float, points: int) -> list[float]:
    """A geometric series that ends with the seconds."""
    return [seconds * _FIRST_POINT ** (1 - (i + 1) / points) for i in range(points)]


def measure(row: Row, workload: Crops, data: Resident, judge: Judge, options: argparse.Namespace) -> dict:
    """The row's curve and its costs, ready for JSON."""
    if row.no_cpu and workload.device == "cpu":
        return {"what": row.what, "skipped": row.no_cpu, "failed": False}
    try:
        step = build(row, workload)
    except ValueError as error:  # by which a network or a backend says what it needs
        return {"what": row.what, "skipped": str(error), "failed": False}
    run = Run(step, data, workload.batch, options.seconds, options.learning_rate)
    net = workload.network(DiT, impl="torch")
    model = row.objective(net, **workload.recipe(row.objective), **row.settings)
    report = {"what": row.what, "ms_per_step": run.ms, "preparation_seconds": run.preparation, "points": []}
    begin = time.perf_counter()
    for seconds, steps in run.train(times(options.seconds, options.points)):
        model.load_state_dict(run.step.ema.state_dict())
        point = {
            "seconds": seconds,
            "steps": steps,
            "images": steps * workload.batch,
            "distance": judge.distance(model),
        }
        if not math.isfinite(point["distance"]):
            return {**report, "skipped": f"its samples are not finite after {seconds:.0f} s", "failed": True}
        report["points"].append(point)
    return report | {"evaluation_seconds": time.perf_counter() - begin - seconds}


# --------------------------------------------------------------------------------------------------------- command


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="photographs.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="DiT-B/2", choices=[*PRESETS, "tiny"], metavar="NAME", help="default %(default)s")
    add("--rows", nargs="+", default=[REFERENCE, "soflow/fast"], metavar="ROW", help="default: %(default)s")
    add("--seconds", type=float, default=300.0, help="of training for each row (default %(default)s)")
    add("--batch", type=int, default=256, help="default %(default)s")
    add("--learning-rate", type=float, default=1e-4, help="default %(default)s, as published")
    add("--guidance-scale", type=float, default=3.0, help="of SoFlow's rows (default %(default)s, as published)")
    add("--points", type=int, default=20, help="evaluations of each row (default %(default)s)")
    add("--samples", type=int, default=10_000, help="for each evaluation (default %(default)s)")
    add("--size", type=int, default=32, help="of a crop (default %(default)s)")
    add("--crops", type=int, default=2**18, help="to train on (default %(default)s)")
    add("--held-out", type=int, default=2**14, help="crops to compare with (default %(default)s)")
    add("--json", type=Path, metavar="OUT", help="write the results here, after every row")
    add("--plot", type=Path, metavar="OUT.png", help="draw the curves here")
    add("--resume", action="store_true", help="do not run again the rows that are in the JSON")
    add("--limit", type=float, metavar="SECONDS", help="begin no row that may not be done by then")
    add("--smoke", action="store_true", help="a tiny network for seconds; the figures mean nothing")
    options = parser.parse_args(arguments)
    if options.smoke:
        parser.set_defaults(**_SMOKE)
        options = parser.parse_args(arguments)
    elif not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA GPU and none is visible; --smoke tries it on a CPU")
    if find_spec("sklearn") is None:
        parser.error("the photographs are in scikit-learn, which is not installed; run pip install 'soflow-fast[demo]'")
    if options.resume and options.json is None:
        parser.error("--resume needs --json, the file to go on with")
    for name in ("seconds", "points", "learning_rate", "samples", "held_out"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name):g} is not positive")
    if options.crops < 2 * options.batch:
        parser.error(f"--crops {options.crops} are fewer than two batches of {options.batch}")
    if min(options.held_out, options.samples) <= COMPONENTS:
        parser.error(f"--held-out and --samples must be more than the {COMPONENTS} components of the distance")
    for path in (options.json, options.plot):
        if path is not None and not path.parent.is_dir():
            parser.error(f"the folder of {path} does not exist; create it")
    return options


def run_rows(rows: dict[str, Row], workload: Crops, results: Results, options, start: float) -> list[str]:
    """Trains the rows that are not in the results; those that the time is too short for."""
    pending = [name for name in rows if name not in results.report["rows"]]
    data, held_out = crops(options.size, options.crops, options.held_out, workload.device)
    judge = Judge(held_out, options.samples)
    some = torch.arange(0, len(data.samples), max(1, len(data.samples) // options.samples), device=workload.device)
    distance = frechet_distance(judge.features(data.samples[some]).cpu(), judge.real)
    results.report |= {"distance_of_crops": distance, "variance_explained": judge.explained}
    results.add({})
    for i, name in enumerate(pending):
        needed = options.seconds + (0 if options.smoke else _PREPARATION)
        if options.limit is not None and time.monotonic() - start + needed > options.limit:
            return pending[i:]
        print(f"{name}: {rows[name].what}", file=sys.stderr, flush=True)
        try:
            report = measure(rows[name], workload, data, judge, options)
        except Exception as error:  # a row that breaks must not cost the others
            why = (
                f"out of memory at batch {workload.batch}"
                if out_of_memory(error)
                else f"{type(error).__name__}: {error}"
            )
            report = {"what": rows[name].what, "skipped": why[:2000], "failed": True}
        results.add({name: report})
        torch.compiler.reset()
        release()
    return []


def main(arguments: list[str] | None = None) -> int:
    """0; 1 if a row failed; 2 for bad input."""
    start, options = time.monotonic(), parsed(arguments)
    on_gpu = torch.cuda.is_available()
    machine = environment()
    same = {name: getattr(options, name) for name in _SETTINGS}
    same |= {"hardware": machine["gpu"]["name"] if on_gpu else machine["cpu"]["model"]}
    same |= {"versions": machine["versions"], "commit": machine["commit"]}
    header = {"environment": machine, "smoke": options.smoke, "same": same}
    try:
        rows = selected(options.rows)
        workload = Crops(
            options.model,
            options.batch,
            "cuda" if on_gpu else "cpu",
            compile=on_gpu,
            fused=on_gpu,
            half=on_gpu,
            size=options.size,
            guidance_scale=options.guidance_scale,
        )
        workload.network(DiT, impl="torch")  # sizes that cannot be are found before the crops are cut
        results = Results(header, options.json, options.resume)
        torch._dynamo.config.recompile_limit = 8 * len(rows)  # all rows share one code object
        left = run_rows(rows, workload, results, options, start)
    except ValueError as error:
        print(f"photographs.py: {error}", file=sys.stderr)
        return 2
    print(table(results.report))
    if options.smoke:
        print("a smoke run: these figures mean nothing")
    if options.plot:
        chart(results.report, options.plot)
    if left:
        print(f"not begun, as the time was too short: {', '.join(left)}; run again with --resume")
    return int(any(row.get("failed") for row in results.report["rows"].values()))


if __name__ == "__main__":
    sys.exit(main())
