"""Random draws, and noisy samples in one pass over the data.

    draw:         Philox4x32-10 of counter (block, row, step, stream) and key (seed mod 2^32, seed div 2^32)
    normal:       r cos θ, r sin θ with r = √(−2 ln u₁), θ = 2π u₂ of two words each
    interpolate:  x_t = α x_0 + β ε,  v_t = α' x_0 + β' ε
    noisy_sample: the same with ε drawn inside, and x_0 = (mean + std ε')·latent_scale where the data are moments

A word depends on its counter and key alone, never on the launch. A program makes the draws of up to 256 blocks, 1024
values, of one row; the noise stays in registers. Shapes: B rows, n values per row. Bytes moved: draws 4 per value;
interpolate 16; noisy_sample 12, of moments 16. No op has a gradient: the losses do not flow into the data.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._cases import Case, Inputs
from ._launch import Launch, constants, launch, require_dtype, require_shape
from ._math import log, sin_cos
from ._op import raw_op
from .coefficients import PATHS, require_choice
from .reference import Stream

# Eight values a thread, two 16-byte stores for each output; the rounds of Philox need few registers, so that most of an
# SM's threads are resident.
_BLOCK = 256
_LAUNCH = Launch(num_warps=4, max_registers=64)
_LAUNCH_FEW = Launch(num_warps=1, max_registers=64)


@triton.jit
def philox(block, row, step, stream, seed):
    """The four uint32 words of each counter (block, row, step, stream); row, step, stream, seed are int64 scalars."""
    c0 = block.to(tl.uint32)
    c1, c2, c3 = c0 * 0 + row.to(tl.uint32), c0 * 0 + step.to(tl.uint32), c0 * 0 + stream
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _unit(word):
    """In (0, 1], exactly the reference's value: the word rounded to float32, plus a half, over 2^32."""
    return word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@triton.jit
def _normal_pair(word_r, word_angle):
    radius = tl.sqrt_rn(-2 * log(_unit(word_r)))
    # 2πu rounded to float32, as the reference has it: a plain product could be fused into the reduction of the angle.
    sin, cos = sin_cos(tl.fma(_unit(word_angle), 6.283185307179586, 0.0))
    return radius * cos, radius * sin


@triton.jit
def _draw(block, row, step, stream, seed, NORMAL: tl.constexpr):
    """Values 4k to 4k+3 of a row for each of the blocks k, in their order."""
    w0, w1, w2, w3 = philox(block, row, step, stream, seed)
    if NORMAL:
        z0, z1 = _normal_pair(w0, w1)
        z2, z3 = _normal_pair(w2, w3)
    else:
        z0, z1, z2, z3 = _unit(w0), _unit(w1), _unit(w2), _unit(w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit
def _path_coefficients(t, TRIG: tl.constexpr):
    """``(α, β, α', β')``."""
    if TRIG:
        half_pi: tl.constexpr = 1.5707963267948966
        sin, cos = sin_cos(half_pi * t)
        return cos, sin, -half_pi * sin, half_pi * cos
    return 1 - t, t, -1.0, 1.0


@triton.jit
def _draw_kernel(
    rows_ptr,  # (B,)
    seed_ptr,  # ()
    step_ptr,  # ()
    values_ptr,  # (B, N)
    N: tl.constexpr,
    STREAM: tl.constexpr,
    NORMAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1).to(tl.int64)
    block = chunk * BLOCK + tl.arange(0, BLOCK)
    values = _draw(block, tl.load(rows_ptr + index), tl.load(step_ptr), STREAM, tl.load(seed_ptr), NORMAL)
    column = chunk * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    tl.store(values_ptr + index * N + column, values, mask=column < N)


@triton.jit
def _store_pair(x_t_ptr, v_t_ptr, offset, mask, x0, noise, t, TRIG: tl.constexpr):
    alpha, beta, dalpha, dbeta = _path_coefficients(t, TRIG)
    tl.store(x_t_ptr + offset, (alpha * x0 + beta * noise).to(x_t_ptr.dtype.element_ty), mask=mask)
    tl.store(v_t_ptr + offset, (dalpha * x0 + dbeta * noise).to(v_t_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _interpolate_kernel(
    x0_ptr,  # (B, N)
    noise_ptr,  # (B, N)
    t_ptr,  # (B,)
    x_t_ptr,  # (B, N)
    v_t_ptr,  # (B, N)
    N: tl.constexpr,
    TRIG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < N
    offset = row * N + column
    x0 = tl.load(x0_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    noise = tl.load(noise_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    _store_pair(x_t_ptr, v_t_ptr, offset, mask, x0, noise, tl.load(t_ptr + row).to(tl.float32), TRIG)


@triton.jit
def _noisy_sample_kernel(
    data_ptr,  # (B, N), or moments (B, 2, N)
    t_ptr,  # (B,)
    rows_ptr,  # (B,)
    seed_ptr,  # ()
    step_ptr,  # ()
    x_t_ptr,  # (B, N)
    v_t_ptr,  # (B, N)
    latent_scale,
    N: tl.constexpr,
    MOMENTS: tl.constexpr,
    TRIG: tl.constexpr,
    NOISE: tl.constexpr,
    LATENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1).to(tl.int64)
    row, seed, step = tl.load(rows_ptr + index), tl.load(seed_ptr), tl.load(step_ptr)
    block = chunk * BLOCK + tl.arange(0, BLOCK)
    column = chunk * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    mask = column < N
    if MOMENTS:
        offset = index * (2 * N) + column
        mean = tl.load(data_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        std = tl.load(data_ptr + offset + N, mask=mask, other=0.0).to(tl.float32)
        x0 = (mean + std * _draw(block, row, step, LATENT, seed, True)) * latent_scale
    else:
        x0 = tl.load(data_ptr + index * N + column, mask=mask, other=0.0).to(tl.float32)
    noise = _draw(block, row, step, NOISE, seed, True)
    _store_pair(x_t_ptr, v_t_ptr, index * N + column, mask, x0, noise, tl.load(t_ptr + index).to(tl.float32), TRIG)


def _shape_of_draw(n: int) -> tuple[int, int, Launch]:
    """Philox blocks per program, programs per row, and the launch."""
    block = min(_BLOCK, triton.next_power_of_2(triton.cdiv(n, 4)))
    return block, triton.cdiv(n, 4 * block), _LAUNCH if block == _BLOCK else _LAUNCH_FEW


def _draw_values(rows: Tensor, seed: Tensor, step: Tensor, n: int, stream: int, normal: bool) -> Tensor:
    values = torch.empty(rows.shape[0], n, dtype=torch.float32, device=rows.device)
    block, chunks, config = _shape_of_draw(n)
    launch(
        _draw_kernel,
        lambda: (rows.shape[0], chunks),
        *(rows, seed, step, values),
        N=n,
        STREAM=stream,
        NORMAL=normal,
        BLOCK=block,
        config=config,
    )
    return values


def _interpolate(x0: Tensor, noise: Tensor, t: Tensor, path: str) -> tuple[Tensor, Tensor]:
    x0, noise, t = x0.contiguous(), noise.contiguous(), t.contiguous()
    x_t, v_t = torch.empty_like(x0), torch.empty_like(x0)
    n = math.prod(x0.shape[1:])
    launch(
        _interpolate_kernel,
        lambda: (x0.shape[0], triton.cdiv(n, 4 * _BLOCK)),
        *(x0, noise, t, x_t, v_t),
        N=n,
        TRIG=path == "trig",
        BLOCK=4 * _BLOCK,
        config=_LAUNCH,
    )
    return x_t, v_t


def _noisy_sample(
    data: Tensor, t: Tensor, rows: Tensor, seed: Tensor, step: Tensor, path: str, latent_scale: float | None
) -> tuple[Tensor, Tensor]:
    data, t, rows = data.contiguous(), t.contiguous(), rows.contiguous()
    moments = latent_scale is not None
    shape = (data.shape[0], data.shape[1] // (1 + moments), *data.shape[2:])
    x_t, v_t = (torch.empty(shape, dtype=torch.float32, device=data.device) for _ in range(2))
    n = math.prod(x_t.shape[1:])
    block, chunks, config = _shape_of_draw(n)
    launch(
        _noisy_sample_kernel,
        lambda: (shape[0], chunks),
        *(data, t, rows, seed, step, x_t, v_t),
        latent_scale if moments else 1.0,
        N=n,
        MOMENTS=moments,
        TRIG=path == "trig",
        NOISE=int(Stream.NOISE),
        LATENT=int(Stream.LATENT),
        BLOCK=block,
        config=config,
    )
    return x_t, v_t


_draw_op = raw_op("draw", _draw_values)
_interpolate_op = raw_op("interpolate", _interpolate)
_noisy_sample_op = raw_op("noisy_sample", _noisy_sample)


def _require_rows(rows: Tensor) -> None:
    if rows.dim() != 1 or rows.dtype != torch.int64:
        raise ValueError(f"rows must be (B,) int64 global row indices, not {tuple(rows.shape)} {rows.dtype}")


def _on_device(name: str, value: int | Tensor, rows: Tensor) -> Tensor:
    """A word of the key or counter as a 0-d device tensor: none is compiled into a kernel, none is read back."""
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=torch.int64, device=rows.device)
    if value.dim() or value.dtype != torch.int64 or value.device != rows.device:
        raise ValueError(
            f"{name} must be an int or a 0-d int64 tensor on {rows.device}, "
            f"not {tuple(value.shape)} {value.dtype} on {value.device}"
        )
    return value


def _require_no_gradient(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"the fused kernel has no gradient for {name}; detach it or use impl='torch'")


def uniform(rows: Tensor, n: int, *, seed: int | Tensor, step: int | Tensor, stream: int) -> Tensor:
    """Fused :func:`soflow_fast.kernels.reference.uniform`, bitwise equal to it.

    Args:
        rows: (B,) int64. n: values per row, at least 1. seed, step: ints, or 0-d int64 tensors on the device of rows.

    Returns:
        (B, n) float32 in (0, 1].
    """
    return _random(rows, n, seed, step, stream, normal=False)


def normal(rows: Tensor, n: int, *, seed: int | Tensor, step: int | Tensor, stream: int) -> Tensor:
    """Fused :func:`soflow_fast.kernels.reference.normal`: the same draws, the values equal to 1e-6.

    Args:
        rows: (B,) int64. n: values per row, at least 1. seed, step: ints, or 0-d int64 tensors on the device of rows.

    Returns:
        (B, n) float32.
    """
    return _random(rows, n, seed, step, stream, normal=True)


def _random(rows: Tensor, n: int, seed: int | Tensor, step: int | Tensor, stream: int, normal: bool) -> Tensor:
    _require_rows(rows)
    if n < 1:
        raise ValueError(f"n={n} is not a number of values per row; it must be at least 1")
    seed, step = _on_device("seed", seed, rows), _on_device("step", step, rows)
    return _draw_op(rows.contiguous(), seed, step, n, int(stream), normal)


def interpolate(x0: Tensor, noise: Tensor, t: Tensor, *, path: str) -> tuple[Tensor, Tensor]:
    """Fused :func:`soflow_fast.kernels.reference.interpolate`, computed in float32.

    Args:
        x0, noise: (B, ...). t: (B,) in [0, 1].

    Returns:
        ``(x_t, v_t)``, shape and dtype of x0, no gradient.

    Raises:
        ValueError: for an unknown path, for shapes or dtypes that do not fit, for inputs that require a gradient.
    """
    require_choice("path", path, PATHS)
    require_shape("noise", noise, x0.shape)
    require_shape("t", t, x0.shape[:1])
    for name, x in (("x0", x0), ("noise", noise), ("t", t)):
        require_dtype(name, x)
    _require_no_gradient(x0=x0, noise=noise, t=t)
    return _interpolate_op(*constants(x0, noise, t), path)


def noisy_sample(
    data: Tensor,
    t: Tensor,
    rows: Tensor,
    *,
    seed: int | Tensor,
    step: int | Tensor,
    path: str,
    latent_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Fused :func:`soflow_fast.kernels.reference.noisy_sample`.

    Args:
        data: (B, C, ...) samples, or (B, 2C, ...) latent moments (mean, then std) when ``latent_scale`` is given.
        t: (B,). rows: (B,) int64 global row indices. seed, step: ints, or 0-d int64 tensors on the device of rows.

    Returns:
        ``(x_t, v_t)``, each (B, C, ...) float32, no gradient.

    Raises:
        ValueError: for an unknown path, for shapes or dtypes that do not fit, for inputs that require a gradient.
    """
    require_choice("path", path, PATHS)
    _require_rows(rows)
    if data.dim() < 2 or (latent_scale is not None and data.shape[1] % 2):
        needed = "(B, C, ...)" if latent_scale is None else "(B, 2C, ...), mean and std,"
        raise ValueError(f"data has shape {tuple(data.shape)} where {needed} is needed")
    require_shape("t", t, data.shape[:1])
    require_shape("rows", rows, data.shape[:1])
    require_dtype("data", data)
    require_dtype("t", t)
    _require_no_gradient(data=data, t=t)
    seed, step = _on_device("seed", seed, rows), _on_device("step", step, rows)
    return _noisy_sample_op(*constants(data, t), rows, seed, step, path, latent_scale)


def cases() -> list[Case]:
    """A batch of 256: latents of 256-pixel images as samples and as moments, times and label drops, CIFAR-10 images."""

    def counters(new: Inputs, batch: int) -> dict:
        rows, zero = new.integers(new.rows(batch), high=1 << 40), new.integers(high=1 << 30)
        return {"rows": rows, "seed": zero, "step": zero}

    def draws(n: int):
        return lambda new: {**counters(new, 256), "n": n, "stream": int(Stream.TIMES)}

    def samples(*shape: int):
        def make(new: Inputs) -> dict:
            batch = new.rows(256)
            return {"data": new.normal(batch, *shape), "t": new.uniform(batch), **counters(new, 256)}

        return make

    def pairs(*shape: int):
        def make(new: Inputs) -> dict:
            batch = new.rows(256)
            x0, noise = (new.normal(batch, *shape, dtype=torch.float32) for _ in range(2))
            return {"x0": x0, "noise": noise, "t": new.uniform(batch)}

        return make

    return [
        Case("uniform", "label drops", draws(1)),
        Case("normal", "times", draws(2)),
        Case("normal", "latents", draws(4096)),
        Case("interpolate", "latents", pairs(4, 32, 32), {"path": "linear"}),
        Case("interpolate", "latents, trig", pairs(4, 32, 32), {"path": "trig"}),
        Case("noisy_sample", "latents", samples(4, 32, 32), {"path": "linear"}),
        Case("noisy_sample", "moments", samples(8, 32, 32), {"path": "linear", "latent_scale": 0.18215}),
        Case("noisy_sample", "moments, trig", samples(8, 32, 32), {"path": "trig", "latent_scale": 0.18215}),
        Case("noisy_sample", "CIFAR-10", samples(3, 32, 32), {"path": "linear"}),
    ]
