"""The specification of the difference forward: each op's difference, in a form without cancellation.

A difference op takes the primal ``x`` and ``d = x' − x`` and returns the difference of its outputs without ever
subtracting two nearly equal numbers (computational divided differencing, Reps & Rall 2003). With ``tangent=True``
every product of two differences is dropped, which is the exact directional derivative.

Shapes: b rows that carry a difference, N tokens, D width, H heads, h head dim. Low-precision inputs are upcast:
everything runs in float32 (float64 for float64 inputs) and the result is rounded once, to the dtype stated.
No gradient flows through these ops.
"""

import math

import torch
from torch import Tensor

#: A change of an exponent after which the plain subtraction keeps its digits, and the other forms may overflow.
LARGE_CHANGE = 20.0


def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in float32, or in float64 if the first one is."""
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return tuple(x.to(dtype) for x in tensors)


def frequencies(width: int, like: Tensor) -> Tensor:
    """``10000^(−i/(width/2))``, i < width/2, on the device and in the dtype of ``like``."""
    index = torch.arange(width // 2, device=like.device, dtype=like.dtype)
    return torch.exp(-math.log(10000.0) / (width // 2) * index)


def time_sinusoids_difference(
    t: Tensor, s: Tensor, dt: Tensor, *, width: int = 256, dtype: torch.dtype | None = None, tangent: bool = False
) -> Tensor:
    """Difference of :func:`time_sinusoids` when t, and with it t−s, moves by dt.

    ``cos(ω(τ+dt)) − cos(ωτ) = −2 sin(ω(τ+dt/2)) sin(ωdt/2)`` and likewise for the sine.

    Args:
        t, s, dt: (b,).

    Returns:
        (2, b, width).
    """
    tau, tau_s, dt = wide(t, s, dt)
    tau = torch.stack([tau, tau - tau_s])[..., None]
    omega, dt = frequencies(width, tau), dt[:, None]
    if tangent:
        phase, chord = omega * tau, omega * dt
    else:
        phase, chord = omega * (tau + dt / 2), 2 * torch.sin(omega * dt / 2)
    return torch.cat([-torch.sin(phase) * chord, torch.cos(phase) * chord], dim=-1).to(dtype or t.dtype)


def normalized_difference(x: Tensor, d: Tensor, *, eps: float, tangent: bool = False) -> tuple[Tensor, Tensor]:
    """``n = x ρ``, ``ρ = rsqrt(mean(x²)+ε)``, over the last axis, and the difference of n.

    With ``e = ρ²(2·mean(xd) + mean(d²))`` and ``q = √(1+e)``: ``δρ = −ρ e/(q(1+q))``, ``dn = d(ρ+δρ) + x δρ``. Of a
    centred x and d this is LayerNorm, else RMSNorm. ``1+e = ρ²(mean((x+d)²)+ε)`` is kept at least ``ρ²ε``.
    """
    rho = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    e = 2 * (x * d).mean(-1, keepdim=True)
    if tangent:
        drho = -0.5 * rho**3 * e
        return x * rho, d * rho + x * drho
    e = rho.square() * (e + d.square().mean(-1, keepdim=True))
    q = torch.sqrt(torch.maximum(1 + e, eps * rho.square()))
    drho = -rho * e / (q * (1 + q))
    return x * rho, d * (rho + drho) + x * drho


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
    """Difference of ``LayerNorm(x)·(1+scale) + shift``.

    With ``(n, dn)`` of :func:`normalized_difference`: ``dh = dn(1+scale+dscale) + n·dscale + dshift``.

    Args:
        x, d: (b, N, D). scale, dshift, dscale: (b, D).

    Returns:
        (b, N, D), by default with the dtype of d.
    """
    x, d_wide, scale, dshift, dscale = wide(x, d, scale, dshift, dscale)
    x = x - x.mean(-1, keepdim=True)
    d_wide = d_wide - d_wide.mean(-1, keepdim=True)
    n, dn = normalized_difference(x, d_wide, eps=eps, tangent=tangent)
    gain = 1 + scale if tangent else 1 + scale + dscale
    return (dn * gain[:, None] + n * dscale[:, None] + dshift[:, None]).to(dtype or d.dtype)


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
    """Difference of :func:`gated_residual_layernorm`, given its output ``x_new``.

    ``d_new = d + gate·d_branch + dgate·(branch + bias + d_branch)``, then :func:`modulated_layernorm_difference`.

    Args:
        x_new, d, branch, d_branch: (b, N, D). gate, scale, dgate, dshift, dscale: (b, D). bias: of the primal branch,
            (D,), or None. dtype: of dh, by default that of d_branch.

    Returns:
        ``(d_new, dh)``, (b, N, D); d_new has the dtype of d.
    """
    d_wide, branch, d_branch_wide, gate, dgate = wide(d, branch, d_branch, gate[:, None], dgate[:, None])
    if bias is not None:
        branch = branch + bias.to(branch.dtype)
    moved = branch if tangent else branch + d_branch_wide
    d_new = (d_wide + gate * d_branch_wide + dgate * moved).to(d.dtype)
    dtype = dtype or d_branch.dtype
    return d_new, modulated_layernorm_difference(
        x_new, d_new, scale, dshift, dscale, eps=eps, dtype=dtype, tangent=tangent
    )


# ------------------------------------------------------------------------------------------------ activations

_GELU_C, _GELU_K = math.sqrt(2 / math.pi), 0.044715


def tanh_difference(tanh_a: Tensor, tanh_b: Tensor, difference: Tensor) -> Tensor:
    """``tanh a − tanh b`` from ``difference = a − b``: ``tanh(a−b)(1 − tanh a·tanh b)``."""
    return torch.tanh(difference) * (1 - tanh_a * tanh_b)


def gelu_difference(u: Tensor, du: Tensor, *, tangent: bool = False) -> Tensor:
    """``gelu(u+du) − gelu(u)`` of the tanh GELU; any shape, dtype of du.

    ``z = c(u+κu³)``, ``dz = c·du(1+κ(3u²+3u·du+du²))``,
    ``dg = ½du(1+tanh z') + ½u·tanh(dz)(1 − tanh z·tanh z')``.
    """
    u, du_wide = wide(u, du)
    z = _GELU_C * u * (1 + _GELU_K * u * u)
    tanh_z = torch.tanh(z)
    if tangent:
        dz = _GELU_C * du_wide * (1 + 3 * _GELU_K * u * u)
        return (0.5 * du_wide * (1 + tanh_z) + 0.5 * u * dz * (1 - tanh_z * tanh_z)).to(du.dtype)
    dz = _GELU_C * du_wide * (1 + _GELU_K * (3 * u * (u + du_wide) + du_wide * du_wide))
    tanh_moved = torch.tanh(z + dz)
    dg = 0.5 * du_wide * (1 + tanh_moved) + 0.5 * u * tanh_difference(tanh_moved, tanh_z, dz)
    return dg.to(du.dtype)


def silu_difference(u: Tensor, du: Tensor, *, tangent: bool = False) -> Tensor:
    """``silu(u+du) − silu(u)``; any shape, dtype of du.

    ``du σ(u') + u (σ(u') − σ(u))`` with ``σ(u') − σ(u) = tanh(du/2)(σ(u')σ(−u) + σ(u)σ(−u'))``, which neither cancels
    nor overflows, however far u is from 0 and however large du.
    """
    u, du_wide = wide(u, du)
    sigmoid, rest = torch.sigmoid(u), torch.sigmoid(-u)
    if tangent:
        return (du_wide * sigmoid * (1 + u * rest)).to(du.dtype)
    moved, moved_rest = torch.sigmoid(u + du_wide), torch.sigmoid(-u - du_wide)
    dg = du_wide * moved + u * torch.tanh(du_wide / 2) * (moved * rest + sigmoid * moved_rest)
    return dg.to(du.dtype)


# -------------------------------------------------------------------------------------------------- attention


def expm1(x: Tensor) -> Tensor:
    """``e^x − 1`` as ``tanh(x/2)(e^x + 1)``: compiled for a CPU, torch.expm1 becomes exp(x) − 1 and cancels."""
    return torch.tanh(x / 2) * (torch.exp(x) + 1)


def softmax_difference(p: Tensor, x: Tensor, d: Tensor, *, dim: int = -1, tangent: bool = False) -> Tensor:
    """``softmax(x+d) − softmax(x)``: ``P(E−Z)/(1+Z)``, ``E = expm1(d−c)``, ``Z = Σ P E``; of large changes, subtracted.

    Softmax does not see a change c that is common to all; without it, ``Σ P d``, no 1+Z is below 1.

    Args:
        p: ``softmax(x)``, 0 where x is −inf. x, d: of its shape; d of what is masked does not matter.
    """
    centred = torch.where(p == 0, 0, d)
    centred = centred - (p * centred).sum(dim, keepdim=True)
    if tangent:
        return p * centred
    e = expm1(centred.clamp(-LARGE_CHANGE, LARGE_CHANGE))
    z = (p * e).sum(dim, keepdim=True)
    large = (d - d.amin(dim, keepdim=True)).amax(dim, keepdim=True) > LARGE_CHANGE
    return torch.where(large, torch.ops.aten._safe_softmax(x + d, dim) - p, p * (e - z) / (1 + z))


def attention_difference(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, o: Tensor, *, tangent: bool = False
) -> Tensor:
    """``softmax(q'k'ᵀ/√h) v' − softmax(qkᵀ/√h) v`` from the differences of q, k and v.

    ``dS = (dq·(k+dk) + q·dk)/√h``, ``P = softmax(S)``, dP by :func:`softmax_difference`, ``dO = dP(v+dv) + P dv``.
    Softmax does not see a shift common to all keys, so k and dk are centred over the keys first; otherwise its products
    with q and dq would cancel only approximately.

    Args:
        q, k, v, dq, dk, dv: (b, H, N, h), any strides. o: (b, H, N, h), the primal output (the fused kernel needs it
            for its single accumulator; here it is recomputed).

    Returns:
        dO, (b, H, N, h), dtype of dv.
    """
    scale = 1 / math.sqrt(q.shape[-1])
    q, k, v, dq, dk, dv_wide = wide(q, k, v, dq, dk, dv)
    k = k - k.mean(-2, keepdim=True)
    dk = dk - dk.mean(-2, keepdim=True)
    scores = q @ k.mT * scale
    p = torch.softmax(scores, dim=-1)
    moved_k, moved_v = (k, v) if tangent else (k + dk, v + dv_wide)
    dp = softmax_difference(p, scores, (dq @ moved_k.mT + q @ dk.mT) * scale, tangent=tangent)
    return (dp @ moved_v + p @ dv_wide).to(dv.dtype)
