"""The order of the data: a pure function of (seed, epoch, global row), so that a run can stop and go on anywhere."""

from functools import lru_cache

import torch
from torch import Tensor

from soflow_fast.kernels.reference import Stream, philox

# Words drawn at a time on a CPU: what is in between is many times as large, and best stays in the cache.
_CHUNK = 2**16


@lru_cache(maxsize=2)
def permutation(n: int, seed: int, epoch: int, device: torch.device | str = "cpu") -> Tensor:
    """The order of n samples in one epoch, (n,) int64: the stable argsort of one Philox word per sample."""
    words = torch.arange(n, device=device)  # the rows, each of which its word takes the place of
    for chunk in words.split(_CHUNK if words.device.type == "cpu" else max(1, n)):
        chunk.copy_(philox(chunk, 1, seed=seed, step=epoch, stream=Stream.ORDER)[:, 0])
    return words.argsort(stable=True)


def batch_indices(n: int, batch: int, step: int, seed: int) -> list[int]:
    """Which samples are the rows of the global batch of a step; what an epoch has beyond full batches is left out.

    Args:
        n: samples in the data set, at least batch. batch: rows of the global batch. step: from 0. seed: of the run.
    """
    epoch, position = divmod(step, n // batch)
    return permutation(n, seed, epoch)[position * batch : (position + 1) * batch].tolist()
