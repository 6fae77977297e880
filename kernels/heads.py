"""The projection to queries, keys and values, one tensor per head, whose backward packs and sums in one pass.

    y = h Wᵀ + bias, (B, N, 3, H, h);   q, k, v are views of y
    dy = [dq dk dv],   dbias = Σ_tokens dy,   dh = dy W,   dW = dyᵀ h

The forward is one product, bias in its epilogue. The backward of attention returns three tensors; the products of the
backward want one. Autograd stacks them, and the bias's gradient reads the stack once more; here one kernel copies them
and keeps the sums of its columns in registers. It writes them as float32 partial sums (chunks, 3, H·h), which torch
adds in a fixed order.

Shapes: B rows (samples), N tokens, D = H·h width, H heads, h head dim.

Bytes per token and column of y, bfloat16: dq, dk, dv read, dy written: 2+2 = 4, and 8/256 of partial sums, written and
read; stacked and then summed 6.

Saved for the backward: h and W. A gradient that does not arrive is not read.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from ._cases import Case, Inputs
from ._launch import Launch, launch, require_dtype, require_shape
from ._op import autocast, raw_op
from ._projection import projection_gradients
from ._rows import require_tokens
from .float8 import float8_linear
from .reference import split_heads
from .reference_float8 import Float8Rows

# A program has the same 16 groups of columns of q, k and v: a group is one access of 16 bytes, so a half warp reads 256
# bytes in a row, and 128 columns of bfloat16 divide the width of every preset. Its 8 warps take 16 tokens at a time,
# one a thread, three accesses each: at 64 registers 48 KiB are on the way on each SM, where a microsecond of latency at
# 4.3 TB/s needs 32.
_GROUPS = 16
_TOKENS = 16
_LAUNCH = Launch(num_warps=8, max_registers=64)
_ACCESS_BYTES = 16

# Tokens per program: 256 keep the partial sums at 0.8 % of the bytes (bfloat16); where that leaves less than 2 programs
# for each of an H100's 132 SMs, 64.
_CHUNKS = (256, 64)
_ENOUGH_PROGRAMS = 264


@triton.jit
def _load(ptr, sample, token, stride_b, stride_n, columns, mask, like_ptr):
    """A tile of (GROUPS, TOKENS, VECTOR) values as they are, 0 where masked; zeros where nothing arrives."""
    if ptr is None:
        return tl.zeros(mask.shape, like_ptr.dtype.element_ty)
    else:  # after a return in an `if` that it decides, Triton would compile on
        return tl.load(ptr + (sample * stride_b + token * stride_n) * mask.shape[2] + columns, mask=mask, other=0.0)


_STRIDES = [f"{part}stride_{axis}" for part in "qkv" for axis in "bhn"]


@triton.jit(do_not_specialize=[*_STRIDES, "rows", "N", "chunk"])
def _pack_heads_kernel(
    dq_ptr,  # (B, H, N, h), strides qstride_*; or None: zeros
    dk_ptr,  # (B, H, N, h), strides kstride_*; or None
    dv_ptr,  # (B, H, N, h), strides vstride_*; or None
    packed_ptr,  # (B, N, 3, H, h)
    partial_ptr,  # (chunks, 3, H, h)
    qstride_b: tl.int64,  # strides count VECTOR elements, which tells the compiler how pointers are aligned
    qstride_h: tl.int64,
    qstride_n: tl.int64,
    kstride_b: tl.int64,
    kstride_h: tl.int64,
    kstride_n: tl.int64,
    vstride_b: tl.int64,
    vstride_h: tl.int64,
    vstride_n: tl.int64,
    rows: tl.int64,  # B·N
    N: tl.int32,
    chunk: tl.int64,
    D: tl.constexpr,
    HEAD: tl.constexpr,  # h
    VECTOR: tl.constexpr,  # columns of one access, which lie in one head
    GROUPS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None, None]
    column = group * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    head = group * VECTOR // HEAD
    inside = column - head * HEAD
    q_columns = head * qstride_h * VECTOR + inside
    k_columns = head * kstride_h * VECTOR + inside
    v_columns = head * vstride_h * VECTOR + inside

    first = tl.program_id(1).to(tl.int64) * chunk
    end = tl.minimum(first + chunk, rows)
    shape: tl.constexpr = (GROUPS, TOKENS, VECTOR)
    sum_q = tl.zeros(shape, tl.float32)
    sum_k = tl.zeros(shape, tl.float32)
    sum_v = tl.zeros(shape, tl.float32)
    for start in range(first, end, TOKENS):
        row = start + tl.arange(0, TOKENS)[None, :, None]
        mask = tl.broadcast_to((row < end) & (group * VECTOR < D), shape)
        # 32 bits, of which a division takes a quarter of the time; there are fewer than 2^31 tokens
        sample = (row.to(tl.int32) // N).to(tl.int64)
        token = (row.to(tl.int32) % N).to(tl.int64)
        dq = _load(dq_ptr, sample, token, qstride_b, qstride_n, q_columns, mask, packed_ptr)
        dk = _load(dk_ptr, sample, token, kstride_b, kstride_n, k_columns, mask, packed_ptr)
        dv = _load(dv_ptr, sample, token, vstride_b, vstride_n, v_columns, mask, packed_ptr)
        packed = packed_ptr + row * (3 * D) + column
        tl.store(packed, dq, mask=mask)
        tl.store(packed + D, dk, mask=mask)
        tl.store(packed + 2 * D, dv, mask=mask)
        sum_q += dq.to(tl.float32)
        sum_k += dk.to(tl.float32)
        sum_v += dv.to(tl.float32)
    partial = partial_ptr + tl.program_id(1).to(tl.int64) * (3 * D) + column
    tl.store(partial, tl.sum(sum_q, 1, keep_dims=True), mask=column < D)
    tl.store(partial + D, tl.sum(sum_k, 1, keep_dims=True), mask=column < D)
    tl.store(partial + 2 * D, tl.sum(sum_v, 1, keep_dims=True), mask=column < D)


def _tokens_per_program(rows: int, column_blocks: int) -> int:
    """See the launch table."""
    many, few = _CHUNKS
    return many if triton.cdiv(rows, many) * column_blocks >= _ENOUGH_PROGRAMS else few


def _aligned(x: Tensor | None, vector: int) -> Tensor | None:
    """The tensor if its heads have no holes and its strides are multiples of ``vector``; else a packed copy."""
    if x is None or (x.stride(-1) == 1 and all(stride % vector == 0 for stride in x.stride()[:-1])):
        return x
    return x.contiguous()


def _pack_heads_bwd(dq: Tensor | None, dk: Tensor | None, dv: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(packed, partials)``: dy (B, N, 3·D) and partial sums of its columns (chunks, 3·D); not all three are None."""
    given = next(x for x in (dq, dk, dv) if x is not None)
    B, heads, N, h = given.shape
    vector = math.gcd(_ACCESS_BYTES // given.element_size(), h)
    parts = [_aligned(x, vector) for x in (dq, dk, dv)]
    column_blocks = triton.cdiv(heads * h, _GROUPS * vector)
    chunk = _tokens_per_program(B * N, column_blocks)
    chunks = triton.cdiv(B * N, chunk)
    packed = given.new_empty((B, N, 3 * heads * h))
    partials = given.new_empty((chunks, 3 * heads * h), dtype=torch.float32)
    launch(
        _pack_heads_kernel,
        lambda: (column_blocks, chunks),
        *parts,
        packed,
        partials,
        *(0 if x is None else stride // vector for x in parts for stride in (given if x is None else x).stride()[:3]),
        B * N,
        N,
        chunk,
        D=heads * h,
        HEAD=h,
        VECTOR=vector,
        GROUPS=_GROUPS,
        TOKENS=_TOKENS,
        config=_LAUNCH,
    )
    return packed, partials


_op = raw_op("pack_heads_bwd", _pack_heads_bwd)


@torch.compiler.allow_in_graph  # else a checkpoint that is compiled keeps what it should recompute
class _ProjectHeads(torch.autograd.Function):
    @staticmethod
    def forward(h, weight, bias, heads):
        # The views are made inside: those of an output would have autograd stack their gradients.
        return split_heads(nn.functional.linear(h, weight, bias), heads)

    @staticmethod
    def setup_context(ctx, inputs, output):
        h, weight, _, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, weight)

    @staticmethod
    def backward(ctx, dq, dk, dv):
        if dq is None and dk is None and dv is None:
            return (None,) * 4
        h, weight = ctx.saved_tensors
        packed, partials = _op(dq, dk, dv)
        return *projection_gradients(packed, partials, h, weight, ctx.needs_input_grad), None


def check_projection(h: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """h, contiguous; the ValueErrors of :func:`project_heads`."""
    (h,) = require_tokens(h=h)
    D = h.shape[2]
    for name, x, shape in (("weight", weight, (3 * D, D)), ("bias", bias, (3 * D,))):
        require_shape(name, x, shape)
        require_dtype(name, x)
        if x.dtype != h.dtype:
            raise ValueError(f"{name} has dtype {x.dtype} and h has {h.dtype}; convert one of them to the other's")
    if heads < 1 or D % heads:
        raise ValueError(f"heads={heads} does not divide the width {D} of h")
    return h


def project_heads(h: Tensor | Float8Rows, weight: Tensor, bias: Tensor, *, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fused :func:`soflow_fast.kernels.reference.project_heads`.

    Args:
        h: (B, N, D), also in float8, then without gradient. weight: (3D, D). bias: (3D,), all of one dtype. heads:
            divides D.

    Returns:
        ``(q, k, v)``, each (B, H, N, h), views of one (B, N, 3, H, h) tensor.

    Raises:
        ValueError: for a shape or dtype that does not fit, and for heads that do not divide D.
    """
    if isinstance(h, Float8Rows):
        return split_heads(float8_linear(h, weight, bias), heads)
    h, weight, bias = autocast(h, weight, bias)
    return _ProjectHeads.apply(check_projection(h, weight, bias, heads), weight, bias, heads)


def cases() -> list[Case]:
    """Shapes of a batch of 256."""

    def inputs(tokens: int, width: int):
        def make(new: Inputs) -> dict:
            h = new.normal(new.rows(256), tokens, width)
            weight = new.normal(3 * width, width, scale=width**-0.5)
            return {"h": h, "weight": weight, "bias": new.normal(3 * width, scale=0.1)}

        return make

    sizes = {"B/4": (64, 768, 12), "L/2": (256, 1024, 16), "XL/2": (256, 1152, 16)}
    return [
        Case("project_heads", name, inputs(tokens, width), {"heads": heads}, ("h", "weight", "bias"))
        for name, (tokens, width, heads) in sizes.items()
    ]
