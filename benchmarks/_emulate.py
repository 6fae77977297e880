"""Matrix products of another precision, emulated on any machine: operands are rounded, accumulation stays as it is."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
#: Positions of the operands in each matrix product's arguments.
_OPERANDS = {
    _aten.mm.default: (0, 1),
    _aten.bmm.default: (0, 1),
    _aten.addmm.default: (1, 2),
    _aten.baddbmm.default: (1, 2),
}


def to_tf32(x: Tensor) -> Tensor:
    """float32 rounded to TensorFloat-32's 10 bits of mantissa, to nearest, ties to even."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def to_bf16(x: Tensor) -> Tensor:
    """float32 rounded to bfloat16."""
    return x.to(torch.bfloat16).to(x.dtype)


def to_fp8(x: Tensor) -> Tensor:
    """float32 rounded to float8 e4m3 after scaling by the largest value of each row of the last axis."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


class RoundedProducts(TorchDispatchMode):
    """Rounds the float32 operands of every matrix product inside the block, of a backward too if that runs in it.

    Attention is seen only in its ``math`` form: fused attention is one operator.
    """

    def __init__(self, rounding: Callable[[Tensor], Tensor]):
        super().__init__()
        self.rounding = rounding

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        args = list(args)
        for position in _OPERANDS.get(func, ()):
            if args[position].dtype == torch.float32:
                args[position] = self.rounding(args[position])
        return func(*args, **(kwargs or {}))
