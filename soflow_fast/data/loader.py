"""Batches of any map-style data set of (sample, label), one per training step."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from soflow_fast.data.checks import checked_labels, require_floating_point
from soflow_fast.data.order import batch_indices
from soflow_fast.data.resident import Resident


class _Steps(Dataset):
    """The batch of each step; the loader's workers share steps out, so their number cannot change the order."""

    def __init__(self, dataset: Dataset, batch: int, seed: int, rows: slice):
        self.dataset, self.batch, self.seed, self.rows = dataset, batch, seed, rows

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor] | ValueError:
        indices = batch_indices(len(self.dataset), self.batch, step, self.seed)[self.rows]
        try:
            if hasattr(self.dataset, "__getitems__"):
                samples = self.dataset.__getitems__(indices)
            else:
                samples = [self.dataset[i] for i in indices]
        except ValueError as error:  # a worker would wrap it in a traceback; as a value it stays one sentence
            return error
        return default_collate(samples)


def batches(
    dataset: Dataset | Resident,
    *,
    batch: int,
    steps: range,
    seed: int,
    num_classes: int,
    rows: slice = slice(None),
    workers: int = 0,
    prefetch: int = 2,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The batch of each step, on the device; the same one however it is read.

    Args:
        dataset: map-style, of (sample, label): floating point (C, H, W) and an integer in [0, num_classes). Random
            augmentation inside it is not part of what a resumed run repeats, unless it is a function of the index.
            A :class:`Resident` one, on the device, needs no loader.
        batch: rows of the global batch. steps: the steps wanted. seed: of the order.
        num_classes: 0 yields labels None. rows: which of the global batch are wanted, by default all.
        workers: loader processes. prefetch: batches each of them reads ahead, into pinned memory for a GPU.

    Yields:
        ``(x, labels)``: (rows, C, H, W) float32 and (rows,) int64 or None.

    Raises:
        ValueError: for labels outside the classes, samples that are not floating point and images that cannot be read.
    """
    if isinstance(dataset, Resident):
        yield from dataset.batches(batch=batch, steps=steps, seed=seed, rows=rows)
        return
    loader = DataLoader(
        _Steps(dataset, batch, seed, rows),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(seed),  # the loader seeds its workers from it, not from the global one
    )
    for item in loader:
        if isinstance(item, ValueError):
            raise item
        x, labels = item
        require_floating_point(x)
        if num_classes:
            labels = checked_labels(labels, num_classes).to(device, non_blocking=True)
        # In its own dtype to the device, where it is widened: half the bytes, and no copy on the host.
        yield x.to(device, non_blocking=True).float(), labels if num_classes else None
