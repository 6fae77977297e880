"""Differences of activations: ``g(u+du) − g(u)`` for the tanh GELU and for SiLU, without cancellation.

The tangent is ``g'(u)·du``; both are in ``_activations.py``. One pass: reads u and du, writes dg (6 bytes per element
in bf16). Nothing is saved; the ops have no gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._activations import difference
from ._cases import Case, Inputs
from ._launch import Launch, constants, launch, require_dtype, require_shape
from ._op import raw_op

# 8 elements a thread are one 16-byte access in bf16; at 64 registers half of an SM's threads are resident, enough loads
# in flight for a kernel that only streams.
_BLOCK = 1024
_LAUNCH = Launch(num_warps=4, max_registers=64)


@triton.jit
def _store_differences(u_ptr, du_ptr, dg_ptr, offsets, mask, GELU: tl.constexpr, TANGENT: tl.constexpr):
    u = tl.load(u_ptr + offsets, mask=mask).to(tl.float32)
    du = tl.load(du_ptr + offsets, mask=mask).to(tl.float32)
    dg = difference(u, du, GELU, TANGENT, dg_ptr.dtype.element_ty == tl.float32)
    tl.store(dg_ptr + offsets, dg.to(dg_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n"])
def _activation_difference_kernel(
    u_ptr,  # (n,)
    du_ptr,  # (n,)
    dg_ptr,  # (n,)
    n: tl.int64,
    GELU: tl.constexpr,
    TANGENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = first + tl.arange(0, BLOCK)
    if first + BLOCK <= n:  # a mask of a size known only now would make every access one value wide
        _store_differences(u_ptr, du_ptr, dg_ptr, offsets, None, GELU, TANGENT)
    else:
        _store_differences(u_ptr, du_ptr, dg_ptr, offsets, offsets < n, GELU, TANGENT)


def _activation_difference(u: Tensor, du: Tensor, gelu: bool, tangent: bool) -> Tensor:
    u, du = u.contiguous(), du.contiguous()
    dg = torch.empty_like(du)
    n = du.numel()
    launch(
        _activation_difference_kernel,
        lambda: (triton.cdiv(n, _BLOCK),),
        u,
        du,
        dg,
        n,
        GELU=gelu,
        TANGENT=tangent,
        BLOCK=_BLOCK,
        config=_LAUNCH,
    )
    return dg


_op = raw_op("activation_difference", _activation_difference)


def _check(u: Tensor, du: Tensor) -> None:
    require_shape("du", du, u.shape)
    require_dtype("u", u)
    require_dtype("du", du)


def gelu_difference(u: Tensor, du: Tensor, *, tangent: bool = False) -> Tensor:
    """Fused :func:`soflow_fast.kernels.reference.gelu_difference`: any shape, dtype of du, no gradient."""
    _check(u, du)
    return _op(*constants(u, du), True, tangent)


def silu_difference(u: Tensor, du: Tensor, *, tangent: bool = False) -> Tensor:
    """Fused :func:`soflow_fast.kernels.reference.silu_difference`: any shape, dtype of du, no gradient."""
    _check(u, du)
    return _op(*constants(u, du), False, tangent)


def cases() -> list[Case]:
    """Shapes of the consistency rows of a batch of 256: the MLP's hidden units, and the conditioning."""

    def inputs(batch: int, *shape: int):
        def make(new: Inputs) -> dict:
            rows = new.rows(batch)
            return {"u": new.normal(rows, *shape), "du": new.normal(rows, *shape, scale=1e-3)}

        return make

    return [
        Case("gelu_difference", "B/4", inputs(64, 64, 3072)),
        Case("gelu_difference", "XL/2", inputs(64, 256, 4608)),
        Case("gelu_difference", "XL/2 tangent", inputs(64, 256, 4608), {"tangent": True}),
        Case("silu_difference", "XL/2", inputs(64, 1152)),
        Case("silu_difference", "XL/2 tangent", inputs(64, 1152), {"tangent": True}),
    ]
