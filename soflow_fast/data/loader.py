"""Batches of any map-style data set of (sample, label), one per training step."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from soflow_fast.data.order import batch_indices


class _Steps(Dataset):
    """The batch of each step; the loader's workers share steps out, so their number cannot change the order."""

    def __init__(self, dataset: Dataset, batch: int, seed: int):
        self.dataset, self.batch, self.seed = dataset, batch, seed

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor] | ValueError:
        indices = batch_indices(len(self.dataset), self.batch, step, self.seed)
        try:
            if hasattr(self.dataset, "__getitems__"):
                samples = self.dataset.__getitems__(indices)
            else:
                samples = [self.dataset[i] for i in indices]
        except ValueError as error:  # a worker would wrap it in a traceback; as a value it stays one sentence
            return error
        return default_collate(samples)


def batches(
    dataset: Dataset,
    *,
    batch: int,
    steps: range,
    seed: int,
    num_classes: int,
    workers: int = 0,
    prefetch: int = 2,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The batch of each step, on the device.

    Args:
        dataset: map-style, of (sample, label): floating point (C, H, W) and an integer in [0, num_classes). Random
            augmentation inside it is not part of what a resumed run repeats, unless it is a function of the index.
        batch: rows per step. steps: the steps wanted. seed: of the order.
        num_classes: 0 yields labels None. workers: loader processes. prefetch: batches each of them reads ahead.

    Yields:
        ``(x, labels)``: (batch, C, H, W) float32 and (batch,) int64 or None.

    Raises:
        ValueError: for labels outside the classes, samples that are not floating point and images that cannot be read.
    """
    loader = DataLoader(
        _Steps(dataset, batch, seed),
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
        if not x.is_floating_point():
            raise ValueError(f"the data set yields samples of {x.dtype}; they must be floating point, about in [-1, 1]")
        x = x.to(device, torch.float32, non_blocking=True)
        yield x, None if num_classes == 0 else _checked(labels, num_classes).to(device, non_blocking=True)


def _checked(labels: Tensor, num_classes: int) -> Tensor:
    if labels.dim() != 1 or labels.is_floating_point():
        raise ValueError(f"the data set yields labels of {labels.dtype}; they must be integers, one per sample")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"the data set yields labels from {low} to {high}, outside the classes 0..{num_classes - 1}; "
            "set model.num_classes to the number of classes"
        )
    return labels.long()
