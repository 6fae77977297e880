"""Difference of adaLN: of gate, residual, LayerNorm and modulation, without cancellation and in one pass.

    d_new = d + gate·d_branch + dgate·(branch + bias + d_branch)
    x̃ = x − mean(x),  d̃ = d_new − mean(d_new),  ρ = rstd(x),  e = ρ²(2·mean(x̃d̃) + mean(d̃²)),  q = √(1+e)
    δρ = −ρe/(q(1+q)),  dn = d̃(ρ+δρ) + x̃δρ,  dh = dn(1+scale+dscale) + x̃ρ·dscale + dshift

x is the normalised input, x_new of the primal op; bias is that of the primal branch, or absent, and d_branch has none.
The tangent drops every product of two differences: branch + bias alone in d_new, e = 2ρ²·mean(x̃d̃) with q = 1, and
dh = dn(1+scale) + x̃ρ·dscale + dshift.

Shapes: b rows that carry a difference, N tokens, D width. Bytes per token and channel, float32 streams and bfloat16
operands: reads x, d, branch, d_branch (4+4+2+2), writes d_new, dh (4+2), 18 in all; 12 with bfloat16 streams. Nothing
is saved; the ops have no gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._cases import Case, Inputs
from ._launch import Launch, constants, launch
from ._op import raw_op
from ._rows import (
    load_row,
    require_bias,
    require_modulation,
    require_tokens,
    row_columns,
    row_warps,
    store_row,
    sum_rows_2,
    sum_rows_3,
)

# Tokens per program: at 64 rows of 64 tokens there are still 4 programs for each of an H100's 132 SMs. At 128 registers
# 4 rows of up to 1536 channels are in flight per SM, as in adaln; only float32 operands on sm_100 need a few more. The
# row that is used last, dshift, is not kept: each token reads it from L1.
_TOKENS = 8
_REGISTERS = 140


@triton.jit(do_not_specialize=["N", "chunk"])
def _adaln_difference_kernel(
    x_ptr,  # (b, N, D)
    d_ptr,  # (b, N, D)
    branch_ptr,  # (b, N, D), or None: then d is the difference of what is normalised
    d_branch_ptr,  # (b, N, D) or None
    bias_ptr,  # (D,), or None: then branch has no bias
    gate_ptr,  # (b, D), row stride stride_gate; None without branch
    scale_ptr,  # (b, D), row stride stride_scale
    dgate_ptr,  # (b, D), row stride stride_dgate; None without branch
    dshift_ptr,  # (b, D), row stride stride_dshift
    dscale_ptr,  # (b, D), row stride stride_dscale
    d_new_ptr,  # (b, N, D); None without branch
    dh_ptr,  # (b, N, D)
    stride_gate,
    stride_scale,
    stride_dgate,
    stride_dshift,
    stride_dscale,
    N: tl.int64,
    chunk: tl.int64,
    EPS: tl.constexpr,
    TANGENT: tl.constexpr,
    D: tl.constexpr,
    THREADS: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * chunk
    columns = row_columns(D, THREADS)
    dscale = load_row(dscale_ptr + sample * stride_dscale, columns, D)
    gain = 1 + load_row(scale_ptr + sample * stride_scale, columns, D)
    if not TANGENT:
        gain += dscale
    if branch_ptr is not None:
        gate = load_row(gate_ptr + sample * stride_gate, columns, D)
        dgate = load_row(dgate_ptr + sample * stride_dgate, columns, D)
    if bias_ptr is not None:
        bias = load_row(bias_ptr, columns, D)
    for token in range(sample * N + first, sample * N + tl.minimum(first + chunk, N)):
        x = load_row(x_ptr + token * D, columns, D)
        d = load_row(d_ptr + token * D, columns, D)
        if branch_ptr is not None:
            branch = load_row(branch_ptr + token * D, columns, D)
            d_branch = load_row(d_branch_ptr + token * D, columns, D)
            if bias_ptr is not None:
                branch += bias
            moved = branch if TANGENT else branch + d_branch
            d = (d + gate * d_branch + dgate * moved).to(d_new_ptr.dtype.element_ty)
            store_row(d_new_ptr + token * D, columns, d, D)
            d = d.to(tl.float32)
        sum_x, sum_d = sum_rows_2(x, d)
        x = tl.where(columns < D, x - sum_x / D, 0.0)
        d = tl.where(columns < D, d - sum_d / D, 0.0)
        if TANGENT:
            sum_xx, sum_xd = sum_rows_2(x * x, x * d)
            rho = tl.rsqrt(sum_xx / D + EPS)
            drho = -rho * rho * rho * (sum_xd / D)
            dn = d * rho + x * drho
        else:
            sum_xx, sum_xd, sum_dd = sum_rows_3(x * x, x * d, d * d)
            rho = tl.rsqrt(sum_xx / D + EPS)
            e = rho * rho * ((2 * sum_xd + sum_dd) / D)
            q = tl.sqrt_rn(tl.maximum(1 + e, EPS * rho * rho))  # of a token made constant 1 + e may round to less
            drho = -rho * e / (q * (1 + q))
            dn = d * (rho + drho) + x * drho
        dshift = load_row(dshift_ptr + sample * stride_dshift, columns, D)
        store_row(dh_ptr + token * D, columns, dn * gain + x * rho * dscale + dshift, D)


def _run(
    x, d, branch, d_branch, bias, gate, scale, dgate, dshift, dscale, eps, dtype, tangent
) -> tuple[Tensor | None, Tensor]:
    """``(d_new, dh)``; d_new is None without branch."""
    b, N, D = x.shape
    d_new = None if branch is None else torch.empty_like(d)
    dh = x.new_empty((b, N, D), dtype=dtype)
    warps = row_warps(D)
    launch(
        _adaln_difference_kernel,
        lambda: (b, triton.cdiv(N, _TOKENS)),
        x,
        d,
        branch,
        d_branch,
        bias,
        gate,
        scale,
        dgate,
        dshift,
        dscale,
        d_new,
        dh,
        *(0 if m is None else m.stride(0) for m in (gate, scale, dgate, dshift, dscale)),
        N,
        _TOKENS,
        EPS=eps,
        TANGENT=tangent,
        D=D,
        THREADS=32 * warps,
        config=Launch(warps, max_registers=_REGISTERS),
    )
    return d_new, dh


def _layernorm_difference(
    x: Tensor,
    d: Tensor,
    scale: Tensor,
    dshift: Tensor,
    dscale: Tensor,
    eps: float,
    dtype: torch.dtype,
    tangent: bool,
) -> Tensor:
    return _run(x, d, None, None, None, None, scale, None, dshift, dscale, eps, dtype, tangent)[1]


def _gated_difference(
    x_new: Tensor,
    d: Tensor,
    branch: Tensor,
    d_branch: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    scale: Tensor,
    dgate: Tensor,
    dshift: Tensor,
    dscale: Tensor,
    eps: float,
    dtype: torch.dtype,
    tangent: bool,
) -> tuple[Tensor, Tensor]:
    return _run(x_new, d, branch, d_branch, bias, gate, scale, dgate, dshift, dscale, eps, dtype, tangent)


_layernorm_op = raw_op("modulated_layernorm_difference", _layernorm_difference)
_gated_op = raw_op("gated_residual_layernorm_difference", _gated_difference)


def modulated_layernorm_difference(
    x: Tensor,
    d: Tensor,
    scale: Tensor,
    dshift: Tensor,
    dscale: Tensor,
    *,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    tangent: bool = False,
) -> Tensor:
    """Fused :func:`soflow_fast.kernels.reference.modulated_layernorm_difference`.

    Args:
        x, d: (b, N, D). scale, dshift, dscale: (b, D), one dtype, any row stride. dtype: of the result, by default
            that of d.

    Returns:
        (b, N, D), no gradient.

    Raises:
        ValueError: for a shape or dtype that does not fit.
    """
    tokens = require_tokens(x=x, d=d)
    modulation = require_modulation(x, scale=scale, dshift=dshift, dscale=dscale)
    return _layernorm_op(*constants(*tokens, *modulation), eps, dtype or d.dtype, tangent)


def gated_residual_layernorm_difference(
    x_new: Tensor,
    d: Tensor,
    branch: Tensor,
    d_branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    dgate: Tensor,
    dshift: Tensor,
    dscale: Tensor,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    tangent: bool = False,
) -> tuple[Tensor, Tensor]:
    """Fused :func:`soflow_fast.kernels.reference.gated_residual_layernorm_difference`.

    Args:
        x_new, d, branch, d_branch: (b, N, D). gate, scale, dgate, dshift, dscale: (b, D), one dtype, any row stride.
            bias: (D,), of any dtype, or None. dtype: of dh, by default that of d_branch.

    Returns:
        ``(d_new, dh)``, (b, N, D), no gradient; d_new has the dtype of d and dh normalises the rounded d_new.

    Raises:
        ValueError: for a shape or dtype that does not fit.
    """
    tokens = require_tokens(x_new=x_new, d=d, branch=branch, d_branch=d_branch)
    modulation = require_modulation(x_new, gate=gate, scale=scale, dgate=dgate, dshift=dshift, dscale=dscale)
    bias = require_bias(x_new, bias)
    biases = [None] if bias is None else constants(bias)
    return _gated_op(*constants(*tokens), *biases, *constants(*modulation), eps, dtype or d_branch.dtype, tangent)


def cases() -> list[Case]:
    """Shapes of the consistency rows of a batch of 256, residual stream in float32 and in low precision."""

    def inputs(tokens: int, width: int, residual: torch.dtype | None, gated: bool, biased: bool = True):
        def make(new: Inputs) -> dict:
            b = new.rows(64)
            gate, scale = new.normal(b, 8, width, scale=0.5).unbind(1)[:2]
            dgate, dshift, dscale = new.normal(b, 8, width, scale=1e-3).unbind(1)[:3]
            x = new.normal(b, tokens, width, dtype=residual)
            d = new.normal(b, tokens, width, scale=1e-3, dtype=residual)
            modulation = {"scale": scale, "dshift": dshift, "dscale": dscale}
            if not gated:
                return {"x": x, "d": d, "dtype": new.dtype, **modulation}
            branch, d_branch = new.normal(b, tokens, width), new.normal(b, tokens, width, scale=1e-3)
            gates = {"gate": gate, "dgate": dgate} | ({"bias": new.normal(width, scale=0.5)} if biased else {})
            return {"x_new": x, "d": d, "branch": branch, "d_branch": d_branch, **gates, **modulation}

        return make

    sizes = {"S/2": (256, 384), "B/4": (64, 768), "L/2": (256, 1024), "XL/2": (256, 1152)}
    op, wide, cases = "gated_residual_layernorm_difference", torch.float32, []
    for name, size in sizes.items():
        cases.append(Case(op, name, inputs(*size, wide, gated=True)))
        cases.append(Case(op, f"{name} tangent", inputs(*size, wide, gated=True), {"tangent": True}))
        cases.append(Case(op, f"{name} narrow residual", inputs(*size, None, gated=True)))
        first = inputs(*size, wide, gated=False)
        cases.append(Case("modulated_layernorm_difference", name, first))
    cases.append(Case(op, "XL/2 without bias", inputs(*sizes["XL/2"], wide, gated=True, biased=False)))
    return cases
