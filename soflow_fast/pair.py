"""Layers on pairs ``(value, difference)``: the difference forward for any network.

A network built from these layers returns its output and, beside it, how much the output changes when the input does,
accurate relative to the change itself however small it is (computational divided differencing, Reps & Rall 2003).
Write the network's ``forward_difference`` by replacing each layer by its pair form::

    x = pair.Pair(x, dx)
    h = pair.rms_norm(x, block.norm.weight)
    x = pair.add(x, pair.linear(pair.silu(pair.linear(h, block.w1)), block.w2))
    F, dF = x

The value is what the plain layer computes and is differentiable; the difference never is. Layers that only move or
scale numbers (reshape, transpose, pooling, pixel shuffle) go through :meth:`Pair.map`.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from soflow_fast.difference_nonlinear import norm_difference, rms_eps
from soflow_fast.difference_rules import bilinear
from soflow_fast.kernels import reference_difference as reference


class Pair:
    """A tensor and its difference.

    Args:
        value: of any floating dtype. difference: ``value' − value``, same shape.
        tangent: the difference is an infinitesimal one: products of two differences are dropped, and the layers
            compute the exact directional derivative.
    """

    def __init__(self, value: Tensor, difference: Tensor, tangent: bool = False):
        if value.shape != difference.shape:
            raise ValueError(f"a Pair's difference has shape {tuple(difference.shape)}, its value {tuple(value.shape)}")
        self.value, self.difference, self.tangent = value, difference.detach(), tangent

    def __iter__(self) -> Iterator[Tensor]:
        """Unpacks as ``value, difference``."""
        return iter((self.value, self.difference))

    def map(self, linear: Callable[[Tensor], Tensor]) -> "Pair":
        """Applies a linear function, the same to both."""
        with torch.no_grad():
            difference = linear(self.difference)
        return Pair(linear(self.value), difference, self.tangent)

    def chunk(self, n: int, dim: int = -1) -> tuple["Pair", ...]:
        """Both split into n parts along dim."""
        parts = zip(self.value.chunk(n, dim), self.difference.chunk(n, dim), strict=True)
        return tuple(Pair(v, d, self.tangent) for v, d in parts)


def constant(value: Tensor, like: Pair) -> Pair:
    """A tensor that does not change."""
    return Pair(value, torch.zeros_like(value), like.tangent)


def add(x: Pair, y: Pair) -> Pair:
    """``x + y``, broadcasting."""
    return Pair(x.value + y.value, x.difference + y.difference, x.tangent)


@torch.no_grad()
def _product_difference(x: Pair, y: Pair) -> Tensor:
    return bilinear(torch.mul, x.value, y.value, x.difference, y.difference, x.tangent)


def multiply(x: Pair, y: Pair) -> Pair:
    """``x · y`` elementwise, broadcasting: ``dx·y + (x+dx)·dy``."""
    return Pair(x.value * y.value, _product_difference(x, y), x.tangent)


def linear(x: Pair, weight: Tensor, bias: Tensor | None = None) -> Pair:
    """``x Wᵀ + bias``, over the last axis; the difference has no bias."""
    with torch.no_grad():
        difference = nn.functional.linear(x.difference, weight)
    return Pair(nn.functional.linear(x.value, weight, bias), difference, x.tangent)


def conv2d(x: Pair, weight: Tensor, bias: Tensor | None = None, **options) -> Pair:
    """2-D convolution; options as :func:`torch.nn.functional.conv2d`."""
    with torch.no_grad():
        difference = nn.functional.conv2d(x.difference, weight, **options)
    return Pair(nn.functional.conv2d(x.value, weight, bias, **options), difference, x.tangent)


@torch.no_grad()
def _norm_difference(x: Pair, weight: Tensor | None, eps: float, centred: bool) -> Tensor:
    return norm_difference(*x, weight, eps=eps, centred=centred, tangent=x.tangent).to(x.difference.dtype)


def layer_norm(x: Pair, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Pair:
    """LayerNorm over the last axis; eps is by default torch's."""
    value = nn.functional.layer_norm(x.value, x.value.shape[-1:], weight, bias, eps)
    return Pair(value, _norm_difference(x, weight, eps, centred=True), x.tangent)


def rms_norm(x: Pair, weight: Tensor | None = None, eps: float | None = None) -> Pair:
    """``x / √(mean(x²)+eps)`` over the last axis; eps is by default torch's, see :func:`rms_eps`."""
    eps = rms_eps(x.value) if eps is None else eps
    value = nn.functional.rms_norm(x.value, x.value.shape[-1:], weight, eps)
    return Pair(value, _norm_difference(x, weight, eps, centred=False), x.tangent)


def gelu(x: Pair) -> Pair:
    """GELU, tanh form."""
    with torch.no_grad():
        difference = reference.gelu_difference(*x, tangent=x.tangent)
    return Pair(nn.functional.gelu(x.value, approximate="tanh"), difference, x.tangent)


def silu(x: Pair) -> Pair:
    """SiLU, ``x·σ(x)``."""
    with torch.no_grad():
        difference = reference.silu_difference(*x, tangent=x.tangent)
    return Pair(nn.functional.silu(x.value), difference, x.tangent)


def swiglu(gate: Pair, up: Pair) -> Pair:
    """``silu(gate)·up``."""
    return multiply(silu(gate), up)


def modulate(x: Pair, shift: Pair, scale: Pair) -> Pair:
    """``x(1+scale) + shift``, broadcasting."""
    return add(multiply(x, Pair(1 + scale.value, scale.difference, scale.tangent)), shift)


def gate_residual(x: Pair, gate: Pair, branch: Pair) -> Pair:
    """``x + gate·branch``, broadcasting."""
    return add(x, multiply(gate, branch))


def rope(x: Pair, cos: Tensor, sin: Tensor) -> Pair:
    """Rotary position embedding in the half-split convention, a rotation of ``(x1, x2)``, the halves of the last axis.

    Args:
        x: (..., N, h). cos, sin: (N, h/2) or broadcastable, of the fixed positions.
    """

    def rotate(y: Tensor) -> Tensor:
        y1, y2 = y.chunk(2, dim=-1)
        return torch.cat([y1 * cos - y2 * sin, y2 * cos + y1 * sin], dim=-1)

    return x.map(rotate)


def attention(q: Pair, k: Pair, v: Pair) -> Pair:
    """Softmax attention, ``softmax(qkᵀ/√h) v``; (B, H, N, h) each."""
    value = nn.functional.scaled_dot_product_attention(q.value, k.value, v.value)
    with torch.no_grad():
        difference = reference.attention_difference(
            q.value, k.value, v.value, q.difference, k.difference, v.difference, value, tangent=q.tangent
        )
    return Pair(value, difference, q.tangent)


@torch.no_grad()
def sinusoids(t: Pair, frequencies: Tensor) -> Pair:
    """``[cos(ωt), sin(ωt)]`` of times (B,) and frequencies (K,): (B, 2K)."""
    phase = t.value[:, None] * frequencies
    shift = t.difference[:, None] * frequencies
    middle, chord = (phase, shift) if t.tangent else (phase + shift / 2, 2 * torch.sin(shift / 2))
    value = torch.cat([torch.cos(phase), torch.sin(phase)], dim=-1)
    return Pair(value, torch.cat([-torch.sin(middle) * chord, torch.cos(middle) * chord], dim=-1), t.tangent)
