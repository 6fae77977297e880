"""Where the time of a training step goes: its kernels by kind, against the floor, and the three largest gaps.

    python benchmarks/profile_step.py [--model DiT-XL/2] [--batch 256] [--row soflow/fast] [--rates RATES.json]
                                      [--json OUT.json] [--trace TRACE.json.gz] [--smoke]

Runs steps under torch's profiler. ``--rates`` is the JSON of ``rates.py`` from the same card, whose times of the
products and of attention are the floor of those kinds; without them ``no_floor`` says why there is none. All else has
the floor 0, as a perfect step would hide it. The gap of a kind is its time beyond its floor; ``idle`` is time in which
no kernel ran. ``--smoke`` takes a small model; so does a machine without a GPU, where operators take the place of
kernels and the times mean nothing.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import torch
from _measure import environment, write_report
from _rows import Workload, build, selected
from torch.profiler import ProfilerActivity, profile

from soflow_fast.dit import PRESETS

#: Kind of a kernel by its name; the first that matches. On a CPU the names are those of operators.
KINDS = {
    "Inductor's kernels": r"^triton_|cpp_fused",  # first, as their names tell what is fused in them
    "attention difference": r"attention_difference|large_change_kernel",
    "attention": r"flash|fmha|attention|cudnn.*sdpa|sdpa|^_(forward|(short|keys|queries)_backward)_kernel",
    "products": r"gemm|nvjet|cutlass|cublas|wgmma|aten::(mm|addmm|bmm|linear)\b|mkl",
    "update": r"adamw|_square_sum_kernel|multi_tensor|foreach",
    "fused kernels": r"^_\w+_kernel",
    "copies": r"memcpy|memset|copy",
}
STEPS = 5


def kind_of(name: str) -> str:
    """The kind of a kernel, ``other`` if its name says nothing."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def run(row: str, workload: Workload, trace: Path | None) -> tuple[float, dict[str, dict]]:
    """Milliseconds of a step by the clock, and of each kernel with its calls, per step."""
    on_gpu = workload.device == "cuda"
    step, (x0, labels) = build(selected([row])[row], workload), workload.data()
    for _ in range(5):  # compiled and captured
        step(x0, labels)
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    wall_ms = _wall_ms(step, x0, labels, on_gpu)
    with profile(activities=[activity], acc_events=True) as profiler:
        for _ in range(STEPS):
            step(x0, labels)
        if on_gpu:
            torch.cuda.synchronize()
    if trace:
        profiler.export_chrome_trace(str(trace))
    kernels = {}
    for event in profiler.key_averages():
        total = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if total:
            kernels[event.key] = {"ms": total / STEPS / 1e3, "calls": event.count / STEPS}
    return wall_ms, kernels


def _wall_ms(step, x0, labels, on_gpu: bool) -> float:
    """Without the profiler, which slows the host."""
    if not on_gpu:
        from time import perf_counter

        start = perf_counter()
        for _ in range(STEPS):
            step(x0, labels)
        return 1e3 * (perf_counter() - start) / STEPS
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(STEPS):
        step(x0, labels)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / STEPS


def floors(rates: dict, workload: Workload) -> dict[str, float]:
    """Milliseconds of the kinds that ``rates.py`` has measured.

    Raises:
        ValueError: if it has not measured this model and batch, or not every part of it.
    """
    for model in rates["models"]:
        if (model["model"], model["batch"]) == (workload.model, workload.batch):
            if model.get("without"):
                raise ValueError(f"--rates has no time of {', '.join(model['without'])}")
            sums = defaultdict(float)
            for row in model["rows"]:
                attention = "attention" in row["part"]
                sums[row["part"] if row["part"] in KINDS else "attention" if attention else "products"] += row[
                    "ms_per_step"
                ]
            return dict(sums)
    raise ValueError(f"--rates has no {workload.model} at batch {workload.batch}; run rates.py for it")


def known_floors(path: Path, workload: Workload) -> tuple[dict[str, float], str | None]:
    """:func:`floors` of a file, and None; or no floors, and why: the profile is worth its time without them."""
    try:
        return floors(json.loads(path.read_text()), workload), None
    except (OSError, ValueError) as error:
        print(f"no floor is known: {error}", file=sys.stderr, flush=True)
        return {}, str(error)


def summary(wall_ms: float, kernels: dict[str, dict], floor_ms: dict[str, float]) -> dict:
    """Time, calls, floor and gap by kind, the largest first, and the three largest gaps."""
    kinds = defaultdict(lambda: {"ms": 0.0, "calls": 0.0})
    for name, kernel in kernels.items():
        for value in ("ms", "calls"):
            kinds[kind_of(name)][value] += kernel[value]
    kinds["idle"]["ms"] = max(0.0, wall_ms - sum(kind["ms"] for kind in kinds.values()))
    for name, kind in kinds.items():
        kind["floor_ms"] = floor_ms.get(name, 0.0)
        kind["gap_ms"] = kind["ms"] - kind["floor_ms"]
    ordered = dict(sorted(kinds.items(), key=lambda item: -item[1]["ms"]))
    gaps = sorted(ordered, key=lambda name: -ordered[name]["gap_ms"])[:3]
    largest = sorted(kernels.items(), key=lambda item: -item[1]["ms"])[:25]
    return {
        "ms_per_step": wall_ms,
        "floor_ms": sum(floor_ms.values()),
        "kinds": ordered,
        "largest_gaps": gaps,
        "largest_kernels": [{"kernel": name[:160], "kind": kind_of(name), **kernel} for name, kernel in largest],
    }


def main(arguments: list[str] | None = None) -> int:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="profile_step.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="DiT-XL/2", choices=list(PRESETS), metavar="NAME")
    parser.add_argument("--batch", type=int, default=256, help="a multiple of 4 (default %(default)s)")
    parser.add_argument("--row", default="soflow/fast", help="of throughput.py (default %(default)s)")
    parser.add_argument("--rates", type=Path, metavar="JSON", help="of rates.py on this card")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result here")
    parser.add_argument("--trace", type=Path, metavar="OUT", help="write a trace for Perfetto here")
    parser.add_argument("--smoke", action="store_true", help="a small model: only tries the script")
    options = parser.parse_args(arguments)
    small = options.smoke or not on_gpu
    try:
        selected([options.row])
        workload = Workload(
            "small" if small else options.model,
            4 if small else options.batch,
            "cuda" if on_gpu else "cpu",
            compile=on_gpu,
            fused=on_gpu,
            half=on_gpu,
        )
    except ValueError as error:
        print(f"profile_step.py: {error}", file=sys.stderr)
        return 2
    floor, no_floor = known_floors(options.rates, workload) if options.rates and not small else ({}, None)
    report = {"environment": environment(), "model": workload.model, "batch": workload.batch, "row": options.row}
    wall_ms, kernels = run(options.row, workload, options.trace)
    if not kernels:
        print(f"profile_step.py: the profiler saw no kernel in {STEPS} steps of {wall_ms:.1f} ms", file=sys.stderr)
        return 1
    report |= {"smoke": small, "no_floor": no_floor, **summary(wall_ms, kernels, floor)}
    if options.json:
        write_report(options.json, report)
    print(f"{options.row}, {workload.model}, batch {workload.batch}{': times mean nothing' if small else ''}")
    print(f"{'ms per step':24}{'time':>9}{'calls':>8}{'floor':>9}{'gap':>9}")
    for name, kind in report["kinds"].items():
        print(f"{name:24}{kind['ms']:>9.2f}{kind['calls']:>8.0f}{kind['floor_ms']:>9.2f}{kind['gap_ms']:>9.2f}")
    print(f"{'step':24}{report['ms_per_step']:>9.2f}{'':8}{report['floor_ms']:>9.2f}")
    print(f"largest gaps: {', '.join(report['largest_gaps'])}")
    for kernel in report["largest_kernels"][:8]:
        print(f"  {kernel['ms']:8.2f} ms {kernel['calls']:6.0f} calls  {kernel['kernel'][:80]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
