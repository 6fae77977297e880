"""Fused consistency loss."""

import pytest
import torch
from op_checks import DEVICE, check_accuracy, check_compiles, check_repeatable, check_row_gradients, run

from soflow_fast.kernels import consistency, fused

NAME = "consistency_loss"
# latents, CIFAR-10, an odd sample, a tiny one, and one that takes several iterations, the last not full
SHAPES = ((4, 32, 32), (3, 32, 32), (3, 5, 7), (1, 2, 2), (3, 56, 56))
PARAMETERIZATIONS = ("euler", "trig")


def _inputs(shape, dtype=torch.float32, gap=1e-3, v_dtype=torch.float32):
    """dF is of the size of the gap, as the difference forward makes it. s is 0 in one row, and l = s in another."""
    generator = torch.Generator().manual_seed(0)
    F, dF, v, x_t = torch.randn(4, 5, *shape, generator=generator).to(DEVICE)
    s = torch.tensor([0.0, 0.2, 0.5, 0.85, 0.6], device=DEVICE)
    gap = gap * torch.tensor([0.5, 1.0, 0.2, 0.7, 1.0], device=DEVICE)
    t = torch.tensor([0.3, 0.9, 1.0, 0.97, 0.0], device=DEVICE)
    t[-1] = s[-1] + gap[-1]
    dF = gap.view(-1, 1, 1, 1) * dF
    F, dF, v, x_t = F.to(dtype), dF.to(dtype), v.to(v_dtype), x_t.to(v_dtype)
    return {"F": F, "dF": dF, "v": v, "x_t": x_t, "t": t, "gap": gap, "s": s}


def _options(parameterization="euler", tangent=False, p=1.0, eps=0.01):
    return {"parameterization": parameterization, "tangent": tangent, "p": p, "eps": eps}


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_reference(shape, dtype, parameterization):
    check_accuracy(NAME, _inputs(shape, dtype), _options(parameterization), ("F",))


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize(("p", "eps"), [(0.0, 0.0), (0.75, 1e-3), (2.0, 0.1)])
def test_options(p, eps, tangent, parameterization):
    check_accuracy(NAME, _inputs((3, 5, 7)), _options(parameterization, tangent, p, eps), ("F",))


def test_dtypes_mix():
    check_accuracy(NAME, _inputs((3, 5, 7), torch.bfloat16, v_dtype=torch.float16), _options("trig"), ("F",))


@pytest.mark.parametrize("gap", [0.1, 1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_quotient_by_its_definition_at_every_gap(parameterization, gap):
    """``(f(x_t,t,s) − f(x_l,l,s))/gap`` in float64, and the loss and the gradient from it; float32 keeps six digits."""
    arguments = _inputs((2, 3, 3), gap=gap)
    F, dF, v, x_t, t, h, s = (x.double() for x in arguments.values())
    t, h, s = (x.view(-1, 1, 1, 1) for x in (t, h, s))

    def solution(x, time, output):
        if parameterization == "euler":
            return x + (s - time) * output
        angle = torch.pi / 2 * (s - time)
        return torch.cos(angle) * x + torch.sin(angle) * output

    quotient = (solution(x_t, t, F) - solution(x_t - h * v, t - h, F + dF)) / h
    mse = quotient.square().mean((1, 2, 3))
    loss = -(F * quotient).mean((1, 2, 3)) / (mse + 0.01)
    slope = -quotient / 18 / (mse + 0.01).view(-1, 1, 1, 1)
    options = _options(parameterization)
    ones = torch.ones(5, device=DEVICE)
    results = run(fused.consistency_loss, arguments, options, ("F",), output_gradients=(ones,))
    for ours, truth in zip(results, (loss, mse, 1 / (mse + 0.01), slope), strict=True):
        assert ((ours - truth).abs() <= 3e-6 * truth.abs() + 1e-6 * truth.abs().mean()).all()


def test_incoming_gradients_of_any_stride():
    check_row_gradients("consistency_loss", _inputs((3, 5, 7)), _options())


def test_only_the_loss_and_only_F_have_a_gradient():
    arguments = {k: x.requires_grad_() for k, x in _inputs((3, 5, 7)).items()}
    loss, mse, weight = fused.consistency_loss(**arguments, **_options())
    assert (loss.requires_grad, mse.requires_grad, weight.requires_grad) == (True, False, False)
    loss.sum().backward()
    assert [name for name, x in arguments.items() if x.grad is not None] == ["F"]


def test_euler_does_not_read_x_t():
    arguments = _inputs((3, 5, 7))
    expected = run(fused.consistency_loss, arguments, _options(), ("F",))
    arguments["x_t"] = torch.full_like(arguments["x_t"], float("nan"))
    for ours, result in zip(run(fused.consistency_loss, arguments, _options(), ("F",)), expected, strict=True):
        assert torch.equal(ours, result)


def test_a_broken_row_does_not_spread():
    arguments = _inputs((3, 5, 7))
    arguments["dF"][1, 0, 0, 0] = float("nan")
    arguments["v"][2, 2, 4, 6] = float("inf")
    loss, mse, _, dF = run(fused.consistency_loss, arguments, _options(), ("F",))
    assert loss.isfinite().tolist() == mse.isfinite().tolist() == [True, False, False, True, True]
    assert dF.flatten(1).isfinite().all(1).tolist() == [True, False, False, True, True]


def test_op_contract():
    arguments = _inputs((3, 5, 7))
    for parameterization in PARAMETERIZATIONS:
        torch.library.opcheck(
            consistency._consistency_loss_op, (*arguments.values(), parameterization, 1.0, 0.01, False)
        )
        check_compiles(NAME, arguments, _options(parameterization), ("F",))
        check_repeatable(NAME, arguments, _options(parameterization), ("F",))


def test_bad_inputs():
    arguments = _inputs((3, 5, 7))
    op = fused.consistency_loss
    with pytest.raises(ValueError, match="parameterization='cubic' is not known; choose one of euler, trig"):
        op(**arguments, **_options("cubic"))
    with pytest.raises(ValueError, match=r"dF has shape \(4, 3, 5, 7\) where \(5, 3, 5, 7\) is needed"):
        op(**{**arguments, "dF": arguments["dF"][:4]}, **_options())
    with pytest.raises(ValueError, match=r"gap has shape \(5, 1\) where \(5,\) is needed"):
        op(**{**arguments, "gap": arguments["gap"][:, None]}, **_options())
    with pytest.raises(ValueError, match=r"x_t has dtype torch\.float64"):
        op(**{**arguments, "x_t": arguments["x_t"].double()}, **_options())
