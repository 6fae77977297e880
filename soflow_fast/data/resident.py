"""A data set that lies in the memory of one device as a whole, so that a batch is one gather."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from soflow_fast.data.checks import as_condition, checked_labels, is_of_tensors, require_floating_point
from soflow_fast.data.order import permutation

# Host memory that loading takes at a time.
_CHUNK_BYTES = 2**26


class Resident(NamedTuple):
    """Samples and labels on one device.

    Attributes:
        samples: (n, C, H, W), in the data set's dtype. labels: (n,) int64, (n, ...) conditions, or
            None without classes.
    """

    samples: Tensor
    labels: Tensor | None

    def batches(self, *, batch: int, steps: range, seed: int, rows: slice) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The given rows of the global batch of each step; arguments and order as in :func:`~.loader.batches`."""
        n, epoch, order = len(self.samples), None, None
        for step in steps:
            wanted, position = divmod(step, n // batch)
            if wanted != epoch:
                epoch, order = wanted, permutation(n, seed, wanted, self.samples.device)
            indices = order[position * batch : (position + 1) * batch][rows]
            yield self.samples[indices].float(), None if self.labels is None else self.labels[indices]


def resident_bytes(dataset: Dataset) -> int | None:
    """What :func:`load_resident` would take on the device, or None if the data set cannot be read in pieces."""
    if not can_read_ranges(dataset):
        return None
    sample, label = dataset[0]
    return len(dataset) * (sample.nbytes + max(torch.int64.itemsize, getattr(label, "nbytes", 0)))


def can_read_ranges(dataset: Dataset) -> bool:
    """Whether a data set can be read in pieces, and so once for all: its items are the same whenever they are read."""
    return hasattr(dataset, "read_range") or _is_pair_of_tensors(dataset)


def load_resident(
    dataset: Dataset,
    device: torch.device,
    num_classes: int,
    *,
    null_condition: Tensor | None = None,
    show: bool = True,
) -> Resident:
    """Reads a whole data set to a device, piece by piece.

    Args:
        dataset: with ``read_range(start, stop)``, the samples and labels of that range as two tensors; or a
            ``TensorDataset`` of the two. num_classes: 0 ignores the labels. null_condition: the labels are conditions
            of its form. show: a progress bar.

    Raises:
        ValueError: for labels outside the classes and samples that are not floating point.
    """
    n, (sample, label) = len(dataset), dataset[0]
    require_floating_point(sample)
    samples = torch.empty((n, *sample.shape), dtype=sample.dtype, device=device)
    labels = torch.empty(n, dtype=torch.int64, device=device) if num_classes else None
    item_bytes = sample.nbytes
    if null_condition is not None:
        condition = as_condition(label, null_condition)
        labels = torch.empty((n, *condition.shape), dtype=condition.dtype, device=device)
        item_bytes += condition.nbytes
    size = max(1, _CHUNK_BYTES // item_bytes)
    with tqdm(total=n, unit="sample", desc=f"data to {device}", disable=not show, delay=1) as bar:
        for start in range(0, n, size):
            stop = min(start + size, n)
            in_tensors = _is_pair_of_tensors(dataset)
            piece, piece_labels = dataset[start:stop] if in_tensors else dataset.read_range(start, stop)
            samples[start:stop] = piece.to(device)
            if null_condition is not None:
                labels[start:stop] = piece_labels.detach().to(device)
            elif num_classes:
                labels[start:stop] = checked_labels(piece_labels, num_classes).to(device)
            bar.update(stop - start)
    return Resident(samples, labels)


def _is_pair_of_tensors(dataset: Dataset) -> bool:
    return is_of_tensors(dataset) and len(dataset.tensors) == 2
