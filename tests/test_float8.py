"""Rows in float8 and the forwards that multiply them."""

import pytest
import torch
from op_checks import DEVICE, OperatorNames, check_accuracy, check_compiles, check_repeatable
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from soflow_fast import DiT, SoFlow
from soflow_fast.kernels import fused, reference
from soflow_fast.kernels.reference_float8 import Float8Rows, float8_linear, float8_rows
from soflow_fast.objectives.alphaflow import AlphaFlow
from soflow_fast.objectives.improved_meanflow import ImprovedMeanFlow
from soflow_fast.objectives.meanflow import MeanFlow
from soflow_fast.precision import require_float8

FLOAT8 = {"dtype": torch.float8_e4m3fn}


def _normal(*shape, scale=1.0, dtype=torch.float32, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE, dtype)


def _adaln(B=2, N=9, D=80, dtype=torch.float32):
    names = ("gate", "shift", "scale")
    modulation = {name: _normal(B, D, scale=0.5, dtype=dtype, seed=i) for i, name in enumerate(names)}
    x, branch = (_normal(B, N, D, dtype=dtype, seed=seed) for seed in (3, 4))
    return {"x": x, "branch": branch, "bias": _normal(D, seed=5, dtype=dtype), **modulation}


def _plain(adaln):
    return {name: adaln[name] for name in ("x", "shift", "scale")}


CASES = {
    "gated": lambda dtype: ("gated_residual_layernorm", _adaln(dtype=dtype) | FLOAT8),
    "without bias": lambda dtype: ("gated_residual_layernorm", _adaln(dtype=dtype) | FLOAT8 | {"bias": None}),
    "several strips": lambda dtype: ("gated_residual_layernorm", _adaln(1, 3, 1152, dtype=dtype) | FLOAT8),
    "plain": lambda dtype: ("modulated_layernorm", _plain(_adaln(dtype=dtype)) | FLOAT8),
    "GELU": lambda dtype: ("gelu_rows", {"u": _normal(3, 5, 520, scale=3.0, dtype=dtype)}),
    "GELU of one": lambda dtype: ("gelu_rows", {"u": _normal(1, 16, dtype=dtype)}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_ops_match_the_reference(case, dtype):
    name, arguments = CASES[case](dtype)
    check_accuracy(name, arguments, {})
    ours, expected = (getattr(ops, name)(**arguments) for ops in (fused, reference))
    if not isinstance(ours, Float8Rows):
        (_, ours), (_, expected) = ours, expected
    assert ours.dtype == expected.dtype == dtype
    torch.testing.assert_close(ours.scales, expected.scales, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=0)
    if dtype == torch.float32:  # the same roundings, but for a value next to where two meet
        assert (ours.values.float() == expected.values.float()).float().mean() > 0.99


@pytest.mark.parametrize("case", ["gated", "plain", "GELU"])
def test_ops_repeat_and_compile(case):
    name, arguments = CASES[case](torch.float32)
    check_repeatable(name, arguments, {})
    check_compiles(name, arguments, {})


def test_rows_are_off_by_a_sixteenth_and_keep_their_largest():
    x = _normal(7, 64) * torch.logspace(-30, 30, 7, device=DEVICE)[:, None]
    rows = float8_rows(x)
    wide = rows.to(torch.float32)
    small = x.abs() < x.abs().amax(1, keepdim=True) / 2**14
    assert ((wide - x).abs() <= x.abs() / 16)[~small].all()
    largest = x.abs().amax(1)
    torch.testing.assert_close(wide.abs().amax(1), largest, rtol=1e-6, atol=0)


@pytest.mark.parametrize("op", ["rows", "GELU"])
def test_zeros_and_a_broken_row(op):
    """A row of zeros stays one, and what is not a number stays in its row."""
    x = _normal(4, 32)
    x[1], x[2, 5] = 0.0, float("nan")
    wide = (float8_rows(x) if op == "rows" else fused.gelu_rows(x)).to(torch.float32)
    assert torch.equal(wide[1], torch.zeros_like(wide[1]))
    assert not wide[2].isfinite().all()
    assert wide[[0, 3]].isfinite().all()


DTYPE = torch.bfloat16  # as a GPU has it


def _linear(rows=(3, 16), width=64, outputs=48):
    h = _normal(*rows, width, dtype=DTYPE)
    return h, _normal(outputs, width, scale=width**-0.5, dtype=DTYPE, seed=1), _normal(outputs, dtype=DTYPE, seed=2)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [((3, 16), 64, 48), ((3, 5), 4608, 16)])
def test_a_product_is_that_of_the_rounded_operands(shape, with_bias):
    h, weight, bias = _linear(*shape)
    bias = bias if with_bias else None
    rows, columns = float8_rows(h), float8_rows(weight)
    exact = rows.to(torch.float64) @ columns.to(torch.float64).mT + (0 if bias is None else bias.double())
    out = float8_linear(rows, weight, bias)
    assert out.dtype == DTYPE
    assert (out.double() - exact).norm() / exact.norm() < 0.005  # tensor cores add up with fewer bits
    plain = torch.nn.functional.linear(h, weight, bias).double()
    error = (exact - plain).norm() / plain.norm()
    assert 0.005 < error < 0.06


def test_a_product_counts():
    h, weight, bias = _linear()
    rows = float8_rows(h)
    with FlopCounterMode(display=False) as counter:
        float8_linear(rows, weight, bias)
    assert counter.get_total_flops() == 2 * 48 * 64 * 48


@pytest.mark.parametrize("ops", [fused, reference])
def test_layers_take_rows(ops):
    """The MLP and the projection of rows, without gradient, are near those of what was rounded."""
    h, w1, b1 = _linear(outputs=128)
    w2 = _normal(64, 128, scale=128**-0.5, dtype=DTYPE)
    projection = _normal(192, 64, scale=0.1, dtype=DTYPE), _normal(192, dtype=DTYPE)
    rows = float8_rows(h)
    out, u = ops.mlp(rows, w1, b1, w2)
    assert u is None
    pairs = [(out, ops.mlp(h, w1, b1, w2)[0])]
    pairs += zip(ops.project_heads(rows, *projection, heads=4), ops.project_heads(h, *projection, heads=4), strict=True)
    pairs += zip(
        ops.self_attention(rows, *projection, heads=4), ops.self_attention(h, *projection, heads=4), strict=True
    )
    for ours, plain in pairs:
        assert (ours.shape, ours.dtype) == (plain.shape, plain.dtype)
        assert 0.003 < (ours - plain).double().norm() / plain.double().norm() < 0.08


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"u has dtype torch\.float64"):
        fused.gelu_rows(_normal(2, 16).double())


def test_on_a_gpu_it_is_torchs_product():
    """Whose shape function has the requirements on layouts, scales and sizes."""
    with FakeTensorMode(), OperatorNames() as calls:
        h = torch.empty(2, 3, 64, device="cuda", dtype=torch.bfloat16)
        weight, bias = (torch.empty(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((48, 64), (48,)))
        out = float8_linear(float8_rows(h), weight, bias)
    assert (out.shape, out.dtype) == ((2, 3, 48), torch.bfloat16)
    assert calls.names.count("_scaled_mm") == 1


# ---------------------------------------------------------------------------------------------------- the network

SIZES = {"input_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 32, "depth": 2, "num_heads": 2}


def _net(**options):
    torch.manual_seed(0)
    net = DiT(**{**SIZES, **options}, num_classes=10)
    for p in net.parameters():
        if p.requires_grad and not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return net.to(DEVICE, DTYPE)


def _batch(n=4):
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(n, 3, 8, 8, generator=generator), torch.rand(n, generator=generator)
    return x.to(DEVICE), t.to(DEVICE), torch.arange(n, device=DEVICE)


def _difference(ours, plain):
    return ((ours - plain).norm() / plain.norm()).item()


def test_three_products_of_a_block_are_rounded():
    net, plain, (x, t, labels) = _net(float8_guidance=True, impl="triton"), _net(), _batch()
    assert torch.equal(_net(float8_guidance=True)(x, t, t, labels), plain(x, t, t, labels))
    with OperatorNames() as calls:
        rounded = net.forward_float8(x, t, t, labels)
    count = {name: sum(name in call for call in calls.names) for name in ("float8_product", "norm_float8", "gelu_rows")}
    assert count == {"float8_product": 6, "norm_float8": 4, "gelu_rows": 2}
    assert not rounded.requires_grad
    assert 0.002 < _difference(rounded, plain(x, t, t, labels)) < 0.012


@pytest.mark.parametrize("attention", ["sdpa", "triton"])
def test_kernels_and_attentions_agree(attention):
    plain = _net(float8_guidance=True, depth=1, impl="torch")
    fast = _net(float8_guidance=True, depth=1, impl="triton", attention=attention)
    x, t, labels = _batch(2)
    ours, expected = (net.forward_float8(x, t, t, labels) for net in (fast, plain))
    assert _difference(ours, expected) < (1e-3 if torch.float32 == DTYPE else 0.02)  # one rounding may be another


@pytest.mark.parametrize(
    ("objective", "condition_dim"), [(SoFlow, 0), (MeanFlow, 0), (AlphaFlow, 0), (ImprovedMeanFlow, 3)]
)
def test_what_guides_an_objective_is_rounded(objective, condition_dim):
    """And nothing else: samples are those of the plain network, and without guidance so is the loss."""
    nets = [_net(condition_dim=condition_dim, float8_guidance=float8) for float8 in (True, False)]
    calls, forward = [], nets[0].forward_float8
    nets[0].forward_float8 = lambda *arguments: calls.append(arguments) or forward(*arguments)
    models = [objective(net) for net in nets]
    x, _, labels = _batch(8)
    ours, plain = (model.loss(x, labels, 0.5, step=3) for model in models)
    for name, part in plain.parts.items():
        assert 1e-6 < _difference(ours.parts[name].mse, part.mse) < 0.02
    ((guided, t, s, told),) = calls
    assert s is t
    assert len(guided) == len(told) == 8 + len(plain.parts[list(plain.parts)[-1]].mse)
    ours, plain = (model.sample(x, labels, 1) for model in models)
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("settings", [{}, {"direction": "prediction"}])
def test_without_guidance_nothing_is_rounded(settings):
    objective = MeanFlow if settings else SoFlow
    mix = {"guidance_mix": 0.0} if settings else {}
    models = [objective(_net(float8_guidance=f), guidance_scale=1.0, **mix, **settings) for f in (True, False)]
    x, _, labels = _batch(8)
    ours, plain = (model.loss(x, labels, 0.5, step=3).loss for model in models)
    assert torch.equal(ours, plain)


def test_single_losses_guide_as_the_merged_one():
    net, calls = _net(float8_guidance=True), []
    net.forward_float8 = lambda *arguments: calls.append(len(arguments[0])) or DiT.forward_float8(net, *arguments)
    model, (x, t, labels) = SoFlow(net), _batch()
    model.velocity_loss(x, x, t, labels)
    model.consistency_loss(x, x, t, None, t / 2, labels, gap=t / 4)
    assert calls == [4, 4, 4]


def test_it_is_one_graph():
    net, (x, t, labels) = _net(float8_guidance=True, depth=1), _batch()
    torch.compiler.reset()
    compiled = torch.compile(net.forward_float8, fullgraph=True, backend="aot_eager")
    assert _difference(compiled(x, t, t, labels), net.forward_float8(x, t, t, labels)) < 0.01


def test_settings_that_cannot_run(monkeypatch):
    with pytest.raises(ValueError, match=r"float8_guidance=True takes products of multiples of 16, .* is 40 wide"):
        DiT(**{**SIZES, "hidden_size": 40}, float8_guidance=True)
    with pytest.raises(ValueError, match="is 72 wide"):
        DiT(**SIZES, mlp_ratio=2.25, float8_guidance=True)
    net, gpu = _net(float8_guidance=True).float(), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A10")
    with pytest.raises(ValueError, match=r"on a GPU, and precision='tf32'; choose precision='bf16'"):
        require_float8(net, gpu, "tf32")
    with pytest.raises(ValueError, match=r"compute capability 8\.9 or newer, and NVIDIA A10 is older"):
        require_float8(net, gpu, "bf16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    require_float8(net, gpu, "bf16")
    require_float8(net, torch.device("cpu"), "fp32")
