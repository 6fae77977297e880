"""What a network is told of a sample in place of its class: a tensor, such as the embedding of a text, or its tokens.

Such a network has ``null_condition``, a buffer that stands for "no condition", as the embedding of the empty text does,
or a parameter where that is to be learned; every sample's condition has its shape and dtype. As labels, conditions are
(B, *shape of null_condition).
"""

import hashlib
import inspect
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from soflow_fast.data.checks import is_of_tensors
from soflow_fast.seeding import preserve_rng, seed_generators

# Bytes of a file of conditions that are looked at together.
_LOOKED_AT_BYTES = 1 << 24


def null_condition(network: nn.Module | None) -> Tensor | None:
    """What stands for "no condition" of a network that is told conditions, None of one that is told classes."""
    return getattr(network, "null_condition", None)


def takes_labels(network: nn.Module) -> bool:
    """Whether a network is told of a sample's class or condition."""
    return null_condition(network) is not None or network.num_classes > 0


def require_classes(network: nn.Module) -> None:
    """ValueError for a network that says neither how many classes it is told of nor what stands for no condition."""
    num_classes = getattr(network, "num_classes", None)
    if null_condition(network) is None and (not isinstance(num_classes, int) or num_classes < 0):
        raise ValueError(
            f"the network {type(network).__name__} has num_classes={num_classes!r}; set it to the number of classes, "
            "which is also the label that means 'no label' (0 for none), or give it a null_condition (see "
            "soflow_fast.conditions)"
        )


def require_arguments(network: nn.Module) -> None:
    """ValueError for a network that does not take ``(x, t, s, labels)``."""
    try:
        signature = inspect.signature(network.forward)
    except (TypeError, ValueError):  # a traced one has none
        return
    try:
        signature.bind("x", "t", "s", "labels")
    except TypeError as error:
        raise ValueError(
            f"the network {type(network).__name__} is called as net(x, t, s, labels), and its forward does not take "
            f"that ({error}); give it these four arguments"
        ) from None


def told(network: nn.Module | None, labels: Tensor | None, x: Tensor) -> Tensor | None:
    """The labels that a network gets of samples x (B, ...): those given or, where there are none, "no label" of each.

    Returns:
        ``labels``; for None (B,) int64 full of ``num_classes``, or (B, *shape of null_condition); and None of a network
        that is told of neither classes nor conditions.

    Raises:
        ValueError: where the network's table has no row for "no label".
    """
    if labels is not None:
        return labels
    null = null_condition(network)
    if null is not None:
        # a view of a parameter that is made without gradient would still say that it requires one
        null = null if torch.is_grad_enabled() else null.detach()
        return null.expand(x.shape[0], *null.shape)
    num_classes = getattr(network, "num_classes", 0)
    if not num_classes:
        return None
    getattr(network, "null_label", None)  # which says so where a DiT has none
    return torch.full((x.shape[0],), num_classes, device=x.device)


class ItemConditions:
    """The conditions of items of a data set, read from it when they are asked for; to be sliced like a tensor.

    What an item draws from the global generators depends on its number alone.

    Args:
        dataset: map-style, of (sample, condition). One with ``conditions(items)``, from a list of n indices to
            (n, ...), is asked for that, so that no samples are read; it may be of conditions alone.
        items: (n,) int64, the indices.
    """

    def __init__(self, dataset: "Dataset | ConditionsFile", items: Tensor):
        self.dataset, self.items = dataset, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, part: slice) -> Tensor:
        items = self.items[part]
        if is_of_tensors(self.dataset):
            return self.dataset.tensors[1][items].detach()
        with preserve_rng():
            if callable(getattr(self.dataset, "conditions", None)):
                return self.dataset.conditions(items.tolist())
            return torch.stack([self._read(item) for item in items.tolist()])

    def _read(self, item: int) -> Tensor:
        seed_generators(f"condition,{item}")
        return torch.as_tensor(self.dataset[item][1]).detach()


class ConditionsFile:
    """The rows of an array in a file, as conditions; mapped into memory, and all of them looked at once.

    As text it is what a file of samples can be called by: the array's name and a hash of its values.

    Args:
        path: ``.npy``, an array (N, *shape of null_condition) of a dtype that torch casts to that of null_condition:
            whole numbers where that has them, else any real ones. network: that is told them.

    Raises:
        ValueError: for a network that is told no conditions, what is no such array, and values that are not finite, or
            too large, in null_condition's dtype.
    """

    def __init__(self, path: str | Path, network: nn.Module):
        self.path, null = Path(path), null_condition(network)
        if null is None:
            remedy = "classes; give --labels" if network.num_classes else "nothing of a sample; leave them out"
            raise ValueError(
                f"the conditions {path} are for a network that is told conditions (null_condition), and "
                f"{type(network).__name__} is told {remedy}"
            )
        if not self.path.exists():
            raise ValueError(f"the conditions {path} do not exist; give the path of an array .npy")
        try:
            self._rows, self._dtype = np.lib.format.open_memmap(self.path, mode="r"), null.dtype
            theirs = torch.from_numpy(np.empty(0, self._rows.dtype.newbyteorder("="))).dtype
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(
                f"the conditions {path} cannot be read ({' '.join(str(error).split())}); give a file that numpy.save "
                "wrote of an array of numbers"
            ) from None
        shape, found = tuple(null.shape), self._rows.shape
        wanted = ", ".join(map(str, ("N", *shape)))
        if not (found and self._rows.size and found[1:] == shape and torch.can_cast(theirs, null.dtype)):
            raise ValueError(
                f"the conditions {path} are an array {found} of {self._rows.dtype}, and the network's "
                f"null_condition is of shape {shape} and {null.dtype}; give ({wanted}), at least one row, of "
                "such numbers"
            )
        self._hash = self._look()

    def __len__(self) -> int:
        return len(self._rows)

    def __str__(self) -> str:
        return f"{self.path.stem}-{self._hash[:6]}"

    def conditions(self, items: list[int] | slice) -> Tensor:
        """Those rows, (n, *shape of null_condition) in its dtype."""
        rows = self._rows[items]
        return torch.from_numpy(rows.astype(rows.dtype.newbyteorder("="))).to(self._dtype)

    def _look(self) -> str:
        """The hash of all values."""
        digest = hashlib.sha256()
        size = max(1, _LOOKED_AT_BYTES // self._rows[0].nbytes)
        for part in (slice(first, first + size) for first in range(0, len(self), size)):
            given, cast = self._rows[part], self.conditions(part)
            digest.update(np.ascontiguousarray(given))
            fits = cast.isfinite() if cast.is_floating_point() else torch.from_numpy(given == cast.numpy())
            rows = fits.reshape(len(cast), -1).all(1)
            if not rows.all():
                row = part.start + int(rows.int().argmin())
                what = "not finite" if cast.is_floating_point() else "too large"
                raise ValueError(
                    f"the conditions {self.path} have in row {row} values that are {what} in {self._dtype}, the dtype "
                    "of the network's null_condition; mend them, or leave that row out"
                )
        return digest.hexdigest()
