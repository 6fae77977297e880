"""A whole DiT and a whole objective, ``impl="triton"`` against ``impl="torch"``; on a CPU in Triton's interpreter."""

import inspect

import pytest
import torch
from op_checks import DEVICE

from soflow_fast import DiT, SoFlow
from soflow_fast.kernels import fused, reference
from soflow_fast.kernels._cases import Inputs
from soflow_fast.kernels._launch import Launch, launch
from soflow_fast.kernels.mlp import _gelu_kernel
from soflow_fast.layers import Attention, Call

# Everything is float32: what differs is the order of sums.
_RTOL = 2e-5

_ATTENTION = pytest.mark.parametrize("attention", ["math", "triton"])


def _dit(impl: str, attention: str = "math", **overrides) -> DiT:
    """The heads of DiT-S, half as many; 16 tokens, two blocks; every parameter random, also those that start at 0."""
    sizes = {"hidden_size": 192, "depth": 2, "num_heads": 3, "num_classes": 5, **overrides}
    net = DiT(8, 2, 4, impl=impl, attention=attention, **sizes).to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 / max(1, p[0].numel()) ** 0.5)
    return net


def _batch(rows: int = 3):
    generator = torch.Generator().manual_seed(1)
    x, dx, g = torch.randn(3, rows, 4, 8, 8, generator=generator).to(DEVICE)
    t = torch.linspace(0.3, 0.9, rows, device=DEVICE)
    labels = torch.arange(rows, device=DEVICE) % 6
    return x, t, t / 3, labels, 1e-3 * dx, -1e-3 * t, g


def _gradients(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in net.named_parameters() if p.requires_grad}


def _assert_close(ours: torch.Tensor, expected: torch.Tensor, what: str):
    error, scale = (ours - expected).abs().max().item(), expected.abs().max().item()
    assert scale > 0, what
    assert error <= _RTOL * scale, f"{what}: {error:.3g} of {scale:.3g}"


def _elements(case) -> int:
    arguments = case.inputs(Inputs("meta", torch.float32, max_rows=1)).values()
    return sum(x.numel() for x in arguments if torch.is_tensor(x))


#: the case of each op that the interpreter runs fastest
_SMALLEST = {case.op: case for case in sorted(fused.cases(), key=_elements, reverse=True)}


def test_fused_has_every_op_of_the_reference():
    names = set(reference.__all__) - {"Stream", "philox"}
    assert names <= set(fused.__all__)
    for name in fused.__all__:
        ours, expected = (
            [(p.name, p.kind, p.default) for p in inspect.signature(getattr(module, name)).parameters.values()]
            for module in (fused, reference)
        )
        assert ours == expected, name


def test_every_op_has_a_case():
    assert {case.op for case in fused.cases()} == set(fused.__all__)


@pytest.mark.parametrize("name", sorted(set(fused.__all__) - {"normal", "uniform"}))
def test_no_op_has_a_silent_forward_mode_derivative(name):
    """A zero tangent where nobody wrote a derivative would train garbage."""
    case = _SMALLEST[name]
    arguments = case.inputs(Inputs(DEVICE, torch.float32, max_rows=1))
    numbers = [key for key, value in arguments.items() if torch.is_tensor(value) and value.is_floating_point()]
    assert numbers
    for key in numbers:
        with pytest.raises(NotImplementedError, match="jvp"):
            torch.func.jvp(
                lambda x, key=key: getattr(fused, name)(**{**arguments, key: x}, **case.options),
                (arguments[key],),
                (torch.ones_like(arguments[key]),),
            )


@_ATTENTION
def test_dit_forward_and_every_parameter_gradient(attention):
    x, t, s, labels, _, _, g = _batch()
    nets = [_dit("torch"), _dit("triton", attention)]
    outputs = [net(x, t, s, labels) for net in nets]
    for out in outputs:
        out.backward(g)
    _assert_close(outputs[1], outputs[0], "output")
    expected = _gradients(nets[0])
    for name, gradient in _gradients(nets[1]).items():
        _assert_close(gradient, expected[name], name)


@_ATTENTION
def test_what_is_recomputed_changes_no_gradient(attention):
    x, t, s, labels, _, _, g = _batch(2)
    nets = [_dit("triton", attention, depth=1, recompute=how) for how in ("none", "elementwise", "block")]
    for net in nets:
        net(x, t, s, labels).backward(g)
    expected, *others = map(_gradients, nets)
    for gradients in others:
        for name, gradient in gradients.items():
            _assert_close(gradient, expected[name], name)


@_ATTENTION
@pytest.mark.parametrize("mode", ["difference", "tangent"])
def test_dit_difference_forward(mode, attention):
    x, t, s, labels, dx, dt, _ = _batch()
    rows = slice(1, None)
    results = [
        net.forward_difference(x, t, s, labels, dx[rows], dt[rows], rows=rows, mode=mode)
        for net in (_dit("torch", depth=1), _dit("triton", attention, depth=1))
    ]
    for what, expected, ours in zip(("F", "dF"), *results, strict=True):
        _assert_close(ours, expected, what)


def test_of_heads_too_large_for_its_kernel_plain_torch_makes_the_difference(caplog):
    layer = Attention(192, 2).to(DEVICE)  # head dim 96, above 80
    h, dh = torch.randn(2, 2, 8, 192, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    results = [layer(h, 1e-3 * dh, Call(ops, "math", slice(None))) for ops in (reference, fused)]
    for what, expected, ours in zip(("o", "do"), *results, strict=True):
        _assert_close(ours, expected, what)
    sizes = {"hidden_size": 192, "depth": 1, "impl": "triton"}
    DiT(8, num_heads=2, compute_dtype=torch.bfloat16, **sizes)
    DiT(8, num_heads=3, **sizes)
    assert caplog.messages == []
    DiT(8, num_heads=2, **sizes)
    DiT(8, num_heads=1, **sizes)
    told = (
        "the fused difference of attention does not take a head dim of {} in {}, and plain torch makes it, slower; "
        "give the model more heads"
    )
    assert caplog.messages == [told.format(96, "float32"), told.format(192, "float32, bfloat16, float16")]


@_ATTENTION
def test_dit_compiles_as_one_graph(attention):
    x, t, s, labels, dx, dt, g = _batch(2)
    eager, net = (_dit("triton", attention, depth=1) for _ in range(2))
    compiled = torch.compile(net.forward_difference, fullgraph=True, backend="aot_eager")
    results = [forward(x, t, s, labels, dx, dt) for forward in (eager.forward_difference, compiled)]
    for what, expected, ours in zip(("F", "dF"), *results, strict=True):
        _assert_close(ours.detach(), expected.detach(), what)
    for F, _ in results:
        F.backward(g)
    expected = _gradients(eager)
    for name, gradient in _gradients(net).items():
        _assert_close(gradient, expected[name], name)


@pytest.mark.parametrize(("path", "parameterization", "depth"), [("linear", "euler", 2), ("trig", "trig", 1)])
def test_soflow_loss_and_every_parameter_gradient(path, parameterization, depth):
    x0, *_ = _batch(4)
    labels = torch.arange(4, device=DEVICE)
    results = []
    for impl in ("torch", "triton"):
        objective = SoFlow(_dit(impl, depth=depth), path=path, parameterization=parameterization)
        out = objective.loss(x0, labels, progress=0.5, seed=3, step=7)
        out.loss.backward()
        results.append((out, _gradients(objective)))
    (expected, expected_gradients), (ours, gradients) = results
    _assert_close(ours.loss, expected.loss, "loss")
    for part in ("velocity", "consistency"):
        for field in ("loss", "mse", "weight", "t"):
            _assert_close(getattr(ours.parts[part], field), getattr(expected.parts[part], field), f"{part} {field}")
    for name, gradient in gradients.items():
        _assert_close(gradient, expected_gradients[name], name)


@_ATTENTION
def test_in_bfloat16_gradients_are_as_exact_as_by_plain_torch(attention):
    x0, *_ = _batch(4)
    labels = torch.arange(4, device=DEVICE)

    def gradients(*how, dtype):
        objective = SoFlow(_dit(*how, depth=1).to(dtype))
        objective.loss(x0, labels, progress=0.5, seed=3, step=7).loss.backward()
        return torch.cat([g.float().flatten() for g in _gradients(objective).values()])

    truth = gradients("torch", dtype=torch.float32)
    plain, ours = (gradients(*how, dtype=torch.bfloat16) for how in (("torch",), ("triton", attention)))
    assert 1e-3 * truth.norm() < (ours - truth).norm() < 1.2 * (plain - truth).norm()


def test_tensors_on_several_devices_are_refused():
    """A kernel would read the address of one device's memory on another."""
    x, m = torch.ones(2, 4, 32, device=DEVICE), torch.ones(2, 32, device="meta")
    with pytest.raises(ValueError, match=f"tensors on {x.device} and meta; move the model and its inputs to one dev"):
        launch(_gelu_kernel, lambda: (1,), x, m, x.numel(), BLOCK=1024, config=Launch())


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return None


@pytest.mark.parametrize("name", [name for name, case in _SMALLEST.items() if case.gradients])
def test_a_gradient_that_does_not_arrive(name):
    case = _SMALLEST[name]
    arguments = case.inputs(Inputs(DEVICE, torch.float32, max_rows=1))
    leaves = [arguments[x].detach().requires_grad_() for x in case.gradients]
    outputs = getattr(fused, name)(**arguments | dict(zip(case.gradients, leaves, strict=True)), **case.options)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    sum(_NoGradient.apply(out).sum() for out in outputs if out is not None and out.requires_grad).backward()
    assert not any(x.grad is not None and x.grad.any() for x in leaves)


_PROJECTIONS = {
    "mlp": ({"w1": (64, 32), "b1": (64,), "w2": (32, 64)}, {}),
    "project_heads": ({"weight": (96, 32), "bias": (96,)}, {"heads": 2}),
    "self_attention": ({"weight": (96, 32), "bias": (96,)}, {"heads": 2}),
}


@pytest.mark.parametrize("name", _PROJECTIONS)
def test_under_autocast_an_input_may_be_narrow_already(name):
    shapes, options = _PROJECTIONS[name]
    parameters = {key: torch.randn(shape, device=DEVICE) for key, shape in shapes.items()}
    h = torch.randn(2, 8, 32, device=DEVICE, dtype=torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        outputs = getattr(fused, name)(h, **parameters, **options)
    assert outputs[0].dtype == torch.bfloat16
