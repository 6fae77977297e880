"""Random numbers as one operator of what is compiled: traced, Philox is more than half of a small step's graph."""

import contextlib

import torch
from torch import Tensor

from soflow_fast.kernels import reference

_philox = reference.philox


@torch.library.custom_op("tests::philox", mutates_args=())
def _words(rows: Tensor, n: int, seed: Tensor, step: Tensor, stream: int) -> Tensor:
    return _philox(rows, n, seed=seed, step=step, stream=stream).contiguous()


@_words.register_fake
def _(rows: Tensor, n: int, seed: Tensor, step: Tensor, stream: int) -> Tensor:
    return rows.new_empty(rows.shape[0], n)


def _one_operator(rows, n, *, seed, step, stream):
    if not torch.compiler.is_compiling():
        return _philox(rows, n, seed=seed, step=step, stream=stream)
    seed, step = (x if isinstance(x, Tensor) else torch.full((), x, dtype=torch.int64) for x in (seed, step))
    return _words(rows, n, seed, step, int(stream))


def install() -> None:
    """For this process."""
    reference.philox = _one_operator


@contextlib.contextmanager
def traced():
    """The library's own, for a test of the graph that trains for real."""
    before, reference.philox = reference.philox, _philox
    try:
        yield
    finally:
        reference.philox = before
