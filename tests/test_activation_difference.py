"""Fused GELU and SiLU differences."""

import pytest
import torch
from op_checks import DEVICE, check_accuracy, check_compiles, check_repeatable

from soflow_fast.kernels import activation_difference, fused, reference

OPS = ("gelu_difference", "silu_difference")
# 16 tokens of the MLP of B, L and XL, and an odd shape
SHAPES = ((1, 16, 3072), (1, 16, 4096), (1, 16, 4608), (3, 7, 13))


def _inputs(shape, dtype, step):
    generator = torch.Generator().manual_seed(0)
    u = 3 * torch.randn(shape, generator=generator)
    return {"u": u.to(DEVICE, dtype), "du": (step * torch.randn(shape, generator=generator)).to(DEVICE, dtype)}


@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPS)
def test_matches_the_reference(name, shape, dtype, tangent):
    check_accuracy(name, _inputs(shape, dtype, 1e-3), {"tangent": tangent})


@pytest.mark.parametrize(
    ("step", "dtype"),
    [(step, torch.float32) for step in (1000.0, 10.0, 1.0, 0.3, 1e-2, 1e-5, 1e-8)]
    + [(step, torch.float16) for step in (1000.0, 10.0, 1.0, 0.3)],  # below, float16's own spacing decides
)
@pytest.mark.parametrize("name", OPS)
def test_relative_accuracy_at_every_step(name, step, dtype):
    """The error is relative to the difference itself, element by element, not to the activation."""
    arguments = _inputs((4096,), dtype, step)
    u, du = (x.double() for x in arguments.values())
    g = (
        torch.nn.functional.silu
        if name == "silu_difference"
        else lambda x: torch.nn.functional.gelu(x, approximate="tanh")
    )
    midpoints = [u + du * (k + 0.5) / 64 for k in range(64)]
    slopes = [torch.func.grad(lambda x: g(x).sum())(m) for m in midpoints]
    truth = g(u + du) - g(u) if step > 1e-2 else du * torch.stack(slopes).mean(0)
    ours = getattr(fused, name)(**arguments)
    rounding = 2**-10 * truth.abs() + 2**-24 if dtype == torch.float16 else 0  # of the result
    assert ((ours - truth).abs() <= 2e-6 * du.abs() + rounding).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("far", [50, 600])
@pytest.mark.parametrize("u", [-60.0, -10.0, 0.0, 8.0, 60.0])
@pytest.mark.parametrize("name", OPS)
def test_extreme_inputs_stay_finite(name, u, far, dtype):
    du = torch.linspace(-far, far, 8, device=DEVICE, dtype=dtype)
    arguments = {"u": torch.full_like(du, u), "du": du}
    truth = getattr(reference, name)(*(x.double() for x in arguments.values()))
    relative = 2**-10 if dtype == torch.float16 else 1e-6
    assert (getattr(fused, name)(**arguments) - truth).abs().max() < relative * (abs(u) + far)


@pytest.mark.parametrize("name", OPS)
def test_op_contract(name):
    arguments = _inputs((5, 33), torch.float32, 0.1)
    torch.library.opcheck(activation_difference._op, (*arguments.values(), name == "gelu_difference", False))
    check_compiles(name, arguments, {})
    check_repeatable(name, arguments, {})


@pytest.mark.parametrize("name", OPS)
def test_no_gradient_flows(name):
    arguments = {k: v.requires_grad_() for k, v in _inputs((8,), torch.float32, 0.1).items()}
    assert not getattr(fused, name)(**arguments).requires_grad


@pytest.mark.parametrize("name", OPS)
def test_strided_inputs(name):
    wide = _inputs((6, 64), torch.float32, 0.1)
    strided = {k: v[:, ::2] for k, v in wide.items()}
    packed = {k: v.contiguous() for k, v in strided.items()}
    assert torch.equal(getattr(fused, name)(**strided), getattr(fused, name)(**packed))


@pytest.mark.parametrize("name", OPS)
def test_bad_inputs(name):
    op = getattr(fused, name)
    with pytest.raises(ValueError, match=r"du has shape \(3,\) where \(4,\) is needed"):
        op(torch.zeros(4, device=DEVICE), torch.zeros(3, device=DEVICE))
    with pytest.raises(ValueError, match="float64"):
        op(torch.zeros(4, device=DEVICE, dtype=torch.float64), torch.zeros(4, device=DEVICE))
