"""What samples and labels of any data set must be, and what a look at some of them tells before a run."""

import logging
from collections.abc import Iterable
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from soflow_fast import distributed
from soflow_fast.seeding import preserve_rng

_log = logging.getLogger(__name__)

# Items that are looked at for the range of their values.
_LOOKED_AT = 16
# Channels of images.
_CHANNELS = (1, 3)


def require_pair(item: Any, num_classes: int, null_condition: Tensor | None = None) -> tuple[int, ...]:
    """The shape of the sample in an item of a map-style data set.

    Raises:
        ValueError: unless it is (sample, label), the sample a floating-point tensor and, where there are classes, the
            label an integer; or where there is a null condition, (sample, condition).
    """
    parts = item if isinstance(item, (tuple, list)) else [item]
    if len(parts) == 2 and torch.is_tensor(parts[0]):
        require_floating_point(parts[0])
        if null_condition is not None:
            as_condition(parts[1], null_condition)
            return tuple(parts[0].shape)
        if not num_classes or _is_integer(parts[1]):
            return tuple(parts[0].shape)
    found = ", ".join(_in_words(part) for part in parts)
    raise ValueError(
        f"the data set yields ({found}); each item must be a pair of a floating-point tensor (C, H, W) and an integer "
        "label, or the condition of a network that has null_condition"
    )


def _in_words(part: Any) -> str:
    return f"{part.dtype} of shape {tuple(part.shape)}" if torch.is_tensor(part) else type(part).__name__


def require_floating_point(samples: Tensor) -> None:
    """ValueError unless the samples are floating point."""
    if not samples.is_floating_point():
        raise ValueError(
            f"the data set yields samples of {samples.dtype}; they must be floating point, about in [-1, 1]"
        )


def require_one_shape(samples: list[Tensor]) -> None:
    """ValueError unless samples can be stacked."""
    for sample in samples:
        if sample.shape != samples[0].shape:
            raise ValueError(
                f"the data set yields samples of shape {tuple(samples[0].shape)} and {tuple(sample.shape)}; make all "
                "of one shape"
            )


def first_not_finite(dataset: Dataset, indices: Iterable[int]) -> int | None:
    """The first of these items whose sample, or condition, has a value that is not finite; None if none has."""
    for index in indices:
        for part in dataset[index]:
            if torch.is_tensor(part) and part.is_floating_point() and not torch.isfinite(part).all():
                return index
    return None


def checked_labels(labels: Tensor, num_classes: int) -> Tensor:
    """The labels (n,) as int64.

    Raises:
        ValueError: if they are not integers in [0, num_classes), one per sample.
    """
    if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"the data set yields labels of {labels.dtype}; they must be integers, one per sample")
    labels = labels.long()  # first: torch finds no least uint16
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"the data set yields labels from {low} to {high}, outside the classes 0..{num_classes - 1}; "
            "labels start at 0, and model.num_classes, or that of the network given, is how many there are"
        )
    return labels


def as_condition(value: Any, null_condition: Tensor) -> Tensor:
    """What a data set yields as a sample's condition, as a tensor without gradient.

    Raises:
        ValueError: unless it is of the shape and dtype of the null condition.
    """
    wanted = f"shape {tuple(null_condition.shape)} and {null_condition.dtype}"
    try:
        condition = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"the data set yields a condition of class {type(value).__name__} that is no tensor; the network's "
            f"null_condition has {wanted}, and each condition must too"
        ) from None
    if (condition.shape, condition.dtype) != (null_condition.shape, null_condition.dtype):
        raise ValueError(
            f"the data set yields conditions of shape {tuple(condition.shape)} and {condition.dtype}, and the "
            f"network's null_condition has {wanted}; they must be the same"
        )
    return condition


def warn_of_unused_classes(dataset: Dataset, num_classes: int) -> None:
    """Logs how many of the classes no sample is of, where the labels are at hand; in the first process."""
    labels = labels_at_hand(dataset) if num_classes else None
    if labels is None or distributed.rank() != 0:
        return
    found = np.unique(labels)
    if len(found) >= num_classes:
        return
    needed = int(found[-1]) + 1
    remedy = "" if needed >= num_classes else f"; set model.num_classes={needed}"
    _log.warning("%d of %d classes have samples in the data%s", len(found), num_classes, remedy)


def is_of_tensors(dataset: Dataset) -> bool:
    """Whether it is a ``TensorDataset`` whose items are its tensors' rows; a subclass may make others of them."""
    return isinstance(dataset, TensorDataset) and type(dataset).__getitem__ is TensorDataset.__getitem__


def labels_at_hand(dataset: Dataset) -> np.ndarray | None:
    """All labels, (n,) integers, of a ``TensorDataset``, or as ``labels`` or torchvision's ``targets``."""
    if is_of_tensors(dataset):
        labels = dataset.tensors[-1]
    else:
        labels = getattr(dataset, "labels", None)
        labels = getattr(dataset, "targets", None) if labels is None else labels
    try:
        labels = np.asarray(labels.cpu() if torch.is_tensor(labels) else labels)
    except (TypeError, ValueError, RuntimeError):  # anything else of that name
        return None
    return labels if labels.shape == (len(dataset),) and len(labels) and labels.dtype.kind in "iu" else None


def described(dataset: Dataset, num_classes: int, null_condition: Tensor | None = None) -> str:
    """How many samples a data set has, and of how many classes, in words."""
    if null_condition is not None:
        return f"{len(dataset):,} samples with conditions"
    if not num_classes:
        return f"{len(dataset):,} samples without classes"
    labels = labels_at_hand(dataset)
    found = num_classes if labels is None else len(np.unique(labels))
    of = "" if found == num_classes else f"{found} of "
    return f"{len(dataset):,} samples of {of}{num_classes} classes"


def require_labels_at_hand(dataset: Dataset, num_classes: int) -> None:
    """ValueError for labels outside the classes, where they are at hand and the item itself has such a one: a data set
    may keep others than it yields.
    """
    labels = labels_at_hand(dataset) if num_classes else None
    if labels is None or (labels.min() >= 0 and labels.max() < num_classes):
        return
    index = int(labels.argmin() if labels.min() < 0 else labels.argmax())
    with preserve_rng():
        item = dataset[index]
    require_pair(item, num_classes)
    if not 0 <= int(item[1]) < num_classes:
        checked_labels(torch.from_numpy(labels.astype(np.int64)), num_classes)


def warn_of_other_range(dataset: Dataset) -> None:
    """Logs, in the first process, that images seem to lie in [0, 1] or [0, 255] and how to scale them to [-1, 1]."""
    if distributed.rank() != 0:
        return
    try:
        with preserve_rng():
            rows = np.unique(np.linspace(0, len(dataset) - 1, _LOOKED_AT).astype(int)).tolist()
            samples = [dataset[row][0] for row in rows]
        if samples[0].shape[0] not in _CHANNELS:
            return
        low = min(float(sample.min()) for sample in samples)
        high = max(float(sample.max()) for sample in samples)
    except Exception:  # whatever is amiss with an item shows when it is trained on
        return
    if 0 <= low < high <= 255:
        _log.warning(
            "the samples lie in [%.4g, %.4g] (%d were looked at), and images should lie in about [-1, 1]; "
            "scale them by %s",
            low,
            high,
            len(samples),
            "x * 2 - 1" if high < 2 else "x / 127.5 - 1",
        )


def _is_integer(label: Any) -> bool:
    if torch.is_tensor(label):
        return label.dim() == 0 and not (label.is_floating_point() or label.is_complex())
    return isinstance(label, Integral)
