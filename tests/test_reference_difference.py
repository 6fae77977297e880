"""Every difference op against a float64 subtraction of plain formulas, its tangent against forward-mode AD."""

import math

import pytest
import torch

from soflow_fast.kernels import reference as ops
from soflow_fast.kernels.reference_difference import normalized_difference

STEPS = [1e-1, 1e-3, 1e-6]


def _randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _sinusoids(t, s):
    i = torch.arange(128, dtype=torch.float64)
    phases = [tau[:, None] / 10000 ** (i / 128) for tau in (t, t - s)]
    return torch.stack([torch.cat([p.cos(), p.sin()], 1) for p in phases])


def _normalize(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()


def _modulated(x, shift, scale):
    x = x - x.mean(-1, keepdim=True)
    return _normalize(x) * (1 + scale[:, None]) + shift[:, None]


def _gated(x, branch, gate, shift, scale):
    x = x + gate[:, None] * branch
    return torch.stack([x, _modulated(x, shift, scale)])


def _gelu(u):
    return 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))


def _silu(u):
    return u / (1 + torch.exp(-u))


def _attention(q, k, v):
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / math.sqrt(q.shape[-1])
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return torch.einsum("bhnm,bhmd->bhnd", weights, v)


def _gated_difference(x, branch, gate, shift, scale, dx, dbranch, dgate, dshift, dscale, tangent, bias=None):
    """``branch`` includes the bias, if there is one; the op gets the two apart."""
    x_new = x + gate[:, None] * branch
    branch = branch if bias is None else branch - bias
    pair = ops.gated_residual_layernorm_difference(
        x_new, dx, branch, dbranch, gate, scale, dgate, dshift, dscale, bias=bias, eps=1e-3, tangent=tangent
    )
    return torch.stack(pair)


def _biased_difference(x, *arguments):
    return _gated_difference(x, *arguments, bias=_randn(12, seed=50).to(x))


# name: the plain function, the op on (values, differences, tangent), the shapes of the values
OPS = {
    "time_sinusoids": (
        lambda t: _sinusoids(t, t.detach() * 0 + 0.05),
        lambda t, dt, tangent: ops.time_sinusoids_difference(t, t * 0 + 0.05, dt, tangent=tangent),
        [(4,)],
    ),
    "normalized": (
        _normalize,
        lambda x, d, tangent: normalized_difference(x, d, eps=1e-3, tangent=tangent)[1],
        [(2, 5, 12)],
    ),
    "modulated_layernorm": (
        _modulated,
        lambda x, shift, scale, d, dshift, dscale, tangent: ops.modulated_layernorm_difference(
            x, d, scale, dshift, dscale, eps=1e-3, tangent=tangent
        ),
        [(2, 5, 12), (2, 12), (2, 12)],
    ),
    "gated_residual_layernorm": (_gated, _gated_difference, [(2, 5, 12)] * 2 + [(2, 12)] * 3),
    "gated_residual_layernorm with bias": (_gated, _biased_difference, [(2, 5, 12)] * 2 + [(2, 12)] * 3),
    "gelu": (_gelu, lambda u, du, tangent: ops.gelu_difference(u, du, tangent=tangent), [(6, 50)]),
    "silu": (_silu, lambda u, du, tangent: ops.silu_difference(u, du, tangent=tangent), [(6, 50)]),
    "attention": (
        _attention,
        lambda q, k, v, dq, dk, dv, tangent: ops.attention_difference(q, k, v, dq, dk, dv, v, tangent=tangent),
        [(2, 3, 7, 6)] * 3,
    ),
}


def _arguments(shapes, step):
    values = tuple(_randn(*shape, seed=i) for i, shape in enumerate(shapes))
    return values, tuple(step * _randn(*shape, seed=100 + i) for i, shape in enumerate(shapes))


def _relative(ours, truth):
    return ((ours - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", OPS)
def test_difference_in_float64(name, step):
    plain, op, shapes = OPS[name]
    values, differences = _arguments(shapes, step)
    subtracted = plain(*(x + d for x, d in zip(values, differences, strict=True))) - plain(*values)
    # the subtraction loses what the step is below one
    assert _relative(op(*values, *differences, False), subtracted) < 1e-13 / step


@pytest.mark.parametrize("step", [*STEPS, 1e-12])
@pytest.mark.parametrize("name", OPS)
def test_difference_in_float32_is_as_accurate_at_any_step(name, step):
    _, op, shapes = OPS[name]
    values, differences = (tuple(x.float() for x in y) for y in _arguments(shapes, step))
    ours = op(*values, *differences, False)
    assert ours.dtype == torch.float32
    # the same formula in float64, shown right by the test above
    truth = op(*(x.double() for x in values), *(d.double() for d in differences), False)
    assert _relative(ours.double(), truth) < 2e-6


@pytest.mark.parametrize("name", OPS)
def test_tangent_is_the_directional_derivative(name):
    plain, op, shapes = OPS[name]
    values, directions = _arguments(shapes, 1.0)
    derivative = torch.func.jvp(plain, values, directions)[1]
    assert _relative(op(*values, *directions, True), derivative) < 1e-13
    doubled = op(*values, *(2 * d for d in directions), True)
    assert _relative(doubled, 2 * derivative) < 1e-13


@pytest.mark.parametrize("name", OPS)
def test_no_difference_gives_exactly_none(name):
    _, op, shapes = OPS[name]
    values, _ = _arguments(shapes, 1.0)
    for tangent in (False, True):
        assert not op(*values, *(torch.zeros_like(x) for x in values), tangent).any()


@pytest.mark.parametrize("tangent", [False, True])
def test_large_arguments_stay_finite(tangent):
    u, du = torch.tensor([-80.0, -20.0, 20.0, 80.0, 0.0]), torch.tensor([1e-3, 5.0, -5.0, 1e-3, 100.0])
    for op, plain in ((ops.gelu_difference, _gelu), (ops.silu_difference, _silu)):
        ours = op(u, du, tangent=tangent).double()
        u_wide, du_wide = u.double(), du.double()
        truth = torch.func.jvp(plain, (u_wide,), (du_wide,))[1] if tangent else plain(u_wide + du_wide) - plain(u_wide)
        torch.testing.assert_close(ours, truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("step", [1e-6, 1e-2, 3.0])
def test_silu_difference_far_from_0(step):
    """Below it the sigmoid cannot be told from 0 by ½(1 + tanh), above it from 1."""
    du = step * _randn(1000).float()
    for u, of_itself in ((-torch.linspace(10, 40, 1000), True), (torch.linspace(2, 40, 1000), False)):
        truth = ops.silu_difference(u.double(), du.double())
        error = (ops.silu_difference(u, du).double() - truth).abs()
        assert (error <= (5e-6 * truth.abs() if of_itself else 5e-7 * du.abs())).all()


def test_attention_difference_with_a_large_part_common_to_all_keys():
    q, k, v, dq, dk, dv = (_randn(1, 2, 16, 8, seed=i).float() for i in range(6))
    differences = [1e-3 * dq, 1e-3 * dk + 10 * _randn(1, 2, 1, 8, seed=9).float(), 1e-3 * dv]
    moved = [x.double() + d.double() for x, d in zip((q, k, v), differences, strict=True)]
    truth = _attention(*moved) - _attention(q.double(), k.double(), v.double())
    # softmax does not see the common part, which is 10,000 times what it does see
    assert _relative(ops.attention_difference(q, k, v, *differences, v).double(), truth) < 1e-5


def test_results_take_the_dtype_of_the_difference_or_the_one_asked_for():
    x, d = _randn(2, 5, 12).float(), _randn(2, 5, 12, seed=1).bfloat16()
    scale, dshift, dscale = (_randn(2, 12, seed=i).bfloat16() for i in range(3))
    assert ops.modulated_layernorm_difference(x, d, scale, dshift, dscale).dtype == torch.bfloat16
    assert ops.modulated_layernorm_difference(x, d, scale, dshift, dscale, dtype=torch.half).dtype == torch.half
    d_new, dh = ops.gated_residual_layernorm_difference(
        x, d.float(), x.bfloat16(), d, scale, scale, dscale, dshift, dscale
    )
    assert (d_new.dtype, dh.dtype) == (torch.float32, torch.bfloat16)
    assert ops.gelu_difference(x, d).dtype == ops.silu_difference(x, d).dtype == torch.bfloat16
    t = torch.rand(3)
    assert ops.time_sinusoids_difference(t, t, t, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_low_precision_inputs_are_rounded_once():
    u, du = _randn(400).bfloat16(), 1e-3 * _randn(400, seed=1).bfloat16()
    truth = ops.gelu_difference(u.double(), du.double())
    error = (ops.gelu_difference(u, du).double() - truth).abs()
    assert (error <= 2**-8 * truth.abs() + 1e-12).all()
