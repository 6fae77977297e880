"""What samples and labels of any data set must be."""

from torch import Tensor


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
