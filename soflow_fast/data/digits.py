"""scikit-learn's handwritten digits: 1,797 real 8×8 images of ten classes, shipped inside that package."""

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from soflow_fast.data.order import permutation
from soflow_fast.require import require_package

TRAIN_SIZE = 1347
_MAX_PIXEL = 16.0
_SPLIT_SEED = 0


def digits(split: str = "train") -> TensorDataset:
    """The digits as a data set of (image, label).

    Args:
        split: ``train`` (1,347 images), ``held_out`` (the other 450) or ``all``; the split never changes.

    Returns:
        Images (1, 8, 8) float32 in [-1, 1] and labels, 0-d int64 in [0, 10).

    Raises:
        ValueError: if scikit-learn is not installed, or for an unknown split.
    """
    images, labels = _load()
    order = permutation(len(labels), _SPLIT_SEED, 0)
    parts = {"train": order[:TRAIN_SIZE], "held_out": order[TRAIN_SIZE:], "all": order}
    if split not in parts:
        raise ValueError(f"split={split!r} is not known; choose one of {', '.join(parts)}")
    return TensorDataset(images[parts[split]], labels[parts[split]])


def _load() -> tuple[Tensor, Tensor]:
    require_package("scikit-learn", "data.kind='digits'", "demo")
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.from_numpy(raw.images).float()[:, None] / (_MAX_PIXEL / 2) - 1
    return images, torch.from_numpy(raw.target).long()
