"""A row of D channels held by one program: how its columns lie on the threads, and loads, stores and sums of it.

A row is cut into strips of 4 columns per thread; a strip is one coalesced access of a warp, 16 bytes a thread in
float32 and 8 in bfloat16. (8 columns a thread would be 16 bytes in bfloat16, but then a float32 store leaves gaps, and
the compiler moves such values through shared memory.) As the width is a compile-time constant, the compiler drops the
tests of whole strips and every strip beyond the row: 1152 = 2¼ strips of 512 cost 3 strips, not the 4 of a power of
two, and need no second code path for the remainder.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._launch import require_dtype, require_shape
from .reference_float8 import LARGEST, LEAST

_VECTOR = tl.constexpr(4)
_MAX_STRIPS = 3
_LARGEST, _LEAST = tl.constexpr(LARGEST), tl.constexpr(LEAST)


def row_warps(width: int) -> int:
    """Warps per row: the fewest, so that reductions stay narrow, that leave at most 3 strips (12 values) a thread."""
    threads = triton.cdiv(width, _VECTOR.value * _MAX_STRIPS)
    return triton.next_power_of_2(triton.cdiv(threads, 32))


def require_tokens(**tensors: Tensor) -> list[Tensor]:
    """The tensors, contiguous; ValueError unless all are (rows, tokens, width) like the first, in known dtypes."""
    shape = next(iter(tensors.values())).shape
    for name, tensor in tensors.items():
        if len(shape) != 3:
            raise ValueError(f"{name} has shape {tuple(shape)} where (rows, tokens, width) is needed")
        require_shape(name, tensor, shape)
        require_dtype(name, tensor)
    return [tensor.contiguous() for tensor in tensors.values()]


def require_modulation(x: Tensor, **modulation: Tensor) -> list[Tensor]:
    """Shifts, scales and gates with contiguous rows; ValueError unless all are (rows, width) of x in one dtype."""
    dtype = next(iter(modulation.values())).dtype
    for name, tensor in modulation.items():
        require_shape(name, tensor, (x.shape[0], x.shape[2]))
        require_dtype(name, tensor)
        if tensor.dtype != dtype:
            raise ValueError(
                f"{name} has dtype {tensor.dtype} where {dtype} is needed: all modulation shares one dtype"
            )
    return [tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in modulation.values()]


def require_bias(x: Tensor, bias: Tensor | None) -> Tensor | None:
    """The bias, contiguous, or None; ValueError unless it is (width,) of x in a known dtype."""
    if bias is None:
        return None
    require_shape("bias", bias, x.shape[2:])
    require_dtype("bias", bias)
    return bias.contiguous()


@triton.jit
def row_columns(D: tl.constexpr, THREADS: tl.constexpr):
    """The columns of a row, (strips, 4·THREADS); those beyond D are masked by the functions below.

    That a thread holds 4 columns of every strip is the compiler's choice, from what it knows to be contiguous: 4
    columns, by the hint, in the second dimension alone. (strips, THREADS, 4) would leave it two dimensions of 1 to
    order, and of these Triton 3.6 and 3.9 put different ones first.
    """
    strips: tl.constexpr = triton.next_power_of_2(triton.cdiv(D, _VECTOR * THREADS))
    column = tl.max_contiguous(tl.arange(0, _VECTOR * THREADS), _VECTOR)
    return tl.arange(0, strips)[:, None] * (_VECTOR * THREADS) + column[None, :]


@triton.jit
def load_row(ptr, columns, D: tl.constexpr):
    """The row at ptr in float32, 0 beyond D."""
    return tl.load(ptr + columns, mask=columns < D, other=0.0).to(tl.float32)


@triton.jit
def store_row(ptr, columns, row, D: tl.constexpr):
    """Rounds the row to the pointer's dtype and stores it."""
    tl.store(ptr + columns, row.to(ptr.dtype.element_ty), mask=columns < D)


@triton.jit
def store_rounded_row(ptr, scale_ptr, columns, row, D: tl.constexpr):
    """Stores a row, zero beyond D, in float8, over the scale that its largest value gives; and the scale."""
    vectors = tl.reshape(tl.abs(row), (row.shape[0], row.shape[1] // _VECTOR, _VECTOR))
    largest = tl.maximum(tl.max(tl.max(tl.max(vectors, 2), 0), 0), _LEAST)
    store_row(ptr, columns, row * (_LARGEST / largest), D)
    tl.store(scale_ptr, largest / _LARGEST)


@triton.jit
def _add_2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _add_3(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def _thread_sum(row):
    """(THREADS,): the sum of what each thread holds, first within its strips: a strip beyond the row adds one zero."""
    vectors = tl.reshape(row, (row.shape[0], row.shape[1] // _VECTOR, _VECTOR))
    return tl.sum(tl.sum(vectors, 2), 0)


@triton.jit
def sum_row(row):
    """The sum of a row, zero beyond D."""
    return tl.sum(_thread_sum(row), 0)


@triton.jit
def sum_rows_2(a, b):
    """The sums of two rows, with one exchange between the threads."""
    return tl.reduce((_thread_sum(a), _thread_sum(b)), 0, _add_2)


@triton.jit
def sum_rows_3(a, b, c):
    """The sums of three rows, with one exchange between the threads."""
    return tl.reduce((_thread_sum(a), _thread_sum(b), _thread_sum(c)), 0, _add_3)
