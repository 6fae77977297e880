"""The MLP, tanh GELU between two products, whose backward takes one pass over its hidden units.

    u = h W1ᵀ + b1,  g = gelu(u),  out = g W2ᵀ

    backward:  dg = dout W2,  du = dg·gelu'(u),  db1 = Σ du,  dW2 = doutᵀ g,  dh = du W1,  dW1 = duᵀ h

The products are torch's. One kernel makes g: Inductor's, with libdevice's tanh, has 8 instructions a byte, more than
memory leaves time for. Another makes du, the sum of du over the rows and, where it was not saved, g from u and dg. The
functions are in ``_activations.py``.

Shapes: R rows, D width, M hidden units. Bytes per hidden unit in bfloat16: forward reads u and writes g: 4; backward
reads u, dg and writes du, g: 8, or 6 with g saved; and at most 1/8 for the partial sums of chunks of 64 rows or more.
Saved: h, u, and g unless it is recomputed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from ._activations import gelu, value_and_slope
from ._cases import Case, Inputs
from ._launch import Launch, constants, launch, require_dtype, require_shape
from ._op import autocast, raw_op
from .float8 import float8_linear, gelu_rows
from .reference_float8 import Float8Rows

# A tile of 4 rows is 8 values a thread, 16-byte accesses in bfloat16. With 64 registers at least half of an SM's
# threads are resident. At most 256 chunks, so that adding up their sums is small, and of at least 64 rows, so that the
# sums are about 2 % of the bytes or less: B/4 has 3072 programs, XL/2 4608, 2 and 4 times what an H100 holds at a time.
_ROWS = tl.constexpr(4)
_COLUMNS = 256
_MOST_CHUNKS, _FEWEST_ROWS = 256, 64
_LAUNCH = Launch(num_warps=4, max_registers=64)
# One access a thread; with 32 registers all of an SM's threads are resident, 32 kB of loads in flight.
_BLOCK = 1024
_GELU_LAUNCH = Launch(num_warps=4, max_registers=32)


@triton.jit
def _store_gelu(u_ptr, g_ptr, offsets, mask):
    g = gelu(tl.load(u_ptr + offsets, mask=mask).to(tl.float32))
    tl.store(g_ptr + offsets, g.to(g_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n"])
def _gelu_kernel(
    u_ptr,  # (n,)
    g_ptr,  # (n,)
    n: tl.int64,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = first + tl.arange(0, BLOCK)
    if first + BLOCK <= n:  # a mask of a size known only now would make every access one value wide
        _store_gelu(u_ptr, g_ptr, offsets, None)
    else:
        _store_gelu(u_ptr, g_ptr, offsets, offsets < n)


@triton.jit(do_not_specialize=["R", "chunk"])
def _gelu_backward_kernel(
    u_ptr,  # (R, M)
    dg_ptr,  # (R, M)
    du_ptr,  # (R, M)
    g_ptr,  # (R, M) or None
    partial_ptr,  # (chunks, M), sums of du
    R: tl.int64,
    chunk: tl.int64,  # rows of a program, a multiple of _ROWS
    M: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    first = tl.program_id(1).to(tl.int64) * chunk
    columns = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    rows = first + tl.arange(0, _ROWS)[:, None]
    total = tl.zeros((_ROWS, COLUMNS), tl.float32)
    for _ in range(0, chunk, _ROWS):
        mask = (rows < R) & (columns < M)
        offset = rows * M + columns
        u = tl.load(u_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        dg = tl.load(dg_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        g, slope = value_and_slope(u, True)
        du = dg * slope
        tl.store(du_ptr + offset, du.to(du_ptr.dtype.element_ty), mask=mask)
        if g_ptr is not None:
            tl.store(g_ptr + offset, g.to(g_ptr.dtype.element_ty), mask=mask)
        total += du
        rows += _ROWS
    columns = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(partial_ptr + tl.program_id(1).to(tl.int64) * M + columns, tl.sum(total, 0), mask=columns < M)


def _gelu(u: Tensor) -> Tensor:
    u = u.contiguous()
    g, n = torch.empty_like(u), u.numel()
    launch(_gelu_kernel, lambda: (triton.cdiv(n, _BLOCK),), u, g, n, BLOCK=_BLOCK, config=_GELU_LAUNCH)
    return g


def _gelu_bwd(u: Tensor, dg: Tensor, with_g: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``(du, g, partials)``, g empty unless asked for; the column sums of the partials are those of du."""
    R, M = u.shape
    u, dg = u.contiguous(), dg.contiguous()
    du, g = torch.empty_like(u), u.new_empty((R, M) if with_g else (0,))
    chunk = _ROWS.value * triton.cdiv(max(_FEWEST_ROWS, triton.cdiv(R, _MOST_CHUNKS)), _ROWS.value)
    chunks = triton.cdiv(R, chunk)
    partials = u.new_empty((chunks, M), dtype=torch.float32)
    launch(
        _gelu_backward_kernel,
        lambda: (triton.cdiv(M, _COLUMNS), chunks),  # programs side by side read whole rows
        *(u, dg, du, g if with_g else None, partials),
        *(R, chunk),
        M=M,
        COLUMNS=_COLUMNS,
        config=_LAUNCH,
    )
    return du, g, partials


_gelu_op = raw_op("gelu", _gelu)
_gelu_bwd_op = raw_op("gelu_bwd", _gelu_bwd)


def _linear_gelu(h: Tensor, w1: Tensor, b1: Tensor) -> Tensor:
    """``gelu(u)`` of h, (R, D): on CUDA in the product's epilogue, whose GELU is the tanh form there alone."""
    if h.is_cuda:
        return torch._addmm_activation(b1, h, w1.mT, use_gelu=True)
    return nn.functional.gelu(nn.functional.linear(h, w1, b1), approximate="tanh")


def _linear_gelu_fake(h: Tensor, w1: Tensor, b1: Tensor) -> Tensor:
    return h.new_empty(h.shape[0], w1.shape[0])


_linear_gelu_op = raw_op("linear_gelu", _linear_gelu, _linear_gelu_fake)


@register_flop_formula(torch.ops.soflow.linear_gelu)
def _flops(h_shape, w1_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * h_shape[0] * h_shape[1] * w1_shape[0]


@torch.compiler.allow_in_graph  # else a checkpoint that is compiled keeps what it should recompute
class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(h, w1, b1, w2, recompute):
        u = nn.functional.linear(h, w1, b1)
        g = _gelu_op(u)
        return nn.functional.linear(g, w2), u, g

    @staticmethod
    def setup_context(ctx, inputs, output):
        h, w1, _, w2, recompute = inputs
        _, u, g = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(u, g)
        ctx.save_for_backward(h, w1, w2, u, None if recompute else g)

    @staticmethod
    def backward(ctx, dout, *_):
        if dout is None:
            return (None,) * 5
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise NotImplementedError(
                "the fused MLP has no second derivative, which torch.func.grad and vjp want too; use "
                "torch.autograd.grad for a first one, or impl='torch'"
            )
        h, w1, w2, u, g = ctx.saved_tensors
        needs_h, needs_w1, needs_b1, needs_w2, _ = ctx.needs_input_grad
        dout_2d, h_2d, u_2d = (x.reshape(-1, x.shape[-1]) for x in (dout, h, u))
        dh = dw1 = db1 = dw2 = None
        if needs_h or needs_w1 or needs_b1 or g is None:
            du, new_g, partials = _gelu_bwd_op(u_2d, dout_2d @ w2, needs_w2 and g is None)
        if needs_w2:
            dw2 = dout_2d.mT @ (new_g if g is None else g.reshape(u_2d.shape))
        if needs_h:
            dh = (du @ w1).view(h.shape)
        if needs_w1:
            dw1 = du.mT @ h_2d
        if needs_b1:
            db1 = partials.sum(0).to(du.dtype)
        return dh, dw1, db1, dw2, None


def mlp(
    h: Tensor | Float8Rows, w1: Tensor, b1: Tensor, w2: Tensor, *, recompute: bool = False, hidden: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Fused :func:`soflow_fast.kernels.reference.mlp`.

    In half precision the GELU is part of the first product where neither gradients nor hidden units are wanted: it is
    then that of the unrounded u. In float32, where two outputs may be subtracted, both forms compute the same.

    Args:
        h: (..., D), also in float8, then without gradient. w1: (M, D). b1: (M,). w2: (D_out, M), all of one dtype.
            recompute: the backward computes the GELU again instead of keeping its output. hidden: whether u is wanted.

    Returns:
        ``(out, u)``: (..., D_out), and (..., M) without gradient, or None.

    Raises:
        ValueError: for a shape or dtype that does not fit.
    """
    if isinstance(h, Float8Rows):
        u = float8_linear(h, w1, b1)
        return float8_linear(gelu_rows(u), w2), u if hidden else None
    h, w1, b1, w2 = autocast(h, w1, b1, w2)
    require_dtype("h", h)
    require_shape("b1", b1, w1.shape[:1])
    require_shape("w1", w1, (*b1.shape, h.shape[-1]))
    require_shape("w2", w2, (w2.shape[0], *b1.shape))
    for name, x in {"w1": w1, "b1": b1, "w2": w2}.items():
        if x.dtype != h.dtype:
            raise ValueError(f"{name} has dtype {x.dtype} where that of h, {h.dtype}, is needed")
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (h, w1, b1, w2))
    if not hidden and not differentiable and h.dtype != torch.float32:
        g = _linear_gelu_op(*constants(h.reshape(-1, h.shape[-1]), w1, b1))
        return nn.functional.linear(g, w2).view(*h.shape[:-1], w2.shape[0]), None
    out, u, _ = _Mlp.apply(h, w1, b1, w2, recompute)
    return out, u if hidden else None


def cases() -> list[Case]:
    """The gradient's rows of a batch of 256, the GELU recomputed; S/4 where it is not; XL/2's rows without gradient."""

    def inputs(tokens: int, width: int, rows: int = 256):
        def make(new: Inputs) -> dict:
            hidden = 4 * width
            return {
                "h": new.normal(new.rows(rows), tokens, width),
                "w1": new.normal(hidden, width, scale=width**-0.5),
                "b1": new.normal(hidden, scale=0.1),
                "w2": new.normal(width, hidden, scale=hidden**-0.5),
            }

        return make

    gradients, recompute = ("h", "w1", "b1", "w2"), {"recompute": True}
    return [
        Case("mlp", "S/4", inputs(64, 384), gradients=gradients),
        Case("mlp", "B/4", inputs(64, 768), recompute, gradients),
        Case("mlp", "L/2", inputs(256, 1024), recompute, gradients),
        Case("mlp", "XL/2", inputs(256, 1152), recompute, gradients),
        Case("mlp", "XL/2 without gradient", inputs(256, 1152, 320)),
    ]
