"""What a training step costs: SoFlow and MeanFlow in their published, compiled and fused forms, and flow matching.

    python benchmarks/throughput.py [--model DiT-B/4] [--batch 256] [--json OUT.json] [--plot OUT.png]

Every row trains the same DiT on the same draws. A row is timed only if its loss and gradient agree with the plain
objective in float64; rows are timed in turns, as many together as fit into the memory. ``--resume`` leaves out the rows
that are in the JSON, so that a long table can be made in several calls. Without a GPU it trains a small DiT on the CPU,
in float32 and without the rows that need one, within about four minutes beside the compiling, which ``--jobs`` does
ahead in several processes (on a GPU by itself).
"""

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from _ahead import compile_ahead, shared_traces
from _measure import environment
from _pieces import gpu_lost
from _public_source import ID as PUBLIC_SOURCE
from _public_source import public_source_row
from _race import Contestant, NotRun, Track, broken, out_of_memory, release
from _rows import SETS, Row, Workload, selected
from _table import Results, chart, table

from soflow_fast.dit import PRESET_NAMES, PRESETS

# A row that is begun is assumed to take this many seconds to prepare, the second where its code is in the cache and it
# is only traced again, until such a one has taken longer.
_PREPARATION = (90.0, 45.0)
_PREPARATION_OF_DEEP = dict.fromkeys(("DiT-XL/2", "DiT-L/2"), (180.0, 90.0))

# So many rows are timed together at most: what ends the process costs those that are ready.
_GROUP = 4


class Run:
    """Prepares, times and records rows.

    Args:
        rows: by id. track: where they run. results: where they go. limit: seconds from ``start`` after which none may
            still be running. ahead: seconds in which rows were compiled ahead.
    """

    def __init__(
        self,
        rows: dict[str, Row],
        track: Track,
        results: Results,
        *,
        start: float,
        limit: float | None,
        ahead: dict[str, float],
    ):
        self.rows, self.track, self.results, self.start, self.limit = rows, track, results, start, limit
        self.ahead = ahead
        self.left: list[str] = []
        self._together: dict[str, Contestant] = {}
        self._groups = len({row["group"] for row in results.rows.values() if "group" in row})
        to_compile, compiled = _PREPARATION_OF_DEEP.get(track.workload.model, _PREPARATION)
        self._longest = {True: to_compile, False: compiled}

    def __call__(self) -> None:
        """Runs every row that is not in the results, the ready ones first; ``left`` is what time is too short for."""
        pending = [name for name in self.rows if name not in self.results.rows]
        for name in sorted(pending, key=self._to_compile):
            if not self._in_time(name):
                self.left.append(name)
                continue
            if len(self._together) == _GROUP or not self.track.has_room(list(self._together.values())):
                self._race()  # before the next one is compiled only to find that it does not fit
            begin = time.monotonic()
            if not self._prepare(name):
                self.left.append(name)
                continue
            kind = self._to_compile(name)
            self._longest[kind] = max(self._longest[kind], time.monotonic() - begin)
        self._race()

    def _to_compile(self, name: str) -> bool:
        return self.rows[name].compile and name not in self.ahead

    def _in_time(self, name: str) -> bool:
        if self.limit is None:
            return True
        timing = self.track.race_seconds(list(self._together.values())) + self.track.seconds
        return time.monotonic() - self.start + self._longest[self._to_compile(name)] + 1.3 * timing < self.limit

    def _prepare(self, name: str) -> bool:
        """False if only a second attempt would do and there is no time for it."""
        print(f"{name}: {self.rows[name].what}", file=sys.stderr, flush=True)
        try:
            with self.results.running(name):
                self._together[name] = self.track.prepare(self.rows[name])
            if name in self.ahead:
                self._together[name].report["compiled_ahead_seconds"] = self.ahead[name]
            return True
        except NotRun as error:
            report = error.report
        except Exception as error:  # a row that breaks must not cost the others
            if out_of_memory(error):
                report = {"skipped": f"out of memory at batch {self.track.workload.batch}", "failed": False}
            else:
                report = broken(error)
            if gpu_lost():
                self.results.add({name: report})
                raise
        if out_of_memory_report(report) and self._together:
            self._race()
            return self._in_time(name) and self._prepare(name)
        print(f"{name}: not timed, {report['skipped']}", file=sys.stderr, flush=True)
        self.results.add({name: report})
        release()
        return True

    def _race(self) -> None:
        """Times the rows that are ready, records them and frees their memory."""
        if not self._together:
            return
        self._groups += 1
        try:
            self.track.race(list(self._together.values()))
        finally:  # an interruption too leaves what was timed
            self._record()
        self.track.count_kernels(list(self._together.values()))
        self._record()
        self._together = {}
        torch.compiler.reset()
        release()

    def _record(self) -> None:
        reports = {name: {**c.report, "group": self._groups} for name, c in self._together.items()}
        self.results.add({name: row for name, row in reports.items() if row.keys() & {"ms_per_step", "skipped"}})

    def largest_batches(self) -> None:
        """For every timed row, its time per image at the largest batch that fits."""
        for name, row in self.rows.items():
            report = self.results.rows.get(name, {})
            if "ms_per_step" in report and "largest_batch" not in report and self._in_time(name):
                self.results.add({name: {**report, **self.track.at_largest_batch(row, report)}})


def out_of_memory_report(report: dict) -> bool:
    return report["skipped"].startswith("out of memory")


def header(workload: Workload, seconds: float) -> dict:
    """What a run is; ``same`` is what rows of one table share."""
    machine = environment()
    gpu, cpu = machine["gpu"], machine["cpu"]
    hardware = gpu["name"] if gpu else cpu["model"]
    threads = f"{cpu['threads']} CPU thread{'s' if cpu['threads'] > 1 else ''}"
    where = hardware if gpu else f"{threads} in float32 (no GPU here, so without the fused kernels)"
    model = "a small DiT" if workload.model == "small" else workload.model
    same = {"model": workload.model, "batch": workload.batch, "device": workload.device}
    same |= {"attention": workload.attention, "compile": workload.compile, "hardware": hardware}
    same |= {"threads": cpu["threads"], "versions": machine["versions"], "commit": machine["commit"]}
    return {
        "title": f"Training {model}, batch {workload.batch}, on {where}",
        "same": same,
        "environment": machine,
        "seconds_per_row": seconds,
        "made_by": "python benchmarks/throughput.py " + " ".join(sys.argv[1:]),
    }


def parsed(arguments: list[str]) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="throughput.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="DiT-B/4" if on_gpu else "small", choices=["small", *PRESETS], metavar="NAME",
        help=f"small, {PRESET_NAMES} (default %(default)s here)")  # fmt: skip
    add("--batch", type=int, default=256 if on_gpu else 16, help="default %(default)s here")
    add("--rows", nargs="+", default=["table"], metavar="ROW", help=f"ids, or {', '.join(SETS)} (default table)")
    add("--seconds", type=float, default=10.0, help="of timing for each row (default %(default)s)")
    add("--json", type=Path, metavar="OUT", help="write the results here, after every group of rows")
    add("--plot", type=Path, metavar="OUT.png", help="draw the results here")
    add("--resume", action="store_true", help="do not run again the rows that are in the JSON")
    add("--limit", type=float, metavar="SECONDS", help="begin no row that may not be done by then")
    add("--jobs", type=int, metavar="N", default=min(8, (os.cpu_count() or 1) // 2) if on_gpu else 0,
        help="compile rows ahead in N processes (default %(default)s here; 0: each in its turn)")  # fmt: skip
    add("--only-ahead", action="store_true", help="compile the rows ahead, for a later call, and run none")
    add("--public-source", type=Path, metavar="DIR", help=f"a checkout of the published code, for {PUBLIC_SOURCE}")
    add("--attention", default="sdpa", help="backend of the rows that are not bound to one (default %(default)s)")
    add("--max-autotune", action="store_true", help="compile with more candidates for the matrix products")
    add("--largest-batch", action="store_true", help="also time each row at the largest batch that fits (GPU)")
    options = parser.parse_args(arguments)
    if options.only_ahead and options.jobs < 1:
        parser.error(f"--only-ahead compiles in --jobs processes, and --jobs is {options.jobs}; give 1 or more")
    if options.resume and options.json is None:
        parser.error("--resume needs --json, the file to go on with")
    if not options.seconds > 0:
        parser.error(f"--seconds {options.seconds:g} is not positive")
    if options.largest_batch and not on_gpu:
        parser.error("--largest-batch needs a CUDA GPU and none is visible; leave it out")
    for path in (options.json, options.plot):
        if path is not None and not path.parent.is_dir():
            parser.error(f"the folder of {path} does not exist; create it")
    return options


def prepared(options: argparse.Namespace) -> tuple[dict[str, Row], Workload, Results]:
    """The rows, what they run on and where they go; ValueError for what cannot be."""
    on_gpu = torch.cuda.is_available()
    workload = Workload(
        options.model,
        options.batch,
        "cuda" if on_gpu else "cpu",
        attention=options.attention,
        compile="max-autotune" if options.max_autotune else True,
        fused=on_gpu,
        half=on_gpu,
    )
    rows = selected(options.rows)
    if options.public_source is not None:
        rows[PUBLIC_SOURCE] = public_source_row(options.public_source, options.model)
    order = [PUBLIC_SOURCE, *selected(SETS)]
    return rows, workload, Results(header(workload, options.seconds), options.json, options.resume, order)


def main(arguments: list[str] | None = None) -> int:
    """0; 1 if a row failed, or its check; 2 for bad input."""
    start, options = time.monotonic(), parsed(arguments)
    try:
        rows, workload, results = prepared(options)
    except ValueError as error:
        print(f"throughput.py: {error}", file=sys.stderr)
        return 2
    # All rows share one code object, and each is a compilation of its own.
    torch._dynamo.config.recompile_limit = 8 * len(rows)
    ahead = {}
    if options.jobs > 0:
        pending = {name: row for name, row in rows.items() if name not in results.rows and name != PUBLIC_SOURCE}
        share = 1.0 if options.only_ahead else 0.6
        seconds = 3600.0 if options.limit is None else share * (options.limit - (time.monotonic() - start))
        ahead = compile_ahead(pending, workload, options.jobs, seconds)
    if options.only_ahead:
        print(f"compiled: {', '.join(ahead)}")
        return 0
    run = Run(rows, Track(workload, options.seconds), results, start=start, limit=options.limit, ahead=ahead)
    with shared_traces():
        run()
    if options.largest_batch and not run.left:
        run.largest_batches()
    results.add({})
    print(table(results.report))
    if options.plot:
        chart(results.report, options.plot)
    if run.left:
        print(f"not begun, as the time was too short: {', '.join(run.left)}; run again with --resume")
    return int(any(row.get("failed") for row in results.rows.values()))


if __name__ == "__main__":
    sys.exit(main())
