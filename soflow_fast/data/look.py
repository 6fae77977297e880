"""What a look at a data set tells before a run: its size, whether its labels are classes, whether its pixels fit."""

import logging

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from soflow_fast import distributed
from soflow_fast.data.checks import checked_labels, labels_at_hand, require_pair
from soflow_fast.data.loader import caller_keeps_generators

_log = logging.getLogger(__name__)

# Items that are looked at for the range of their values.
_LOOKED_AT = 16
# Channels of images.
_CHANNELS = (1, 3)


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
    with caller_keeps_generators():
        item = dataset[index]
    require_pair(item, num_classes)
    if not 0 <= int(item[1]) < num_classes:
        checked_labels(torch.from_numpy(labels.astype(np.int64)), num_classes)


def warn_of_other_range(dataset: Dataset) -> None:
    """Logs, in the first process, that images seem to lie in [0, 1] or [0, 255] and how to scale them to [-1, 1]."""
    if distributed.rank() != 0:
        return
    try:
        with caller_keeps_generators():
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
