"""Guided velocity and velocity loss, one pass over a sample each.

    guided velocity:  target = m [v + g(t)(ω−1)(v − b'F_∅)] + (1−m) b'F_own,  v on rows without label
    velocity loss:    δ = b'F − target,  loss = w·mean(δ²),  w = 1/(b'(mean(δ²)+ε)^p),  dloss/dF = (2b'w/n) δ

In the loss F_own is F, without gradient; b' is ``velocity_scale``. Shapes: B rows, n values per row. Bytes moved per
value, with F and F_∅ in bfloat16 and v in float32: target 12; loss 10 (8 without guidance), its backward 4. Saved: δ in
the dtype of F, and w.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._cases import Case, Inputs
from ._launch import constants, launch
from ._math import expm1
from ._op import raw_op
from ._reduction import (
    POINTWISE,
    POINTWISE_BLOCK,
    inverse_power,
    load,
    loss_backward,
    reduction,
    require_samples,
    row_outputs,
    save_residual,
)
from .coefficients import velocity_scale


@triton.jit
def _guidance_decay(t, decay_time):
    """``g(t)`` for decay_time < 1, see ``coefficients.guidance_decay``."""
    q = tl.minimum(tl.maximum((1 - t) / (1 - decay_time), 0.0), 1 - 1e-6)
    return tl.where(t <= decay_time, 1.0, -expm1(-0.025 * q / (1 - q)))


@triton.jit
def _guide(v, F_null, F_own, strength, mix, SLOPE: tl.constexpr):
    return mix * (v + strength * (v - SLOPE * F_null)) + (1 - mix) * SLOPE * F_own


@triton.jit
def _guided_velocity_kernel(
    v_ptr,  # (B, N)
    F_null_ptr,  # (B, N)
    F_own_ptr,  # (B, N)
    t_ptr,  # (B,)
    drop_ptr,  # (B,)
    target_ptr,  # (B, N)
    scale,
    mix,
    decay_time,
    N: tl.constexpr,
    SLOPE: tl.constexpr,
    DECAY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask, offset = column < N, row * N + column
    strength = scale - 1
    if DECAY:
        strength *= _guidance_decay(tl.load(t_ptr + row).to(tl.float32), decay_time)
    v = load(v_ptr, offset, mask)
    guided = _guide(v, load(F_null_ptr, offset, mask), load(F_own_ptr, offset, mask), strength, mix, SLOPE)
    target = tl.where(tl.load(drop_ptr + row) != 0, v, guided)
    tl.store(target_ptr + offset, target.to(target_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _velocity_loss_kernel(
    F_ptr,  # (B, N)
    v_ptr,  # (B, N)
    F_null_ptr,  # (B, N), read if GUIDED
    t_ptr,  # (B,)
    drop_ptr,  # (B,)
    loss_ptr,  # (B,)
    mse_ptr,  # (B,)
    weight_ptr,  # (B,)
    residual_ptr,  # (B, N)
    scale,
    mix,
    decay_time,
    p,
    eps,
    N: tl.constexpr,
    SLOPE: tl.constexpr,
    GUIDED: tl.constexpr,
    DECAY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if GUIDED:
        dropped = tl.load(drop_ptr + row) != 0
        strength = scale - 1
        if DECAY:
            strength *= _guidance_decay(tl.load(t_ptr + row).to(tl.float32), decay_time)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask, offset = column < N, row * N + column
        F, target = load(F_ptr, offset, mask), load(v_ptr, offset, mask)
        if GUIDED:
            guided = _guide(target, load(F_null_ptr, offset, mask), F, strength, mix, SLOPE)
            target = tl.where(dropped, target, guided)
        residual = SLOPE * F - target
        squares += residual * residual
        tl.store(residual_ptr + offset, residual.to(residual_ptr.dtype.element_ty), mask=mask)
    mse = tl.sum(squares) / N
    weight = inverse_power(mse + eps, p) / SLOPE
    tl.store(loss_ptr + row, weight * mse)
    tl.store(mse_ptr + row, mse)
    tl.store(weight_ptr + row, weight)


def _guided_velocity(
    v: Tensor,
    F_null: Tensor,
    F_own: Tensor,
    t: Tensor,
    drop: Tensor,
    slope: float,
    scale: float,
    mix: float,
    decay_time: float,
) -> Tensor:
    v, F_null, F_own, t, drop = (x.contiguous() for x in (v, F_null, F_own, t, drop))
    target, n = torch.empty_like(v), math.prod(v.shape[1:])
    launch(
        _guided_velocity_kernel,
        lambda: (v.shape[0], triton.cdiv(n, POINTWISE_BLOCK)),
        *(v, F_null, F_own, t, drop, target),
        *(scale, mix, decay_time),
        N=n,
        SLOPE=slope,
        DECAY=decay_time < 1,
        BLOCK=POINTWISE_BLOCK,
        config=POINTWISE,
    )
    return target


def _velocity_loss(
    F: Tensor,
    v: Tensor,
    F_null: Tensor | None,
    t: Tensor,
    drop: Tensor,
    slope: float,
    scale: float,
    mix: float,
    decay_time: float,
    p: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = row_outputs(F)
    guided = F_null is not None
    F, v, F_null, t, drop = (x.contiguous() for x in (F, v, F_null if guided else F, t, drop))
    launch(
        _velocity_loss_kernel,
        lambda: (F.shape[0],),
        *(F, v, F_null, t, drop, *outputs),
        *(scale, mix, decay_time, p, eps),
        SLOPE=slope,
        GUIDED=guided,
        DECAY=decay_time < 1,
        **reduction(F),
    )
    return outputs


_guided_velocity_op = raw_op("guided_velocity", _guided_velocity)
_velocity_loss_op = raw_op("velocity_loss_fwd", _velocity_loss)


class _VelocityLoss(torch.autograd.Function):
    @staticmethod
    def forward(F, v, F_null, t, drop, slope, scale, mix, decay_time, p, eps):
        return _velocity_loss_op(F, v, F_null, t, drop, slope, scale, mix, decay_time, p, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        slope = inputs[5]
        save_residual(ctx, output, 2 * slope)

    @staticmethod
    def backward(ctx, dloss, *_):
        return loss_backward(ctx, dloss), *[None] * 10


def guided_velocity(
    v: Tensor,
    F_null: Tensor,
    F_own: Tensor,
    t: Tensor,
    drop: Tensor,
    *,
    parameterization: str,
    guidance_scale: float,
    guidance_mix: float,
    decay_time: float,
) -> Tensor:
    """Fused :func:`soflow_fast.kernels.reference.guided_velocity`.

    Args:
        v, F_null, F_own: (B, ...), each in its own dtype. t: (B,) float32. drop: (B,) bool.

    Returns:
        (B, ...), dtype of v, no gradient.

    Raises:
        ValueError: for an unknown parameterization, or a shape or dtype that does not fit.
    """
    require_samples(parameterization, {"v": v, "F_null": F_null, "F_own": F_own}, {"t": t}, drop)
    v, F_null, F_own, t = constants(v, F_null, F_own, t)
    slope = velocity_scale(parameterization)
    return _guided_velocity_op(v, F_null, F_own, t, drop, slope, guidance_scale, guidance_mix, decay_time)


def velocity_loss(
    F: Tensor,
    v: Tensor,
    F_null: Tensor | None,
    t: Tensor,
    drop: Tensor,
    *,
    parameterization: str,
    guidance_scale: float,
    guidance_mix: float,
    decay_time: float,
    p: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fused :func:`soflow_fast.kernels.reference.velocity_loss`.

    Args:
        F, v: (B, ...), each in its own dtype. F_null: (B, ...) or None. t: (B,) float32. drop: (B,) bool.

    Returns:
        ``(loss, mse, weight)``, (B,) float32; only loss is differentiable, and only with respect to F.

    Raises:
        ValueError: for an unknown parameterization, or a shape or dtype that does not fit.
    """
    samples = {"F": F, "v": v} if F_null is None else {"F": F, "v": v, "F_null": F_null}
    require_samples(parameterization, samples, {"t": t}, drop)
    v, t = constants(v, t)
    F_null = None if F_null is None else constants(F_null)[0]
    options = (velocity_scale(parameterization), guidance_scale, guidance_mix, decay_time, p, eps)
    return _VelocityLoss.apply(F, v, F_null, t, drop, *options)[:3]


def cases() -> list[Case]:
    """Latents of a batch of 256, of which 192 rows train the velocity, and 64 the consistency, which needs a target;
    images of 256 pixels."""

    def inputs(rows: int, *names: str, shape: tuple[int, ...] = (4, 32, 32)):
        def make(new: Inputs) -> dict:
            B = new.rows(rows)
            outputs = {name: new.normal(B, *shape) for name in names}
            v = new.normal(B, *shape, dtype=torch.float32)
            return {"F_null": None, **outputs, "v": v, "t": new.uniform(B), "drop": new.uniform(B) < 0.1}

        return make

    guidance = {"parameterization": "euler", "guidance_scale": 3.0, "guidance_mix": 0.25, "decay_time": 0.8}
    options = {**guidance, "p": 1.0, "eps": 0.01}
    images = inputs(192, "F", "F_null", shape=(3, 256, 256))
    return [
        Case("guided_velocity", "latents", inputs(64, "F_null", "F_own"), guidance),
        Case("velocity_loss", "latents", inputs(192, "F", "F_null"), options, ("F",)),
        Case("velocity_loss", "latents, unguided", inputs(192, "F"), options, ("F",)),
        Case("velocity_loss", "images", images, options, ("F",)),
    ]
