"""Differences of activations: ``g(u+du) − g(u)`` for the tanh GELU and for SiLU, without cancellation.

    GELU:  z = c(u + κu³),  dz = c·du(1 + κ(3u² + 3u·du + du²)),  c = √(2/π), κ = 0.044715
           dg = ½du(1 + tanh z') + ½u·tanh(dz)(1 − tanh z·tanh z')
    SiLU:  dg = ½du(1 + tanh(u'/2)) + ½u·tanh(du/2)(1 − tanh(u/2)·tanh(u'/2))

primed values at u+du; the tangent drops every product of two differences. One pass: reads u and du, writes dg (6 bytes
per element in bf16). Nothing is saved; the ops have no gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._cases import Case, Inputs
from ._launch import Launch, constants, launch, require_dtype, require_shape
from ._math import tanh, tanh_difference
from ._op import raw_op

# 8 elements a thread are one 16-byte access in bf16; at 64 registers half of an SM's threads are resident, enough loads
# in flight for a kernel that only streams.
_BLOCK = 1024
_LAUNCH = Launch(num_warps=4, max_registers=64)


@triton.jit
def _gelu_difference(u, du, TANGENT: tl.constexpr):
    c: tl.constexpr = 0.7978845608028654
    k: tl.constexpr = 0.044715
    z = c * u * (1 + k * u * u)
    tanh_z = tanh(z)
    if TANGENT:
        dz = c * du * (1 + 3 * k * u * u)
        return 0.5 * du * (1 + tanh_z) + 0.5 * u * dz * (1 - tanh_z * tanh_z)
    dz = c * du * (1 + k * (3 * u * (u + du) + du * du))
    tanh_moved = tanh(z + dz)
    return 0.5 * du * (1 + tanh_moved) + 0.5 * u * tanh_difference(tanh_moved, tanh_z, dz)


@triton.jit
def _silu_difference(u, du, TANGENT: tl.constexpr):
    tanh_half = tanh(0.5 * u)
    if TANGENT:
        return 0.5 * du * (1 + tanh_half) + 0.25 * u * du * (1 - tanh_half * tanh_half)
    tanh_moved = tanh(0.5 * (u + du))
    return 0.5 * du * (1 + tanh_moved) + 0.5 * u * tanh_difference(tanh_moved, tanh_half, 0.5 * du)


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
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    u = tl.load(u_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    du = tl.load(du_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    dg = _gelu_difference(u, du, TANGENT) if GELU else _silu_difference(u, du, TANGENT)
    tl.store(dg_ptr + offsets, dg.to(dg_ptr.dtype.element_ty), mask=mask)


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
