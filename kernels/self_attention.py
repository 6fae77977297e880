"""Self-attention of short sequences from the projection on: no tensor of its gradients is written twice.

    y = h Wᵀ + bias, (B, N, 3, H, h), is q, k and v;   P = softmax(qkᵀ/√h),   o = P v

    backward:  δ = Σ_h do·o,  dS = P(do vᵀ − δ),  dq = dS k/√h,  dk = dSᵀ q/√h,  dv = Pᵀ do,  dy = [dq dk dv]
               dbias = Σ_tokens dy = [Σ dq, 0, Σ do],  dh = dy W,  dW = dyᵀ h

The forward is flash attention; beside o it writes ``log₂ Σ exp`` of each query's scores. The backward
(``_self_attention_backward.py``) is two kernels that take the scores again from it: one has a block of queries and goes
over the keys, for δ and dq, the other a block of keys and goes over the queries, for dk and dv. So no gradient is added
up in memory, nothing is atomic, and results repeat bitwise. That takes 7 products instead of 5; where all tokens are
one block, one kernel makes everything with 5. What is written is dy itself, with each program's float32 sums of the
columns of dq and do: rows of dS add up to 0 and rows of P to 1. Flash attention adds dq up in float32 in memory, then
rounds it, and dq, dk and dv are packed and summed after it (``heads.py``): about 24 bytes more per token and column of
o.

Shapes: B rows (samples), N tokens, D = H·h width, H heads, h head dim. Bytes per token and column of o in bfloat16,
where other programs of a head find what the first has read in the L2 cache: forward 8; backward reads q, k, v, do twice
and o once and writes dy: 24, of one block 16. Saved: h, W, y, o and the logarithms.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import MAX_HEAD_DIM
from ._attention import dot, load, own_block, scores, store
from ._cases import Case, Inputs
from ._op import autocast, raw_op
from ._projection import attention_of_projection, count_flops
from ._self_attention_backward import backward, blocks, run
from .heads import check_projection
from .reference_float8 import Float8Rows


@triton.jit(do_not_specialize=["n", "heads"])
def _forward_kernel(
    y_ptr,  # (B, N, 3, H, h)
    o_ptr,  # (B, N, H, h)
    lse_ptr,  # (B, H, blocks · QUERIES)
    n,
    heads,
    HEAD: tl.constexpr,  # h
    MAIN: tl.constexpr,  # columns before the tail
    EVEN: tl.constexpr,  # the blocks divide N
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    TAIL: tl.constexpr = HEAD > MAIN
    row, head, first = own_block(n, heads, QUERIES)
    queries, left = tl.arange(0, QUERIES), (n - first).to(tl.int32)
    width = heads * HEAD
    stride = 3 * width
    q_ptr = y_ptr + row * n * stride + head * HEAD
    k_ptr, v_ptr = q_ptr + width, q_ptr + 2 * width
    scale_log2: tl.constexpr = HEAD**-0.5 * 1.4426950408889634

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

    lse = tl.where(queries < left, peak + tl.log2(total), float("inf"))
    tl.store(lse_ptr + tl.program_id(0).to(tl.int64) * QUERIES + queries, lse)
    o_ptr += ((row * n + first) * heads + head) * HEAD
    store(o_ptr, acc / total[:, None], queries, tl.arange(0, MAIN), left, width, HEAD)
    if TAIL:
        store(o_ptr, acc_tail / total[:, None], queries, MAIN + tl.arange(0, 16), left, width, HEAD)


def _forward(y: Tensor) -> tuple[Tensor, Tensor]:
    """``(o, lse)``: (B, N, H, h), and (B, H, N) in units of ln 2, with infinities up to whole blocks."""
    B, n, _, heads, h = y.shape
    config = blocks(y)
    o = y.new_empty(B, n, heads, h)
    lse = y.new_empty((B, heads, triton.cdiv(n, config.keys) * config.keys), dtype=torch.float32)
    run(_forward_kernel, (y, o, lse), y, config, EVEN=n % config.keys == 0)
    return o, lse


_forward_op = raw_op("self_attention_fwd", _forward)
_backward_op = raw_op("self_attention_bwd", backward)
count_flops(torch.ops.soflow.self_attention_fwd, torch.ops.soflow.self_attention_bwd)
_attention = attention_of_projection(_forward_op, _backward_op)


def self_attention(
    h: Tensor | Float8Rows, weight: Tensor, bias: Tensor, *, heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fused :func:`soflow_fast.kernels.reference.self_attention`.

    Args:
        h: (B, N, D), also in float8, then without gradient. weight: (3D, D). bias: (3D,), all of one dtype. heads: H,
            divides D; D/H fits ``MAX_HEAD_DIM``.

    Returns:
        ``(o, q, k, v)``, each (B, H, N, h); o is stored as (B, N, H, h), the others are views of one tensor, without
        gradient.

    Raises:
        ValueError: for a shape or dtype that does not fit, for heads that do not divide D, for too large heads, and for
            samples of 2^31 numbers.
    """
    if not isinstance(h, Float8Rows):
        h, weight, bias = autocast(h, weight, bias)
        h = check_projection(h, weight, bias, heads)
    if (head_dim := h.shape[2] // heads) > (most := MAX_HEAD_DIM[h.dtype]):
        raise ValueError(
            f"head dim {head_dim} in {h.dtype} does not fit into a GPU's registers (at most {most}): use more heads or "
            "attention='sdpa'"
        )
    if 3 * h.shape[1] * h.shape[2] >= 2**31:  # offsets within a sample are counted in 32 bits
        raise ValueError(
            f"the queries, keys and values of {h.shape[1]} tokens of width {h.shape[2]} are 2^31 numbers or more; use "
            "fewer tokens or attention='sdpa'"
        )
    return _attention(h, weight, bias, heads)


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
