"""A measurement made of pieces: none is begun when the time is over, and another call goes on with the file of this."""

import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from _measure import environment, identity, write_report


def begun(path: Path | None, **settings) -> dict:
    """The report at the path, to go on with, or a new one: of this machine and commit, and of these settings.

    Args:
        path: None for a new one. settings: what has to be the same of two reports that are one.
    """
    here = {"environment": environment(), **settings}
    if path is not None and path.exists():
        report = json.loads(path.read_text())
        same_machine = identity(report["environment"]) == identity(here["environment"])
        if same_machine and all(report.get(name) == value for name, value in settings.items()):
            return {name: value for name, value in report.items() if name != "partial"}
    return {**here, "pieces": [], "rows": [], "refused": []}


def run_pieces(
    report: dict, pieces: Iterable[tuple[str, Callable[[], None]]], minutes: float, path: Path | None
) -> None:
    """Runs the pieces that are not in the report, each by its name; what there is no time for is its ``left_out``.

    Args:
        pieces: each adds to the report; what it raises ends the run. path: is written after each, marked as partial
            until nothing is left.

    Raises:
        SystemExit: if a piece has cost this process its GPU; another call goes on with the next.
    """
    end, report["left_out"] = time.monotonic() + 60 * minutes, []
    for name, run in pieces:
        if name in report["pieces"]:
            continue
        if time.monotonic() > end:
            report["left_out"].append(name)
            continue
        try:
            run()
        except Exception as error:
            if not gpu_lost():
                raise
            report["refused"].append({"piece": name, "why": f"{type(error).__name__}: {error}"})
        report["pieces"].append(name)
        print(name, file=sys.stderr, flush=True)
        if path:
            write_report(path, report, partial=True)
        if gpu_lost():
            sys.exit(f"{name} has cost this process its GPU; --resume goes on with what is left")
    if path:
        write_report(path, report, partial=bool(report["left_out"]))


def gpu_lost() -> bool:
    """Whether an error has ended this process's use of the GPU, as an illegal access does, and a failed capture not."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
