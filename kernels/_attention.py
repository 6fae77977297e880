"""What the kernels of attention and of its difference share: blocks, loads of heads of any width, and products.

Shapes: N tokens, h head dim.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from ._launch import Launch
from ._math import expm1


@dataclass(frozen=True)
class Blocks(Launch):
    """A launch and its block: how many queries a program has, how many keys it takes at a time."""

    queries: int = 128
    keys: int = 32


def main_columns(h: int) -> int:
    """How many columns of a head come before a tail of 16: a power of two, so that 72 are not taken for 128."""
    return 64 if 64 < h <= 80 else max(16, triton.next_power_of_2(h))


@triton.jit
def own_block(n, heads, BLOCK: tl.constexpr):
    """Row, head and first token of a program's block of queries or keys; block after block, then the next head."""
    blocks = tl.cdiv(n, BLOCK)
    pid = tl.program_id(0)
    row = (pid // (blocks * heads)).to(tl.int64)
    head = (pid // blocks % heads).to(tl.int64)
    return row, head, (pid % blocks).to(tl.int64) * BLOCK


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 values rounded to the mantissa of dtype, just below a power of two to one bit less.

    NaN stays NaN, and what exceeds 2^111 becomes it.

    Two full-rate instructions, where converting back would occupy the units of the exps. Rounding the bits as integers
    would take two half-rate ones, and turn the NaN that a GPU makes, 0x7fffffff, into −0.
    """
    if dtype == tl.float32:
        return x
    dropped: tl.constexpr = 65536.0 if dtype == tl.bfloat16 else 8192.0  # of the mantissa's 24 bits, 16 or 13
    return tl.fma(x, -dropped, x * (dropped + 1))


@triton.jit
def rounded_expm1(x, dtype: tl.constexpr):
    """``exp(x) − 1``; where the result is rounded to half precision anyway, to 1e-5 of it, with fewer instructions."""
    if dtype == tl.float32:
        return expm1(x)
    return tl.where(tl.abs(x) < 0.0625, x * (1 + x * (1 / 2 + x * (1 / 6))), tl.exp2(1.4426950408889634 * x) - 1)


@triton.jit
def _load_columns(ptr, stride, rows, columns, n, HEAD: tl.constexpr, FULL: tl.constexpr, EVEN: tl.constexpr):
    pointers = ptr + rows[:, None] * stride + columns[None, :]
    if EVEN and FULL:
        return tl.load(pointers)
    if EVEN:
        return tl.load(pointers, mask=columns[None, :] < HEAD, other=0.0)
    return tl.load(pointers, mask=(rows[:, None] < n) & (columns[None, :] < HEAD), other=0.0)


@triton.jit
def load(ptr, stride, rows, n, HEAD: tl.constexpr, MAIN: tl.constexpr, EVEN: tl.constexpr):
    """Rows of a (n, h) matrix: their first MAIN columns and, where h is larger, a tail of 16; zeros outside."""
    main = _load_columns(ptr, stride, rows, tl.arange(0, MAIN), n, HEAD, HEAD >= MAIN, EVEN)
    tail = main
    if HEAD > MAIN:
        tail = _load_columns(ptr, stride, rows, MAIN + tl.arange(0, 16), n, HEAD, HEAD == MAIN + 16, EVEN)
    return main, tail


@triton.jit
def dot(a, b, acc):
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def scores(a, a_tail, b, b_tail, acc, TAIL: tl.constexpr):
    """``acc + a bᵀ`` over the columns of main and tail."""
    acc = dot(a, b.T, acc)
    if TAIL:
        acc = dot(a_tail, b_tail.T, acc)
    return acc


@triton.jit
def both_scores(
    q, q_tail, dq, dq_tail, q_moved, q_moved_tail, k_ptr, dk_ptr, stride, dstride, keys, n,
    HEAD: tl.constexpr, MAIN: tl.constexpr, TANGENT: tl.constexpr, EVEN: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """S and dS of a block of keys, before scaling; of keys that are not there −∞ and 0."""
    TAIL: tl.constexpr = HEAD > MAIN
    k, k_tail = load(k_ptr, stride, keys, n, HEAD, MAIN, EVEN)
    dk, dk_tail = load(dk_ptr, dstride, keys, n, HEAD, MAIN, EVEN)
    zero = tl.zeros((QUERIES, keys.shape[0]), tl.float32)
    s = scores(q, q_tail, k, k_tail, zero, TAIL)
    ds = scores(dq, dq_tail, k, k_tail, zero, TAIL)
    ds = scores(q_moved, q_moved_tail, dk, dk_tail, ds, TAIL)
    if not TANGENT and q.dtype != tl.float32:
        ds = scores(dq, dq_tail, dk, dk_tail, ds, TAIL)
    if not EVEN:
        s = tl.where(keys[None, :] < n, s, float("-inf"))
    return s, ds


@triton.jit
def store(ptr, tile, rows, columns, n, stride, HEAD: tl.constexpr):
    """Of a tile, the rows below n and the columns of the head."""
    pointers = ptr + rows[:, None] * stride + columns[None, :]
    tl.store(pointers, tile.to(ptr.dtype.element_ty), mask=(rows[:, None] < n) & (columns[None, :] < HEAD))
