"""The backward of self-attention, and how its kernels and the forward's are launched; see ``self_attention.py``.

Shapes: B rows (samples), N tokens, H heads, h head dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention import Blocks, dot, load, main_columns, own_block, scores, store
from ._launch import launch

# As many queries as keys: the kernel for keys has blocks of the size that the others pad lse and delta to.
#
# 64 × 64 scores by 4 warps: on sm_90 three programs fit on an SM, two of the backward's for keys (202 registers), and
# the products of some hide behind the exponentials of others. Larger blocks with 8 warps leave fewer, or spill.
_HALF = Blocks(num_warps=4, num_stages=2, queries=64, keys=64, tensor_cores=True)
# Head dims above 80.
_HALF_WIDE = Blocks(num_warps=8, queries=64, keys=64, tensor_cores=True)
# On the FMA units, exact and slow. With one or two stages a head dim below 80 spills somewhere.
_FLOAT32 = Blocks(num_warps=2, num_stages=3, queries=16, keys=16)


def blocks(y: Tensor) -> Blocks:
    """How a kernel is launched for y of this dtype and head dim."""
    if y.dtype == torch.float32:
        return _FLOAT32
    return _HALF_WIDE if y.shape[-1] > 80 else _HALF


def run(kernel, tensors, y: Tensor, config: Blocks, **constants) -> None:
    """Launches with a program for each block of tokens of every head."""
    B, n, _, heads, h = y.shape
    launch(
        kernel,
        lambda: (triton.cdiv(n, config.keys) * heads * B,),
        *tensors,
        n,
        heads,
        HEAD=h,
        MAIN=main_columns(h),
        QUERIES=config.queries,
        KEYS=config.keys,
        config=config,
        **constants,
    )


@triton.jit
def _rows(rows, n, EVEN: tl.constexpr):
    """Rows, those beyond the last one replaced by it: copies, whose p is 0, take fewer registers than masked loads."""
    return rows if EVEN else tl.minimum(rows, n - 1)


@triton.jit
def _dots(a, b, b_tail, acc, acc_tail, TAIL: tl.constexpr):
    """``acc + a b`` over the columns of main and of tail."""
    acc = dot(a, b, acc)
    if TAIL:
        acc_tail = dot(a, b_tail, acc_tail)
    return acc, acc_tail


@triton.jit
def _delta(o_ptr, do, do_tail, stride, rows, n, HEAD: tl.constexpr, MAIN: tl.constexpr, EVEN: tl.constexpr):
    """δ, of which nothing else is needed of o."""
    o, o_tail = load(o_ptr, stride, rows, n, HEAD, MAIN, EVEN)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    if HEAD > MAIN:
        delta += tl.sum(do_tail.to(tl.float32) * o_tail.to(tl.float32), 1)
    return delta


@triton.jit
def _store(dy_ptr, dy, dy_tail, rows, left, stride, HEAD: tl.constexpr, MAIN: tl.constexpr):
    """A block of dq, dk or dv."""
    store(dy_ptr, dy, rows, tl.arange(0, MAIN), left, stride, HEAD)
    if HEAD > MAIN:
        store(dy_ptr, dy_tail, rows, MAIN + tl.arange(0, 16), left, stride, HEAD)


@triton.jit
def _store_sums(sums_ptr, sums, sums_tail, HEAD: tl.constexpr, MAIN: tl.constexpr):
    columns = tl.arange(0, MAIN)
    tl.store(sums_ptr + columns, sums, mask=columns < HEAD)
    if HEAD > MAIN:
        columns = MAIN + tl.arange(0, 16)
        tl.store(sums_ptr + columns, sums_tail, mask=columns < HEAD)


@triton.jit
def _store_known_sums(sums_ptr, do, do_tail, width, HEAD: tl.constexpr, MAIN: tl.constexpr):
    """What the columns of dk and of dv add up to over all tokens, known without them: zeros, and the sums of do.

    Each row of dS adds up to 0, and each of P to 1. A bias of the keys moves all scores of a query alike, which the
    softmax does not see; added up, dk would leave rounding errors, and Adam makes whole steps of the smallest gradient.
    """
    _store_sums(sums_ptr + width, tl.zeros((MAIN,), tl.float32), tl.zeros((16,), tl.float32), HEAD, MAIN)
    sums, sums_tail = tl.sum(do.to(tl.float32), 0), tl.sum(do_tail.to(tl.float32), 0)
    _store_sums(sums_ptr + 2 * width, sums, sums_tail, HEAD, MAIN)


@triton.jit(do_not_specialize=["n", "heads"])
def _queries_backward_kernel(
    y_ptr,  # (B, N, 3, H, h)
    do_ptr,  # (B, N, H, h)
    o_ptr,  # (B, N, H, h)
    lse_ptr,  # (B, H, blocks · QUERIES)
    delta_ptr,  # (B, H, blocks · QUERIES), written
    dy_ptr,  # (B, N, 3, H, h), of which dq is written
    sums_ptr,  # (B, blocks, 3, H, h), written
    n,
    heads,
    HEAD: tl.constexpr,
    MAIN: tl.constexpr,
    EVEN: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    TAIL: tl.constexpr = HEAD > MAIN
    row, head, first = own_block(n, heads, QUERIES)
    queries, left = tl.arange(0, QUERIES), (n - first).to(tl.int32)
    width = heads * HEAD
    stride = 3 * width
    sample = row * n * stride + head * HEAD
    own = sample + first * stride
    own_o = ((row * n + first) * heads + head) * HEAD
    statistics = tl.program_id(0).to(tl.int64) * QUERIES + queries
    scale: tl.constexpr = HEAD**-0.5
    scale_log2: tl.constexpr = scale * 1.4426950408889634

    rows = _rows(queries, left, EVEN)
    q, q_tail = load(y_ptr + own, stride, rows, left, HEAD, MAIN, True)
    do, do_tail = load(do_ptr + own_o, width, queries, left, HEAD, MAIN, EVEN)  # without copies: it is summed
    lse = tl.load(lse_ptr + statistics)
    delta = _delta(o_ptr + own_o, do, do_tail, width, rows, left, HEAD, MAIN, True)
    tl.store(delta_ptr + statistics, delta)
    sums_ptr += (row * tl.cdiv(n, QUERIES) + first // QUERIES) * stride + head * HEAD
    _store_known_sums(sums_ptr, do, do_tail, width, HEAD, MAIN)  # after the loop: 218 registers
    dq = tl.zeros((QUERIES, MAIN), tl.float32)
    dq_tail = tl.zeros((QUERIES, 16), tl.float32)
    for start in range(0, n, KEYS):
        keys = start + tl.arange(0, KEYS)
        rows = _rows(keys, n, EVEN)
        k, k_tail = load(y_ptr + sample + width, stride, rows, n, HEAD, MAIN, True)
        s = scores(q, q_tail, k, k_tail, tl.zeros((QUERIES, KEYS), tl.float32), TAIL)
        if not EVEN:
            s = tl.where(keys[None, :] < n, s, float("-inf"))
        p = tl.exp2(s * scale_log2 - lse[:, None])
        v, v_tail = load(y_ptr + sample + 2 * width, stride, rows, n, HEAD, MAIN, True)
        dp = scores(do, do_tail, v, v_tail, tl.zeros((QUERIES, KEYS), tl.float32), TAIL)
        ds = (p * (dp - delta[:, None])).to(q.dtype)
        dq, dq_tail = _dots(ds, k, k_tail, dq, dq_tail, TAIL)

    dq, dq_tail = dq * scale, dq_tail * scale
    _store(dy_ptr + own, dq, dq_tail, queries, left, stride, HEAD, MAIN)
    # Of rows beyond the sequence p is 0, and so is dq.
    _store_sums(sums_ptr, tl.sum(dq, 0), tl.sum(dq_tail, 0), HEAD, MAIN)


@triton.jit(do_not_specialize=["n", "heads"])
def _keys_backward_kernel(
    y_ptr,  # (B, N, 3, H, h)
    do_ptr,  # (B, N, H, h)
    lse_ptr,  # (B, H, blocks · KEYS)
    delta_ptr,  # (B, H, blocks · KEYS)
    dy_ptr,  # (B, N, 3, H, h), of which dk and dv are written
    n,
    heads,
    HEAD: tl.constexpr,
    MAIN: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    TAIL: tl.constexpr = HEAD > MAIN
    row, head, first = own_block(n, heads, KEYS)
    keys, left = tl.arange(0, KEYS), (n - first).to(tl.int32)
    width = heads * HEAD
    stride = 3 * width
    sample = row * n * stride + head * HEAD
    own = sample + first * stride + width
    do_ptr += (row * n * heads + head) * HEAD
    statistics = tl.program_id(0).to(tl.int64) * KEYS - first
    scale: tl.constexpr = HEAD**-0.5
    scale_log2: tl.constexpr = scale * 1.4426950408889634

    rows = _rows(keys, left, False)  # with masks sm_80 is a register short, even where no key is missing
    k, k_tail = load(y_ptr + own, stride, rows, left, HEAD, MAIN, True)
    v, v_tail = load(y_ptr + own + width, stride, rows, left, HEAD, MAIN, True)
    dk = tl.zeros((KEYS, MAIN), tl.float32)
    dv = tl.zeros((KEYS, MAIN), tl.float32)
    dk_tail = tl.zeros((KEYS, 16), tl.float32)
    dv_tail = tl.zeros((KEYS, 16), tl.float32)
    for start in range(0, n, QUERIES):
        queries = start + tl.arange(0, QUERIES)
        rows = _rows(queries, n, False)
        q, q_tail = load(y_ptr + sample, stride, rows, n, HEAD, MAIN, True)
        lse = tl.load(lse_ptr + statistics + queries)
        # Transposed, p and ds are in the registers that the products after them read.
        s = scores(k, k_tail, q, q_tail, tl.zeros((KEYS, QUERIES), tl.float32), TAIL)
        p = tl.exp2(s * scale_log2 - lse[None, :])
        do, do_tail = load(do_ptr, width, rows, n, HEAD, MAIN, True)
        dv, dv_tail = _dots(p.to(k.dtype), do, do_tail, dv, dv_tail, TAIL)
        dp = scores(v, v_tail, do, do_tail, tl.zeros((KEYS, QUERIES), tl.float32), TAIL)
        delta = tl.load(delta_ptr + statistics + queries)
        ds = (p * (dp - delta[None, :])).to(k.dtype)
        dk, dk_tail = _dots(ds, q, q_tail, dk, dk_tail, TAIL)

    _store(dy_ptr + own, dk * scale, dk_tail * scale, keys, left, stride, HEAD, MAIN)
    _store(dy_ptr + own + width, dv, dv_tail, keys, left, stride, HEAD, MAIN)


@triton.jit(do_not_specialize=["n", "heads"])
def _short_backward_kernel(
    y_ptr,  # (B, N, 3, H, h)
    do_ptr,  # (B, N, H, h)
    o_ptr,  # (B, N, H, h)
    lse_ptr,  # (B, H, QUERIES)
    dy_ptr,  # (B, N, 3, H, h)
    sums_ptr,  # (B, 3, H, h)
    n,
    heads,
    HEAD: tl.constexpr,
    MAIN: tl.constexpr,
    EVEN: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """All of a head's queries and keys, which are one block."""
    TAIL: tl.constexpr = HEAD > MAIN
    row, head, _ = own_block(n, heads, KEYS)
    tokens = tl.arange(0, KEYS)
    width = heads * HEAD
    stride = 3 * width
    own = row * n * stride + head * HEAD
    own_o = (row * n * heads + head) * HEAD
    scale: tl.constexpr = HEAD**-0.5
    scale_log2: tl.constexpr = scale * 1.4426950408889634

    q, q_tail = load(y_ptr + own, stride, tokens, n, HEAD, MAIN, EVEN)
    k, k_tail = load(y_ptr + own + width, stride, tokens, n, HEAD, MAIN, EVEN)
    v, v_tail = load(y_ptr + own + 2 * width, stride, tokens, n, HEAD, MAIN, EVEN)
    do, do_tail = load(do_ptr + own_o, width, tokens, n, HEAD, MAIN, EVEN)
    lse = tl.load(lse_ptr + tl.program_id(0).to(tl.int64) * QUERIES + tokens)
    delta = _delta(o_ptr + own_o, do, do_tail, width, tokens, n, HEAD, MAIN, EVEN)
    sums_ptr += row * stride + head * HEAD
    _store_known_sums(sums_ptr, do, do_tail, width, HEAD, MAIN)
    s = scores(k, k_tail, q, q_tail, tl.zeros((KEYS, QUERIES), tl.float32), TAIL)  # transposed
    if not EVEN:
        s = tl.where(tokens[:, None] < n, s, float("-inf"))
    p = tl.exp2(s * scale_log2 - lse[None, :])
    dp = scores(v, v_tail, do, do_tail, tl.zeros((KEYS, QUERIES), tl.float32), TAIL)
    ds = (p * (dp - delta[None, :])).to(k.dtype)

    zero, zero_tail = tl.zeros((KEYS, MAIN), tl.float32), tl.zeros((KEYS, 16), tl.float32)
    dv, dv_tail = _dots(p.to(k.dtype), do, do_tail, zero, zero_tail, TAIL)
    _store(dy_ptr + own + 2 * width, dv, dv_tail, tokens, n, stride, HEAD, MAIN)
    dk, dk_tail = _dots(ds, q, q_tail, zero, zero_tail, TAIL)
    _store(dy_ptr + own + width, dk * scale, dk_tail * scale, tokens, n, stride, HEAD, MAIN)
    dq, dq_tail = _dots(ds.T, k, k_tail, zero, zero_tail, TAIL)
    dq, dq_tail = dq * scale, dq_tail * scale
    _store(dy_ptr + own, dq, dq_tail, tokens, n, stride, HEAD, MAIN)
    _store_sums(sums_ptr, tl.sum(dq, 0), tl.sum(dq_tail, 0), HEAD, MAIN)


def backward(y: Tensor, do: Tensor, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """``(dy, sums)``: (B, N, 3, H, h), and (B, blocks, 3·H·h), which add up to the sums of its columns."""
    B, n, _, heads, h = y.shape
    config = blocks(y)
    dy, do = torch.empty_like(y), do.contiguous()
    sums = y.new_empty((B, triton.cdiv(n, config.keys), 3 * heads * h), dtype=torch.float32)
    even = n % config.keys == 0
    if n <= config.keys:
        run(_short_backward_kernel, (y, do, o, lse, dy, sums), y, config, EVEN=even)
        return dy, sums
    delta = torch.empty_like(lse)
    run(_queries_backward_kernel, (y, do, o, lse, delta, dy, sums), y, config, EVEN=even)
    run(_keys_backward_kernel, (y, do, lse, delta, dy), y, config)
    return dy, sums
