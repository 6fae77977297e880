"""Batches of any map-style data set of (sample, label), one per training step."""

from collections import deque
from collections.abc import Iterator
from traceback import format_exception
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate, get_worker_info

from soflow_fast.data.checks import as_condition, checked_labels, require_floating_point, require_one_shape
from soflow_fast.data.order import batch_indices
from soflow_fast.data.resident import Resident, can_read_ranges
from soflow_fast.imported import RemoteError, of_imported_code
from soflow_fast.seeding import preserve_rng, seed_generators


class _Refused(NamedTuple):
    """A ValueError in a worker, as a value: torch would wrap the error in a traceback, and make it anew of a text.

    Attributes:
        sentence: that it says. traceback: its text, where it passes through user code.
    """

    sentence: str
    traceback: str | None


class _Steps(Dataset):
    """The batch of each step; the loader's workers share steps out, so their number cannot change the order.

    What an item draws from the global generators of torch, numpy and Python depends on (seed, step, global row).
    """

    def __init__(
        self,
        dataset: Dataset,
        batch: int,
        seed: int,
        rows: slice,
        items: list[int] | None,
        null_condition: Tensor | None,
    ):
        self.dataset, self.batch, self.seed, self.items = dataset, batch, seed, items
        # only its form is of interest, and workers cannot have a tensor of a GPU
        self.null = None if null_condition is None else null_condition.detach().to("meta")
        self.rows = range(batch)[rows]

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor] | _Refused:
        wanted = self._wanted(step)
        try:
            samples = self._all_at_once(wanted) if draws_nothing(self.dataset) else self._one_by_one(wanted)
            if self.null is not None:
                samples = [(x, as_condition(condition, self.null)) for x, condition in samples]
            require_one_shape([sample[0] for sample in samples])
        except ValueError as error:
            if get_worker_info() is None:
                raise
            return _Refused(str(error), "".join(format_exception(error)) if of_imported_code(error) else None)
        return default_collate(samples)

    def _wanted(self, step: int) -> dict[str, int]:
        """The items of a batch, by what their draws depend on."""
        if self.items is not None:
            rows = range(len(self.items))[step * self.batch : (step + 1) * self.batch]
            return {f"{self.seed},{row}": self.items[row] for row in rows}
        indices = batch_indices(len(self.dataset), self.batch, step, self.seed)
        return {f"{self.seed},{step},{row}": indices[row] for row in self.rows}

    def _all_at_once(self, wanted: dict[str, int]) -> list[tuple[Tensor, Tensor]]:
        if hasattr(self.dataset, "__getitems__"):
            return self.dataset.__getitems__(list(wanted.values()))
        return [self.dataset[index] for index in wanted.values()]

    def _one_by_one(self, wanted: dict[str, int]) -> list[tuple[Tensor, Tensor]]:
        with preserve_rng():
            samples = []
            for key, index in wanted.items():
                seed_generators(key)
                samples.append(self.dataset[index])
            return samples


def draws_nothing(dataset: Dataset) -> bool:
    """Whether items are the same whenever they are read; otherwise each has to be fetched on its own, being seeded."""
    return can_read_ranges(dataset) or (isinstance(dataset, Subset) and draws_nothing(dataset.dataset))


def batches(
    dataset: Dataset | Resident,
    *,
    batch: int,
    steps: range,
    seed: int,
    num_classes: int,
    rows: slice = slice(None),
    items: list[int] | None = None,
    workers: int = 0,
    prefetch: int = 2,
    device: torch.device,
    null_condition: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The batch of each step, on the device; the same one however it is read.

    Args:
        dataset: map-style, of (sample, label): floating point (C, H, W) and an integer in [0, num_classes). An item
            may draw from the global generators of torch, numpy and Python's ``random``, which are seeded before it
            from (seed, step, global row), and afterwards as they were. One with ``read``, see :func:`load_resident`,
            must not draw; only of such a one ``__getitems__`` is called. A :class:`Resident` one, on the device, needs
            no loader. Of (sample, condition) where there is a null condition.
        batch: rows of the global batch. steps: the steps wanted. seed: of the order.
        num_classes: 0 yields labels None. rows: which of the global batch are wanted, by default all.
        items: the samples of rows 0, 1, .. in place of the order, each once; step k is then rows k·batch to
            (k+1)·batch-1, the last batch may have fewer, and draws depend on (seed, row). Not of a :class:`Resident`.
        workers: loader processes. prefetch: batches each of them reads ahead, into pinned memory for a GPU.
        null_condition: of a network that is told conditions, see :mod:`soflow_fast.conditions`.

    Yields:
        ``(x, labels)``: (rows, C, H, W) float32 and (rows,) int64, (rows, ...) conditions, or None.

    Raises:
        ValueError: for labels outside the classes, samples that are not floating point and images that cannot be read.
    """
    if isinstance(dataset, Resident):
        yield from dataset.batches(batch=batch, steps=steps, seed=seed, rows=rows)
        return
    loader = DataLoader(
        _Steps(dataset, batch, seed, rows, items, null_condition),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=device.type == "cuda" and not _is_on_gpu(dataset),
        generator=torch.Generator().manual_seed(seed),  # the loader seeds its workers from it, not from the global one
    )
    items, copied = iter(loader), _Copies(device)
    try:
        for item in items:
            if isinstance(item, _Refused):
                raise ValueError(item.sentence) from (RemoteError(item.traceback) if item.traceback else None)
            x, labels = item
            require_floating_point(x)
            if null_condition is None:
                labels = checked_labels(labels, num_classes) if num_classes else None
            # In its own dtype to the device, where it is widened: half the bytes, and no copy on the host.
            x, labels = copied(x, labels)
            yield x.float(), labels
    finally:
        if workers:  # the traceback of a worker's error would keep them, and torch raises for one that is killed later
            items._shutdown_workers()


def _is_on_gpu(dataset: Dataset) -> bool:
    return isinstance(dataset, TensorDataset) and dataset.tensors[0].is_cuda


class _Copies:
    """From pinned memory to a GPU on a stream of their own, beside the step before, which is still computed there."""

    def __init__(self, device: torch.device):
        self._device, self._steps = device, deque()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, x: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self._stream is None:
            return x.to(self._device), None if labels is None else labels.to(self._device)
        if len(self._steps) == 2:  # no more batches lie there than these, however far the host is ahead
            self._steps.popleft().synchronize()
        reader = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            copies = [None if tensor is None else tensor.to(self._device, non_blocking=True) for tensor in (x, labels)]
        reader.wait_stream(self._stream)
        for copy in filter(torch.is_tensor, copies):
            copy.record_stream(reader)
        self._steps.append(reader.record_event())
        return tuple(copies)
