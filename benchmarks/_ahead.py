"""Rows compiled ahead, side by side in processes: a table then waits for the slowest compilation and not for their sum.

A row is built on tensors without storage and its loss is compiled until the code would run. What Inductor writes stays
in its cache, where the row finds it when its turn comes.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from unittest import mock

import torch
from _rows import Row, Workload, build, selected
from torch._inductor.output_code import CompiledFxGraph
from torch._subclasses.fake_tensor import FakeTensorMode


class _WrittenError(Exception):
    """The code is in the cache."""


def compile_row(row: Row, workload: Workload) -> None:
    """Writes the code of a row's forward and backward into Inductor's cache."""

    def stop(*_):
        raise _WrittenError

    eager_update = replace(row, optimizer="torch", cuda_graph=False)  # no part of what is compiled
    with (
        FakeTensorMode(),
        mock.patch.object(CompiledFxGraph, "__call__", stop),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
    ):
        step = build(eager_update, workload)
        try:
            step(*workload.data())
        except _WrittenError:
            return
    raise RuntimeError("the row ran without compiled code")


def compile_ahead(rows: dict[str, Row], workload: Workload, jobs: int, seconds: float) -> dict[str, float]:
    """Compiles the rows that are compiled and can run here; a row that fails, or is not done in time, is left out.

    Args:
        jobs: processes at a time. seconds: after which what is still running is stopped.

    Returns:
        The seconds that each took.
    """
    waiting = [name for name, row in rows.items() if row.compile and not (row.no_cpu and workload.device == "cpu")]
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    end, running, done = time.monotonic() + seconds, {}, {}
    while (waiting or running) and time.monotonic() < end:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - a pipe that nobody reads would fill up
            command = [sys.executable, __file__, name, json.dumps(asdict(workload))]
            child = subprocess.Popen(command, env={**os.environ, **threads}, stdout=said, stderr=said)
            running[name] = child, said, time.monotonic()
        time.sleep(0.2)
        for name, (child, said, begin) in list(running.items()):
            if child.poll() is None:
                continue
            del running[name]
            if child.returncode == 0:
                done[name] = time.monotonic() - begin
            else:
                said.seek(0)
                why = (said.read().strip().splitlines() or ["no message"])[-1]
                print(f"{name}: not compiled ahead, {why}", file=sys.stderr, flush=True)
    for name, (child, *_) in running.items():
        child.kill()
        child.wait()
        print(f"{name}: not compiled ahead, the time was over", file=sys.stderr, flush=True)
    return done


if __name__ == "__main__":
    (_row,) = selected([sys.argv[1]]).values()
    compile_row(_row, Workload(**json.loads(sys.argv[2])))
