"""The mathematics of Solution Flow Models that is not an op: paths, solution functions, schedules, row assignment.

The scalar coefficients live with the kernels that use them and are re-exported here.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor

from soflow_fast.kernels.coefficients import (
    PARAMETERIZATIONS,
    PATHS,
    guidance_decay,
    path_coefficients,
    quotient_coefficients,
    require_choice,
    solution_coefficients,
    velocity_scale,
)

__all__ = [
    "GAP_SCHEDULES",
    "PARAMETERIZATIONS",
    "PATHS",
    "as_fraction",
    "clean_sample",
    "gap_ratio",
    "guidance_decay",
    "logit_normal",
    "path_coefficients",
    "quotient_coefficients",
    "row_order",
    "row_period",
    "solution_coefficients",
    "velocity_scale",
]

GAP_SCHEDULES = ("const", "linear", "cosine", "exponential")


def clean_sample(x_t: Tensor, v: Tensor, t: Tensor, path: str) -> Tensor:
    """``x_0 = (β' x_t − β v) / (αβ' − α'β)`` of a point of a path and the velocity there; ``x_t − t v`` on the linear.

    Args:
        x_t, v: (B, ...) floating point. t: (B,) in [0, 1].

    Returns:
        (B, ...), of the wider dtype of both.
    """
    alpha, beta, dalpha, dbeta = path_coefficients(t, path)
    of_x, of_v = (c.to(x_t.dtype).view(-1, *[1] * (x_t.dim() - 1)) for c in (dbeta, -beta))
    return (of_x * x_t + of_v * v) / (alpha * dbeta - dalpha * beta).to(x_t.dtype).view_as(of_x)


def gap_ratio(progress: float | Tensor, schedule: str, init: float, end: float) -> Tensor:
    """``r(k)``, the gap t−l as a share of t−s, at training progress k.

    Args:
        progress: k in [0, 1], a number or a 0-d tensor (a tensor is not read on the host).
        schedule: ``const`` (r = end), ``linear``, ``cosine`` or ``exponential`` (``init·(end/init)^k``).
        init, end: r at k=0 and at k=1, in (0, 1].

    Returns:
        0-d tensor, float32 (the dtype of a tensor progress).

    Raises:
        ValueError: for a schedule that is not known.
    """
    require_choice("schedule", schedule, GAP_SCHEDULES)
    k = torch.as_tensor(progress, dtype=None if torch.is_tensor(progress) else torch.float32)
    if schedule == "const":
        return torch.full_like(k, end)
    if schedule == "linear":
        return init + (end - init) * k
    if schedule == "cosine":
        return end + (init - end) * 0.5 * (1 + torch.cos(math.pi * k))
    return init * torch.exp(k * math.log(end / init))


def logit_normal(z: Tensor, mean: float, std: float) -> Tensor:
    """``sigmoid(mean + std·z)``: times in (0, 1) from standard normal draws z, any shape."""
    return torch.sigmoid(mean + std * z)


def row_order(n: int, velocity_share: float, first_row: int = 0) -> tuple[list[int], int]:
    """Which of the global rows ``first_row .. first_row+n-1`` train the velocity and which the consistency.

    Global row g is a consistency row when ``⌊(g+1)(1−share)⌋ > ⌊g(1−share)⌋``: an even spread that depends on g
    alone, so that any split of the global batch into processes and micro-batches trains the same rows the same way.

    Returns:
        ``(order, n_velocity)``: the offsets 0..n-1 with the velocity rows first, and how many they are.
    """
    rest = 1 - as_fraction(velocity_share)
    consistency = [math.floor((g + 1) * rest) > math.floor(g * rest) for g in range(first_row, first_row + n)]
    order = sorted(range(n), key=consistency.__getitem__)
    return order, n - sum(consistency)


def row_period(velocity_share: float) -> int:
    """After how many rows the pattern of :func:`row_order` repeats."""
    return as_fraction(velocity_share).denominator


def as_fraction(share: float) -> Fraction:
    """A share that a configuration gives as a decimal, in lowest terms."""
    return Fraction(share).limit_denominator(10**6)
