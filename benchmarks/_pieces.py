"""A measurement made of pieces: none is begun when the time is over, and another call goes on with the file of this."""

import copy
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from _measure import environment, identity, write_report


def begun(path: Path | None, **settings) -> dict:
    """The report at the path, to go on with, or a new one: of this machine and commit, and of these settings.

    A piece that must not be begun again, see :func:`given_up`, is ``refused``.

    Args:
        path: None for a new one. settings: what has to be the same of two reports that are one.
    """
    here = {"environment": environment(), **settings}
    if path is not None and path.exists():
        report = json.loads(path.read_text())
        same_machine = identity(report["environment"]) == identity(here["environment"])
        if same_machine and all(report.get(name) == value for name, value in settings.items()):
            given = [name for name in given_up(report) if name not in report["pieces"]]
            report["interrupted"] = interruptions(report)
            report["pieces"] += given
            report["refused"] += [{"piece": name, "why": GIVEN_UP} for name in given]
            return {name: value for name, value in report.items() if name not in ("partial", "running")}
    return {**here, "pieces": [], "rows": [], "refused": []}


def run_pieces(
    report: dict, pieces: Iterable[tuple[str, Callable[[], None]]], minutes: float, path: Path | None
) -> None:
    """Runs the pieces that are not in the report, each by its name; what there is no time for is its ``left_out``.

    Args:
        pieces: each adds to the report; one that raises is ``refused``. path: is written before and after each, marked
            as partial until nothing is left.

    Raises:
        SystemExit: if a piece has cost this process its GPU; another call goes on with the next.
    """

    def write(report: dict) -> None:
        if path:
            write_report(path, report, partial=True)

    end, report["left_out"], longest = time.monotonic() + 60 * minutes, [], 0.0
    for name, run in pieces:
        if name in report["pieces"]:
            continue
        begin = time.monotonic()
        if begin + longest > end:
            report["left_out"].append(name)
            continue
        try:
            with running(report, name, write):
                run()
        except Exception as error:  # must not cost the other pieces
            report["refused"].append({"piece": name, "why": f"{type(error).__name__}: {error}"})
        report["pieces"].append(name)
        longest = max(longest, time.monotonic() - begin)
        print(name, file=sys.stderr, flush=True)
        write(report)
        if gpu_lost():
            sys.exit(f"{name} has cost this process its GPU; --resume goes on with what is left")
    if path:
        write_report(path, report, partial=bool(report["left_out"]))


#: Why a name of :func:`given_up` is left out.
GIVEN_UP = "it was interrupted twice, or its process ended in it"


@contextmanager
def running(report: dict, name: str, write: Callable[[dict], None]) -> Iterator[None]:
    """Within it the written report says by ``running`` what runs: what ends the process there is known afterwards.

    An interruption writes the report as it was before, with one more name in ``interrupted``.
    """
    before = after = copy.deepcopy(report)  # what is interrupted may have added half of its rows
    write({**before, "running": name})
    try:
        yield
        after = report
    except KeyboardInterrupt:
        after = {**before, "interrupted": [*before.get("interrupted", []), name]}
        raise
    finally:
        write(after)


def interruptions(report: dict) -> list[str]:
    """What was interrupted, a name for each time; what a process ended in, or was killed as it hung, counts as that."""
    return [*report.get("interrupted", []), *([report["running"]] if "running" in report else [])]


def given_up(report: dict) -> list[str]:
    """What must not be begun again: what was interrupted twice, as once may be the machine's or the time's fault."""
    names = interruptions(report)
    return [name for name in dict.fromkeys(names) if names.count(name) > 1]


def gpu_lost() -> bool:
    """Whether an error has ended this process's use of the GPU, as an illegal access does, and a failed capture not."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
