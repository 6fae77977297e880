"""FlashAttention 2, 3 and 4 by their own packages, from the projection on.

A package's function of q, k and v returns three gradients, which are then packed for the products of the projection's
backward and summed for its bias, 12 bytes per token and column of o (:mod:`soflow_fast.kernels.heads`). Its kernels
write gradients wherever they are told to: here into their places in the projection's own, so that only dq and the
gradient of o are read once more, for the sums, 4 bytes.

A forward and a backward are one operator each, of which Inductor is told, also where a package has none of its own.

Shapes: B rows, N tokens, D = H·h width, H heads, h head dim.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from soflow_fast.flash_packages import PACKAGES
from soflow_fast.kernels._op import autocast, raw_op
from soflow_fast.kernels._projection import attention_of_projection, count_flops
from soflow_fast.kernels.reference_float8 import Float8Rows


def _forward(y: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """``(o, lse)``: (B, N, H, h), and (B, H, N) in float32."""
    o, lse = PACKAGES[backend].forward(*y.unbind(2), y.shape[-1] ** -0.5)
    return o.contiguous(), lse.contiguous()


def _forward_fake(y: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    B, n, _, heads, h = y.shape
    return y.new_empty(B, n, heads, h), y.new_empty((B, heads, n), dtype=torch.float32)


def _backward(y: Tensor, do: Tensor, o: Tensor, lse: Tensor, backend: str) -> Tensor:
    """dy, (B, N, 3, H, h)."""
    dy, deterministic = torch.empty_like(y), torch.are_deterministic_algorithms_enabled()
    scale = y.shape[-1] ** -0.5
    PACKAGES[backend].backward(do.contiguous(), *y.unbind(2), o, lse, *dy.unbind(2), scale, deterministic)
    return dy


def _backward_fake(y: Tensor, do: Tensor, o: Tensor, lse: Tensor, backend: str) -> Tensor:
    return torch.empty_like(y)


_forward_op = raw_op("flash_attention_fwd", _forward, _forward_fake)
_backward_op = raw_op("flash_attention_bwd", _backward, _backward_fake)
count_flops(torch.ops.soflow.flash_attention_fwd, torch.ops.soflow.flash_attention_bwd)


def _of(backend: str) -> Callable:
    def forward(y: Tensor) -> tuple[Tensor, Tensor]:
        return _forward_op(y, backend)

    def backward(y: Tensor, do: Tensor, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        dy = _backward_op(y, do, o, lse, backend)
        # rows of P add up to 1 and those of the scores' gradient to 0
        of_queries, of_values = (x.sum((0, 1), dtype=torch.float32).flatten() for x in (dy[:, :, 0], do))
        return dy, torch.cat([of_queries, torch.zeros_like(of_queries), of_values]).view(1, 1, -1)

    return attention_of_projection(forward, backward)


_ATTENTION = {name: _of(name) for name in PACKAGES}


def self_attention(
    h: Tensor | Float8Rows, weight: Tensor, bias: Tensor, *, heads: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`soflow_fast.kernels.reference.self_attention` by one of PACKAGES.

    Args:
        h: (B, N, D), also in float8, then without gradient. weight: (3D, D). bias: (3D,), all bfloat16 or all float16.
            heads: H, divides D.

    Returns:
        ``(o, q, k, v)``, each (B, H, N, h); o is stored as (B, N, H, h), the others are views of one tensor, without
        gradient.

    Raises:
        ValueError: for another dtype.
    """
    if not isinstance(h, Float8Rows):
        h, weight, bias = autocast(h, weight, bias)
    if h.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"attention={backend!r} takes bfloat16 and float16 and got {h.dtype}; compute in bf16 or choose "
            "attention='sdpa'"
        )
    return _ATTENTION[backend](h, weight, bias, heads)
