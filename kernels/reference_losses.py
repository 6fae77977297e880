"""The specification of the losses: one plain torch function per op, re-exported by ``reference``.

Shapes: B rows (samples). Low-precision inputs are upcast: everything runs in float32 (float64 for float64 inputs).
"""

import torch
from torch import Tensor

from .coefficients import guidance_decay, quotient_coefficients, velocity_scale
from .reference_difference import wide


def per_row(c: Tensor, like: Tensor) -> Tensor:
    """(B,) scalars shaped to broadcast over the samples of ``like`` (B, ...)."""
    return c.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


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
    """``m [v + g(t)(ω−1)(v − v̂(∅))] + (1−m) v̂(y)`` on the rows that keep their label, ``v`` on the dropped ones.

    Args:
        v: (B, ...) conditional velocity ``v_t``. F_null, F_own: (B, ...) network outputs at ``s=t`` without label and
            with the row's. t: (B,). drop: (B,) bool.

    Returns:
        (B, ...), dtype of v, no gradient.
    """
    v_wide, F_null, F_own = wide(v.detach(), F_null.detach(), F_own.detach())
    slope = velocity_scale(parameterization)
    strength = per_row(guidance_decay(t, decay_time) * (guidance_scale - 1), v_wide)
    guided = guidance_mix * (v_wide + strength * (v_wide - slope * F_null)) + (1 - guidance_mix) * slope * F_own
    return torch.where(drop.view(-1, *[1] * (v.dim() - 1)), v_wide, guided).to(v.dtype)


def _row_mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


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
    """Velocity (flow matching) loss of each row: ``w·mean(δ²)``, ``δ = v̂ − target``, ``w = 1/(b'(mean(δ²)+ε)^p)``.

    The target is :func:`guided_velocity` with the prediction itself, detached, as ``v̂(y)``; it is ``v`` when
    ``F_null`` is None. Gradient flows to F only, through δ and not through w.

    Args:
        F: (B, ...) network output at ``s=t``. v: (B, ...). F_null: (B, ...) or None. t: (B,). drop: (B,) bool.

    Returns:
        ``(loss, mse, weight)``, (B,) float32 (float64 for float64 F); mse and weight carry no gradient.
    """
    prediction, target = wide(F, v.detach())
    slope = velocity_scale(parameterization)
    if F_null is not None:
        target = guided_velocity(
            target,
            F_null,
            F,
            t,
            drop,
            parameterization=parameterization,
            guidance_scale=guidance_scale,
            guidance_mix=guidance_mix,
            decay_time=decay_time,
        )
    mse = _row_mean((slope * prediction - target).square())
    weight = 1 / (slope * (mse.detach() + eps).pow(p))
    return weight * mse, mse.detach(), weight


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
    """Solution consistency loss of each row: ``sign(b(t,s))·w·mean(F·Δ)``, ``w = (mean(Δ²)+ε)^(−p)``.

    Δ is the quotient of :func:`~soflow_fast.kernels.coefficients.quotient_coefficients`, without gradient; as ``s <
    t``, ``sign(b) = −1``. The gradient equals that of the squared error of f up to the factor it divides by.

    Args:
        F: (B, ...) ``F(x_t,t,s)``. dF: (B, ...) its difference (or, with tangent, derivative). v: (B, ...) the target
            velocity. x_t: (B, ...). t, gap, s: (B,).

    Returns:
        ``(loss, mse, weight)``, (B,): mse is ``mean(Δ²)``; mse and weight carry no gradient.
    """
    F_wide, dF, v, x_t = wide(F, dF, v, x_t)
    t, gap, s = (x.to(F_wide.dtype) for x in (t, gap, s))
    coefficients = quotient_coefficients(t, gap, s, parameterization, tangent)
    c_x, c_F, c_d, c_v = (per_row(c, F_wide) for c in coefficients)
    quotient = (c_x * x_t + c_F * F_wide + c_d * dF + c_v * v).detach()
    mse = _row_mean(quotient.square())
    weight = (mse + eps).pow(-p)
    return -weight * _row_mean(F_wide * quotient), mse, weight
