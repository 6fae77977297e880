"""A case is an op at a shape that training uses; offline compilation, error table and benchmark run the same cases."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .reference_float8 import Float8Rows


class Inputs:
    """Makes a case's input tensors: on ``meta`` they only have shapes, elsewhere they are random and repeatable.

    Args:
        device: of the tensors. dtype: what "low precision" is in this run.
        max_rows: the largest batch, so that a case can be tried where its real size takes too long; None: as it is.
    """

    def __init__(self, device: str, dtype: torch.dtype = torch.bfloat16, max_rows: int | None = None):
        self.device, self.dtype, self.max_rows = device, dtype, max_rows
        self._generator = None if device == "meta" else torch.Generator(device).manual_seed(0)

    def rows(self, batch: int) -> int:
        """How many rows a case of this batch makes in this run."""
        return batch if self.max_rows is None else min(batch, self.max_rows)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal values, by default in the run's low precision."""
        x = torch.randn(shape, generator=self._generator, device=self.device) * scale
        return x.to(dtype or self.dtype)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """float32 values, uniform in [low, high)."""
        return torch.rand(shape, generator=self._generator, device=self.device) * (high - low) + low

    def integers(self, *shape: int, high: int) -> Tensor:
        """int64 values in [0, high)."""
        return torch.randint(high, shape, generator=self._generator, device=self.device)


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        op: name of the public function, the same in ``reference`` and ``fused``.
        name: the shape, such as "XL/2".
        inputs: makes the arguments by name: the tensors, and ``dtype`` where it is the run's low precision.
        options: the other keyword arguments.
        gradients: names of the arguments that need a gradient; then the backward is part of the case.
    """

    op: str
    name: str
    inputs: Callable[[Inputs], dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    gradients: tuple[str, ...] = ()


def as_tuple(outputs: Tensor | Float8Rows | Sequence[Tensor | Float8Rows | None]) -> tuple[Tensor, ...]:
    """An op's outputs as a tuple, also of one, without those that were not asked for; rows in float8 as float32."""
    if isinstance(outputs, (Tensor, Float8Rows)):
        outputs = (outputs,)
    return tuple(o.to(torch.float32) if isinstance(o, Float8Rows) else o for o in outputs if o is not None)
