"""Scalar functions of time that the ops and the objectives share: paths, solution functions, the quotient, guidance.

Time runs from data at ``t=0`` to noise at ``t=1``. Every function is elementwise over float tensors ``t, s, gap`` of
any one shape, keeps their dtype and returns tensors of that shape; the name of a path or parameterization that is not
known is a ValueError. Source: SoFlow (arXiv 2512.15657).
"""

import math

import torch
from torch import Tensor

PATHS = ("linear", "trig")
PARAMETERIZATIONS = ("euler", "trig")

_HALF_PI = math.pi / 2


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """ValueError unless value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(choices)}")


def path_coefficients(t: Tensor, path: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(α, β, α', β')`` of the path ``x_t = α x_0 + β ε`` and of its velocity ``v_t = α' x_0 + β' ε``.

    ``linear``: α = 1−t, β = t. ``trig``: α = cos(πt/2), β = sin(πt/2).
    """
    require_choice("path", path, PATHS)
    if path == "linear":
        one = torch.ones_like(t)
        return 1 - t, t, -one, one
    cos, sin = torch.cos(_HALF_PI * t), torch.sin(_HALF_PI * t)
    return cos, sin, -_HALF_PI * sin, _HALF_PI * cos


def solution_coefficients(t: Tensor, s: Tensor, parameterization: str) -> tuple[Tensor, Tensor]:
    """``(a, b)`` of the solution function ``f(x,t,s) = a(t,s) x + b(t,s) F(x,t,s)``, with ``f(x,t,t) = x``.

    ``euler``: a = 1, b = s−t. ``trig``: a = cos(π(s−t)/2), b = sin(π(s−t)/2).
    """
    require_choice("parameterization", parameterization, PARAMETERIZATIONS)
    if parameterization == "euler":
        return torch.ones_like(t), s - t
    angle = _HALF_PI * (s - t)
    return torch.cos(angle), torch.sin(angle)


def velocity_scale(parameterization: str) -> float:
    """``∂_s b(t,s)`` at ``s=t``: the model's velocity is this times ``F(x,t,t)`` (``∂_s a`` vanishes there)."""
    require_choice("parameterization", parameterization, PARAMETERIZATIONS)
    return 1.0 if parameterization == "euler" else _HALF_PI


def quotient_coefficients(
    t: Tensor, gap: Tensor, s: Tensor, parameterization: str, tangent: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(c_x, c_F, c_d, c_v)`` such that the consistency quotient is ``Δ = c_x x_t + c_F F + c_d dF + c_v v``.

    ``Δ = (f(x_t,t,s) − f(x_l,l,s)) / gap`` with ``l = t − gap``, ``x_l = x_t − gap·v`` and ``dF = F(x_l,l,s) −
    F(x_t,t,s)``. The differences of a and b are taken by product formulas, so nothing cancels however small the gap
    is. With ``tangent`` the coefficients are the limit ``gap → 0`` and ``dF`` is the directional derivative of F along
    ``(dx, dt) = (−v, −1)``.

    Args:
        t, gap, s: times of the row, ``0 <= s <= t − gap``; gap is carried, never recomputed from l.
    """
    require_choice("parameterization", parameterization, PARAMETERIZATIONS)
    if parameterization == "euler":
        one = torch.ones_like(t)
        c_d = (t - s) if tangent else ((t - s) - gap) / gap
        return torch.zeros_like(t), -one, c_d, one
    angle = _HALF_PI * (t - s)  # a(t,s) = cos(angle), b(t,s) = −sin(angle)
    if tangent:
        sin, cos = torch.sin(angle), torch.cos(angle)
        return -_HALF_PI * sin, -_HALF_PI * cos, sin, cos
    half = _HALF_PI / 2 * gap
    chord = 2 * torch.sin(half) / gap  # (b(t,s) − b(l,s)) / gap over the cosine of the midpoint
    middle, shifted = angle - half, angle - 2 * half
    return -chord * torch.sin(middle), -chord * torch.cos(middle), torch.sin(shifted) / gap, torch.cos(shifted)


def guidance_decay(t: Tensor, decay_time: float) -> Tensor:
    """``g(t)``, in [0, 1], the factor on the guidance near pure noise.

    ``g = 1`` for ``t <= τ``; above, ``1 − exp(−k q/(1−q))`` with ``q = clamp((1−t)/(1−τ), 0, 1−1e-6)`` and ``k =
    0.025``, as published. ``τ >= 1`` means 1 everywhere.
    """
    if decay_time >= 1:
        return torch.ones_like(t)
    q = ((1 - t) / (1 - decay_time)).clamp(0, 1 - 1e-6)
    return torch.where(t <= decay_time, torch.ones_like(t), -torch.expm1(-0.025 * q / (1 - q)))
