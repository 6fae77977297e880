"""Rows compiled ahead, side by side in processes: a table then waits for the slowest compilation and not for their sum.

A row is built on tensors without storage and its loss is compiled until the code would run. What Inductor and, for
rows without an autograd.Function, AOTAutograd write stays in their caches, where the row finds it when its turn comes.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import torch
from _measure import environment, identity, write_whole
from _rows import Row, Workload, build, selected
from torch._functorch._aot_autograd import autograd_cache
from torch._inductor.output_code import CompiledFxGraph
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._subclasses.fake_tensor import FakeTensorMode

_key = autograd_cache.autograd_cache_key


def _key_without_annotations(gm: torch.fx.GraphModule, *others):
    """AOTAutograd's, for which an input is otherwise another one where it has no storage."""
    for node in gm.graph.find_nodes(op="placeholder"):
        node.type = None
    gm.recompile()
    return _key(gm, *others)


@contextmanager
def shared_traces() -> Iterator[None]:
    """Within it rows find what :func:`compile_row` has traced in another process."""
    with (
        mock.patch.object(autograd_cache, "autograd_cache_key", _key_without_annotations),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
    ):
        yield


class _WrittenError(Exception):
    """The code is in the cache."""


def compile_row(row: Row, workload: Workload) -> None:
    """Writes the code of a row's forward and backward into Inductor's cache."""

    def stop(*_):
        raise _WrittenError

    eager_update = replace(row, optimizer="torch", cuda_graph=False)  # no part of what is compiled
    with (
        FakeTensorMode(),
        shared_traces(),
        mock.patch.object(CompiledFxGraph, "__call__", stop),
    ):
        step = build(eager_update, workload)
        try:
            step(*workload.data())
        except _WrittenError:
            return
    raise RuntimeError("the row ran without compiled code")


def _note(name: str, workload: Workload, here: dict) -> Path:
    """The file that says that a row's code is in this machine's cache, of this commit and these versions."""
    what = json.dumps([name, asdict(workload), identity(here), here["commit"], here["versions"]])
    return Path(cache_dir()) / "ahead" / hashlib.sha256(what.encode()).hexdigest()[:20]


def compile_ahead(rows: dict[str, Row], workload: Workload, jobs: int, seconds: float) -> dict[str, float]:
    """Compiles the rows that are compiled and can run here; a row that fails, or is not done in time, is left out.

    A note beside the code says which rows have theirs, so that another call compiles the others only.

    Args:
        jobs: processes at a time. seconds: after which what is still running is stopped; half of them where some rows
            are ready, which can be timed meanwhile.

    Returns:
        The seconds that each took.
    """
    compiled = [name for name, row in rows.items() if row.compile and not (row.no_cpu and workload.device == "cpu")]
    here = environment()
    notes = {name: _note(name, workload, here) for name in compiled}
    done = {name: float(note.read_text()) for name, note in notes.items() if note.exists()}
    waiting = [name for name in compiled if name not in done]
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    end, running = time.monotonic() + (seconds / 2 if done else seconds), {}
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
                notes[name].parent.mkdir(parents=True, exist_ok=True)
                write_whole(notes[name], f"{done[name]:.1f}")
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
