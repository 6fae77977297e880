"""The consistency loss, one pass over a sample.

    Δ = c_x x_t + c_F F + c_d dF + c_v v,  loss = −w·mean(F·Δ),  w = (mean(Δ²)+ε)^(−p),  dloss/dF = −(w/n) Δ

with the ``quotient_coefficients`` c. Shapes: B rows, n values per row. Bytes moved per value, with F and dF in bfloat16
and v, x_t in float32: 10 (14 for trig, whose Δ contains x_t), backward 4. Saved: Δ in the dtype of F, and w.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._cases import Case, Inputs
from ._launch import constants, launch
from ._math import sin_cos
from ._op import raw_op
from ._reduction import inverse_power, load, loss_backward, reduction, require_samples, row_outputs, save_residual


@triton.jit
def _quotient_coefficients(t, gap, s, TRIG: tl.constexpr, TANGENT: tl.constexpr):
    """``(c_x, c_F, c_d, c_v)``, see ``coefficients.quotient_coefficients``."""
    if not TRIG:
        return 0.0, -1.0, (t - s) if TANGENT else ((t - s) - gap) / gap, 1.0
    half_pi: tl.constexpr = 1.5707963267948966
    angle = half_pi * (t - s)
    if TANGENT:
        sin, cos = sin_cos(angle)
        return -half_pi * sin, -half_pi * cos, sin, cos
    half = 0.5 * half_pi * gap
    sin_half, _ = sin_cos(half)
    chord = 2 * sin_half / gap
    sin_middle, cos_middle = sin_cos(angle - half)
    sin_shifted, cos_shifted = sin_cos(angle - 2 * half)
    return -chord * sin_middle, -chord * cos_middle, sin_shifted / gap, cos_shifted


@triton.jit
def _consistency_loss_kernel(
    F_ptr,  # (B, N)
    dF_ptr,  # (B, N)
    v_ptr,  # (B, N)
    x_t_ptr,  # (B, N), read if TRIG
    t_ptr,  # (B,)
    gap_ptr,  # (B,)
    s_ptr,  # (B,)
    loss_ptr,  # (B,)
    mse_ptr,  # (B,)
    weight_ptr,  # (B,)
    residual_ptr,  # (B, N)
    p,
    eps,
    N: tl.constexpr,
    TRIG: tl.constexpr,
    TANGENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    t, gap = tl.load(t_ptr + row).to(tl.float32), tl.load(gap_ptr + row).to(tl.float32)
    s = tl.load(s_ptr + row).to(tl.float32)
    c_x, c_F, c_d, c_v = _quotient_coefficients(t, gap, s, TRIG, TANGENT)
    squares = tl.zeros((BLOCK,), tl.float32)
    products = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask, offset = column < N, row * N + column
        F, dF, v = load(F_ptr, offset, mask), load(dF_ptr, offset, mask), load(v_ptr, offset, mask)
        quotient = c_F * F + c_d * dF + c_v * v
        if TRIG:
            quotient += c_x * load(x_t_ptr, offset, mask)
        squares += quotient * quotient
        products += F * quotient
        tl.store(residual_ptr + offset, quotient.to(residual_ptr.dtype.element_ty), mask=mask)
    mse = tl.sum(squares) / N
    weight = inverse_power(mse + eps, p)
    tl.store(loss_ptr + row, -weight * (tl.sum(products) / N))
    tl.store(mse_ptr + row, mse)
    tl.store(weight_ptr + row, weight)


def _consistency_loss(
    F: Tensor,
    dF: Tensor,
    v: Tensor,
    x_t: Tensor,
    t: Tensor,
    gap: Tensor,
    s: Tensor,
    parameterization: str,
    p: float,
    eps: float,
    tangent: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = row_outputs(F)
    F, dF, v, x_t, t, gap, s = (x.contiguous() for x in (F, dF, v, x_t, t, gap, s))
    launch(
        _consistency_loss_kernel,
        lambda: (F.shape[0],),
        *(F, dF, v, x_t, t, gap, s, *outputs),
        *(p, eps),
        TRIG=parameterization == "trig",
        TANGENT=tangent,
        **reduction(F),
    )
    return outputs


_consistency_loss_op = raw_op("consistency_loss_fwd", _consistency_loss)


class _ConsistencyLoss(torch.autograd.Function):
    @staticmethod
    def forward(F, dF, v, x_t, t, gap, s, parameterization, p, eps, tangent):
        return _consistency_loss_op(F, dF, v, x_t, t, gap, s, parameterization, p, eps, tangent)

    @staticmethod
    def setup_context(ctx, inputs, output):
        save_residual(ctx, output, -1.0)

    @staticmethod
    def backward(ctx, dloss, *_):
        return loss_backward(ctx, dloss), *[None] * 10


def consistency_loss(
    F: Tensor,
    dF: Tensor,
    v: Tensor,
    x_t: Tensor,
    t: Tensor,
    gap: Tensor,
    s: Tensor,
    *,
    parameterization: str,
    p: float,
    eps: float,
    tangent: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fused :func:`soflow_fast.kernels.reference.consistency_loss`.

    Args:
        F, dF, v, x_t: (B, ...), each in its own dtype. t, gap, s: (B,) float32, ``0 <= s <= t − gap``.

    Returns:
        ``(loss, mse, weight)``, (B,) float32; only loss is differentiable, and only with respect to F.

    Raises:
        ValueError: for an unknown parameterization, or a shape or dtype that does not fit.
    """
    require_samples(parameterization, {"F": F, "dF": dF, "v": v, "x_t": x_t}, {"t": t, "gap": gap, "s": s})
    others = constants(dF, v, x_t, t, gap, s)
    return _ConsistencyLoss.apply(F, *others, parameterization, p, eps, tangent)[:3]


def cases() -> list[Case]:
    """The consistency rows of a batch of 256: latents, and images of 256 pixels."""

    def inputs(*shape: int):
        def make(new: Inputs) -> dict:
            B = new.rows(64)
            return {
                "F": new.normal(B, *shape),
                "dF": new.normal(B, *shape, scale=1e-3),
                "v": new.normal(B, *shape, dtype=torch.float32),
                "x_t": new.normal(B, *shape, dtype=torch.float32),
                "t": new.uniform(B, low=0.5),
                "gap": new.uniform(B, low=1e-4, high=1e-2),
                "s": new.uniform(B, high=0.4),
            }

        return make

    euler = {"parameterization": "euler", "p": 1.0, "eps": 0.01}
    trig = {**euler, "parameterization": "trig"}
    return [
        Case("consistency_loss", "latents", inputs(4, 32, 32), euler, ("F",)),
        Case("consistency_loss", "latents, tangent", inputs(4, 32, 32), {**euler, "tangent": True}, ("F",)),
        Case("consistency_loss", "latents, trig", inputs(4, 32, 32), trig, ("F",)),
        Case("consistency_loss", "latents, trig tangent", inputs(4, 32, 32), {**trig, "tangent": True}, ("F",)),
        Case("consistency_loss", "images", inputs(3, 256, 256), euler, ("F",)),
    ]
