"""The specification: one plain torch function per op. The fused kernels have the same signatures and are tested
against these in float64.

Shapes: B rows (samples), N tokens, D width. Low-precision inputs are upcast: statistics and reductions run in float32
(float64 for float64 inputs) and the result is rounded once, to the dtype stated.
The losses are in ``reference_losses``, the ops on differences in ``reference_difference`` and those on float8 in
``reference_float8``, re-exported here.
"""

import math
from enum import IntEnum

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from .coefficients import path_coefficients
from .reference_difference import (
    attention_difference,
    frequencies,
    gated_residual_layernorm_difference,
    gelu_difference,
    modulated_layernorm_difference,
    silu_difference,
    time_sinusoids_difference,
    wide,
)
from .reference_float8 import Float8Rows, gelu_rows, in_rows, linear
from .reference_losses import consistency_loss, guided_velocity, per_row, velocity_loss

__all__ = [
    "Stream",
    "attention_difference",
    "condition",
    "consistency_loss",
    "gated_residual_layernorm",
    "gated_residual_layernorm_difference",
    "gelu_difference",
    "gelu_rows",
    "guided_velocity",
    "interpolate",
    "mlp",
    "modulated_layernorm",
    "modulated_layernorm_difference",
    "noisy_sample",
    "normal",
    "philox",
    "project_heads",
    "self_attention",
    "silu_difference",
    "time_sinusoids",
    "time_sinusoids_difference",
    "uniform",
    "velocity_loss",
]

# ------------------------------------------------------------------------------------------------ random draws


class Stream(IntEnum):
    """What a draw is for: the last word of the Philox counter, so that no two uses share numbers."""

    NOISE = 0
    TIMES = 1
    DROP = 2
    LATENT = 3
    RENOISE = 4
    ORDER = 5
    AUGMENT = 7
    AUGMENT_SIZE = 8
    GUIDANCE = 9
    USER = 16  # and those above it: what an objective of one's own draws


_MASK = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply_32x32(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low words of a 32×32-bit product, in int64 without overflow."""
    low, high = b & 0xFFFF, b >> 16
    bottom = a * low
    top = a * high + (bottom >> 16)
    return top >> 16, ((top & 0xFFFF) << 16) | (bottom & 0xFFFF)


def philox(rows: Tensor, n: int, *, seed: int | Tensor, step: int | Tensor, stream: int) -> Tensor:
    """Philox4x32-10 words (Salmon et al., SC 2011): the library's only source of randomness.

    Word ``4k+j`` of a row is word j of the block with counter ``(k, row, step, stream)`` and key ``(seed mod 2^32,
    seed div 2^32)``.

    Args:
        rows: (B,) int64, *global* row indices, so that a draw does not depend on how rows are spread over processes.
        n: words per row.
        seed: key, 0 <= seed < 2^63. step: the training step, below 2^32; a 0-d int64 tensor costs no recompilation.

    Returns:
        (B, n) int64 in [0, 2^32).
    """
    device = rows.device
    blocks = torch.arange((n + 3) // 4, device=device, dtype=torch.int64)
    zero = torch.zeros(rows.shape[0], blocks.shape[0], device=device, dtype=torch.int64)
    c0, c1 = zero + blocks, zero + (rows[:, None] & _MASK)
    c2, c3 = zero + (step & _MASK), zero + stream
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _multiply_32x32(c0, _PHILOX_MULTIPLIERS[0])
        high1, low1 = _multiply_32x32(c2, _PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _PHILOX_WEYL[0]) & _MASK, (k1 + _PHILOX_WEYL[1]) & _MASK
    return torch.stack([c0, c1, c2, c3], dim=-1).flatten(1)[:, :n]


def _unit(words: Tensor) -> Tensor:
    """float32 in (0, 1] from 32-bit words: the word rounded to float32, plus a half, over 2^32."""
    return words.to(torch.float32) * 2.0**-32 + 2.0**-33


def uniform(rows: Tensor, n: int, *, seed: int | Tensor, step: int | Tensor, stream: int) -> Tensor:
    """(B, n) float32 uniform draws in (0, 1]; arguments as :func:`philox`."""
    return _unit(philox(rows, n, seed=seed, step=step, stream=stream))


def normal(rows: Tensor, n: int, *, seed: int | Tensor, step: int | Tensor, stream: int) -> Tensor:
    """(B, n) float32 standard normal draws by Box-Muller; arguments as :func:`philox`.

    Words (2i, 2i+1) of a row give values (2i, 2i+1): ``r cos θ, r sin θ`` with ``r = √(−2 ln u)`` of the first word
    and ``θ = 2πu`` of the second. Values are bounded by 6.8.
    """
    words = philox(rows, n + n % 2, seed=seed, step=step, stream=stream).unflatten(1, (-1, 2))
    radius = torch.sqrt(-2 * torch.log(_unit(words[..., 0])))
    angle = 2 * math.pi * _unit(words[..., 1])
    return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1).flatten(1)[:, :n]


# ------------------------------------------------------------------------------------------- path and latents


def interpolate(x0: Tensor, noise: Tensor, t: Tensor, *, path: str) -> tuple[Tensor, Tensor]:
    """``x_t = α x_0 + β ε`` and ``v_t = α' x_0 + β' ε``.

    Args:
        x0, noise: (B, ...). t: (B,) in [0, 1].

    Returns:
        ``(x_t, v_t)``, shape and dtype of x0.
    """
    alpha, beta, dalpha, dbeta = (per_row(c, x0) for c in path_coefficients(t, path))
    return alpha * x0 + beta * noise, dalpha * x0 + dbeta * noise


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
    """:func:`interpolate` with every draw made inside, from ``(seed, step, row)``.

    Args:
        data: (B, C, ...) samples, or (B, 2C, ...) latent moments (mean, then std) when ``latent_scale`` is given: then
            ``x_0 = (mean + std·ε')·latent_scale`` with ε' from :attr:`Stream.LATENT`.
        t: (B,). rows: (B,) int64 global row indices.

    Returns:
        ``(x_t, v_t)``, each (B, C, ...) float32 (float64 for float64 data, of the same float32 draws).
    """
    (data,) = wide(data)

    def draw(like: Tensor, stream: Stream) -> Tensor:
        z = normal(rows, like[0].numel(), seed=seed, step=step, stream=stream)
        return z.view(like.shape).to(like.dtype)

    if latent_scale is None:
        x0 = data
    else:
        mean, std = data.chunk(2, dim=1)
        x0 = (mean + std * draw(mean, Stream.LATENT)) * latent_scale
    return interpolate(x0, draw(x0, Stream.NOISE), t, path=path)


# ---------------------------------------------------------------------------------------------- conditioning


def time_sinusoids(t: Tensor, s: Tensor, *, width: int = 256, dtype: torch.dtype | None = None) -> Tensor:
    """``[cos, sin]`` features of ``t`` and of ``t−s``, maximal period 10000, times not scaled.

    Args:
        t, s: (B,) float32 or float64. width: even. dtype: of the result, by default that of t.

    Returns:
        (2, B, width): first t, then t−s.
    """
    tau, tau_s = wide(t, s)
    tau = torch.stack([tau, tau - tau_s])
    phase = tau[..., None] * frequencies(width, tau)
    return torch.cat([torch.cos(phase), torch.sin(phase)], dim=-1).to(dtype or t.dtype)


def condition(t_embedding: Tensor, s_embedding: Tensor, table: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """``c = t_embedding + s_embedding + table[labels]`` and ``SiLU(c)``, which every modulation layer shares.

    Args:
        t_embedding, s_embedding: (B, D). table: (classes, D). labels: (B,) int64 in [0, classes).

    Returns:
        ``(c, SiLU(c))``, (B, D), dtype of t_embedding; c is not differentiable (it only feeds the difference).
    """
    t_wide, s_wide, y_wide = wide(t_embedding, s_embedding, nn.functional.embedding(labels, table))
    c = t_wide + s_wide + y_wide
    return c.detach().to(t_embedding.dtype), nn.functional.silu(c).to(t_embedding.dtype)


# -------------------------------------------------------------------------------------------- adaLN modulation


def modulated_layernorm(
    x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6, dtype: torch.dtype | None = None
) -> Tensor | Float8Rows:
    """``LayerNorm(x)·(1+scale) + shift``, LayerNorm over the last axis without affine.

    Args:
        x: (B, N, D). shift, scale: (B, D). dtype: of the result, by default that of x; of float8 e4m3 its rows, without
            gradient, in place of a tensor in the dtype of the shift.

    Returns:
        (B, N, D).
    """
    x_wide, shift_wide, scale = wide(x, shift, scale)
    n = nn.functional.layer_norm(x_wide, x.shape[-1:], eps=eps)
    return in_rows(n * (1 + scale[:, None]) + shift_wide[:, None], dtype or x.dtype, shift.dtype)


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
    """``x_new = x + gate·(branch + bias)`` and ``h = LayerNorm(x_new)(1+scale) + shift``.

    Args:
        x: (B, N, D) residual stream. branch: (B, N, D). gate, shift, scale: (B, D). bias: of branch, (D,), or None.
            dtype: of h, by default branch's; float8 e4m3 as in :func:`modulated_layernorm`.

    Returns:
        ``(x_new, h)``; x_new has the dtype of x and h normalises the *rounded* x_new.
    """
    x_wide, branch_wide, gate = wide(x, branch, gate)
    if bias is not None:
        branch_wide = branch_wide + bias.to(branch_wide.dtype)
    x_new = (x_wide + gate[:, None] * branch_wide).to(x.dtype)
    return x_new, modulated_layernorm(x_new, shift, scale, eps=eps, dtype=dtype or branch.dtype)


# ----------------------------------------------------------------------------------------- attention heads, MLP


def split_heads(y: Tensor, heads: int) -> tuple[Tensor, ...]:
    """``(q, k, v)``, each (B, H, N, h), views of y (B, N, 3·H·h)."""
    return y.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def project_heads(h: Tensor | Float8Rows, weight: Tensor, bias: Tensor, *, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of every head: ``h Wᵀ + bias``, whose columns are (3, H, h); in the dtype of h.

    Args:
        h: (B, N, D), also in float8, then without gradient. weight: (3D, D). bias: (3D,). heads: H, divides D.

    Returns:
        ``(q, k, v)``, each (B, H, N, h).
    """
    return split_heads(linear(h, weight, bias), heads)


def self_attention(
    h: Tensor | Float8Rows, weight: Tensor, bias: Tensor, *, heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`project_heads` and ``o = softmax(qkᵀ/√h) v``.

    Returns:
        ``(o, q, k, v)``, each (B, H, N, h), the last three without gradient.
    """
    q, k, v = project_heads(h, weight, bias, heads=heads)
    return nn.functional.scaled_dot_product_attention(q, k, v), q.detach(), k.detach(), v.detach()


_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def _save_products():
    """A checkpoint policy: the backward recomputes everything but matrix products."""

    def policy(context, op, *args, **kwargs) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def mlp(
    h: Tensor | Float8Rows, w1: Tensor, b1: Tensor, w2: Tensor, *, recompute: bool = False, hidden: bool = False
) -> tuple[Tensor, Tensor | None]:
    """``u = h W1ᵀ + b1``, ``out = gelu(u) W2ᵀ`` with the tanh GELU; of rows in float8 both products are in float8.

    Args:
        h: (..., D), also in float8, then without gradient. w1: (M, D). b1: (M,). w2: (D_out, M). recompute: the
            backward computes the GELU again instead of keeping its output. hidden: whether u is wanted.

    Returns:
        ``(out, u)``: (..., D_out), and (..., M) without gradient, or None.
    """

    def down(u: Tensor, w2: Tensor) -> Tensor:
        g = gelu_rows(u) if isinstance(h, Float8Rows) else nn.functional.gelu(u, approximate="tanh")
        return linear(g, w2)

    u = linear(h, w1, b1)
    if recompute and torch.is_grad_enabled():
        out = checkpoint(down, u, w2, use_reentrant=False, preserve_rng_state=False, context_fn=_save_products)
    else:
        out = down(u, w2)
    return out, u.detach() if hidden else None
