"""Products of rows in float8, and the GELU between two of them: forwards without gradient.

``adaln.py`` makes the rows of a layer's input as it normalises it, and the kernel here those of the hidden units: the
row is in registers, so its scale costs no pass of its own. A weight's rows are rounded by torch, once a call.

Bytes per hidden unit in bfloat16: reads u, writes g: 2+1 = 3.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._activations import gelu
from ._cases import Case
from ._launch import Launch, constants, launch, require_dtype
from ._op import raw_op
from ._rows import load_row, row_columns, row_warps, store_rounded_row
from .reference_float8 import Float8Rows, float8_rows, scaled_product

# A quarter of the threads that adaLN has for a row: 4608 = 9 strips of 4 warps, with 48 registers ten rows, 90 KiB, on
# an SM, and 5 instructions a byte. With 16 warps a strip is 2048, of which the last is a quarter used: 9 a byte.
_FEWER, _FEWEST = 4, 4
_REGISTERS = 80


@triton.jit
def _gelu_rows_kernel(
    u_ptr,  # (R, M)
    g_ptr,  # (R, M) float8
    scale_ptr,  # (R,)
    M: tl.constexpr,
    THREADS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = row_columns(M, THREADS)
    g = gelu(load_row(u_ptr + row * M, columns, M))
    store_rounded_row(g_ptr + row * M, scale_ptr + row, columns, g, M)


def _gelu_rows(u: Tensor) -> tuple[Tensor, Tensor]:
    """Of u, (R, M): the GELU's rows in float8 and their scales (R,)."""
    u, (R, M) = u.contiguous(), u.shape
    g, scales = torch.empty_like(u, dtype=torch.float8_e4m3fn), u.new_empty(R, dtype=torch.float32)
    warps = max(row_warps(M) // _FEWER, _FEWEST)
    config = Launch(warps, max_registers=_REGISTERS)
    launch(_gelu_rows_kernel, lambda: (R,), u, g, scales, M=M, THREADS=32 * warps, config=config)
    return g, scales


def _product_fake(
    values: Tensor, scales: Tensor, columns: Tensor, column_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return values.new_empty((*values.shape[:-1], columns.shape[0]), dtype=dtype)


_gelu_rows_op = raw_op("gelu_rows", _gelu_rows)
_product_op = raw_op("float8_product", scaled_product, _product_fake)


@register_flop_formula(torch.ops.soflow.float8_product)
def _flops(values_shape, scales_shape, columns_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(values_shape) * columns_shape[0]


def float8_linear(h: Float8Rows, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`soflow_fast.kernels.reference_float8.float8_linear` as one operator, of which compilers know the shape."""
    weight, bias = constants(weight, bias)
    rows = float8_rows(weight)
    return _product_op(h.values, h.scales, rows.values, rows.scales, bias, h.dtype)


def gelu_rows(u: Tensor) -> Float8Rows:
    """Fused :func:`soflow_fast.kernels.reference.gelu_rows`, without gradient.

    Raises:
        ValueError: for a dtype that does not fit.
    """
    require_dtype("u", u)
    (flat,) = constants(u.reshape(-1, u.shape[-1]))
    g, scales = _gelu_rows_op(flat)
    return Float8Rows(g.view(u.shape), scales.view(u.shape[:-1]), u.dtype)


def cases() -> list[Case]:
    """The rows without gradient of a batch of 256."""

    def inputs(tokens: int, width: int):
        return lambda new: {"u": new.normal(new.rows(320) * tokens, 4 * width)}

    sizes = {"B/4": (64, 768), "XL/2": (256, 1152)}
    return [Case("gelu_rows", name, inputs(*size)) for name, size in sizes.items()]
