"""Difference of softmax attention, ``O(q+dq, k+dk, v+dv) − O(q, k, v)``, without cancellation, in one pass over keys.

    dS = (dq·k + q·dk + dq·dk)/√h,  P = softmax(qkᵀ/√h),  E = expm1(dS − c),  Z = Σ_j P E
    dO = (Σ_j P E v + Σ_j P (1+E) dv − Z·O) / (1 + Z)

O, the primal output, is at hand from flash attention, so one accumulator is enough: like flash attention the kernel
keeps p̃ = exp(S − m), ℓ = Σ p̃, z = Σ p̃E and D = Σ p̃E v + p̃(1+E) dv, and ends with ``(D/ℓ − Z·O)/(1+Z)``, Z = z/ℓ.
The tangent drops dq·dk and has E = dS − c, P for P(1+E) and 1 for 1+Z.

Softmax does not see a shift c of dS that all keys of a query share. c is the mean of dS under P over the first block of
keys. It removes the part common to all dk, which is large because a shift of the time moves every token's modulation;
and the smaller Z becomes, the less the rounding of O counts.

In half precision the operands of all products are tensors as they are in memory, except p̃E and p̃(1+E). That is why
dq·(k+dk) is taken as two products: rounding k+dk would cost more accuracy, and writing it to shared memory more time,
than the sixth product. z sums the rounded p̃E, so that a part common to all v cancels. float32 is rounded inside the
products instead: there k and dk are centred over the tokens first, and q·dk + dq·dk is the one product (q+dq)·dk.

Where a step moves a query's attention so far that 1+Z leaves [⅕, 8], the mean of the first keys tells too little. Such
queries come out as NaN, and a second kernel, whose programs end at once where there are none, goes over their keys
twice: for the exact ``c = log Σ_j P exp(dS)``, with which Z vanishes and P E is the change of P, taken as a subtraction
where it is large; and for D.

Shapes: b rows, H heads, N tokens, h head dim. Bytes moved: the seven inputs and dO once (16·b·H·N·h in bf16); blocks of
queries after the first find the keys' four tensors in the L2 cache. Nothing is saved; the op has no gradient.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import MAX_HEAD_DIM
from ._attention import Blocks, both_scores, dot, load, main_columns, own_block, rounded, rounded_expm1, store
from ._cases import Case, Inputs
from ._launch import constants, launch, require_dtype, require_shape
from ._math import expm1
from ._op import raw_op

# On sm_90, 32 keys at a time keep a thread within 128 registers (150 at head dim 72 with 4 warps): 12 to 16 warps are
# resident on an SM, and the exponentials of some hide behind the products of others. 64 keys need 175 and leave 8.
# Two stages: the next keys arrive while these are used. With 128 queries a block, half as many read the keys from L2.
_HALF = Blocks(num_warps=8, num_stages=2, tensor_cores=True)
# More queries than tokens would idle.
_HALF_SHORT = Blocks(num_warps=4, num_stages=2, queries=64, tensor_cores=True)
# Head dims above 80: with more keys at a time sm_80, which holds the operands in registers, spills.
_HALF_WIDE = Blocks(num_warps=8, num_stages=2, keys=16, tensor_cores=True)
# float32 runs on the FMA units, exact and slow; larger blocks spill.
_FLOAT32 = Blocks(num_warps=4, num_stages=1, max_registers=168, queries=32, keys=16)

# Of the second kernel, what spills nowhere in the cases below. 64 queries are a warp group's products on sm_90, and few
# programs where all end at once; at 105 registers four are on an SM. 32 keys take a quarter fewer instructions where
# programs go on, and spill on sm_80.
_RARE = Blocks(num_warps=4, num_stages=2, queries=64, keys=16, idle=True, tensor_cores=True)
_RARE_WIDE = Blocks(num_warps=4, queries=32, keys=16, idle=True, tensor_cores=True)
_RARE_FLOAT32 = Blocks(num_warps=4, num_stages=2, queries=32, keys=16, idle=True)
_RARE_FLOAT32_NARROW = Blocks(num_warps=4, queries=16, keys=16, idle=True)


def _blocks(dtype: torch.dtype, h: int, n: int) -> Blocks:
    if dtype == torch.float32:
        return _FLOAT32
    if h > 80:
        return _HALF_WIDE
    return _HALF_SHORT if n <= 64 else _HALF


def _rare_blocks(dtype: torch.dtype, h: int) -> Blocks:
    if dtype == torch.float32:
        return _RARE_FLOAT32 if h > 32 else _RARE_FLOAT32_NARROW
    return _RARE_WIDE if h > 80 else _RARE


_STRIDES = [f"{of}stride_{axis}" for of in ("", "d", "o") for axis in "bhn"]


@triton.jit(do_not_specialize=["n", "heads", *_STRIDES])
def _attention_difference_kernel(
    q_ptr,  # (b, H, N, h), strides stride_*
    k_ptr,
    v_ptr,
    dq_ptr,  # (b, H, N, h), strides dstride_*
    dk_ptr,
    dv_ptr,
    o_ptr,  # (b, H, N, h), strides ostride_*
    do_ptr,  # (b, N, H, h), contiguous
    n,
    heads,
    scale,
    stride_b: tl.int64,  # strides count VECTOR elements, which tells the compiler how pointers are aligned
    stride_h,
    stride_n,
    dstride_b: tl.int64,
    dstride_h,
    dstride_n,
    ostride_b: tl.int64,
    ostride_h,
    ostride_n,
    HEAD: tl.constexpr,  # h
    MAIN: tl.constexpr,  # columns before the tail
    TANGENT: tl.constexpr,
    EVEN: tl.constexpr,  # the blocks divide N
    VECTOR: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    TAIL: tl.constexpr = HEAD > MAIN
    row, head, first = own_block(n, heads, QUERIES)
    queries, left = tl.arange(0, QUERIES), (n - first).to(tl.int32)

    offset = (row * stride_b + head * stride_h) * VECTOR
    doffset = (row * dstride_b + head * dstride_h) * VECTOR
    stride, dstride = stride_n * VECTOR, dstride_n * VECTOR
    scale_log2 = scale * 1.4426950408889634

    q, q_tail = load(q_ptr + offset + first * stride, stride, queries, left, HEAD, MAIN, EVEN)
    dq, dq_tail = load(dq_ptr + doffset + first * dstride, dstride, queries, left, HEAD, MAIN, EVEN)
    q_moved, q_moved_tail = q, q_tail
    if q.dtype == tl.float32:
        # A copy even in the tangent: of an operand that two products share, every value would stay in a register.
        MOVED: tl.constexpr = 0.0 if TANGENT else 1.0
        q_moved, q_moved_tail = q + MOVED * dq, q_tail + MOVED * dq_tail
    acc = tl.zeros((QUERIES, MAIN), tl.float32)  # D
    acc_tail = tl.zeros((QUERIES, 16), tl.float32)
    peak = tl.full((QUERIES,), float("-inf"), tl.float32)  # m, before scaling
    sum_p = tl.zeros((QUERIES,), tl.float32)  # ℓ
    sum_pe = tl.zeros((QUERIES,), tl.float32)  # z
    common = tl.zeros((QUERIES,), tl.float32)  # c

    for start in range(0, n, KEYS):
        keys = start + tl.arange(0, KEYS)
        s, ds = both_scores(
            q, q_tail, dq, dq_tail, q_moved, q_moved_tail, k_ptr + offset, dk_ptr + doffset, stride, dstride, keys, n,
            HEAD, MAIN, TANGENT, EVEN, QUERIES,
        )  # fmt: skip
        higher = tl.maximum(peak, tl.max(s, 1))
        decay = tl.exp2((peak - higher) * scale_log2)
        p = tl.exp2(s * scale_log2 - (higher * scale_log2)[:, None])
        block_p = tl.sum(p, 1)
        if start == 0:
            common = tl.sum(p * ds, 1) / block_p * scale
        e = ds * scale - common[:, None]
        if not TANGENT:
            e = rounded_expm1(e, q.dtype)
        pe = rounded(p * e, q.dtype)
        peak = higher
        sum_p = sum_p * decay + block_p
        sum_pe = sum_pe * decay + tl.sum(pe, 1)
        p_moved = (p if TANGENT else p + pe).to(q.dtype)
        pe = pe.to(q.dtype)
        v, v_tail = load(v_ptr + offset, stride, keys, n, HEAD, MAIN, EVEN)
        dv, dv_tail = load(dv_ptr + doffset, dstride, keys, n, HEAD, MAIN, EVEN)
        if TAIL:
            acc_tail = dot(pe, v_tail, dot(p_moved, dv_tail, acc_tail * decay[:, None]))
        acc = dot(pe, v, dot(p_moved, dv, acc * decay[:, None]))

    z = sum_pe / sum_p
    gain = 1 / sum_p if TANGENT else 1 / (sum_p + sum_pe)  # 1/(ℓ(1+Z))
    o_gain = z if TANGENT else z / (1 + z)
    if not TANGENT:
        gain = tl.where((z > -0.8) & (z < 7), gain, float("nan"))  # what overflowed fails a comparison
    ooffset = (row * ostride_b + head * ostride_h + first * ostride_n) * VECTOR
    o, o_tail = load(o_ptr + ooffset, ostride_n * VECTOR, queries, left, HEAD, MAIN, EVEN)
    do_ptr += ((row * n + first) * heads + head) * HEAD
    do = acc * gain[:, None] - o.to(tl.float32) * o_gain[:, None]
    store(do_ptr, do, queries, tl.arange(0, MAIN), left, heads * HEAD, HEAD)
    if TAIL:
        do = acc_tail * gain[:, None] - o_tail.to(tl.float32) * o_gain[:, None]
        store(do_ptr, do, queries, MAIN + tl.arange(0, 16), left, heads * HEAD, HEAD)


@triton.jit(do_not_specialize=["n", "heads", *_STRIDES[:6]])
def _large_change_kernel(
    q_ptr,  # (b, H, N, h), strides stride_*
    k_ptr,
    v_ptr,
    dq_ptr,  # (b, H, N, h), strides dstride_*
    dk_ptr,
    dv_ptr,
    do_ptr,  # (b, N, H, h), contiguous, NaN where it is wanted
    n,
    heads,
    scale,
    stride_b: tl.int64,
    stride_h,
    stride_n,
    dstride_b: tl.int64,
    dstride_h,
    dstride_n,
    HEAD: tl.constexpr,
    MAIN: tl.constexpr,
    EVEN: tl.constexpr,
    VECTOR: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """dO of the queries whose change is large; names as above."""
    TAIL: tl.constexpr = HEAD > MAIN
    row, head, first = own_block(n, heads, QUERIES)
    queries, left = tl.arange(0, QUERIES), (n - first).to(tl.int32)
    do_ptr += ((row * n + first) * heads + head) * HEAD
    marks = tl.load(do_ptr + queries * heads * HEAD, mask=queries < left, other=0.0).to(tl.float32)
    wanted = (marks != marks).to(tl.int32)
    if tl.max(wanted, 0) == 0:
        return

    offset = (row * stride_b + head * stride_h) * VECTOR
    doffset = (row * dstride_b + head * dstride_h) * VECTOR
    stride, dstride = stride_n * VECTOR, dstride_n * VECTOR
    scale_log2 = scale * 1.4426950408889634
    q, q_tail = load(q_ptr + offset + first * stride, stride, queries, left, HEAD, MAIN, EVEN)
    dq, dq_tail = load(dq_ptr + doffset + first * dstride, dstride, queries, left, HEAD, MAIN, EVEN)
    q_moved, q_moved_tail = q, q_tail
    if q.dtype == tl.float32:
        q_moved, q_moved_tail = q + dq, q_tail + dq_tail

    peak = tl.full((QUERIES,), float("-inf"), tl.float32)  # of S in units of ln 2, then log2 Σ exp2
    moved_peak = peak  # likewise of S + dS
    sum_p = tl.zeros((QUERIES,), tl.float32)
    sum_moved = tl.zeros((QUERIES,), tl.float32)
    for start in range(0, n, KEYS):
        keys = start + tl.arange(0, KEYS)
        s, ds = both_scores(
            q, q_tail, dq, dq_tail, q_moved, q_moved_tail, k_ptr + offset, dk_ptr + doffset, stride, dstride, keys, n,
            HEAD, MAIN, False, EVEN, QUERIES,
        )  # fmt: skip
        s, moved = s * scale_log2, (s + ds) * scale_log2
        higher, moved_higher = tl.maximum(peak, tl.max(s, 1)), tl.maximum(moved_peak, tl.max(moved, 1))
        sum_p = sum_p * tl.exp2(peak - higher) + tl.sum(tl.exp2(s - higher[:, None]), 1)
        sum_moved = sum_moved * tl.exp2(moved_peak - moved_higher) + tl.sum(tl.exp2(moved - moved_higher[:, None]), 1)
        peak, moved_peak = higher, moved_higher
    peak += tl.log2(sum_p)
    moved_peak += tl.log2(sum_moved)

    acc = tl.zeros((QUERIES, MAIN), tl.float32)
    acc_tail = tl.zeros((QUERIES, 16), tl.float32)
    for start in range(0, n, KEYS):
        keys = start + tl.arange(0, KEYS)
        s, ds = both_scores(
            q, q_tail, dq, dq_tail, q_moved, q_moved_tail, k_ptr + offset, dk_ptr + doffset, stride, dstride, keys, n,
            HEAD, MAIN, False, EVEN, QUERIES,
        )  # fmt: skip
        p = tl.exp2(s * scale_log2 - peak[:, None])
        p_moved = tl.exp2((s + ds) * scale_log2 - moved_peak[:, None])
        e = ds * scale - ((moved_peak - peak) * 0.6931471805599453)[:, None]
        dp = tl.where(tl.abs(e) > 1, p_moved - p, p * expm1(tl.minimum(e, 1.0)))
        dp, p_moved = dp.to(q.dtype), p_moved.to(q.dtype)
        v, v_tail = load(v_ptr + offset, stride, keys, n, HEAD, MAIN, EVEN)
        dv, dv_tail = load(dv_ptr + doffset, dstride, keys, n, HEAD, MAIN, EVEN)
        if TAIL:
            acc_tail = dot(dp, v_tail, dot(p_moved, dv_tail, acc_tail))
        acc = dot(dp, v, dot(p_moved, dv, acc))

    left = (left * wanted)[:, None]
    store(do_ptr, acc, queries, tl.arange(0, MAIN), left, heads * HEAD, HEAD)
    if TAIL:
        store(do_ptr, acc_tail, queries, MAIN + tl.arange(0, 16), left, heads * HEAD, HEAD)


def _aligned(tensors: list[Tensor], vector: int) -> list[Tensor]:
    """The tensors as they are, or packed copies.

    They are read as they are if they share strides, multiples of ``vector``, have rows without holes, and if their
    offsets within a head fit into 32 bits, in which the kernels count them.
    """
    strides = tensors[0].stride()
    shared = all(x.stride() == strides for x in tensors)
    near = tensors[0].shape[-2] * strides[-2] < 2**31
    if shared and near and strides[-1] == 1 and all(stride % vector == 0 for stride in strides[:-1]):
        return tensors
    return [x.contiguous() for x in tensors]


def _attention_difference(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, o: Tensor, tangent: bool
) -> Tensor:
    b, heads, n, h = q.shape
    if q.dtype == torch.float32:
        k, dk = (x - x.mean(-2, keepdim=True) for x in (k, dk))
    vector = math.gcd(8, h)
    q, k, v = _aligned([q, k, v], vector)
    dq, dk, dv = _aligned([dq, dk, dv], vector)
    (o,) = _aligned([o], vector)
    do = torch.empty(b, n, heads, h, dtype=dv.dtype, device=dv.device)  # as the projection that follows reads it
    columns = {"HEAD": h, "MAIN": main_columns(h), "VECTOR": vector}

    def run(kernel, tensors, strided, config: Blocks, **constants) -> None:
        launch(
            kernel,
            lambda: (triton.cdiv(n, config.queries) * heads * b,),
            *tensors,
            n,
            heads,
            h**-0.5,
            *(stride // vector for x in strided for stride in x.stride()[:3]),
            **columns,
            **constants,
            EVEN=n % max(config.queries, config.keys) == 0,
            QUERIES=config.queries,
            KEYS=config.keys,
            config=config,
        )

    tensors, config = (q, k, v, dq, dk, dv), _blocks(q.dtype, h, n)
    run(_attention_difference_kernel, (*tensors, o, do), (q, dq, o), config, TANGENT=tangent)
    if not tangent:
        run(_large_change_kernel, (*tensors, do), (q, dq), _rare_blocks(q.dtype, h))
    return do.transpose(1, 2)


_op = raw_op("attention_difference", _attention_difference)


@register_flop_formula(torch.ops.soflow.attention_difference)
def _flops(q_shape, *args, out_shape=None, **kwargs) -> int:
    """The 5 products of the reference; that the kernel splits one of them in two is its own affair."""
    b, heads, n, h = q_shape
    return 5 * 2 * b * heads * n * n * h


def attention_difference(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, o: Tensor, *, tangent: bool = False
) -> Tensor:
    """Fused :func:`soflow_fast.kernels.reference.attention_difference`: dtype of dv, no gradient.

    The differences keep their relative accuracy at any size that their dtype resolves: down to 1e-38 in bfloat16 and
    float32; float16 is coarse below 6e-5, so differences of that size need a scale or another dtype.

    Args:
        q, k, v, dq, dk, dv: (b, H, N, h) of one dtype, any strides; views of a (b, N, 3, H, h) tensor are read as they
            are. h up to 128, in float32 up to 80. o: (b, H, N, h) the primal output, any float dtype of the kernels.

    Returns:
        dO (b, H, N, h), stored as (b, N, H, h).

    Raises:
        ValueError: for shapes or dtypes that differ, and for a head dim that does not fit into registers.
    """
    if q.dim() != 4:
        raise ValueError(f"q has shape {tuple(q.shape)} where (rows, heads, tokens, head dim) is needed")
    require_dtype("q", q)
    require_dtype("o", o)
    for name, x in (("k", k), ("v", v), ("dq", dq), ("dk", dk), ("dv", dv), ("o", o)):
        require_shape(name, x, q.shape)
        if x.dtype != q.dtype and name != "o":
            raise ValueError(f"{name} has dtype {x.dtype} and q has {q.dtype}; convert one of them to the other's")
    if q.shape[-1] > MAX_HEAD_DIM[q.dtype]:
        raise ValueError(
            f"head dim {q.shape[-1]} in {q.dtype} does not fit into a GPU's registers "
            f"(at most {MAX_HEAD_DIM[q.dtype]}): use more heads or impl='torch'"
        )
    return _op(*constants(q, k, v, dq, dk, dv, o), tangent)


def cases() -> list[Case]:
    """Shapes of the consistency rows of a batch of 256; inputs are views of one projection, as the DiT makes them."""

    def inputs(heads: int, n: int, h: int, dtype: torch.dtype | None = None):
        def make(new: Inputs) -> dict:
            shape = (new.rows(64), n, 3, heads, h)
            q, k, v = new.normal(*shape, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
            dq, dk, dv = new.normal(*shape, scale=1e-3, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
            o = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return {"q": q, "k": k, "v": v, "dq": dq, "dk": dk, "dv": dv, "o": o}

        return make

    return [
        Case("attention_difference", "B/4", inputs(12, 64, 64)),
        Case("attention_difference", "L/2", inputs(16, 256, 64)),
        Case("attention_difference", "XL/2", inputs(16, 256, 72)),
        Case("attention_difference", "XL/2 tangent", inputs(16, 256, 72), {"tangent": True}),
        Case("attention_difference", "L/2 tangent", inputs(16, 256, 64), {"tangent": True}),
        Case("attention_difference", "XL/4", inputs(16, 64, 72)),
        Case("attention_difference", "XL/2 with 4 more tokens", inputs(16, 260, 72)),
        Case("attention_difference", "head dim 32", inputs(12, 256, 32)),
        Case("attention_difference", "head dim 128", inputs(16, 256, 128, dtype=torch.bfloat16)),
    ]
