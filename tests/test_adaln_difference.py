"""Fused differences of adaLN: against the reference, and against the primal op itself in float64 at every step."""

import pytest
import torch
from op_checks import DEVICE, check_accuracy, check_compiles, check_repeatable

from soflow_fast.kernels import adaln_difference, fused, reference

PLAIN, GATED = "modulated_layernorm_difference", "gated_residual_layernorm_difference"
OPS = (PLAIN, GATED)
# B, L and XL, a width that is only a multiple of 8, and an odd one
SHAPES = ((2, 9, 768), (1, 9, 1024), (2, 5, 1152), (1, 9, 136), (3, 7, 13))
# residual stream and matrix operands
DTYPES = ((torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16))


def _inputs(name, shape, residual=torch.float32, dtype=None, step=1e-3):
    generator = torch.Generator().manual_seed(0)
    rows, _, width = shape

    def tokens(scale, dtype):
        return (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype)

    def modulation(scale):
        return (torch.randn(rows, 8, width, generator=generator) * scale).to(DEVICE, dtype or residual).unbind(1)

    gate, scale = modulation(0.5)[2:4]
    dgate, dshift, dscale = modulation(step)[2:5]
    x, d = tokens(1, residual), tokens(step, residual)
    if name == PLAIN:
        return {"x": x, "d": d, "scale": scale, "dshift": dshift, "dscale": dscale}
    branch, d_branch = tokens(1, dtype or residual), tokens(step, dtype or residual)
    tensors = {"x_new": x, "d": d, "branch": branch, "d_branch": d_branch}
    tensors |= {"gate": gate, "scale": scale, "dgate": dgate, "dshift": dshift, "dscale": dscale}
    return tensors | {"bias": torch.randn(width, generator=generator).to(DEVICE, dtype or residual)}


def _inputs_without_bias(*arguments, **options):
    return {k: v for k, v in _inputs(GATED, *arguments, **options).items() if k != "bias"}


def _primal(name, a, amount):
    """The primal op's outputs in float64, its inputs moved by ``amount`` of their differences."""
    a = {k: v.double() for k, v in a.items()}
    shift = torch.zeros_like(a["scale"]) + amount * a["dshift"]
    scale = a["scale"] + amount * a["dscale"]
    if name == PLAIN:
        return (reference.modulated_layernorm(a["x"] + amount * a["d"], shift, scale),)
    x = a["x_new"] - a["gate"][:, None] * (a["branch"] + a["bias"])
    branch, gate = a["branch"] + amount * a["d_branch"], a["gate"] + amount * a["dgate"]
    return reference.gated_residual_layernorm(x + amount * a["d"], branch, gate, shift, scale, bias=a["bias"])


def _outputs(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize(("residual", "dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPS)
def test_matches_the_reference(name, shape, residual, dtype, tangent):
    check_accuracy(name, _inputs(name, shape, residual, dtype), {"dtype": dtype, "tangent": tangent})


@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize(("residual", "dtype"), DTYPES)
@pytest.mark.parametrize("shape", [(2, 9, 768), (3, 7, 13)])
def test_matches_the_reference_without_bias(shape, residual, dtype, tangent):
    check_accuracy(GATED, _inputs_without_bias(shape, residual, dtype), {"dtype": dtype, "tangent": tangent})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bias_may_have_any_dtype(dtype):
    arguments = _inputs(GATED, (3, 9, 24), torch.float32, torch.bfloat16)
    check_accuracy(GATED, arguments | {"bias": arguments["bias"].to(dtype)}, {})


@pytest.mark.parametrize("step", [1.0, 1e-1, 1e-3, 1e-6])
@pytest.mark.parametrize("name", OPS)
def test_is_the_difference_of_the_primal_op(name, step):
    """Relative to the difference itself, the error is that of float32 at every step."""
    arguments = _inputs(name, (2, 3, 384), step=step)
    ours = _outputs(getattr(fused, name)(**arguments))
    for d, moved, start in zip(ours, _primal(name, arguments, 1), _primal(name, arguments, 0), strict=True):
        truth = moved - start
        assert (d - truth).abs().max() < 3e-6 * truth.abs().max()


@pytest.mark.parametrize("name", OPS)
def test_tangent_is_the_derivative_of_the_primal_op(name):
    arguments = _inputs(name, (2, 3, 384), step=1.0)
    zero = torch.zeros((), dtype=torch.float64, device=DEVICE)
    _, truth = torch.func.jvp(lambda amount: _primal(name, arguments, amount), (zero,), (torch.ones_like(zero),))
    for d, t in zip(_outputs(getattr(fused, name)(**arguments, tangent=True)), truth, strict=True):
        assert (d - t).abs().max() < 3e-6 * t.abs().max()


@pytest.mark.parametrize("name", OPS)
def test_eps(name):
    check_accuracy(name, _inputs(name, (2, 3, 24)), {"eps": 0.5})


@pytest.mark.parametrize("name", OPS)
def test_no_difference_gives_exactly_zero(name):
    arguments = _inputs(name, (2, 3, 384), step=0.0)
    assert all(not d.any() for d in _outputs(getattr(fused, name)(**arguments)))


@pytest.mark.parametrize("name", OPS)
def test_op_contract(name):
    arguments = _inputs(name, (2, 5, 24))
    check_compiles(name, arguments, {})
    check_repeatable(name, arguments, {})


def test_op_contract_without_bias():
    arguments = _inputs_without_bias((2, 5, 24))
    check_compiles(GATED, arguments, {})
    check_repeatable(GATED, arguments, {})


@pytest.mark.parametrize("tangent", [False, True])
def test_raw_ops(tangent):
    options = (1e-6, torch.bfloat16, tangent)
    torch.library.opcheck(adaln_difference._layernorm_op, (*_inputs(PLAIN, (2, 5, 24)).values(), *options))
    *tokens, gate, scale, dgate, dshift, dscale, bias = _inputs(GATED, (2, 5, 24)).values()
    for added in (None, bias):
        torch.library.opcheck(
            adaln_difference._gated_op, (*tokens, added, gate, scale, dgate, dshift, dscale, *options)
        )


@pytest.mark.parametrize("name", OPS)
def test_no_gradient_flows(name):
    arguments = {k: v.requires_grad_() for k, v in _inputs(name, (1, 2, 24)).items()}
    assert not any(d.requires_grad for d in _outputs(getattr(fused, name)(**arguments)))


@pytest.mark.parametrize("name", OPS)
def test_strided_inputs(name):
    arguments = _inputs(name, (2, 3, 24))
    strided = {k: torch.stack([v, v], -1)[..., 0] for k, v in arguments.items()}
    for a, b in zip(
        _outputs(getattr(fused, name)(**arguments)), _outputs(getattr(fused, name)(**strided)), strict=True
    ):
        assert torch.equal(a, b)


def test_bad_inputs():
    a = _inputs(GATED, (2, 5, 24))
    with pytest.raises(ValueError, match=r"d_branch has shape \(2, 4, 24\) where \(2, 5, 24\) is needed"):
        fused.gated_residual_layernorm_difference(**{**a, "d_branch": a["d_branch"][:, 1:]})
    with pytest.raises(ValueError, match=r"dgate has shape \(1, 24\) where \(2, 24\) is needed"):
        fused.gated_residual_layernorm_difference(**{**a, "dgate": a["dgate"][:1]})
    with pytest.raises(ValueError, match=r"dscale has dtype torch\.float16 where torch\.float32 is needed"):
        fused.gated_residual_layernorm_difference(**{**a, "dscale": a["dscale"].half()})
    with pytest.raises(ValueError, match=r"bias has shape \(2, 24\) where \(24,\) is needed"):
        fused.gated_residual_layernorm_difference(**{**a, "bias": a["gate"]})
    with pytest.raises(ValueError, match=r"bias has dtype torch\.int64"):
        fused.gated_residual_layernorm_difference(**{**a, "bias": a["bias"].long()})
    b = _inputs(PLAIN, (2, 5, 24))
    with pytest.raises(ValueError, match=r"d has dtype torch\.float64"):
        fused.modulated_layernorm_difference(**{**b, "d": b["d"].double()})


@pytest.mark.parametrize("ops", [fused, reference])
def test_a_token_may_become_constant(ops):
    """The moved variance is that of rounding errors, which may come out below zero."""
    x = 10 * torch.randn(64, 4, 48, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    zero = torch.zeros(64, 48, device=DEVICE)
    dh = ops.modulated_layernorm_difference(x, -x, zero, zero, zero)
    truth = -torch.nn.functional.layer_norm(x.double(), (48,), eps=1e-6)
    torch.testing.assert_close(dh.double(), truth, atol=0.01, rtol=0.01)
