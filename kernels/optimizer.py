"""AdamW or RAdam, EMA and the low-precision copies of all parameters in one pass over them.

    m ← m + (1−β₁)(c·g − m),  v ← v + (1−β₂)((c·g)² − v)
    p ← p(1 − η·wd) − η/(1−β₁ᵏ) · m / (√v/√(1−β₂ᵏ) + ε)
    average ← average + w(p − average),  copy ← p in the copy's dtype

RAdam (arXiv 1908.03265, with AdamW's decay) has in place of the last factor, as torch has,

    m · r √(1−β₂ᵏ) / (√v + ε)  where ρ_k > 5, and m alone before,
    r² = (ρ_k−4)(ρ_k−2)ρ_∞ / ((ρ_∞−4)(ρ_∞−2)ρ_k),  ρ_k = ρ_∞ − 2kβ₂ᵏ/(1−β₂ᵏ),  ρ_∞ = 2/(1−β₂) − 1

c is the clipping factor, min(1, limit/‖g‖); where ‖g‖ is not finite nothing is written. The norm takes a pass of its
own over the gradients. Bytes per parameter in float32 with a bfloat16 copy: 4 + 38 (read g; read p, g, m, v, average,
write p, m, v, average, copy), against 58 for torch's fused AdamW, clipping, foreach EMA and foreach copy.

The tensors are found through a table of their addresses, cut into blocks of one tensor each: one launch for all of
them, whatever their number. Everything that changes from step to step is read on the device.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Launch, launch
from ._math import expm1

# 8 elements a thread in 16-byte accesses: five streams of loads in flight, nine blocks to an SM.
_BLOCK = 1024
_LAUNCH = Launch(num_warps=4, max_registers=56)

_ROLES = 6  # parameter, gradient, exp_avg, exp_avg_sq, average, copy


@triton.jit
def _tensor(table_ptr, index, ROLE: tl.constexpr, DTYPE: tl.constexpr):
    """The tensor of a role, as a pointer; torch aligns every tensor to at least 16 bytes."""
    address = tl.load(table_ptr + index * 6 + ROLE)
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def _square_sum_kernel(
    table_ptr,  # (tensors, 6) addresses
    blocks_ptr,  # (blocks, 3): tensor, first element, elements left
    sums_ptr,  # (blocks,) out
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    index = tl.load(blocks_ptr + block * 3)
    start = tl.multiple_of(tl.load(blocks_ptr + block * 3 + 1), BLOCK)
    left = tl.load(blocks_ptr + block * 3 + 2)
    offsets = tl.arange(0, BLOCK)
    g_ptr = _tensor(table_ptr, index, 1, GRADIENT) + start + offsets
    # Without a mask the accesses are 16 bytes wide; only the last block of a tensor needs one.
    if left >= BLOCK:
        g = tl.load(g_ptr).to(tl.float32)
    else:
        g = tl.load(g_ptr, mask=offsets < left, other=0.0).to(tl.float32)
    tl.store(sums_ptr + block, tl.sum(g * g, axis=0))


@triton.jit
def _tail(x):
    """``1/(eˣ−1) − 1/x + 1/2``: its odd series up to x = 1 (next term 3e-7 of x/12)."""
    square = x * x
    return x * (1 / 12 + square * (-1 / 720 + square * (1 / 30240 - square * (1 / 1209600))))


@triton.jit
def average_length(step, log_beta2):
    """``(ρ_k, ρ_∞)``, float32, within 2e-6 of their values: after k steps and at last, how many gradients v averages.

    ρ_k is between 1 and k while ρ_∞ may be thousands, so that their difference would lose all digits that decide on
    ``ρ_k > 5``. With y = −ln β₂ and the tail τ it is ``k + 2(τ(y) − kτ(ky))``, which has none to lose, up to ky = 1; by
    then more than a third of ρ_∞ is left.
    """
    y = -log_beta2
    x = step * y
    limit = 2 / -expm1(log_beta2) - 1
    early = step + 2 * (_tail(y) - step * _tail(tl.minimum(x, 1.0)))
    late = limit - 2 * step * tl.exp2(-1.4426950408889634 * x) / -expm1(-x)
    return tl.where(x < 1, early, late), limit


@triton.jit
def _rectified(scalars, step, log_beta2):
    """The scalars of AdamW with the root and the ε by which its step, m over ``√v/root + ε``, is RAdam's."""
    clip, rest1, rest2, decay, rate, root, eps, weight = scalars
    length, limit = average_length(step, log_beta2)
    # no less than 5, below which the factor may not exist and is not used
    at, end = tl.maximum(length, 5.0), tl.maximum(limit, 5.0)
    root *= tl.sqrt((at - 4) / (end - 4) * ((at - 2) / (end - 2)) * (end / at))
    # until then the denominator is 1: √v, which is below 2e19, over 1e30 is nothing, without a division by infinity
    eps = tl.where(length > 5, eps / root, 1.0)
    root = tl.where(length > 5, root, 1e30)
    return clip, rest1, rest2, decay, rate, root, eps, weight


@triton.jit
def _adamw_block(
    p_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    average_ptr,
    copy_ptr,
    mask,
    scalars,
    AVERAGE: tl.constexpr,
    COPY: tl.constexpr,
):
    clip, rest1, rest2, decay, rate, root, eps, weight = scalars
    # All loads before the first store: the pointers may alias, so that none of them is moved above one.
    p = tl.load(p_ptr, mask=mask)
    if AVERAGE:
        average = tl.load(average_ptr, mask=mask)
    m = tl.load(m_ptr, mask=mask)
    v = tl.load(v_ptr, mask=mask)
    g = clip * tl.load(g_ptr, mask=mask).to(tl.float32)
    m += rest1 * (g - m)
    v += rest2 * (g * g - v)
    tl.store(m_ptr, m, mask=mask)
    tl.store(v_ptr, v, mask=mask)
    p = p * decay - rate * m / (tl.sqrt(v) / root + eps)
    tl.store(p_ptr, p, mask=mask)
    if AVERAGE:
        tl.store(average_ptr, average + weight * (p - average), mask=mask)
    if COPY:
        tl.store(copy_ptr, p.to(copy_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _adamw_kernel(
    table_ptr,  # (tensors, 6) addresses
    blocks_ptr,  # (blocks, 3): tensor, first element, elements left
    norm_ptr,  # () gradient norm
    steps_ptr,  # (tensors,) steps before this one
    lr_ptr,  # ()
    weight_ptr,  # () of the parameter in its average
    log_beta1: tl.float32,
    log_beta2: tl.float32,
    eps: tl.float32,
    weight_decay: tl.float32,
    grad_clip: tl.float32,
    GRADIENT: tl.constexpr,
    COPY: tl.constexpr,  # dtype of the copy, or None
    AVERAGE: tl.constexpr,
    RECTIFIED: tl.constexpr,  # whether it is RAdam
    BLOCK: tl.constexpr,
):
    norm = tl.load(norm_ptr)
    if (norm == norm) & (norm < float("inf")):
        block = tl.program_id(0).to(tl.int64)
        index = tl.load(blocks_ptr + block * 3)
        step = tl.load(steps_ptr + index) + 1
        lr = tl.load(lr_ptr)
        scalars = (
            tl.minimum(1.0, grad_clip / (norm + 1e-6)),
            -expm1(log_beta1),
            -expm1(log_beta2),
            1 - lr * weight_decay,
            lr / -expm1(step * log_beta1),
            tl.sqrt(-expm1(step * log_beta2)),
            eps,
            tl.load(weight_ptr),
        )
        if RECTIFIED:
            scalars = _rectified(scalars, step, log_beta2)
        start = tl.multiple_of(tl.load(blocks_ptr + block * 3 + 1), BLOCK)
        left = tl.load(blocks_ptr + block * 3 + 2)
        # 4 elements at a time also of the copy, of which 8 fit: the float32 tensors keep their layout
        offsets = tl.max_contiguous(tl.arange(0, BLOCK), 4)
        p_ptr = _tensor(table_ptr, index, 0, tl.float32) + start + offsets
        g_ptr = _tensor(table_ptr, index, 1, GRADIENT) + start + offsets
        m_ptr = _tensor(table_ptr, index, 2, tl.float32) + start + offsets
        v_ptr = _tensor(table_ptr, index, 3, tl.float32) + start + offsets
        average_ptr = _tensor(table_ptr, index, 4, tl.float32) + start + offsets
        copy_ptr = _tensor(table_ptr, index, 5, tl.float32 if COPY is None else COPY) + start + offsets
        # Without a mask the accesses are 16 bytes wide; only the last block of a tensor needs one.
        if left >= BLOCK:
            _adamw_block(p_ptr, g_ptr, m_ptr, v_ptr, average_ptr, copy_ptr, None, scalars, AVERAGE, COPY is not None)
        else:
            mask = offsets < left
            _adamw_block(p_ptr, g_ptr, m_ptr, v_ptr, average_ptr, copy_ptr, mask, scalars, AVERAGE, COPY is not None)


def address_table(*roles: Sequence[Tensor] | None) -> list[int]:
    """The flat table of addresses of parameters, gradients, exp_avgs, exp_avg_sqs, averages and copies (or None)."""
    columns = [[0] * len(roles[0]) if tensors is None else [t.data_ptr() for t in tensors] for tensors in roles]
    return [address for row in zip(*columns, strict=True) for address in row]


def block_table(parameters: Sequence[Tensor]) -> Tensor:
    """(blocks, 3) int64 on the CPU: for every block its tensor, its first element and how many elements are left."""
    rows = [(i, start, p.numel() - start) for i, p in enumerate(parameters) for start in range(0, p.numel(), _BLOCK)]
    return torch.tensor(rows, dtype=torch.int64)


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def gradient_norm(table: Tensor, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Global L2 norm of the gradients, 0-d float32.

    Args:
        table: (tensors·6,) int64, :func:`address_table` on the device. blocks: :func:`block_table` on the device.
        dtype: of the gradients.
    """
    sums = torch.empty(blocks.shape[0], device=blocks.device, dtype=torch.float32)
    grid = lambda: (blocks.shape[0],)  # noqa: E731
    launch(_square_sum_kernel, grid, table, blocks, sums, GRADIENT=_TYPES[dtype], BLOCK=_BLOCK, config=_LAUNCH)
    return sums.sum().sqrt()


def adamw_(
    table: Tensor,
    blocks: Tensor,
    norm: Tensor,
    steps: Tensor,
    lr: Tensor,
    average_weight: Tensor | None,
    *,
    log_betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_clip: float,
    rectified: bool = False,
    gradient_dtype: torch.dtype,
    copy_dtype: torch.dtype | None,
) -> None:
    """One step on every tensor of the table, in place; the module's docstring has the equations.

    Args:
        norm: 0-d float32 gradient norm. steps: (tensors,) float32, of each the steps before this one. lr: 0-d float32.
        average_weight: 0-d float32 weight of the new parameter in its average, or None without averages.
        log_betas: natural logarithms of β₁, β₂. grad_clip: largest norm, ``inf`` for none.
        rectified: RAdam in place of AdamW.
    """
    launch(
        _adamw_kernel,
        lambda: (blocks.shape[0],),
        table,
        blocks,
        norm,
        steps,
        lr,
        norm if average_weight is None else average_weight,
        *log_betas,
        eps,
        weight_decay,
        grad_clip,
        GRADIENT=_TYPES[gradient_dtype],
        COPY=None if copy_dtype is None else _TYPES[copy_dtype],
        AVERAGE=average_weight is not None,
        RECTIFIED=rectified,
        BLOCK=_BLOCK,
        config=_LAUNCH,
    )


def passes() -> dict[str, Callable[[], None]]:
    """Both launches in each form that a training step has, on meta tensors, by name; for offline compilation."""

    def make(gradient: torch.dtype, copy: torch.dtype | None, averaged: bool, rectified=False) -> Callable[[], None]:
        def run() -> None:
            parameter, scalar = torch.empty(1000, 1000, device="meta"), torch.empty((), device="meta")
            table, blocks = torch.empty(_ROLES, dtype=torch.int64, device="meta"), block_table([parameter]).to("meta")
            steps = torch.empty(1, device="meta")
            norm = gradient_norm(table, blocks, gradient)
            hyper = {"log_betas": (-0.1, -0.01), "eps": 1e-8, "weight_decay": 0.0, "grad_clip": 1.0}
            form = {"rectified": rectified, "gradient_dtype": gradient, "copy_dtype": copy}
            adamw_(table, blocks, norm, steps, scalar, scalar if averaged else None, **hyper, **form)

        return run

    forms = {"bf16 copy, average": (torch.bfloat16, True), "average": (None, True), "alone": (None, False)}
    return {
        f"{name}{form}": make(torch.float32, *options, rectified=rectified)
        for name, rectified in (("", False), ("RAdam, ", True))
        for form, options in forms.items()
    }
