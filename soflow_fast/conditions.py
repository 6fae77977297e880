"""What a network is told of a sample in place of its class: a tensor, such as the embedding of a text, or its tokens.

Such a network has ``null_condition``, a tensor that stands for "no condition", as the embedding of the empty text
does; every sample's condition has its shape and dtype. As labels, conditions are (B, *shape of null_condition).
"""

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

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
        dataset: map-style, of (sample, condition). items: (n,) int64, their indices.
    """

    def __init__(self, dataset: Dataset, items: Tensor):
        self.dataset, self.items = dataset, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, part: slice) -> Tensor:
        with caller_keeps_generators():
            return torch.stack([self._read(item) for item in self.items[part].tolist()])

    def _read(self, item: int) -> Tensor:
        seed_generators(f"condition,{item}")
        return torch.as_tensor(self.dataset[item][1])
