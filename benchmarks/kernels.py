"""Fused ops against the same formula in plain torch, eager and compiled: time, GB/s, share of the copy bandwidth.

    python benchmarks/kernels.py [--only OP] [--json OUT.json] [--minutes 9] [--smoke]
    pytest benchmarks/kernels.py

Runs every case of ``soflow_fast.kernels.fused`` with bfloat16 operands. An op whose results are not as exact as its
tests demand is not timed, and the run fails. GB/s are the bytes that the fused op's kernels move, for every provider,
so they compare as times do; plain matrix products around them count in the time alone. ``--smoke`` takes the smallest
case of each op with one row; so does a machine without a GPU, in Triton's interpreter and in float32: those times mean
nothing.
"""

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import _interpreter  # noqa: F401
import pytest
import torch
from _ops import DEVICE, DTYPE, bytes_moved, make_check, make_step, modes, options, selected
from _pieces import begun, gpu_lost, run_pieces
from _timing import Timer, copy_bandwidth, launch_floor_ms

from soflow_fast.kernels import fused, reference
from soflow_fast.kernels._cases import Case

PROVIDERS = ("eager", "compiled", "ours")


def make_op(case: Case, provider: str) -> Callable:
    """The case's op, eager, compiled or fused."""
    op = getattr(fused if provider == "ours" else reference, case.op)
    if provider != "compiled":
        return op
    torch.compiler.reset()
    # on a CPU only the plumbing is tried, and generating C++ would take most of the time
    return torch.compile(op, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")


def timings(case: Case, provider: str, timer: Timer, max_rows: int | None) -> list[dict]:
    """One row per mode."""
    op, rows = make_op(case, provider), []
    for mode in modes(case):
        moved = bytes_moved(case, mode, max_rows)
        timing = timer(make_step(case, mode, op, max_rows))
        row = {"op": case.op, "case": case.name, "mode": mode, "provider": provider, "ms": timing.median}
        row |= {"ms_low": timing.low, "ms_high": timing.high, "repeats": timing.repeats, "bytes": moved}
        rows.append({**row, "gb_per_s": moved / timing.median / 1e6})
    return rows


def measure(
    cases: list[Case],
    max_rows: int | None,
    minutes: float = math.inf,
    json_path: Path | None = None,
    resume: bool = False,
) -> dict:
    """Environment, copy bandwidth, one row per case, mode and provider, and what was refused.

    Args:
        json_path: is written after every case; a file of fewer cases than these is marked as partial. resume: goes on
            with that file.
    """
    timer = Timer(DEVICE)
    report = begun(json_path if resume else None, dtype=str(DTYPE), max_rows=max_rows)
    report |= {"copy_gb_per_s": copy_bandwidth(timer), "launch_floor_ms": launch_floor_ms(timer)}

    def refuse(case: Case, what: str, why: str):
        report["refused"].append({"op": case.op, "case": case.name, "what": what, "why": why})
        print(f"{case.op} {case.name}, {what}: {why}", file=sys.stderr)

    def run(case: Case):
        try:
            failures = make_check(case, max_rows)()
        except Exception as error:
            failures = [f"{type(error).__name__}: {error}"]
        if failures:
            return refuse(case, "not exact", "; ".join(failures))
        for provider in PROVIDERS:
            try:
                rows = timings(case, provider, timer, max_rows)
            except Exception as error:  # what one provider cannot compile or capture must not cost the other rows
                refuse(case, provider, f"{type(error).__name__}: {error}")
                if gpu_lost():
                    return
            else:
                percent = 100 / report["copy_gb_per_s"]
                report["rows"] += [{**row, "percent_of_copy": percent * row["gb_per_s"]} for row in rows]

    run_pieces(report, ((f"{case.op} {case.name}", partial(run, case)) for case in cases), minutes, json_path)
    return report


def table(report: dict) -> str:
    """The report as text: one line per case and mode."""
    times = {}
    for row in report["rows"]:
        times.setdefault((row["op"], row["case"], row["mode"]), {})[row["provider"]] = row
    lines = [
        f"copy {report['copy_gb_per_s']:.0f} GB/s, launch floor {1e3 * report['launch_floor_ms']:.1f} us, "
        f"device {(report['environment']['gpu'] or {}).get('name', 'CPU, interpreter')}",
        f"{'op':36} {'case':24} {'mode':16} {'eager ms':>9} {'compiled':>9} {'ours ms':>9} {'spread':>7} {'GB/s':>6}"
        f" {'copy':>5} {'vs compiled':>11}",
    ]
    ratios = []
    for (op, case, mode), row in times.items():
        line = f"{op:36} {case:24} {mode:16}"
        for provider in PROVIDERS:
            line += f" {row[provider]['ms']:9.4f}" if provider in row else f" {'-':>9}"
        if ours := row.get("ours"):
            spread = (ours["ms_high"] - ours["ms_low"]) / ours["ms"]
            line += f" {spread:7.1%} {ours['gb_per_s']:6.0f} {ours['percent_of_copy']:4.0f}%"
            if compiled := row.get("compiled"):
                ratios.append(compiled["ms"] / ours["ms"])
                line += f" {ratios[-1]:10.2f}x"
        lines.append(line)
    if ratios:
        mean, slower = math.exp(sum(map(math.log, ratios)) / len(ratios)), sum(ratio < 1 for ratio in ratios)
        lines.append(f"{len(ratios)} compared, {slower} slower than compiled, geometric mean {mean:.2f}x of compiled")
    lines.append(f"{len(report['refused'])} refused, {len(report['left_out'])} left out for time")
    return "\n".join(lines)


def main() -> int:
    """Measures, writes the JSON, prints the table; 1 if anything was refused."""
    arguments = options(__doc__, "case").parse_args()
    smoke = arguments.smoke or DEVICE == "cpu"
    cases, max_rows = selected(smoke, arguments.only), 1 if smoke else None
    report = measure(cases, max_rows, arguments.minutes, arguments.json, arguments.resume)
    print(table(report))
    return bool(report["refused"])


_SMOKE_ROWS = 1 if DEVICE == "cpu" else None


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    ("case", "mode"),
    [
        pytest.param(case, mode, id=f"{case.op}-{case.name}-{mode}")
        for case in selected(smoke=DEVICE == "cpu")
        for mode in modes(case)
    ],
)
def test_kernel(benchmark, case, mode, provider):
    """A regression suite for pytest-benchmark: its times include the launches."""
    if provider == "ours":
        assert not make_check(case, _SMOKE_ROWS)()
    step = make_step(case, mode, make_op(case, provider), _SMOKE_ROWS)

    def synchronous_step():
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case.op} {case.name} {mode}"
    benchmark.extra_info["bytes"] = bytes_moved(case, mode, _SMOKE_ROWS)
    benchmark.pedantic(synchronous_step, rounds=1 if DEVICE == "cpu" else 50, warmup_rounds=DEVICE == "cuda")


if __name__ == "__main__":
    sys.exit(main())
