"""adaLN's backward in one pass, with chunks of the sums that ``adaln.py`` describes; its forward is there.

Shapes: B rows (samples), N tokens, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Launch, launch
from ._partials import sum_chunks
from ._rows import load_row, row_columns, row_warps, store_row, sum_rows_2

# Tokens per program: 64 keep the partial sums at 3 to 4 % of the bytes; where that leaves fewer warps than about fit on
# an H100's 132 SMs at 128 registers, 16 each, 32, and then 16.
_TOKENS = (64, 32, 16)
_ENOUGH_WARPS = 2048

# Registers for at least 4 rows of up to 1536 channels in flight per SM, as in the forward: at 1152 channels 54 KiB with
# a float32 stream and 36 with a bfloat16 one. The row that is used last, the gate, is not kept: each token reads it
# from L1.
_REGISTERS = 128


@triton.jit(do_not_specialize=["N", "chunk"])
def _adaln_backward_kernel(
    dh_ptr,  # (B, N, D)
    dx_new_ptr,  # (B, N, D), or None: nothing arrives at the residual stream
    x_ptr,  # (B, N, D), what was normalised
    branch_ptr,  # (B, N, D) or None
    bias_ptr,  # (D,) or None
    gate_ptr,  # (B, D), row stride stride_gate; None without branch
    scale_ptr,  # (B, D), row stride stride_scale
    mean_ptr,  # (B, N)
    rstd_ptr,  # (B, N)
    dx_ptr,  # (B, N, D)
    dbranch_ptr,  # (B, N, D); None without branch
    partial_ptr,  # (B, chunks, 2 to 4, D): of dshift, dscale, with branch dgate, with bias its gradient
    stride_gate,
    stride_scale,
    N: tl.int64,
    chunk: tl.int64,
    SUMS: tl.constexpr,
    D: tl.constexpr,
    THREADS: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * chunk
    columns = row_columns(D, THREADS)
    gain = 1 + load_row(scale_ptr + sample * stride_scale, columns, D)
    dshift = tl.zeros(columns.shape, tl.float32)
    dscale = tl.zeros(columns.shape, tl.float32)
    if branch_ptr is not None:
        dgate = tl.zeros(columns.shape, tl.float32)
    if bias_ptr is not None:
        sum_dx = tl.zeros(columns.shape, tl.float32)
    for token in range(sample * N + first, sample * N + tl.minimum(first + chunk, N)):
        dh = load_row(dh_ptr + token * D, columns, D)
        x = load_row(x_ptr + token * D, columns, D)
        if branch_ptr is not None:
            branch = load_row(branch_ptr + token * D, columns, D)
        if dx_new_ptr is not None:
            dx_new = load_row(dx_new_ptr + token * D, columns, D)
        rstd = tl.load(rstd_ptr + token)
        # zero beyond D, so that a strip that lies there costs nothing
        n = tl.where(columns < D, (x - tl.load(mean_ptr + token)) * rstd, 0.0)
        dscale += dh * n  # here, and dshift below: in other orders ptxas spills or needs more registers
        g = dh * gain
        sum_g, sum_gn = sum_rows_2(g, g * n)
        dshift += dh
        dx = rstd * (g - sum_g / D - n * (sum_gn / D))
        if dx_new_ptr is not None:
            dx += dx_new
        store_row(dx_ptr + token * D, columns, dx, D)
        if branch_ptr is not None:
            gate = load_row(gate_ptr + sample * stride_gate, columns, D)
            store_row(dbranch_ptr + token * D, columns, dx * gate, D)
            dgate += dx * branch
        if bias_ptr is not None:
            sum_dx += dx
    partial_ptr += (sample * tl.num_programs(1) + tl.program_id(1)) * (SUMS * D)
    store_row(partial_ptr, columns, dshift, D)
    store_row(partial_ptr + D, columns, dscale, D)
    if bias_ptr is not None:
        gate = load_row(gate_ptr + sample * stride_gate, columns, D)
        dgate += sum_dx * load_row(bias_ptr, columns, D)
        store_row(partial_ptr + 3 * D, columns, sum_dx * gate, D)
    if branch_ptr is not None:
        store_row(partial_ptr + 2 * D, columns, dgate, D)


def _tokens_per_program(B: int, N: int, warps: int) -> int:
    """Of a backward with that many warps a program; see above."""
    *many, fewest = _TOKENS
    return next((tokens for tokens in many if B * triton.cdiv(N, tokens) * warps >= _ENOUGH_WARPS), fewest)


def backward(
    dh, dx_new, x, branch, bias, gate, scale, mean, rstd
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """``(dx, dbranch, dmodulation, dbias)``.

    dmodulation: dshift, dscale and, with branch, dgate, (B, 2 or 3, D). dbias: with bias, each sample's part of it,
    (B, D), float32.
    """
    B, N, D = x.shape
    dh = dh.contiguous()
    dx_new = None if dx_new is None else dx_new.contiguous()
    dx = torch.empty_like(x)
    dbranch = None if branch is None else torch.empty_like(branch)
    warps = row_warps(D)
    tokens = _tokens_per_program(B, N, warps)
    chunks = triton.cdiv(N, tokens)
    dmodulation = scale.new_empty((B, 2 if branch is None else 3, D))
    dbias = None if bias is None else x.new_empty((B, D), dtype=torch.float32)
    n_sums = dmodulation.shape[1] + (bias is not None)
    partials = x.new_empty((B, chunks, n_sums, D), dtype=torch.float32)
    launch(
        _adaln_backward_kernel,
        lambda: (B, chunks),
        *(dh, dx_new, x, branch, bias, gate, scale, mean, rstd),
        *(dx, dbranch, partials),
        *(0 if m is None else m.stride(0) for m in (gate, scale)),
        *(N, tokens),
        SUMS=n_sums,
        D=D,
        THREADS=32 * warps,
        config=Launch(warps, max_registers=_REGISTERS),
    )
    sum_chunks(partials, dmodulation, dbias)
    return dx, dbranch, dmodulation, dbias
