"""Ending a run with a checkpoint: on Ctrl-C, a closed terminal, and the signals that schedulers send before a kill; and
where the data cannot be read.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import count, islice
from multiprocessing import active_children
from pathlib import Path
from typing import Any

from soflow_fast.distributed import Processes

_log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
_STEPS_BETWEEN_QUESTIONS = 10


class StoppedBySignal(SystemExit):
    """Ends the program with 128 + the signal's number, unless it is caught; the run's checkpoint is on the disk."""

    def __init__(self, number: int):
        super().__init__(128 + number)


class StopSignal:
    """Within it SIGTERM, SIGUSR1, SIGHUP and SIGINT are noted instead of what they do otherwise.

    Only in the main thread, where Python allows that; elsewhere, and for a signal that is ignored (as by nohup) or
    whose handler is not Python's, they stay as they are. A second SIGINT does what it does otherwise, and so ends the
    run at once.
    """

    def __init__(self):
        self._number, self._before = 0, {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # None could not be put back
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame) -> None:
        again, self._number = self._number == number == signal.SIGINT, number
        if again and callable(self._before[number]):
            self._before[number](number, frame)
        elif number == signal.SIGINT:
            with suppress(OSError):  # nobody may read any longer, as of a pipe that the same Ctrl-C has ended
                os.write(2, b"\nthe run ends with a checkpoint after this step; Ctrl-C once more ends it at once\n")

    def agreed(self, processes: Processes, step: int, saves: bool = False) -> tuple[int, bool]:
        """The number of the signal after which this step is the last, or 0; and whether any process says ``saves``.

        Several processes stop after every tenth step only: they ask each other, for a few tenths of a millisecond.
        """
        if processes.world_size > 1 and step % _STEPS_BETWEEN_QUESTIONS:
            return 0, False
        number, saves = divmod(processes.largest(2 * self._number + saves), 2)
        return number, bool(saves)

    def shield_workers(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; what reads them, processes and threads that begin with the first, never gets the signals.

        A scheduler may send them to all processes of a job, and a run whose readers are dead cannot end its step. That
        one is dead is an error of the next batch: torch's own handler would raise it anywhere in the step.
        """
        others = set(active_children())
        before = signal.pthread_sigmask(signal.SIG_BLOCK, self._before.keys())  # which they inherit
        try:
            first = list(islice(batches, 1))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        readers = set(active_children()) - others
        ended = signal.getsignal(signal.SIGCHLD)  # torch's, from the first reader on
        handles = threading.current_thread() is threading.main_thread() and callable(ended)
        if handles:
            signal.signal(signal.SIGCHLD, partial(_quietly, ended))
        try:
            yield from first
            yield from batches
        finally:
            if hasattr(batches, "close"):
                batches.close()
            for reader in readers:  # that still reads, and does not get the signal to end either
                reader.kill()
            if handles:
                signal.signal(signal.SIGCHLD, ended)


def _quietly(handler: Callable, number: int, frame) -> None:
    with suppress(RuntimeError):
        handler(number, frame)


def saving(batches: Iterator[Any], start: int, save: Callable[[int], object]) -> Iterator[Any]:
    """The same batches, from that of step ``start + 1`` on; where one cannot be had, ``save`` is called first, with the
    number of steps that are done. An error of its own is a warning.
    """
    for done in count(start):
        try:
            batch = next(batches)
        except StopIteration:
            return
        except Exception:
            try:
                save(done)
            except Exception as error:
                _log.warning("the data of step %d cannot be read, and step %d is not saved: %s", done + 1, done, error)
            raise
        yield batch


def ended_by(number: int) -> BaseException:
    """What ends the program after the checkpoint: of Ctrl-C what a notebook knows as such."""
    return KeyboardInterrupt() if number == signal.SIGINT else StoppedBySignal(number)


def sentence(number: int, step: int, checkpoint: Path) -> str:
    """The run's last log line."""
    return f"stopped by {signal.Signals(number).name} after step {step}: {checkpoint}; the same command goes on from it"
