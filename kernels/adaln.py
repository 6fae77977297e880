"""adaLN: gate, residual, LayerNorm and modulation in one pass, and their backward in one pass.

    x_new = x + gate·(branch + bias),   n = (x_new − mean)·rstd,   h = n(1+scale) + shift

Backward, with g = dh(1+scale) and dx_new the gradient that arrives at the residual stream:

    dx = dx_new + rstd(g − mean(g) − n·mean(g·n)),   dbranch = gate·dx
    dshift = Σ_tokens dh,   dscale = Σ_tokens dh·n,   dgate = Σ_tokens dx·branch + bias·Σ_tokens dx
    dbias = Σ_samples gate·Σ_tokens dx

The bias is that of the linear layer whose product branch is, or absent. Summed where dx is in registers, its gradient
costs no pass over dbranch. One pass over the tokens gives all six: a program walks over a chunk of one sample's tokens,
keeps the four sums in registers, and writes them as float32 partial sums (B, chunks, 4, D), which a second small kernel
adds in a fixed order; dbias is then one more sum, of (B, D).

Shapes: B rows (samples), N tokens, D width.

Bytes per token and channel, bfloat16 operands:    residual stream float32    bfloat16
    forward    reads x, branch; writes x_new, h           4+2+4+2 = 12        2+2+2+2 = 8
    backward   reads dh, dx_new, x_new, branch            2+4+4+2             2+2+2+2
               writes dx, dbranch                         4+2     = 18        2+2     = 12
    partial sums, written and read, chunks of 64 tokens   32/64   =  ½                   ½
    a block (two of each)                                           61                  41
In chunks of 16 tokens (small batches) a block takes 64 and 44. With the modulation and its gradients, and with mean and
rstd, all launches of a block of XL/2 move 61.2 bytes (float32 stream) and 41.2; of B/4, 64.7 and 44.7. The bias is 0.3
of them (B/4: 1.1), where passes over dbranch would read 4.

Saved for the backward: x_new (which the next op reads anyway), branch, bias, gate, scale, and mean and rstd of each
token: 16 bytes a token, written and read, 0.1 % of the backward's bytes, spare it two more exchanges between threads.
An output that nobody uses has no gradient to read (torch.compile sends zeros instead, in the last of all blocks).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._adaln_backward import backward
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
    store_rounded_row,
    store_row,
    sum_row,
)
from .reference_float8 import Float8Rows

# Tokens per program: enough to reuse the modulation, few enough for several programs per SM at 64 tokens.
_TOKENS = 8

# Registers for at least 4 rows of up to 1536 channels in flight per SM, where a microsecond of latency at 4.3 TB/s
# needs 32 KiB on the way: at 1152 channels, with 6 rows or 7, 40 KiB with a float32 stream and 31 with a bfloat16 one.
# The row that is used last, the shift, is not kept: each token reads it from L1.
_REGISTERS = 80


@triton.jit(do_not_specialize=["N", "chunk"])
def _adaln_forward_kernel(
    x_ptr,  # (B, N, D)
    branch_ptr,  # (B, N, D), or None: then x is normalised as it is
    bias_ptr,  # (D,), or None: then branch has no bias
    gate_ptr,  # (B, D), row stride stride_gate; None without branch
    shift_ptr,  # (B, D), row stride stride_shift
    scale_ptr,  # (B, D), row stride stride_scale
    x_new_ptr,  # (B, N, D); None without branch
    h_ptr,  # (B, N, D)
    mean_ptr,  # (B, N), or None
    rstd_ptr,  # (B, N), or None
    h_scale_ptr,  # (B, N), of rows of h in float8, or None
    stride_gate,
    stride_shift,
    stride_scale,
    N: tl.int64,
    chunk: tl.int64,
    EPS: tl.constexpr,
    D: tl.constexpr,
    THREADS: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * chunk
    columns = row_columns(D, THREADS)
    gain = 1 + load_row(scale_ptr + sample * stride_scale, columns, D)
    if branch_ptr is not None:
        gate = load_row(gate_ptr + sample * stride_gate, columns, D)
    if bias_ptr is not None:
        bias = load_row(bias_ptr, columns, D)
    for token in range(sample * N + first, sample * N + tl.minimum(first + chunk, N)):
        x = load_row(x_ptr + token * D, columns, D)
        if branch_ptr is not None:
            branch = load_row(branch_ptr + token * D, columns, D)
            if bias_ptr is not None:
                branch += bias
            x = (x + gate * branch).to(x_new_ptr.dtype.element_ty)
            store_row(x_new_ptr + token * D, columns, x, D)
            x = x.to(tl.float32)
        mean = sum_row(x) / D
        centred = tl.where(columns < D, x - mean, 0.0)
        rstd = tl.rsqrt(sum_row(centred * centred) / D + EPS)
        shift = load_row(shift_ptr + sample * stride_shift, columns, D)
        h = centred * rstd * gain + shift
        if h_scale_ptr is not None:
            store_rounded_row(h_ptr + token * D, h_scale_ptr + token, columns, h, D)
        else:
            store_row(h_ptr + token * D, columns, h, D)
        if mean_ptr is not None:
            tl.store(mean_ptr + token, mean)
            tl.store(rstd_ptr + token, rstd)


def _forward(x, branch, bias, gate, shift, scale, eps, dtype) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """``(x_new, h, mean, rstd)``, in float8 ``(x_new, h, scales of h, None)``; x_new is None without branch."""
    B, N, D = x.shape
    x_new = None if branch is None else torch.empty_like(x)
    h, rounded = x.new_empty((B, N, D), dtype=dtype), dtype == torch.float8_e4m3fn
    mean, rstd, h_scale = (
        x.new_empty((B, N), dtype=torch.float32) if wanted else None for wanted in (not rounded, not rounded, rounded)
    )
    warps = row_warps(D)
    launch(
        _adaln_forward_kernel,
        lambda: (B, triton.cdiv(N, _TOKENS)),
        *(x, branch, bias, gate, shift, scale),
        *(x_new, h, mean, rstd, h_scale),
        *(0 if m is None else m.stride(0) for m in (gate, shift, scale)),
        *(N, _TOKENS),
        EPS=eps,
        D=D,
        THREADS=32 * warps,
        config=Launch(warps, max_registers=_REGISTERS),
    )
    return x_new, h, h_scale if rounded else mean, rstd


def _layernorm_fwd(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, None, None, None, shift, scale, eps, dtype)[1:]


def _layernorm_bwd(dh: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dx, _, dmodulation, _ = backward(dh, None, x, None, None, None, scale, mean, rstd)
    return dx, dmodulation


def _gated_fwd(
    x: Tensor,
    branch: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward(x, branch, bias, gate, shift, scale, eps, dtype)


def _layernorm_float8(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _forward(x, None, None, None, shift, scale, eps, torch.float8_e4m3fn)[1:3]


def _gated_float8(
    x: Tensor, branch: Tensor, bias: Tensor | None, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, branch, bias, gate, shift, scale, eps, torch.float8_e4m3fn)[:3]


def _gated_bwd(
    dh: Tensor,
    dx_new: Tensor | None,
    x_new: Tensor,
    branch: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dbranch, dmodulation, dbias = backward(dh, dx_new, x_new, branch, bias, gate, scale, mean, rstd)
    # an op returns a tensor in any case: without bias one of no rows
    return dx, dbranch, dmodulation, x_new.new_empty((0, x_new.shape[2])) if dbias is None else dbias


_layernorm_fwd_op = raw_op("modulated_layernorm_fwd", _layernorm_fwd)
_layernorm_bwd_op = raw_op("modulated_layernorm_bwd", _layernorm_bwd)
_gated_fwd_op = raw_op("gated_residual_layernorm_fwd", _gated_fwd)
_gated_bwd_op = raw_op("gated_residual_layernorm_bwd", _gated_bwd)
_layernorm_float8_op = raw_op("modulated_layernorm_float8", _layernorm_float8)
_gated_float8_op = raw_op("gated_residual_layernorm_float8", _gated_float8)


class _ModulatedLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(x, shift, scale, eps, dtype):
        return _layernorm_fwd_op(x, shift, scale, eps, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, _, scale, _, _ = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(x, scale, mean, rstd)

    @staticmethod
    def backward(ctx, dh, _mean, _rstd):
        dx, dmodulation = _layernorm_bwd_op(dh, *ctx.saved_tensors)
        dshift, dscale = dmodulation.unbind(1)
        return dx, dshift, dscale, None, None


class _GatedResidualLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(x, branch, bias, gate, shift, scale, eps, dtype):
        return _gated_fwd_op(x, branch, bias, gate, shift, scale, eps, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, branch, bias, gate, _, scale, _, ctx.dtype = inputs
        x_new, _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x_new, branch, bias, gate, scale, mean, rstd)

    @staticmethod
    def backward(ctx, dx_new, dh, _mean, _rstd):
        if dh is None and dx_new is None:
            return (None,) * 8
        if dh is None:
            dh = torch.zeros_like(dx_new, dtype=ctx.dtype)
        saved = ctx.saved_tensors  # once: a checkpoint unpacks them only once
        dx, dbranch, dmodulation, dbias = _gated_bwd_op(dh, dx_new, *saved)
        dbias = dbias.sum(0).to(saved[2].dtype) if ctx.needs_input_grad[2] else None
        dshift, dscale, dgate = dmodulation.unbind(1)
        return dx, dbranch, dbias, dgate, dshift, dscale, None, None


def modulated_layernorm(
    x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6, dtype: torch.dtype | None = None
) -> Tensor | Float8Rows:
    """Fused :func:`soflow_fast.kernels.reference.modulated_layernorm`.

    Args:
        x: (B, N, D). shift, scale: (B, D), one dtype, any row stride. dtype: of the result, by default that of x; of
            float8 e4m3 its rows, without gradient, in place of a tensor in the dtype of the shift.

    Returns:
        (B, N, D).

    Raises:
        ValueError: for a shape or dtype that does not fit.
        RuntimeError: by torch, under torch.func.grad or vjp; torch.autograd.grad takes the op.
    """
    (x,) = require_tokens(x=x)
    shift, scale = require_modulation(x, shift=shift, scale=scale)
    if dtype == torch.float8_e4m3fn:
        return Float8Rows(*_layernorm_float8_op(*constants(x, shift, scale), eps), shift.dtype)
    return _ModulatedLayerNorm.apply(x, shift, scale, eps, dtype or x.dtype)[0]


def gated_residual_layernorm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | Float8Rows]:
    """Fused :func:`soflow_fast.kernels.reference.gated_residual_layernorm`.

    Args:
        x, branch: (B, N, D). gate, shift, scale: (B, D), one dtype, any row stride. bias: (D,), of any dtype, or None.
            dtype: of h, by default branch's; float8 e4m3 as in :func:`modulated_layernorm`.

    Returns:
        ``(x_new, h)``, (B, N, D); x_new has the dtype of x and h normalises the rounded x_new.

    Raises:
        ValueError: for a shape or dtype that does not fit.
        RuntimeError: by torch, under torch.func.grad or vjp; torch.autograd.grad takes the op.
    """
    x, branch = require_tokens(x=x, branch=branch)
    gate, shift, scale = require_modulation(x, gate=gate, shift=shift, scale=scale)
    bias = require_bias(x, bias)
    if dtype == torch.float8_e4m3fn:
        x_new, *h = _gated_float8_op(*constants(x, branch, bias, gate, shift, scale), eps)
        return x_new, Float8Rows(*h, shift.dtype)
    return _GatedResidualLayerNorm.apply(x, branch, bias, gate, shift, scale, eps, dtype or branch.dtype)[:2]


def cases() -> list[Case]:
    """Shapes of a batch of 256; the modulation are slices of one (B, chunks, D) tensor, as in the DiT."""

    def inputs(tokens: int, width: int, residual: torch.dtype | None, gradients: tuple[str, ...]):
        def make(new: Inputs) -> dict:
            B = new.rows(256)
            gate, shift, scale = new.normal(B, 8, width, scale=0.5).unbind(1)[:3]
            made = {"x": new.normal(B, tokens, width, dtype=residual), "shift": shift, "scale": scale}
            if "branch" not in gradients:
                return made | {"dtype": new.dtype}
            made |= {"branch": new.normal(B, tokens, width), "gate": gate}
            return made | ({"bias": new.normal(width, scale=0.5)} if "bias" in gradients else {})

        return make

    def case(op: str, name: str, size: tuple[int, int], residual: torch.dtype | None, *gradients: str) -> Case:
        return Case(op, name, inputs(*size, residual, gradients), gradients=gradients)

    def rounded(op: str, name: str, *needed: str) -> Case:
        make = inputs(*sizes[name], None, needed)
        return Case(op, f"{name} float8", lambda new: {**make(new), "dtype": torch.float8_e4m3fn})

    sizes = {"S/2": (256, 384), "B/4": (64, 768), "L/2": (256, 1024), "XL/2": (256, 1152)}
    plain, gated = ("x", "shift", "scale"), ("x", "branch", "gate", "shift", "scale")
    op, cases = "gated_residual_layernorm", []
    for name, size in sizes.items():
        cases.append(case(op, name, size, torch.float32, *gated, "bias"))
        cases.append(case(op, f"{name} narrow residual", size, None, *gated, "bias"))
        cases.append(case("modulated_layernorm", name, size, torch.float32, *plain))
    cases.append(case(op, "XL/2 without bias", sizes["XL/2"], torch.float32, *gated))
    cases += [rounded(op, "B/4", *gated, "bias"), rounded(op, "XL/2", *gated, "bias")]
    cases.append(rounded("modulated_layernorm", "XL/2", *plain))
    return cases
