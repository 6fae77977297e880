"""What a run was trained on, in a few values that tell whether the data are still the same."""

import hashlib
import os
from collections.abc import Iterable

import numpy as np
from torch.utils.data import Dataset, TensorDataset

from soflow_fast.data import CIFAR10, ImageFolder, LatentMoments, MomentsFolder


def fingerprint(dataset: Dataset, num_classes: int) -> dict[str, object]:
    """``samples``, how many; and of this package's data sets and a ``TensorDataset``, of what is known without reading.

    ``shape`` of a sample, ``classes``, the folders in the order of their numbers, and ``sha256`` of the relative names
    and labels. Labels count where there are classes. What the files hold does not enter.
    """
    found: dict[str, object] = {"samples": len(dataset)}
    labels, names = labels_of(dataset), _names_of(dataset)
    if labels is None:
        return found
    found["shape"] = list(dataset[0][0].shape)
    if isinstance(dataset, ImageFolder) and num_classes:
        found["classes"] = list(dataset.classes)
    digest = hashlib.sha256()
    for name in names:
        digest.update(os.fsencode(name) + b"\0")
    if num_classes:
        digest.update(np.ascontiguousarray(labels, dtype="<i8").tobytes())
    return found | {"sha256": digest.hexdigest()}


def labels_of(dataset: Dataset) -> np.ndarray | None:
    """(n,) labels where they are known without reading the samples, or None."""
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
        if dataset.tensors[1].is_floating_point():  # more than a label
            return None
        return dataset.tensors[1].cpu().numpy()
    if isinstance(dataset, CIFAR10):
        return dataset.labels.numpy()
    return dataset.labels if isinstance(dataset, (ImageFolder, LatentMoments, MomentsFolder)) else None


def difference(before: dict[str, object], after: dict[str, object]) -> str | None:
    """How the data of two fingerprints differ, in words, or None."""
    if before == after:
        return None
    old, new = before.get("classes"), after.get("classes")
    if old != new and old and new:
        added, gone = [name for name in new if name not in old], [name for name in old if name not in new]
        parts = [
            f"the class folder {_some(names)} is {what}" for names, what in ((added, "new"), (gone, "gone")) if names
        ]
        return " and ".join(parts) or "the class folders have another order"
    for name, unit in (("samples", "samples"), ("shape", "as the shape of a sample")):
        if before.get(name) != after.get(name):
            return f"{after.get(name)} {unit} in place of {before.get(name)}"
    return "other names of files or other labels"


def _names_of(dataset: Dataset) -> Iterable[str | bytes]:
    if isinstance(dataset, ImageFolder):
        return dataset._files.tolist()
    return dataset._names.tolist() if isinstance(dataset, MomentsFolder) else []


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" (and {len(names) - 3} more)" if len(names) > 3 else "")
