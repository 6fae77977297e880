"""What a network is told of a sample in place of its class: a tensor, such as the embedding of a text, or its tokens.

Such a network has ``null_condition``, a buffer that stands for "no condition", as the embedding of the empty text does,
or a parameter where that is to be learned; every sample's condition has its shape and dtype. As labels, conditions are
(B, *shape of null_condition).
"""

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from soflow_fast.data.loader import caller_keeps_generators, seed_generators


def null_condition(network: nn.Module | None) -> Tensor | None:
    """What stands for "no condition" of a network that is told conditions, None of one that is told classes."""
    return getattr(network, "null_condition", None)


def takes_labels(network: nn.Module) -> bool:
    """Whether a network is told of a sample's class or condition."""
    return null_condition(network) is not None or network.num_classes > 0


class OfItems:
    """The conditions of items of a data set, read from it when they are asked for; to be sliced like a tensor.

    What an item draws from the global generators depends on its number alone.

    Args:
        dataset: map-style, of (sample, condition). One with ``conditions(items)``, from a list of n indices to
            (n, ...), is asked for that, so that no samples are read. items: (n,) int64, the indices.
    """

    def __init__(self, dataset: Dataset, items: Tensor):
        self.dataset, self.items = dataset, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, part: slice) -> Tensor:
        items = self.items[part]
        if isinstance(self.dataset, TensorDataset):
            return self.dataset.tensors[1][items].detach()
        with caller_keeps_generators():
            if callable(getattr(self.dataset, "conditions", None)):
                return self.dataset.conditions(items.tolist())
            return torch.stack([self._read(item) for item in items.tolist()])

    def _read(self, item: int) -> Tensor:
        seed_generators(f"condition,{item}")
        return torch.as_tensor(self.dataset[item][1]).detach()
