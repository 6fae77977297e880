"""Fused guided velocity and velocity loss."""

import math

import pytest
import torch
from op_checks import DEVICE, check_accuracy, check_compiles, check_repeatable, check_row_gradients, run

from soflow_fast.kernels import _reduction, fused, velocity

# latents, CIFAR-10, an odd sample, a tiny one, and one that takes several iterations, the last not full
SHAPES = ((4, 32, 32), (3, 32, 32), (3, 5, 7), (1, 2, 2), (3, 56, 56))
GUIDANCE = {"parameterization": "euler", "guidance_scale": 3.0, "guidance_mix": 0.25, "decay_time": 0.8}
OPTIONS = {**GUIDANCE, "p": 1.0, "eps": 0.01}


def _inputs(shape, dtype=torch.float32, names=("F", "F_null")):
    """Five rows: t below and above the decay time, at 1, and one row without label."""
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(5, *shape, generator=generator).to(DEVICE, dtype) for name in names}
    return {
        **inputs,
        "v": torch.randn(5, *shape, generator=generator).to(DEVICE),
        "t": torch.tensor([0.1, 0.8, 0.95, 1.0, 0.9], device=DEVICE),
        "drop": torch.tensor([False, False, False, False, True], device=DEVICE),
    }


def _decay(t, decay_time):
    if t <= decay_time:
        return 1.0
    q = min((1 - t) / (1 - decay_time), 1 - 1e-6)
    return 1 - math.exp(-0.025 * q / (1 - q))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_reference(shape, dtype):
    check_accuracy("velocity_loss", _inputs(shape, dtype), OPTIONS, ("F",))
    check_accuracy("guided_velocity", _inputs(shape, dtype, ("F_null", "F_own")), GUIDANCE)


@pytest.mark.parametrize(
    "change",
    [
        {"parameterization": "trig"},
        {"decay_time": 1.0},
        {"guidance_scale": 1.0, "guidance_mix": 1.0},
        {"p": 0.0},
        {"p": 0.75, "eps": 1e-3},
        {"p": 2.0},
    ],
    ids=str,
)
def test_options(change):
    check_accuracy("velocity_loss", _inputs((3, 5, 7)), {**OPTIONS, **change}, ("F",))
    guidance = {name: value for name, value in {**GUIDANCE, **change}.items() if name in GUIDANCE}
    check_accuracy("guided_velocity", _inputs((3, 5, 7), names=("F_null", "F_own")), guidance)


def test_without_guidance():
    check_accuracy("velocity_loss", {**_inputs((3, 5, 7), names=("F",)), "F_null": None}, OPTIONS, ("F",))


def test_dtypes_mix():
    arguments = _inputs((3, 5, 7))
    arguments["F"], arguments["v"] = arguments["F"].bfloat16(), arguments["v"].half()
    check_accuracy("velocity_loss", arguments, OPTIONS, ("F",))


def test_by_the_formulas():
    """Row by row in float64, from the definitions."""
    arguments = {**_inputs((2, 3, 3)), "F_own": _inputs((2, 3, 3))["F"]}
    F, F_null, v, t, drop, F_own = (arguments[name] for name in ("F", "F_null", "v", "t", "drop", "F_own"))
    guided = fused.guided_velocity(v, F_null, F_own, t, drop, **GUIDANCE)
    loss, mse, weight = fused.velocity_loss(F, v, F_null, t, drop, **OPTIONS)
    for i, time in enumerate(t.tolist()):
        F_i, null, v_i = F[i].double(), F_null[i].double(), v[i].double()
        target = 0.25 * (v_i + _decay(time, 0.8) * (3 - 1) * (v_i - null)) + (1 - 0.25) * F_i
        target = v_i if drop[i] else target
        error = (F_i - target).square().mean().item()
        assert (guided[i] - target).abs().max() < 2e-6
        assert mse[i].item() == pytest.approx(error, rel=2e-6)
        assert weight[i].item() == pytest.approx(1 / (error + 0.01), rel=2e-6)
        assert loss[i].item() == pytest.approx(error / (error + 0.01), rel=2e-6)


def test_incoming_gradients_of_any_stride():
    check_row_gradients("velocity_loss", _inputs((3, 5, 7)), OPTIONS)


def test_only_the_loss_and_only_F_have_a_gradient():
    arguments = {k: x.requires_grad_() if x.is_floating_point() else x for k, x in _inputs((3, 5, 7)).items()}
    loss, mse, weight = fused.velocity_loss(**arguments, **OPTIONS)
    assert (loss.requires_grad, mse.requires_grad, weight.requires_grad) == (True, False, False)
    loss.sum().backward()
    assert [name for name, x in arguments.items() if x.grad is not None] == ["F"]
    arguments["F_own"] = arguments.pop("F")
    assert not fused.guided_velocity(**arguments, **GUIDANCE).requires_grad


def test_a_broken_row_does_not_spread():
    """NaN and infinity stay visible, in their row alone; a dropped row does not see the output without label."""
    arguments = _inputs((3, 5, 7))
    arguments["F"][1, 0, 0, 0] = float("nan")
    arguments["F"][2, 2, 4, 6] = float("inf")
    arguments["F_null"][4, 0, 0, 0] = float("nan")
    loss, mse, _, dF = run(fused.velocity_loss, arguments, OPTIONS, ("F",))
    assert loss.isfinite().tolist() == mse.isfinite().tolist() == [True, False, False, True, True]
    assert dF.flatten(1).isfinite().all(1).tolist() == [True, False, False, True, True]


def test_strided_inputs():
    wide = {k: torch.stack([x, x], dim=-1) for k, x in _inputs((3, 5, 7)).items()}
    strided = {k: x[..., 0] for k, x in wide.items()}
    packed = {k: x.contiguous() for k, x in strided.items()}
    for ours, expected in zip(*(run(fused.velocity_loss, x, OPTIONS, ("F",)) for x in (strided, packed)), strict=True):
        assert torch.equal(ours, expected)


def test_op_contract():
    arguments = _inputs((3, 5, 7))
    F, F_null, v, t, drop = arguments.values()
    numbers = (3.0, 0.25, 0.8)
    torch.library.opcheck(velocity._guided_velocity_op, (v, F_null, F, t, drop, 1.0, *numbers))
    torch.library.opcheck(velocity._velocity_loss_op, (F, v, F_null, t, drop, 1.0, *numbers, 1.0, 0.01))
    torch.library.opcheck(velocity._velocity_loss_op, (F, v, None, t, drop, 1.0, *numbers, 1.0, 0.01))
    torch.library.opcheck(_reduction._loss_bwd_op, (F, t, t, 0.5))
    check_compiles("velocity_loss", arguments, OPTIONS, ("F",))
    check_repeatable("velocity_loss", arguments, OPTIONS, ("F",))
    arguments["F_own"] = arguments.pop("F")
    check_compiles("guided_velocity", arguments, GUIDANCE)
    check_repeatable("guided_velocity", arguments, GUIDANCE)


def test_bad_inputs():
    arguments = _inputs((3, 5, 7))
    op = fused.velocity_loss
    with pytest.raises(ValueError, match="parameterization='cubic' is not known; choose one of euler, trig"):
        op(**arguments, **{**OPTIONS, "parameterization": "cubic"})
    with pytest.raises(ValueError, match=r"F_null has shape \(4, 3, 5, 7\) where \(5, 3, 5, 7\) is needed"):
        op(**{**arguments, "F_null": arguments["F_null"][:4]}, **OPTIONS)
    with pytest.raises(ValueError, match=r"t has shape \(1,\) where \(5,\) is needed"):
        op(**{**arguments, "t": arguments["t"][:1]}, **OPTIONS)
    with pytest.raises(ValueError, match=r"drop has dtype torch\.int64 where torch\.bool is needed"):
        op(**{**arguments, "drop": arguments["drop"].long()}, **OPTIONS)
    with pytest.raises(ValueError, match=r"F has dtype torch\.float64"):
        op(**{**arguments, "F": arguments["F"].double()}, **OPTIONS)
