"""Rows in float8, each with a scale of its own, and products of them: for forwards without gradient.

    scale = max|row| / 448,    row ≈ values·scale,    h Wᵀ ≈ (values_h values_Wᵀ)·scale_h·scale_W

Tensor cores multiply float8 twice as fast as bfloat16. e4m3 has 3 bits of mantissa: a value is off by up to 6 % of
itself, and one below 1/16,000 of its row's largest is lost, which the scale of each row keeps apart from other rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float8_e4m3fn).max
#: of |row|, so that a row of zeros has a scale
LEAST = 1e-30


class Float8Rows(NamedTuple):
    """A matrix in float8 in place of one in ``dtype``, also as what a product takes.

    Attributes:
        values: (..., D) float8 e4m3. scales: (...) float32. dtype: of what is computed from it.
    """

    values: Tensor
    scales: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """(..., D)."""
        return self.values.shape

    def to(self, dtype: torch.dtype) -> Tensor:
        """The rows as a tensor (..., D)."""
        return (self.values.float() * self.scales[..., None]).to(dtype)


def float8_rows(x: Tensor, dtype: torch.dtype | None = None) -> Float8Rows:
    """The rows of x, (..., D), in float8. dtype: of what is computed from them, by default that of x."""
    wide = x.float()
    scales = wide.abs().amax(-1).clamp(min=LEAST) / LARGEST
    return Float8Rows((wide / scales[..., None]).to(torch.float8_e4m3fn), scales, dtype or x.dtype)


def scaled_product(
    values: Tensor, scales: Tensor, columns: Tensor, column_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The product of two matrices of rows in float8, (..., D) and (M, D), and a bias (M,): (..., M) in that dtype.

    On a GPU by torch's scaled product, which adds up in the tensor cores' own precision; dtype is bfloat16 there, that
    of the bias too, and D and M are multiples of 16. Elsewhere the same operands are multiplied in float32.
    """
    if not values.is_cuda:
        out = (values.float() @ columns.float().mT) * scales[..., None] * column_scales
        return (out if bias is None else out + bias).to(dtype)
    out = torch._scaled_mm(
        values.flatten(0, -2),
        columns.mT,
        scales.reshape(-1, 1),
        column_scales[None],
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=True,
    )
    return out.view(*values.shape[:-1], columns.shape[0])


def float8_linear(h: Float8Rows, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``h Wᵀ + bias`` in the dtype that h stands for, the weight's rows rounded to float8 as well.

    Args:
        h: (..., D). weight: (M, D). bias: (M,) in that dtype.

    Returns:
        (..., M).
    """
    rows = float8_rows(weight)
    return scaled_product(h.values, h.scales, rows.values, rows.scales, bias, h.dtype)


def linear(h: Tensor | Float8Rows, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``h Wᵀ + bias`` in the dtype of h, by :func:`float8_linear` for rows in float8."""
    return (float8_linear if isinstance(h, Float8Rows) else torch.nn.functional.linear)(h, weight, bias)


def gelu_rows(u: Tensor) -> Float8Rows | Tensor:
    """The tanh GELU of u (..., M), in place of one in its dtype; of float64 a tensor, which is not rounded."""
    if u.dtype == torch.float64:
        return torch.nn.functional.gelu(u, approximate="tanh")
    return float8_rows(torch.nn.functional.gelu(u.float(), approximate="tanh"), u.dtype)


def in_rows(x: Tensor, dtype: torch.dtype, computed: torch.dtype) -> Float8Rows | Tensor:
    """x in that dtype: of float8 its rows, of which things are computed in the other dtype."""
    return float8_rows(x, computed) if dtype == torch.float8_e4m3fn else x.to(dtype)
