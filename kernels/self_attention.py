"""Self-attention of short sequences from the projection on: no tensor of its gradients is written twice.

    y = h Wᵀ + bias, (B, N, 3, H, h), is q, k and v;   P = softmax(qkᵀ/√h),   o = P v

    backward:  δ = Σ_h do·o,  dS = P(do vᵀ − δ),  dq = dS k/√h,  dk = dSᵀ q/√h,  dv = Pᵀ do,  dy = [dq dk dv]
               dbias = Σ_tokens dy,  dh = dy W,  dW = dyᵀ h

The forward is flash attention; beside o it writes ``log₂ Σ exp`` of each query's scores. The backward is two kernels
that take the scores again from it: one has a block of keys and goes over the queries, for dk and dv, the other a block
of queries and goes over the keys, for dq. So no gradient is added up in memory, nothing is atomic, and results repeat
bitwise. That takes 7 products instead of 5, and what is written is dy itself, with float32 sums of its columns from
each program. Flash attention adds dq up in float32 in memory, then rounds it, and dq, dk and dv are packed and summed
after it (``heads.py``): about 24 bytes more per token and column of o.

Shapes: B rows (samples), N tokens, D = H·h width, H heads, h head dim. Bytes per token and column of o in bfloat16,
where other programs of a head find what the first has read in the L2 cache: forward 8; backward reads q, k, v, do twice
and writes dy: 22, and o and do once more for δ. Saved: h, W, y, o and the logarithms.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from ._attention import Blocks, dot, load, main_columns, own_queries, scores, store
from ._cases import Case, Inputs
from ._launch import autocast, launch
from ._op import raw_op
from .heads import check_projection, projection_gradients
from .reference import split_heads

# float32 above 80 spills at every size of block.
_MAX_HEAD_DIM = {torch.float32: 80, torch.bfloat16: 128, torch.float16: 128}

# 64 × 64 scores by 4 warps: on sm_90 three programs fit on an SM, two of the backward's for keys (242 registers), and
# the products of some hide behind the exponentials of others. Larger blocks with 8 warps leave fewer, or spill.
_HALF = Blocks(num_warps=4, num_stages=2, queries=64, keys=64)
# Of the backward's for keys; with two stages Triton 3.6 does not compile it for sm_100.
_HALF_KEYS = Blocks(num_warps=4, queries=64, keys=64)
# Where a part of a block is left over, which costs registers.
_HALF_KEYS_UNEVEN = Blocks(num_warps=4, queries=32, keys=64)
# Head dims above 80.
_HALF_WIDE = Blocks(num_warps=8, queries=64, keys=64)
# On the FMA units, exact and slow.
_FLOAT32 = Blocks(num_warps=2, queries=16, keys=16)
_FLOAT32_KEYS = Blocks(num_warps=2, num_stages=2, queries=16, keys=16)


def _blocks(y: Tensor, of_keys: bool = False) -> Blocks:
    """Of the backward's kernel for keys, which has as many as the others have queries, or of the others."""
    if y.dtype == torch.float32:
        return _FLOAT32_KEYS if of_keys else _FLOAT32
    if y.shape[-1] > 80:
        return _HALF_WIDE
    if of_keys:
        return _HALF_KEYS_UNEVEN if y.shape[1] % _HALF_KEYS.keys else _HALF_KEYS
    return _HALF


@triton.jit(do_not_specialize=["n", "heads"])
def _forward_kernel(
    y_ptr,  # (B, N, 3, H, h)
    o_ptr,  # (B, N, H, h)
    lse_ptr,  # (B, H, N)
    n,
    heads,
    scale,
    HEAD: tl.constexpr,  # h
    MAIN: tl.constexpr,  # columns before the tail
    EVEN: tl.constexpr,  # the blocks divide N
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    TAIL: tl.constexpr = HEAD > MAIN
    row, head, first = own_queries(n, heads, QUERIES)
    queries, left = tl.arange(0, QUERIES), (n - first).to(tl.int32)
    width = heads * HEAD
    stride = 3 * width
    q_ptr = y_ptr + row * n * stride + head * HEAD
    k_ptr, v_ptr = q_ptr + width, q_ptr + 2 * width
    scale_log2 = scale * 1.4426950408889634

    q, q_tail = load(q_ptr + first * stride, stride, queries, left, HEAD, MAIN, EVEN)
    acc = tl.zeros((QUERIES, MAIN), tl.float32)
    acc_tail = tl.zeros((QUERIES, 16), tl.float32)
    peak = tl.full((QUERIES,), float("-inf"), tl.float32)  # of the scores in units of ln 2
    total = tl.zeros((QUERIES,), tl.float32)
    for start in range(0, n, KEYS):
        keys = start + tl.arange(0, KEYS)
        k, k_tail = load(k_ptr, stride, keys, n, HEAD, MAIN, EVEN)
        s = scores(q, q_tail, k, k_tail, tl.zeros((QUERIES, KEYS), tl.float32), TAIL)
        if not EVEN:
            s = tl.where(keys[None, :] < n, s, float("-inf"))
        higher = tl.maximum(peak, tl.max(s, 1) * scale_log2)
        decay = tl.exp2(peak - higher)
        p = tl.exp2(s * scale_log2 - higher[:, None])
        total = total * decay + tl.sum(p, 1)
        peak = higher
        p = p.to(q.dtype)
        v, v_tail = load(v_ptr, stride, keys, n, HEAD, MAIN, EVEN)
        acc = dot(p, v, acc * decay[:, None])
        if TAIL:
            acc_tail = dot(p, v_tail, acc_tail * decay[:, None])

    tl.store(lse_ptr + (row * heads + head) * n + first + queries, peak + tl.log2(total), mask=queries < left)
    o_ptr += ((row * n + first) * heads + head) * HEAD
    store(o_ptr, acc / total[:, None], queries, tl.arange(0, MAIN), left, width, HEAD)
    if TAIL:
        store(o_ptr, acc_tail / total[:, None], queries, MAIN + tl.arange(0, 16), left, width, HEAD)


@triton.jit
def _store_with_sums(dy_ptr, sum_ptr, dy, rows, columns, left, stride, HEAD: tl.constexpr):
    """A block of dy, and the sums of its columns as they were rounded."""
    dy = tl.where(rows[:, None] < left, dy, 0.0).to(dy_ptr.dtype.element_ty)
    store(dy_ptr, dy, rows, columns, left, stride, HEAD)
    tl.store(sum_ptr + columns, tl.sum(dy.to(tl.float32), 0), mask=columns < HEAD)


@triton.jit(do_not_specialize=["n", "heads"])
def _keys_backward_kernel(
    y_ptr,  # (B, N, 3, H, h)
    do_ptr,  # (B, N, H, h)
    lse_ptr,  # (B, H, N)
    delta_ptr,  # (B, H, N)
    dy_ptr,  # (B, N, 3, H, h), of which dk and dv are written
    sums_ptr,  # (B, blocks, 3, H, h), of which those of dk and dv are written
    n,
    heads,
    scale,
    HEAD: tl.constexpr,
    MAIN: tl.constexpr,
    EVEN: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    TAIL: tl.constexpr = HEAD > MAIN
    row, head, first = own_queries(n, heads, KEYS)
    keys, left = tl.arange(0, KEYS), (n - first).to(tl.int32)
    width = heads * HEAD
    stride = 3 * width
    sample = row * n * stride + head * HEAD
    own = sample + first * stride + width
    do_ptr += (row * n * heads + head) * HEAD
    statistics = (row * heads + head) * n
    scale_log2 = scale * 1.4426950408889634

    k, k_tail = load(y_ptr + own, stride, keys, left, HEAD, MAIN, EVEN)
    v, v_tail = load(y_ptr + own + width, stride, keys, left, HEAD, MAIN, EVEN)
    dk = tl.zeros((KEYS, MAIN), tl.float32)
    dv = tl.zeros((KEYS, MAIN), tl.float32)
    dk_tail = tl.zeros((KEYS, 16), tl.float32)
    dv_tail = tl.zeros((KEYS, 16), tl.float32)
    for start in range(0, n, QUERIES):
        queries = start + tl.arange(0, QUERIES)
        q, q_tail = load(y_ptr + sample, stride, queries, n, HEAD, MAIN, EVEN)
        lse = tl.load(lse_ptr + statistics + queries, mask=queries < n, other=float("inf"))
        s = scores(q, q_tail, k, k_tail, tl.zeros((QUERIES, KEYS), tl.float32), TAIL)
        p = tl.exp2(s * scale_log2 - lse[:, None])
        do, do_tail = load(do_ptr, width, queries, n, HEAD, MAIN, EVEN)
        dp = scores(do, do_tail, v, v_tail, tl.zeros((QUERIES, KEYS), tl.float32), TAIL)
        delta = tl.load(delta_ptr + statistics + queries, mask=queries < n, other=0.0)
        ds = (p * (dp - delta[:, None])).to(k.dtype).T
        p = p.to(k.dtype).T
        dv = dot(p, do, dv)
        dk = dot(ds, q, dk)
        if TAIL:
            dv_tail = dot(p, do_tail, dv_tail)
            dk_tail = dot(ds, q_tail, dk_tail)

    sums_ptr += (row * tl.cdiv(n, KEYS) + first // KEYS) * stride + head * HEAD + width
    columns = tl.arange(0, MAIN)
    _store_with_sums(dy_ptr + own, sums_ptr, dk * scale, keys, columns, left, stride, HEAD)
    _store_with_sums(dy_ptr + own + width, sums_ptr + width, dv, keys, columns, left, stride, HEAD)
    if TAIL:
        columns = MAIN + tl.arange(0, 16)
        _store_with_sums(dy_ptr + own, sums_ptr, dk_tail * scale, keys, columns, left, stride, HEAD)
        _store_with_sums(dy_ptr + own + width, sums_ptr + width, dv_tail, keys, columns, left, stride, HEAD)


@triton.jit(do_not_specialize=["n", "heads"])
def _queries_backward_kernel(
    y_ptr,  # (B, N, 3, H, h)
    do_ptr,  # (B, N, H, h)
    lse_ptr,  # (B, H, N)
    delta_ptr,  # (B, H, N)
    dy_ptr,  # (B, N, 3, H, h), of which dq is written
    sums_ptr,  # (B, blocks, 3, H, h), of which those of dq are written
    n,
    heads,
    scale,
    HEAD: tl.constexpr,
    MAIN: tl.constexpr,
    EVEN: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    TAIL: tl.constexpr = HEAD > MAIN
    row, head, first = own_queries(n, heads, QUERIES)
    queries, left = tl.arange(0, QUERIES), (n - first).to(tl.int32)
    width = heads * HEAD
    stride = 3 * width
    sample = row * n * stride + head * HEAD
    own = sample + first * stride
    do_ptr += ((row * n + first) * heads + head) * HEAD
    statistics = (row * heads + head) * n + first
    scale_log2 = scale * 1.4426950408889634

    q, q_tail = load(y_ptr + own, stride, queries, left, HEAD, MAIN, EVEN)
    do, do_tail = load(do_ptr, width, queries, left, HEAD, MAIN, EVEN)
    lse = tl.load(lse_ptr + statistics + queries, mask=queries < left, other=float("inf"))
    delta = tl.load(delta_ptr + statistics + queries, mask=queries < left, other=0.0)
    dq = tl.zeros((QUERIES, MAIN), tl.float32)
    dq_tail = tl.zeros((QUERIES, 16), tl.float32)
    for start in range(0, n, KEYS):
        keys = start + tl.arange(0, KEYS)
        k, k_tail = load(y_ptr + sample + width, stride, keys, n, HEAD, MAIN, EVEN)
        s = scores(q, q_tail, k, k_tail, tl.zeros((QUERIES, KEYS), tl.float32), TAIL)
        if not EVEN:
            s = tl.where(keys[None, :] < n, s, float("-inf"))
        p = tl.exp2(s * scale_log2 - lse[:, None])
        v, v_tail = load(y_ptr + sample + 2 * width, stride, keys, n, HEAD, MAIN, EVEN)
        dp = scores(do, do_tail, v, v_tail, tl.zeros((QUERIES, KEYS), tl.float32), TAIL)
        ds = (p * (dp - delta[:, None])).to(q.dtype)
        dq = dot(ds, k, dq)
        if TAIL:
            dq_tail = dot(ds, k_tail, dq_tail)

    sums_ptr += (row * tl.cdiv(n, QUERIES) + first // QUERIES) * stride + head * HEAD
    _store_with_sums(dy_ptr + own, sums_ptr, dq * scale, queries, tl.arange(0, MAIN), left, stride, HEAD)
    if TAIL:
        _store_with_sums(dy_ptr + own, sums_ptr, dq_tail * scale, queries, MAIN + tl.arange(0, 16), left, stride, HEAD)


def _run(kernel, tensors, y: Tensor, config: Blocks, block: int) -> None:
    """Launches with a program for each block, of queries or of keys, of every head."""
    B, n, _, heads, h = y.shape
    launch(
        kernel,
        lambda: (triton.cdiv(n, block) * heads * B,),
        *tensors,
        *(n, heads, h**-0.5),
        HEAD=h,
        MAIN=main_columns(h),
        EVEN=n % max(config.queries, config.keys) == 0,
        QUERIES=config.queries,
        KEYS=config.keys,
        config=config,
    )


def _forward(y: Tensor) -> tuple[Tensor, Tensor]:
    """``(o, lse)``: (B, N, H, h), and (B, H, N) in units of ln 2."""
    B, n, _, heads, h = y.shape
    o, lse = y.new_empty(B, n, heads, h), y.new_empty((B, heads, n), dtype=torch.float32)
    config = _blocks(y)
    _run(_forward_kernel, (y, o, lse), y, config, config.queries)
    return o, lse


def _backward(y: Tensor, do: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """``(dy, sums)``, (B, N, 3, H, h), and of its columns over each block of tokens (B, blocks, 3·H·h)."""
    B, n, _, heads, h = y.shape
    config, keys_config = _blocks(y), _blocks(y, of_keys=True)
    block = config.queries  # and keys_config.keys
    dy = torch.empty_like(y)
    sums = y.new_empty((B, triton.cdiv(n, block), 3 * heads * h), dtype=torch.float32)
    tensors = (y, do.contiguous(), lse, delta.contiguous(), dy, sums)
    _run(_keys_backward_kernel, tensors, y, keys_config, block)
    _run(_queries_backward_kernel, tensors, y, config, block)
    return dy, sums


_forward_op = raw_op("self_attention_fwd", _forward)
_backward_op = raw_op("self_attention_bwd", _backward)


@register_flop_formula(torch.ops.soflow.self_attention_fwd)
def _forward_flops(y_shape, *args, out_shape=None, **kwargs) -> int:
    B, n, _, heads, h = y_shape
    return 2 * 2 * B * heads * n * n * h


@register_flop_formula(torch.ops.soflow.self_attention_bwd)
def _backward_flops(y_shape, *args, out_shape=None, **kwargs) -> int:
    """The 5 products of flash attention; that 2 are made twice is the kernels' own affair."""
    B, n, _, heads, h = y_shape
    return 5 * 2 * B * heads * n * n * h


@torch.compiler.allow_in_graph  # else a checkpoint that is compiled keeps what it should recompute
class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(h, weight, bias, heads):
        y = nn.functional.linear(h, weight, bias).unflatten(-1, (3, heads, -1))
        o, lse = _forward_op(y)
        return o, y, lse

    @staticmethod
    def setup_context(ctx, inputs, output):
        h, weight, _, _ = inputs
        o, y, lse = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(y, lse)
        ctx.save_for_backward(h, weight, o, y, lse)

    @staticmethod
    def backward(ctx, do, *_):
        if do is None:
            return (None,) * 4
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise NotImplementedError("the fused self-attention has no second derivative; use impl='torch'")
        h, weight, o, y, lse = ctx.saved_tensors
        delta = (do.to(torch.float32) * o).sum(-1).transpose(1, 2)
        dy, sums = _backward_op(y, do, lse, delta)
        return *projection_gradients(dy.flatten(2), sums.flatten(0, 1), h, weight, ctx.needs_input_grad), None


def self_attention(h: Tensor, weight: Tensor, bias: Tensor, *, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fused :func:`soflow_fast.kernels.reference.self_attention`.

    Args:
        h: (B, N, D). weight: (3D, D). bias: (3D,), all of one dtype. heads: H, divides D; D/H is at most 128.

    Returns:
        ``(o, q, k, v)``, each (B, H, N, h); o is stored as (B, N, H, h), the others are views of one tensor, without
        gradient.

    Raises:
        ValueError: for a shape or dtype that does not fit, for heads that do not divide D, and for too large heads.
    """
    h, weight, bias = autocast(h, weight, bias)
    h = check_projection(h, weight, bias, heads)
    if (head_dim := h.shape[2] // heads) > (most := _MAX_HEAD_DIM[h.dtype]):
        raise ValueError(
            f"head dim {head_dim} in {h.dtype} does not fit into a GPU's registers (at most {most}): use more heads or "
            "attention='sdpa'"
        )
    o, y, _ = _SelfAttention.apply(h, weight, bias, heads)
    return o.transpose(1, 2), *split_heads(y.flatten(2), heads)


def cases() -> list[Case]:
    """Shapes of a batch of 256, with gradient."""

    def inputs(tokens: int, width: int, dtype: torch.dtype | None = None):
        def make(new: Inputs) -> dict:
            h = new.normal(new.rows(256), tokens, width, dtype=dtype)
            weight = new.normal(3 * width, width, scale=width**-0.5, dtype=dtype)
            return {"h": h, "weight": weight, "bias": new.normal(3 * width, scale=0.1, dtype=dtype)}

        return make

    sizes = {
        "B/4": (12, (64, 768)),
        "L/2": (16, (256, 1024)),
        "XL/2": (16, (256, 1152)),
        "XL/2 with 4 more tokens": (16, (260, 1152)),
        "head dim 128": (8, (256, 1024, torch.bfloat16)),
    }
    return [
        Case("self_attention", name, inputs(*size), {"heads": heads}, ("h", "weight", "bias"))
        for name, (heads, size) in sizes.items()
    ]
