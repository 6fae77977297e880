"""What a run reports: a progress bar, ``metrics.jsonl`` and TensorBoard events."""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from soflow_fast.checkpoint import replace_text
from soflow_fast.distributed import LostProcessError, OtherProcessError, Processes
from soflow_fast.objectives.base import LossOutput
from soflow_fast.step import StepStats

_log = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"
TIME_BINS = 10

# Steps whose reports are kept until they are added up: 1 MB of 1,024 rows.
_KEPT_STEPS = 64

# Between updates of the progress bar: in a terminal, and in a file, where each of them is a line.
_BAR_SECONDS, _BAR_SECONDS_OF_FILE = 0.5, 60.0


def due(step: int, every: int) -> bool:
    """Whether what comes every so many steps, 0 for never, comes after this one."""
    return every > 0 and step > 0 and step % every == 0


def is_logged(folder: Path, step: int, prefix: str) -> bool:
    """Whether the metrics of the run in a folder have values of that prefix of a step."""
    return any(
        values["step"] == step and any(name.startswith(prefix) for name in values)
        for _, values in _records(folder / METRICS_NAME)
    )


def _records(path: Path) -> Iterator[tuple[str, dict]]:
    """The lines of a file of metrics with their values, if there is one, without those that a kill or a full disk cut
    short.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.split("\n"):
        with suppress(json.JSONDecodeError):
            values = json.loads(line)
            if isinstance(values, dict) and isinstance(values.get("step"), int):
                yield line, values


@contextmanager
def going_on(what: str, processes: Processes) -> Iterator[None]:
    """Within it a failure, in whichever process, is a warning that names what failed, and not the training's end."""
    try:
        yield
    except LostProcessError:
        raise
    except OtherProcessError as error:
        if processes.is_first:  # the one that failed says more
            _log.warning("%s failed, and training goes on: %s", what, error)
    except Exception as error:
        _log.warning("%s failed, and training goes on: %s", what, error, exc_info=error)


def sums_of(part: LossOutput | Tensor, counted: Tensor | None = None) -> Tensor:
    """(3 + 2·TIME_BINS,): rows, mse, weighted mse; then mse and rows of each time bin. Of numbers (2,): how many, and
    their sum. ``counted``: which of the rows or numbers enter, by default all.
    """
    values = part if torch.is_tensor(part) else part.mse
    counted = torch.ones_like(values, dtype=torch.bool) if counted is None else counted
    rows, values = counted.float(), torch.where(counted, values.float(), 0)
    if torch.is_tensor(part):
        return torch.stack([rows.sum(), values.sum()])
    bins = torch.bucketize(part.t.float().contiguous(), _edges(part.t.device), right=True)
    member = (bins[:, None] == torch.arange(TIME_BINS, device=bins.device)).float()
    weighted = torch.where(counted, part.weight.float(), 0) * values
    plain = torch.stack([rows.sum(), values.sum(), weighted.sum()])
    return torch.cat([plain, values @ member, rows @ member])


@cache
def _edges(device: torch.device) -> Tensor:
    return torch.arange(1, TIME_BINS, device=device) / TIME_BINS


def means_of(name: str, sums: Sequence[float]) -> dict[str, float | list[float | None]]:
    """From the :func:`sums_of` a part its metrics, ``<name>/mse`` and so on, see :meth:`Meter.read`; of one number
    ``<name>/loss``.
    """
    if len(sums) == 2:
        return {f"{name}/loss": sums[1] / sums[0]}
    rows, mse, weighted, *bins = sums
    totals, counts = bins[:TIME_BINS], bins[TIME_BINS:]
    by_time = [total / n if n else None for total, n in zip(totals, counts, strict=True)]
    return {f"{name}/mse": mse / rows, f"{name}/weighted": weighted / rows, f"{name}/mse_by_time": by_time}


class Meter:
    """Means over the steps since it was last read, kept on the device; only reading waits for the device.

    Steps whose gradient, for which they are left out, or loss is not finite do not enter the means; they are counted.
    With several processes, what is read is of all of them, and all of them must read.

    Of a step what it reports is copied, in a launch or two; what that adds up to is computed of many steps at once.

    Args:
        processes: of the run. skipped: how many such steps there were before.
    """

    def __init__(self, processes: Processes, skipped: int = 0):
        self._processes = processes
        self._skipped, self._first = skipped, 0  # how many, and the first since this was made, from 1, or 0
        self._unasked: list[tuple[list[int], Tensor]] = []  # steps, and whether they were finite in this process
        self._sums: dict[str, Tensor] = {}
        self._steps: list[int] = []
        self._kept: list[Tensor] = []
        self._sizes: dict[str, int] = {}  # of the parts in what is kept: their rows, or 0 of a number

    def update(self, step: int, stats: StepStats) -> None:
        """Adds step number ``step``, counted from 1."""
        sizes = {name: 0 if torch.is_tensor(part) else len(part.mse) for name, part in stats.parts.items()}
        if sizes != self._sizes or len(self._kept) == _KEPT_STEPS:
            self._fold()
            self._sizes = sizes
        values = [stats.loss, stats.grad_norm, stats.finite]
        for part in stats.parts.values():
            values += [part] if torch.is_tensor(part) else [part.mse, part.weight, part.t]
        self._kept.append(torch.cat([x.detach().float().view(-1) for x in values]))
        self._steps.append(step)

    def _fold(self) -> None:
        if not self._kept:
            return
        kept, steps = torch.stack(self._kept), self._steps
        self._kept, self._steps = [], []
        sizes = [1, 1, 1] + [n for size in self._sizes.values() for n in (3 * [size] if size else [1])]
        loss, grad_norm, finite, *columns = kept.split(sizes, 1)
        finite = (finite > 0) & loss.isfinite()
        self._unasked.append((steps, finite[:, 0].to(torch.int32)))
        self._add("", torch.where(finite, torch.cat([torch.ones_like(loss), loss, grad_norm], 1), 0).sum(0))
        columns = iter(columns)
        for name, size in self._sizes.items():
            counted = finite.expand(-1, max(size, 1)).reshape(-1)
            if size:
                mse, weight, t = (next(columns).reshape(-1) for _ in range(3))
                part = LossOutput(loss, mse, weight, t)
            else:
                part = next(columns).reshape(-1)
            self._add(name, sums_of(part, counted))

    def skipped(self) -> tuple[int, int]:
        """How many such steps the whole run had, in whichever process, and the first of them since it was started, from
        1, or 0.
        """
        self._fold()
        if self._unasked:
            steps, finite = zip(*self._unasked, strict=True)
            finite = self._processes.minimum(torch.cat(finite)).tolist()
            found = [step for step, is_finite in zip(chain(*steps), finite, strict=True) if not is_finite]
            self._skipped += len(found)
            self._first = self._first or min(found, default=0)
            self._unasked = []
        return self._skipped, self._first

    def read(self) -> dict[str, float | list[float | None]]:
        """The means by name, and a fresh start.

        ``<part>/mse`` is unweighted and ``<part>/weighted`` is times the adaptive weight; ``<part>/mse_by_time`` is
        over :data:`TIME_BINS` equal bins of t, None where a bin had no rows. Of a part that is one number there is
        ``<part>/loss``.
        """
        self._fold()
        sizes = {name: len(sums) for name, sums in self._sums.items()}
        if not sizes:
            return {}
        rows = self._processes.sum(torch.nn.utils.rnn.pad_sequence(list(self._sums.values())).T.contiguous())
        sums = {name: row[: sizes[name]] for name, row in zip(sizes, rows.tolist(), strict=True)}
        self._sums = {}
        steps, loss, grad_norm = sums.pop("")
        if not steps:
            return {}
        values = {"loss": loss / steps, "grad_norm": grad_norm / steps}
        for name, of_part in sums.items():
            values |= means_of(name, of_part)
        return values

    def _add(self, name: str, values: Tensor) -> None:
        self._sums[name] = self._sums[name] + values if name in self._sums else values


class RunLog:
    """Writes the metrics of a run that has done ``start`` of ``total`` steps; what an earlier part of the run wrote
    beyond that is taken back.

    What cannot be written, as on a full disk, is a warning, and is tried again with the next line.

    Args:
        folder: of the run. batch: images per step. hook: called with every line that is written, and with the path of
            every picture.
    """

    def __init__(self, folder: Path, start: int, total: int, batch: int, hook: Callable[[dict], object] | None = None):
        self.path, self.batch, self._hook = folder / METRICS_NAME, batch, hook
        self._take_back(start)
        self._unwritten, self._unshown = b"", []  # lines of the file, values for TensorBoard
        self._writer = SummaryWriter(str(folder), purge_step=start + 1)
        seconds = _BAR_SECONDS if _is_watched() else _BAR_SECONDS_OF_FILE
        often = {"mininterval": seconds, "maxinterval": max(10.0, seconds)}
        self._bar = tqdm(initial=start, total=total, unit="step", dynamic_ncols=True, smoothing=0.05, **often)
        self._last, self._clock = start, time.perf_counter()

    def advance(self) -> None:
        """One more step on the bar."""
        with suppress(OSError):  # a terminal that is gone must not keep the run from its checkpoint
            self._bar.update()

    def write(self, step: int, values: dict[str, float | list[float | None]]) -> None:
        """One line of metrics after step number ``step``; adds ``images_per_second`` since the last one."""
        now = time.perf_counter()
        rate = (step - self._last) * self.batch / (now - self._clock)
        self._last, self._clock = step, now
        values = {"step": step, **values, "images_per_second": rate}
        self.append(values)
        losses = {name.split("/")[0]: f"{value:.4g}" for name, value in values.items() if name.endswith("/mse")}
        with suppress(OSError):
            self._bar.set_postfix({**losses, "images/s": f"{rate:.4g}"}, refresh=False)

    def append(self, values: dict) -> None:
        """Any values with their ``step``, to the file, to TensorBoard and to the hook."""
        self._unwritten += f"{json.dumps(values)}\n".encode()
        self._unshown.append(values)
        self._write_all()
        self._call_hook(values)

    def _write_all(self) -> None:
        with self._retrying(f"the metrics cannot be written to {self.path}"):
            self._write_lines()
        with self._retrying(f"TensorBoard's events cannot be written to {self.path.parent}"):
            self._write_events()

    @contextmanager
    def _retrying(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # TensorBoard raises what stopped its thread
            _log.warning(
                "%s (%s), and training goes on; if the disk is full, make room: it is tried again with the next ones",
                what,
                error,
            )

    def _write_lines(self) -> None:
        before = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab") as file:
                file.write(self._unwritten)
        except OSError:
            with suppress(OSError):  # part of a line must not stand before the next
                os.truncate(self.path, before)
            raise
        self._unwritten = b""

    def _write_events(self) -> None:
        try:
            for values in self._unshown:
                for name, value in values.items():
                    for suffix, number in _scalars(value):
                        self._events().add_scalar(name + suffix, number, values["step"])
            self._events().flush()  # its thread alone knows of a failure
        except Exception:
            failed, self._writer = self._writer, None
            with suppress(Exception):
                failed.close()
            raise
        self._unshown = []

    def _events(self) -> SummaryWriter:
        """The writer of a new file, where that of the one before has failed: it writes no more."""
        self._writer = self._writer or SummaryWriter(str(self.path.parent))
        return self._writer

    def show(self, name: str, step: int, path: Path) -> None:
        """The picture in a file, grey or RGB, to TensorBoard, and its path to the hook, by that name."""
        with Image.open(path) as picture:
            pixels = np.asarray(picture)
        with self._retrying(f"a picture cannot be written to TensorBoard's events in {self.path.parent}"):
            self._events().add_image(name, pixels, step, dataformats="HWC" if pixels.ndim == 3 else "HW")
        self._call_hook({"step": step, name: str(path)})

    def _call_hook(self, values: dict) -> None:
        if self._hook is not None:
            try:
                self._hook(dict(values))
            except Exception as error:
                _log.warning("on_log failed at step %d, and training goes on: %s", values["step"], error)

    def say(self, sentence: str) -> None:
        """A line above the progress bar."""
        with suppress(OSError):
            self._bar.write(sentence, file=sys.stderr)

    @contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """What happens within does not count for images/s."""
        entered = time.perf_counter()
        yield
        self._clock += time.perf_counter() - entered

    def close(self) -> None:
        """Flushes everything."""
        self._bar.close()
        self._write_all()
        with suppress(Exception):  # all but the pictures has been flushed
            self._events().close()

    def _take_back(self, start: int) -> None:
        if self.path.exists():
            kept = [line for line, values in _records(self.path) if values["step"] <= start]
            replace_text(self.path, "".join(f"{line}\n" for line in kept))


class Quiet:
    """Stands for a :class:`RunLog` in the processes that write nothing."""

    def advance(self) -> None: ...

    def write(self, step: int, values: dict) -> None: ...

    def append(self, values: dict) -> None: ...

    def show(self, name: str, step: int, path: Path) -> None: ...

    def say(self, sentence: str) -> None: ...

    def off_the_clock(self) -> AbstractContextManager:
        return nullcontext()

    def close(self) -> None: ...


def _is_watched() -> bool:
    """Whether somebody sees the progress bar move: in a terminal or a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def _scalars(value) -> list[tuple[str, float]]:
    if isinstance(value, list):
        width = 1 / len(value)
        return [(f"/t={i * width:.1f}", x) for i, x in enumerate(value) if x is not None]
    return [("", value)] if isinstance(value, (int, float)) else []
