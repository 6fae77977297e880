"""What a run was trained on, in a few values that tell whether the data are still the same."""

import hashlib
import os
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from soflow_fast.data import CIFAR10, ImageFolder, LatentMoments, MomentsFolder
from soflow_fast.data.checks import is_of_tensors, labels_at_hand
from soflow_fast.data.moments import probe_rows
from soflow_fast.seeding import preserve_rng


def fingerprint(dataset: Dataset, num_classes: int, null_condition: Tensor | None = None) -> dict[str, object]:
    """``samples``, how many; and of this package's data sets and a ``TensorDataset``, of what is known without reading.

    ``shape`` of a sample, ``classes``, the folders in the order of their numbers, and ``sha256`` of the relative names
    and labels. Labels count where there are classes. Where there is a null condition, ``conditions`` is the sha256 of
    the conditions, of latents that of some. What else the files hold does not enter. Of any other data set ``labels``
    is the sha256 of the labels, where there are classes and it has them at hand.
    """
    found: dict[str, object] = {"samples": len(dataset)}
    labels, names = _labels_of(dataset), _names_of(dataset)
    conditions = None if null_condition is None else _conditions_of(dataset)
    if conditions is not None:
        found["conditions"] = hashlib.sha256(conditions.contiguous().view(torch.uint8).numpy()).hexdigest()
    if labels is None:
        at_hand = labels_at_hand(dataset) if num_classes else None
        return found if at_hand is None else found | {"labels": hashlib.sha256(_as_bytes(at_hand)).hexdigest()}
    with preserve_rng():  # by which an image may be mirrored
        found["shape"] = list(dataset[0][0].shape)
    if isinstance(dataset, ImageFolder) and num_classes:
        found["classes"] = list(dataset.classes)
    digest = hashlib.sha256()
    for name in names:
        digest.update(os.fsencode(name) + b"\0")
    if num_classes:
        digest.update(_as_bytes(labels))
    return found | {"sha256": digest.hexdigest()}


def _as_bytes(labels: np.ndarray) -> bytes:
    return np.ascontiguousarray(labels, dtype="<i8").tobytes()


def _labels_of(dataset: Dataset) -> np.ndarray | None:
    """(n,) labels where they are known without reading the samples, or None."""
    if is_of_tensors(dataset) and len(dataset.tensors) == 2:
        if dataset.tensors[1].is_floating_point():  # more than a label
            return None
        return dataset.tensors[1].cpu().numpy()
    if isinstance(dataset, CIFAR10):
        return dataset.labels.numpy()
    return dataset.labels if isinstance(dataset, (ImageFolder, LatentMoments, MomentsFolder)) else None


def _conditions_of(dataset: Dataset) -> Tensor | None:
    """(m, ...) conditions on the host, of which others would not be the same data; None where they are not at hand."""
    if is_of_tensors(dataset) and len(dataset.tensors) == 2:
        return dataset.tensors[1].detach().cpu()
    return dataset.conditions(probe_rows(len(dataset)).tolist()) if isinstance(dataset, LatentMoments) else None


def difference(before: dict[str, object], after: dict[str, object]) -> str | None:
    """How the data of two fingerprints differ, in words, or None; ``labels`` count where both were at hand."""
    if not ("labels" in before and "labels" in after):
        before, after = ({k: v for k, v in one.items() if k != "labels"} for one in (before, after))
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
    if before.get("conditions") != after.get("conditions"):
        return "other conditions"
    return "other labels" if before.get("labels") != after.get("labels") else "other names of files or other labels"


def _names_of(dataset: Dataset) -> Iterable[str | bytes]:
    if isinstance(dataset, ImageFolder):
        return dataset._files.tolist()
    return dataset._names.tolist() if isinstance(dataset, MomentsFolder) else []


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" (and {len(names) - 3} more)" if len(names) > 3 else "")
