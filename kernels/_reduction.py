"""What the loss reductions share: launch, saved residual and backward.

The gradient of a row's loss with respect to F is the row's residual times a number, known only after the reduction. The
forward writes the residual as it reads, and the backward scales it: one pass each for a sample of any size. Residuals
are of order one, where a float16 gradient would underflow. One program per row sums in a fixed order: repeatable bit by
bit.

Shapes: B rows, n values per row.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Launch, launch, require_dtype, require_shape
from ._math import log
from ._op import raw_op
from .coefficients import PARAMETERIZATIONS, require_choice

# Latents (4096 values) are one iteration of 8 values a thread; larger samples loop. Many warps a row, because there are
# fewer rows than an H100 has SMs: the consistency rows of a batch of 256 are 64.
_BLOCK = 4096
_REDUCE = Launch(num_warps=16, max_registers=64)
# Elementwise: 8 values a thread, half of an SM's threads resident.
POINTWISE_BLOCK = 1024
POINTWISE = Launch(num_warps=4, max_registers=64)


@triton.jit
def inverse_power(x, p):
    """``x^(−p)``, exact for p = 1."""
    return 1 / x * tl.exp((1 - p) * log(x))


@triton.jit
def load(ptr, offset, mask):
    """Values in float32, 0 where masked."""
    return tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["stride"])
def _scale_rows_kernel(
    residual_ptr,  # (B, N)
    weight_ptr,  # (B,)
    dloss_ptr,  # (B,), stride as given
    dF_ptr,  # (B, N)
    stride,
    factor,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask, offset = column < N, row * N + column
    scale = tl.load(dloss_ptr + row * stride).to(tl.float32) * tl.load(weight_ptr + row) * factor
    tl.store(dF_ptr + offset, (scale * load(residual_ptr, offset, mask)).to(dF_ptr.dtype.element_ty), mask=mask)


def row_outputs(F: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(loss, mse, weight, residual)``, to be filled."""
    loss, mse, weight = (torch.empty(F.shape[0], dtype=torch.float32, device=F.device) for _ in range(3))
    return loss, mse, weight, torch.empty(F.shape, dtype=F.dtype, device=F.device)


def reduction(F: Tensor) -> dict:
    """Constants and launch of a reduction over the rows of F."""
    n = math.prod(F.shape[1:])
    return {"N": n, "BLOCK": min(_BLOCK, triton.next_power_of_2(n)), "config": _REDUCE}


def _loss_bwd(residual: Tensor, weight: Tensor, dloss: Tensor, factor: float) -> Tensor:
    dF, n = torch.empty_like(residual), math.prod(residual.shape[1:])
    launch(
        _scale_rows_kernel,
        lambda: (residual.shape[0], triton.cdiv(n, POINTWISE_BLOCK)),
        *(residual, weight, dloss, dF),
        *(dloss.stride(0), factor),
        N=n,
        BLOCK=POINTWISE_BLOCK,
        config=POINTWISE,
    )
    return dF


_loss_bwd_op = raw_op("loss_bwd", _loss_bwd)


def save_residual(ctx, output, factor: float) -> None:
    """For a backward that scales the residual of each row by weight, incoming gradient and factor."""
    _, mse, weight, residual = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mse, weight, residual)
    ctx.save_for_backward(residual, weight)
    ctx.factor = factor / math.prod(residual.shape[1:])


def loss_backward(ctx, dloss: Tensor | None) -> Tensor | None:
    """dF for the gradients of the rows' losses, of any stride."""
    return None if dloss is None else _loss_bwd_op(*ctx.saved_tensors, dloss, ctx.factor)


def require_samples(
    parameterization: str, samples: dict[str, Tensor], times: dict[str, Tensor], drop: Tensor | None = None
):
    """ValueError unless all samples have the shape of the first, all times one value per row, in known dtypes."""
    require_choice("parameterization", parameterization, PARAMETERIZATIONS)
    shape = next(iter(samples.values())).shape
    for name, x in samples.items():
        require_shape(name, x, shape)
        require_dtype(name, x)
    for name, x in times.items():
        require_shape(name, x, shape[:1])
        require_dtype(name, x)
    if drop is not None:
        require_shape("drop", drop, shape[:1])
        if drop.dtype != torch.bool:
            raise ValueError(f"drop has dtype {drop.dtype} where torch.bool is needed: True for rows without label")
