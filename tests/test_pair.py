"""Pair layers: each against a float64 subtraction, and a foreign transformer block ported with them."""

import math

import pytest
import torch
from torch import nn

from soflow_fast import pair
from soflow_fast.pair import Pair


def _normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


W, BIAS, NORM = _normal(6, 8, seed=7), _normal(6, seed=8), 1 + _normal(8, seed=9, scale=0.1)
KERNEL, KERNEL_BIAS = _normal(5, 3, 3, 3, seed=10), _normal(5, seed=11)
ANGLES = _normal(5, 4, seed=12)


def _rotate(x):
    rotation = torch.polar(torch.ones(5, 4, dtype=torch.float64), ANGLES)
    turned = torch.complex(x[..., :4], x[..., 4:]) * rotation
    return torch.cat([turned.real, turned.imag], dim=-1)


def _attention(q, k, v):
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v


# name: pair layer, the plain function, shapes of the inputs
LAYERS = {
    "linear": (lambda x: pair.linear(x, W.to(x.value), BIAS.to(x.value)), lambda x: x @ W.T + BIAS, [(4, 5, 8)]),
    "conv2d": (
        lambda x: pair.conv2d(x, KERNEL.to(x.value), KERNEL_BIAS.to(x.value), stride=2, padding=1),
        lambda x: nn.functional.conv2d(x, KERNEL, KERNEL_BIAS, stride=2, padding=1),
        [(2, 3, 6, 6)],
    ),
    "layer_norm": (
        lambda x: pair.layer_norm(x, NORM.to(x.value), None, eps=1e-5),
        lambda x: (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, correction=0, keepdim=True) + 1e-5) * NORM,
        [(4, 5, 8)],
    ),
    "rms_norm": (
        lambda x: pair.rms_norm(x, NORM.to(x.value), eps=1e-5),
        lambda x: x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * NORM,
        [(4, 5, 8)],
    ),
    "gelu": (
        pair.gelu,
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        [(4, 8)],
    ),
    "silu": (pair.silu, lambda x: x / (1 + torch.exp(-x)), [(4, 8)]),
    "swiglu": (pair.swiglu, lambda x, y: x / (1 + torch.exp(-x)) * y, [(4, 8)] * 2),
    "multiply": (pair.multiply, lambda x, y: x * y, [(4, 8)] * 2),
    "modulate": (pair.modulate, lambda x, a, b: x * (1 + b) + a, [(4, 5, 8), (4, 1, 8), (4, 1, 8)]),
    "gate_residual": (pair.gate_residual, lambda x, g, b: x + g * b, [(4, 5, 8), (4, 1, 8), (4, 5, 8)]),
    "rope": (lambda x: pair.rope(x, ANGLES.cos().to(x.value), ANGLES.sin().to(x.value)), _rotate, [(4, 2, 5, 8)]),
    "attention": (pair.attention, _attention, [(2, 3, 5, 8)] * 3),
    "sinusoids": (
        lambda t: pair.sinusoids(t, NORM.to(t.value)),
        lambda t: torch.cat([torch.cos(t[:, None] * NORM), torch.sin(t[:, None] * NORM)], -1),
        [(4,)],
    ),
    "constant": (lambda x: pair.add(x, pair.constant(W[0].to(x.value), x)), lambda x: x + W[0], [(4, 8)]),
    "map": (lambda x: x.map(lambda y: y.transpose(0, 1)), lambda x: x.transpose(0, 1), [(4, 8)]),
}


@pytest.mark.parametrize("step", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("name", LAYERS)
def test_difference(name, step):
    layer, plain, shapes = LAYERS[name]
    values = [_normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    differences = [_normal(*shape, seed=20 + i, scale=step) for i, shape in enumerate(shapes)]
    truth = plain(*(v + d for v, d in zip(values, differences, strict=True))) - plain(*values)
    value, difference = layer(*map(Pair, values, differences))
    assert torch.allclose(value, plain(*values), rtol=1e-12, atol=1e-12)
    assert (difference - truth).norm() <= 1e-10 * truth.norm()
    single = layer(*(Pair(v.float(), d.float()) for v, d in zip(values, differences, strict=True)))
    assert (single.difference - truth).norm() <= 2e-6 * truth.norm()


@pytest.mark.parametrize("name", LAYERS)
def test_tangent(name):
    layer, plain, shapes = LAYERS[name]
    values = [_normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    directions = [_normal(*shape, seed=20 + i) for i, shape in enumerate(shapes)]
    _, truth = torch.func.jvp(plain, tuple(values), tuple(directions))
    _, tangent = layer(*(Pair(v, d, tangent=True) for v, d in zip(values, directions, strict=True)))
    assert (tangent - truth).norm() <= 1e-12 * truth.norm()


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_norms_have_the_eps_of_torch(name):
    """Of numbers so small that it matters."""
    plain = getattr(nn.functional, name)
    x, d = (_normal(4, 8, seed=i, scale=scale).float() for i, scale in enumerate((1e-4, 1e-5)))
    value, difference = getattr(pair, name)(Pair(x, d))
    assert torch.equal(value, plain(x, (8,)))
    eps = {"layer_norm": 1e-5, "rms_norm": torch.finfo(torch.float32).eps}[name]
    x, d = x.double(), d.double()
    truth = plain(x + d, (8,), eps=eps) - plain(x, (8,), eps=eps)
    assert (difference - truth).norm() <= 2e-6 * truth.norm()


class ForeignBlock(nn.Module):
    """A block this library does not ship, as language models have: RMSNorm, rotary attention with q/k norms, SwiGLU."""

    def __init__(self, width=32, heads=4, tokens=5):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.q_norm, self.k_norm = (nn.RMSNorm(width // heads, eps=1e-6) for _ in range(2))
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.gate, self.up, self.down = nn.Linear(width, 48), nn.Linear(width, 48), nn.Linear(48, width)
        angles = torch.arange(tokens)[:, None] * 100.0 ** (-torch.arange(width // heads // 2) / 4)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def rotate(self, x):
        a, b = x.chunk(2, -1)
        return torch.cat([a * self.cos - b * self.sin, b * self.cos + a * self.sin], -1)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        q, k = self.rotate(self.q_norm(q)), self.rotate(self.k_norm(k))
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))

    def forward_pair(self, x: Pair) -> Pair:
        def linear(layer, y):
            return pair.linear(y, layer.weight, layer.bias)

        def norm(layer, y):
            return pair.rms_norm(y, layer.weight, layer.eps)

        qkv = linear(self.qkv, norm(self.norm1, x)).chunk(3)
        q, k, v = (y.map(lambda z: z.unflatten(-1, (self.heads, -1)).transpose(1, 2)) for y in qkv)
        q, k = (pair.rope(norm(n, y), self.cos, self.sin) for n, y in ((self.q_norm, q), (self.k_norm, k)))
        out = pair.attention(q, k, v).map(lambda z: z.transpose(1, 2).flatten(2))
        x = pair.add(x, linear(self.proj, out))
        h = norm(self.norm2, x)
        return pair.add(x, linear(self.down, pair.swiglu(linear(self.gate, h), linear(self.up, h))))


@pytest.mark.parametrize("step", [1e-1, 1e-3, 1e-6])
def test_a_foreign_block(step):
    torch.manual_seed(0)
    block = ForeignBlock()
    x, dx = torch.randn(3, 5, 32), step * torch.randn(3, 5, 32)
    value, difference = block.forward_pair(Pair(x, dx))
    assert torch.allclose(value, block(x), atol=1e-6)
    assert value.requires_grad
    assert not difference.requires_grad
    exact = block.double()
    truth = exact(x.double() + dx.double()) - exact(x.double())
    assert (difference - truth).norm() <= 2e-6 * truth.norm()


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"difference has shape \(3,\), its value \(2,\)"):
        Pair(torch.zeros(2), torch.zeros(3))
