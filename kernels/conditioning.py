"""Conditioning: the sinusoids of both times, their difference, and the sum of the three embeddings with its SiLU.

    sinusoids of τ = t and τ = t−s:  [cos ωτ, sin ωτ],  ω_i = 10000^(−i/(width/2)),  i < width/2
    difference when τ moves by dt:   [−sin(ω(τ+dt/2)), cos(ω(τ+dt/2))]·2 sin(ωdt/2)
    condition:                       c = t_embedding + s_embedding + table[label],  active = c·σ(c)
    its backward:                    dc = dactive·σ(c)(1 + c(1−σ(c))),  dtable[k] = Σ_{rows with label k} dc

The tangent of the sinusoids is the same at dt/2 → 0 in the midpoint and ωdt as the chord. Shapes: B rows, b rows that
carry a difference, D width. Bytes: the sinusoids write 4·width per row in bfloat16 and read two floats; condition reads
8·D (the table is float32) and writes 4·D. Its backward reads 10·D per row for the embeddings, 6·D per row and the whole
table for the table, and writes 2·D per row and the whole table gradient; c is recomputed in float32 from the saved
inputs, as the stored one is rounded. All of it is a few microseconds; what counts is one launch instead of many.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._cases import Case, Inputs
from ._launch import Launch, constants, launch, require_dtype, require_shape
from ._math import sin_cos
from ._op import raw_op
from ._partials import sum_chunks
from ._rows import load_row, row_columns, row_warps, store_row

# A program per row (or class): even a thousand of them fit on an H100's 132 SMs at once, at up to 80 registers.
_SINUSOIDS = Launch(num_warps=1, max_registers=64)
_REGISTERS = 80
# Labels looked at together when a program of the table gradient searches the batch for its class. With 256 some spill.
_LABELS = 128
# It adds the rows of its class one after another, about a microsecond each. Where classes are few (without labels, one)
# up to 64 programs share a class: were all equally frequent, each would find 8 rows.
_ROWS, _MOST_PROGRAMS = 8, 64


@triton.jit
def _frequencies(index, HALF: tl.constexpr, DECAY: tl.constexpr):
    """``10000^(−i/HALF)``; DECAY is ``ln(10000)``."""
    return tl.exp(index.to(tl.float32) * (-DECAY / HALF))


@triton.jit
def _silu_gradient(c):
    sigma = tl.sigmoid(c)
    return sigma * (1 + c * (1 - sigma))


@triton.jit
def _time_sinusoids_kernel(
    t_ptr,  # (B,)
    s_ptr,  # (B,)
    features_ptr,  # (2, B, 2·HALF)
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    DECAY: tl.constexpr,
):
    row, B = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    omega = _frequencies(index, HALF, DECAY)
    t = tl.load(t_ptr + row).to(tl.float32)
    s = tl.load(s_ptr + row).to(tl.float32)
    for which in tl.static_range(2):
        sin, cos = sin_cos(omega * (t - which * s))
        out_ptr = features_ptr + (which * B + row) * (2 * HALF) + index
        tl.store(out_ptr, cos.to(features_ptr.dtype.element_ty), mask=index < HALF)
        tl.store(out_ptr + HALF, sin.to(features_ptr.dtype.element_ty), mask=index < HALF)


@triton.jit
def _time_sinusoids_difference_kernel(
    t_ptr,  # (b,)
    s_ptr,  # (b,)
    dt_ptr,  # (b,)
    difference_ptr,  # (2, b, 2·HALF)
    TANGENT: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    DECAY: tl.constexpr,
):
    row, b = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    omega = _frequencies(index, HALF, DECAY)
    t = tl.load(t_ptr + row).to(tl.float32)
    s = tl.load(s_ptr + row).to(tl.float32)
    dt = tl.load(dt_ptr + row).to(tl.float32)
    if TANGENT:
        chord, middle = omega * dt, t
    else:
        half_chord, _ = sin_cos(0.5 * omega * dt)
        chord, middle = 2 * half_chord, t + 0.5 * dt
    for which in tl.static_range(2):
        sin, cos = sin_cos(omega * (middle - which * s))
        out_ptr = difference_ptr + (which * b + row) * (2 * HALF) + index
        tl.store(out_ptr, (-sin * chord).to(difference_ptr.dtype.element_ty), mask=index < HALF)
        tl.store(out_ptr + HALF, (cos * chord).to(difference_ptr.dtype.element_ty), mask=index < HALF)


@triton.jit
def _load_condition(t_ptr, s_ptr, table_ptr, label, row, columns, classes, D: tl.constexpr):
    """``t + s + table[label]`` of a row in float32; NaN for a label that the table does not have."""
    known = (label >= 0) & (label < classes)
    y = load_row(table_ptr + tl.where(known, label, 0) * D, columns, D)
    c = load_row(t_ptr + row * D, columns, D) + load_row(s_ptr + row * D, columns, D) + y
    return tl.where(known, c, float("nan"))


@triton.jit(do_not_specialize=["classes"])
def _condition_forward_kernel(
    t_ptr,  # (B, D)
    s_ptr,  # (B, D)
    table_ptr,  # (classes, D)
    labels_ptr,  # (B,)
    c_ptr,  # (B, D)
    active_ptr,  # (B, D)
    classes: tl.int64,
    D: tl.constexpr,
    THREADS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = row_columns(D, THREADS)
    c = _load_condition(t_ptr, s_ptr, table_ptr, tl.load(labels_ptr + row), row, columns, classes, D)
    store_row(c_ptr + row * D, columns, c, D)
    store_row(active_ptr + row * D, columns, c * tl.sigmoid(c), D)


@triton.jit(do_not_specialize=["classes"])
def _condition_backward_kernel(
    dactive_ptr,  # (B, D)
    t_ptr,  # (B, D)
    s_ptr,  # (B, D)
    table_ptr,  # (classes, D)
    labels_ptr,  # (B,)
    dc_ptr,  # (B, D), the gradient of both embeddings
    classes: tl.int64,
    D: tl.constexpr,
    THREADS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = row_columns(D, THREADS)
    c = _load_condition(t_ptr, s_ptr, table_ptr, tl.load(labels_ptr + row), row, columns, classes, D)
    store_row(dc_ptr + row * D, columns, load_row(dactive_ptr + row * D, columns, D) * _silu_gradient(c), D)


@triton.jit(do_not_specialize=["B", "chunk"])
def _table_gradient_kernel(
    dactive_ptr,  # (B, D)
    t_ptr,  # (B, D)
    s_ptr,  # (B, D)
    table_ptr,  # (classes, D)
    labels_ptr,  # (B,)
    dtable_ptr,  # (chunks, classes, D)
    B: tl.int64,
    chunk: tl.int64,  # rows that a program searches
    D: tl.constexpr,
    THREADS: tl.constexpr,
    LABELS: tl.constexpr,
):
    label, classes = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    columns = row_columns(D, THREADS)
    part = tl.program_id(1).to(tl.int64)
    start, end = part * chunk, tl.minimum((part + 1) * chunk, B)
    total = tl.zeros(columns.shape, tl.float32)
    y = load_row(table_ptr + label * D, columns, D)
    places = tl.arange(0, LABELS)
    for first in range(start, end, LABELS):
        found = tl.load(labels_ptr + first + places, mask=places < end - first, other=-1) == label
        place = tl.min(tl.where(found, places, LABELS))
        while place < LABELS:
            row = first + place
            c = load_row(t_ptr + row * D, columns, D) + load_row(s_ptr + row * D, columns, D) + y
            total += load_row(dactive_ptr + row * D, columns, D) * _silu_gradient(c)
            place = tl.min(tl.where(found & (places > place), places, LABELS))
    store_row(dtable_ptr + (part * classes + label) * D, columns, total, D)


def _time_sinusoids(t: Tensor, s: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    features = t.new_empty((2, t.shape[0], width), dtype=dtype)
    half = width // 2
    launch(
        _time_sinusoids_kernel,
        lambda: (t.shape[0],),
        t,
        s,
        features,
        HALF=half,
        BLOCK=triton.next_power_of_2(half),
        DECAY=math.log(10000.0),
        config=_SINUSOIDS,
    )
    return features


def _time_sinusoids_difference(
    t: Tensor, s: Tensor, dt: Tensor, width: int, dtype: torch.dtype, tangent: bool
) -> Tensor:
    difference = t.new_empty((2, t.shape[0], width), dtype=dtype)
    half = width // 2
    launch(
        _time_sinusoids_difference_kernel,
        lambda: (t.shape[0],),
        t,
        s,
        dt,
        difference,
        TANGENT=tangent,
        HALF=half,
        BLOCK=triton.next_power_of_2(half),
        DECAY=math.log(10000.0),
        config=_SINUSOIDS,
    )
    return difference


def _condition_fwd(t_embedding: Tensor, s_embedding: Tensor, table: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    B, D = t_embedding.shape
    c, active = torch.empty_like(t_embedding), torch.empty_like(t_embedding)
    warps = row_warps(D)
    launch(
        _condition_forward_kernel,
        lambda: (B,),
        t_embedding,
        s_embedding,
        table,
        labels,
        c,
        active,
        table.shape[0],
        D=D,
        THREADS=32 * warps,
        config=Launch(warps, max_registers=_REGISTERS),
    )
    return c, active


def _condition_bwd(
    dactive: Tensor, t_embedding: Tensor, s_embedding: Tensor, table: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    (B, D), classes = t_embedding.shape, table.shape[0]
    dactive = dactive.contiguous()
    dc, dtable = torch.empty_like(t_embedding), torch.empty_like(table)
    chunks = min(max(1, triton.cdiv(B, _ROWS * classes)), _MOST_PROGRAMS)
    partials = dtable if chunks == 1 else table.new_empty((1, chunks, classes, D), dtype=torch.float32)
    warps = row_warps(D)
    row = {"D": D, "THREADS": 32 * warps, "config": Launch(warps, max_registers=_REGISTERS)}
    inputs = (dactive, t_embedding, s_embedding, table, labels)
    launch(_condition_backward_kernel, lambda: (B,), *inputs, dc, classes, **row)
    rows = (B, triton.cdiv(B, chunks))
    launch(_table_gradient_kernel, lambda: (classes, chunks), *inputs, partials, *rows, LABELS=_LABELS, **row)
    if chunks > 1:
        sum_chunks(partials, dtable[None])
    return dc, dtable


_time_sinusoids_op = raw_op("time_sinusoids", _time_sinusoids)
_time_sinusoids_difference_op = raw_op("time_sinusoids_difference", _time_sinusoids_difference)
_condition_fwd_op = raw_op("condition_fwd", _condition_fwd)
_condition_bwd_op = raw_op("condition_bwd", _condition_bwd)


class _Condition(torch.autograd.Function):
    @staticmethod
    def forward(t_embedding, s_embedding, table, labels):
        return _condition_fwd_op(t_embedding, s_embedding, table, labels)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[0])
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, _dc, dactive):
        dc, dtable = _condition_bwd_op(dactive, *ctx.saved_tensors)
        return dc, dc, dtable, None


def _check_times(width: int, **times: Tensor) -> list[Tensor]:
    """The times, contiguous and without gradient; ValueError unless all are (B,) in known dtypes and width is even."""
    if width < 2 or width % 2:
        raise ValueError(f"width={width} is not a positive even number: half of it are cosines, half sines")
    first = next(iter(times.values()))
    for name, time in times.items():
        require_shape(name, time, (first.numel(),))
        require_dtype(name, time)
    return [time.contiguous() for time in constants(*times.values())]


def time_sinusoids(t: Tensor, s: Tensor, *, width: int = 256, dtype: torch.dtype | None = None) -> Tensor:
    """Fused :func:`soflow_fast.kernels.reference.time_sinusoids`, one launch for both times.

    Args:
        t, s: (B,) float32. width: even. dtype: of the result, by default that of t.

    Returns:
        (2, B, width), no gradient: first t, then t−s.

    Raises:
        ValueError: for a shape, width or dtype that does not fit.
    """
    return _time_sinusoids_op(*_check_times(width, t=t, s=s), width, dtype or t.dtype)


def time_sinusoids_difference(
    t: Tensor, s: Tensor, dt: Tensor, *, width: int = 256, dtype: torch.dtype | None = None, tangent: bool = False
) -> Tensor:
    """Fused :func:`soflow_fast.kernels.reference.time_sinusoids_difference`.

    Args:
        t, s, dt: (b,) float32. width: even. dtype: of the result, by default that of t.

    Returns:
        (2, b, width), no gradient.

    Raises:
        ValueError: for a shape, width or dtype that does not fit.
    """
    return _time_sinusoids_difference_op(*_check_times(width, t=t, s=s, dt=dt), width, dtype or t.dtype, tangent)


def condition(t_embedding: Tensor, s_embedding: Tensor, table: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Fused :func:`soflow_fast.kernels.reference.condition`.

    Args:
        t_embedding, s_embedding: (B, D), one dtype. table: (classes, D). labels: (B,) int64 in [0, classes); a row
            with any other label is NaN, as a check would wait for the GPU.

    Returns:
        ``(c, SiLU(c))``, (B, D), dtype of t_embedding; c is not differentiable.

    Raises:
        ValueError: for a shape or dtype that does not fit.
    """
    if t_embedding.dim() != 2:
        raise ValueError(f"t_embedding has shape {tuple(t_embedding.shape)} where (rows, width) is needed")
    B, D = t_embedding.shape
    require_shape("s_embedding", s_embedding, (B, D))
    require_shape("table", table, (table.shape[0], D))
    require_shape("labels", labels, (B,))
    require_dtype("t_embedding", t_embedding)
    require_dtype("table", table)
    for name, tensor, dtype in (("s_embedding", s_embedding, t_embedding.dtype), ("labels", labels, torch.int64)):
        if tensor.dtype != dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype} where {dtype} is needed")
    return _Condition.apply(*(x.contiguous() for x in (t_embedding, s_embedding, table, labels)))


def cases() -> list[Case]:
    """Shapes of a batch of 256 (and of its consistency rows) with 1000 classes and "no label"."""

    def times(batch: int, step: bool):
        def make(new: Inputs) -> dict:
            B = new.rows(batch)
            both = {"t": new.uniform(B, low=0.5), "s": new.uniform(B, high=0.5), "dtype": new.dtype}
            return {**both, "dt": -new.uniform(B, high=0.01)} if step else both

        return make

    def embeddings(width: int):
        def make(new: Inputs) -> dict:
            B, classes = new.rows(256), new.rows(1001)
            t_embedding, s_embedding = new.normal(B, width), new.normal(B, width)
            table, labels = new.normal(classes, width, dtype=torch.float32), new.integers(B, high=classes)
            return {"t_embedding": t_embedding, "s_embedding": s_embedding, "table": table, "labels": labels}

        return make

    gradients = ("t_embedding", "s_embedding", "table")
    return [
        Case("time_sinusoids", "every size", times(256, step=False)),
        Case("time_sinusoids_difference", "every size", times(64, step=True)),
        Case("time_sinusoids_difference", "every size, tangent", times(64, step=True), {"tangent": True}),
        *(
            Case("condition", name, embeddings(width), gradients=gradients)
            for name, width in (("S/2", 384), ("B/4", 768), ("L/2", 1024), ("XL/2", 1152))
        ),
    ]
