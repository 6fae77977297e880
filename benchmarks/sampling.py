"""Samples per second, and the latency of one: eager, compiled, and compiled as one CUDA graph.

    python benchmarks/sampling.py [--models DiT-B/4 DiT-XL/2] [--batches 1 64 256] [--json OUT.json] [--minutes 9]

Runs the sampler of ``soflow sample`` on random weights, in bfloat16 and in float32, in one, two and four steps. The
forms of one case are timed in turns and their ratio is to the eager one. Milliseconds are from the call to the samples
on the device, the host waiting for each, which at batch 1 is the latency; images/s are of calls without waiting. A form
whose samples are not those of the eager float32 sampler, to the rounding of its precision, is not timed. What
``--minutes`` leaves no time for is listed. ``--smoke`` takes a small network, and so does a machine without a GPU:
those figures mean nothing.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from _pieces import begun, run_pieces
from _race import release
from _rows import Workload
from torch import Tensor

from soflow_fast import DiT, SoFlow
from soflow_fast.dit import PRESETS
from soflow_fast.images import balanced_labels
from soflow_fast.sample import SAMPLE_PRECISIONS, Sampler

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EAGER, COMPILED, GRAPH = "eager", "compiled", "compiled + CUDA graph"

#: Largest relative error of a form's samples; float32 is not TensorFloat-32 here.
TOLERANCE = {"bf16": 0.05, "fp32": 1e-3}

_SMOKE = {"models": ["small"], "batches": [1, 2], "steps": [1], "seconds": 0.05}
_ROUNDS = 5


@dataclass(frozen=True)
class Case:
    """One sampler.

    Attributes:
        model: preset of the network, or ``small``. batch: samples at a time. steps: network calls for each of them.
        precision: of :class:`~soflow_fast.sample.Sampler`.
    """

    model: str
    batch: int
    steps: int
    precision: str


def cases(models: list[str], batches: list[int], steps: list[int], precisions: list[str]) -> list[Case]:
    """All combinations, one step in the first precision first: what there is no time for is the rest."""
    order = itertools.product(steps, precisions, models, batches)
    return [Case(model, batch, n, precision) for n, precision, model, batch in order]


def objective(model: str) -> SoFlow:
    """Over the network with random weights, in float32."""
    return SoFlow(Workload(model, 4, DEVICE).network(DiT))


def seconds_of(run: Callable[[], object], calls: int, *, wait: bool) -> list[float]:
    """Of each call, the host waiting for it; or without waiting, the mean of all."""
    times, begin = [], time.perf_counter()
    for _ in range(calls):
        start = time.perf_counter()
        run()
        if wait:
            _synchronize()
            times.append(time.perf_counter() - start)
    _synchronize()
    return times if wait else [(time.perf_counter() - begin) / calls]


def _synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def measure(model: SoFlow, case: Case, seconds: float) -> list[dict]:
    """One row per form, ready for JSON.

    Args:
        seconds: of timing for each form, about.
    """
    net = model.network
    shape = (net.in_channels, net.input_size, net.input_size)
    labels = balanced_labels(case.batch, net.num_classes).to(DEVICE)
    options = {"steps": case.steps, "batch": case.batch, "cuda_graph": False}
    truth = Sampler(model, shape, **options, precision="fp32", compile=False)(labels)
    # On a CPU only the plumbing is tried: generating C++ would take most of the time.
    compilers = {EAGER: False, COMPILED: True if DEVICE == "cuda" else "aot_eager"}
    forms, rows = {}, {}

    def prepare(form: str, sampler: Sampler) -> None:
        start = time.perf_counter()
        samples = sampler(labels).clone()
        _synchronize()
        row = {**asdict(case), "form": form, "first_call_s": time.perf_counter() - start}
        row["error"] = _relative_error(samples, truth)
        forms[form], rows[form] = lambda: sampler(labels), row

    for form, compile in compilers.items():
        prepare(form, Sampler(model, shape, **options, precision=case.precision, compile=compile))
    if DEVICE == "cuda":
        prepare(GRAPH, Sampler(model, shape, **{**options, "cuda_graph": True}, precision=case.precision, compile=True))

    wrong = [form for form, row in rows.items() if not row["error"] <= TOLERANCE[case.precision]]
    for form in wrong:
        rows[form]["refused"] = f"its samples err by {rows[form]['error']:.3g}, allowed {TOLERANCE[case.precision]:g}"
        del forms[form]
    for form, (waiting, running) in _in_turns(forms, seconds).items():
        low, _, high = statistics.quantiles(waiting, n=4)
        rows[form] |= {"ms": 1e3 * statistics.median(waiting), "ms_quartiles": [1e3 * low, 1e3 * high]}
        rows[form] |= {"calls": len(waiting), "images_per_s": case.batch / statistics.median(running)}
    eager = rows[EAGER].get("images_per_s")
    for form in forms:
        rows[form]["ratio_to_eager"] = eager and rows[form]["images_per_s"] / eager
    return list(rows.values())


def _in_turns(forms: dict[str, Callable], seconds: float) -> dict[str, tuple[list[float], list[float]]]:
    """For each form the seconds of calls that are waited for, and of calls that are not, from several rounds."""
    calls = {
        form: max(1, round(seconds / _ROUNDS / 2 / seconds_of(run, 2, wait=True)[1])) for form, run in forms.items()
    }
    times = {form: ([], []) for form in forms}
    for _ in range(_ROUNDS):
        for form, run in forms.items():
            times[form][0].extend(seconds_of(run, calls[form], wait=True))
            times[form][1].extend(seconds_of(run, calls[form], wait=False))
    return times


def _relative_error(samples: Tensor, truth: Tensor) -> float:
    return ((samples - truth).norm() / truth.norm()).item()


def run(wanted: list[Case], options: argparse.Namespace) -> dict:
    """The report; its JSON is written after every case, marked as partial until the last."""
    report = begun(options.json if options.resume else None, device=DEVICE, smoke=options.smoke)
    models: dict[str, SoFlow] = {}

    def refuse(case: Case, why: str) -> None:
        report["refused"].append({**asdict(case), "why": why})
        print(f"{case}: {why}", file=sys.stderr)

    def time_one(case: Case) -> None:
        if case.model not in models:
            models.clear()  # one network at a time in memory
            models[case.model] = objective(case.model)
        try:
            rows = measure(models[case.model], case, options.seconds)
        except Exception as error:  # what cannot be compiled or captured must not cost the other cases
            return refuse(case, f"{type(error).__name__}: {error}"[:2000])
        finally:
            torch.compiler.reset()
            release()
        report["rows"] += rows
        for row in rows:
            if "refused" in row:
                refuse(case, f"{row['form']}: {row['refused']}")

    run_pieces(report, ((str(case), partial(time_one, case)) for case in wanted), options.minutes, options.json)
    return report


def table(report: dict) -> str:
    """The report as text: one line per case and form."""
    head = f"{'model':9} {'precision':9} {'steps':>5} {'batch':>5} {'form':22} {'ms':>9} {'quartiles':>17}"
    lines = [f"{head} {'images/s':>9} {'ratio':>6} {'error':>8}"]
    for row in report["rows"]:
        if "ms" in row:
            spread = "{:.2f} - {:.2f}".format(*row["ms_quartiles"])
            line = f"{row['model']:9} {row['precision']:9} {row['steps']:5} {row['batch']:5} {row['form']:22}"
            ratio = "-" if row["ratio_to_eager"] is None else f"{row['ratio_to_eager']:.2f}x"
            line += f" {row['ms']:9.2f} {spread:>17} {row['images_per_s']:9.4g} {ratio:>6} {row['error']:8.1e}"
            lines.append(line)
    lines.append(f"{len(report['refused'])} refused, {len(report['left_out'])} left out for time")
    return "\n".join(lines)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sampling.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", default=["DiT-B/4", "DiT-XL/2"], choices=["small", *PRESETS], metavar="NAME",
        help="default: %(default)s")  # fmt: skip
    add("--batches", nargs="+", type=int, default=[1, 64, 256], help="samples at a time (default: %(default)s)")
    add("--steps", nargs="+", type=int, default=[1, 2, 4], help="network calls per sample (default: %(default)s)")
    add("--precisions", nargs="+", default=list(SAMPLE_PRECISIONS), choices=SAMPLE_PRECISIONS)
    add("--seconds", type=float, default=1.0, help="of timing for each form (default %(default)s)")
    add("--minutes", type=float, default=9.0, help="begin no case after this time (default %(default)s)")
    add("--json", type=Path, metavar="OUT", help="write the report here")
    add("--resume", action="store_true", help="go on with the report that is there")
    add("--smoke", action="store_true", help="a small network for a moment; the figures mean nothing")
    options = parser.parse_args(arguments)
    options.smoke = options.smoke or DEVICE == "cpu"
    if options.smoke:
        parser.set_defaults(**_SMOKE)
        options = parser.parse_args([*(sys.argv[1:] if arguments is None else arguments), "--smoke"])
    for name in ("batches", "steps"):
        if min(getattr(options, name)) < 1:
            parser.error(f"--{name} {min(getattr(options, name))} is not possible; it must be at least 1")
    if not options.seconds > 0:
        parser.error(f"--seconds {options.seconds:g} is not positive")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"the folder of {options.json} does not exist; create it")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measures, writes the JSON, prints the table; 1 if a case failed or was wrong, 2 for bad input."""
    options = parsed(arguments)
    wanted = cases(options.models, options.batches, options.steps, options.precisions)
    report = run(wanted, options)
    print(table(report))
    if options.smoke:
        print("a smoke run: these figures mean nothing")
    return int(bool(report["refused"]))


if __name__ == "__main__":
    sys.exit(main())
