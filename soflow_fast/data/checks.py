"""What samples and labels of any data set must be."""

from numbers import Integral
from typing import Any

import torch
from torch import Tensor


def require_pair(item: Any, num_classes: int) -> tuple[int, ...]:
    """The shape of the sample in an item of a map-style data set.

    Raises:
        ValueError: unless it is (sample, label), the sample a floating-point tensor and, where there are classes, the
            label an integer.
    """
    parts = item if isinstance(item, (tuple, list)) else [item]
    if len(parts) == 2 and torch.is_tensor(parts[0]):
        require_floating_point(parts[0])
        if not num_classes or _is_integer(parts[1]):
            return tuple(parts[0].shape)
    found = ", ".join(type(part).__name__ for part in parts)
    raise ValueError(
        f"the data set yields ({found}); each item must be a pair of a floating-point tensor (C, H, W) and an integer "
        "label"
    )


def require_floating_point(samples: Tensor) -> None:
    """ValueError unless the samples are floating point."""
    if not samples.is_floating_point():
        raise ValueError(
            f"the data set yields samples of {samples.dtype}; they must be floating point, about in [-1, 1]"
        )


def checked_labels(labels: Tensor, num_classes: int) -> Tensor:
    """The labels (n,) as int64.

    Raises:
        ValueError: if they are not integers in [0, num_classes), one per sample.
    """
    if labels.dim() != 1 or labels.is_floating_point():
        raise ValueError(f"the data set yields labels of {labels.dtype}; they must be integers, one per sample")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"the data set yields labels from {low} to {high}, outside the classes 0..{num_classes - 1}; "
            "set model.num_classes to the number of classes"
        )
    return labels.long()


def _is_integer(label: Any) -> bool:
    if torch.is_tensor(label):
        return label.dim() == 0 and not (label.is_floating_point() or label.is_complex())
    return isinstance(label, Integral)
