"""The DiT's difference forward: against subtraction, against forward-mode AD, and its accuracy in float32."""

import pytest
import torch

from soflow_fast import DiT

SMALL = {"input_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 24, "depth": 2, "num_heads": 3}


def _net(**overrides):
    """A float64 DiT with non-zero weights everywhere, the zero-initialised modulation included."""
    net = DiT(**{**SMALL, "num_classes": 5, "impl": "torch", **overrides}).double()
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        if p.requires_grad:
            scale = 0.2 if p.dim() < 2 else p[0].numel() ** -0.5
            p.data = scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return net


def _inputs(step, b=4, size=(8, 8)):
    """``x, t, s, labels, dx, dt``, the shifts of size ``step``, all of them exact in float32."""
    generator = torch.Generator().manual_seed(1)
    x, v = torch.randn(2, b, 3, *size, generator=generator)
    t = 0.3 + 0.7 * torch.rand(b, generator=generator)
    s = 0.8 * t * torch.rand(b, generator=generator)
    gap = step * (t - s)
    dx, dt = -gap.view(-1, 1, 1, 1) * v, -gap
    return *(y.double() for y in (x, t, s)), torch.arange(b), dx.double(), dt.double()


def _to(arguments, dtype):
    return [y.to(dtype) if y.is_floating_point() else y for y in arguments]


def _relative(ours, truth):
    return ((ours - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("step", [0.5, 1e-1, 1e-3, 1e-6])
@pytest.mark.parametrize(("attention", "size"), [("sdpa", (8, 8)), ("math", (8, 8)), ("sdpa", (4, 10))])
def test_difference_is_the_subtraction_in_float64(step, attention, size):
    net = _net(attention=attention, input_size=size)
    x, t, s, labels, dx, dt = _inputs(step, size=size)
    F, dF = net.forward_difference(x, t, s, labels, dx, dt)
    plain = net(x, t, s, labels)
    assert torch.equal(F, plain)
    # both times shift with t: the network is given t and s, and embeds t and t−s
    assert _relative(dF, net(x + dx, t + dt, s, labels) - plain) < 1e-13 / step
    assert dF.dtype == torch.float64


@pytest.mark.parametrize("attention", ["sdpa", "math"])
def test_tangent_is_the_directional_derivative(attention):
    x, t, s, labels, dx, dt = _inputs(1.0)
    math_net = _net(attention="math")
    F, derivative = torch.func.jvp(lambda x, t: math_net(x, t, s, labels), (x, t), (dx, dt))
    ours = _net(attention=attention).forward_difference(x, t, s, labels, dx, dt, mode="tangent")
    torch.testing.assert_close(ours[0], F, rtol=0, atol=1e-12)
    assert _relative(ours[1], derivative) < 1e-13
    arguments = _to((x, t, s, labels, dx, dt), torch.float32)
    single = _net(attention=attention).float().forward_difference(*arguments, mode="tangent")
    assert _relative(single[1].double(), derivative) < 5e-6


def test_jvp_is_the_directional_derivative():
    x, t, s, labels, dx, dt = _inputs(1.0)
    net = _net()
    F, dF = net.jvp(x, t, s, labels, dx, dt)
    assert torch.equal(F, _net(attention="math")(x, t, s, labels))
    h = 1e-5
    central = net(x + h * dx, t + h * dt, s, labels) - net(x - h * dx, t - h * dt, s, labels)
    assert _relative(dF, central / (2 * h)) < 1e-8


# a head of 36, 48, 64 and 72; widths of 144 to 288
@pytest.mark.parametrize(("hidden_size", "num_heads"), [(144, 4), (192, 4), (256, 4), (144, 2), (288, 4)])
def test_difference_in_float32_is_exact_to_5e_6_at_every_step(hidden_size, num_heads):
    net = _net(hidden_size=hidden_size, num_heads=num_heads, depth=4)
    single = _net(hidden_size=hidden_size, num_heads=num_heads, depth=4).float()
    for step in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        arguments = _inputs(step, b=2)
        truth = net.forward_difference(*arguments)[1]
        ours = single.forward_difference(*_to(arguments, torch.float32))[1]
        assert _relative(ours.double(), truth) < 5e-6, step


@pytest.mark.parametrize("residual", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mode", ["difference", "tangent"])
def test_difference_in_bfloat16_keeps_its_accuracy_at_small_steps(residual, mode):
    for step in (1e-1, 1e-3, 1e-6):
        arguments = _inputs(step)
        truth = _net().forward_difference(*arguments, mode=mode)[1]
        net = _net(compute_dtype=torch.bfloat16, residual_dtype=residual).float()
        F, dF = net.forward_difference(*_to(arguments, torch.float32), mode=mode)
        assert F.dtype == dF.dtype == torch.float32
        # two bfloat16 forwards would be off by 200 % at 1e-3 and more below
        assert _relative(dF.double(), truth) < 0.03


@pytest.mark.parametrize("rows", [slice(3, None), slice(None, 2), slice(1, 3), slice(None)])
def test_difference_of_some_rows(rows):
    net = _net()
    x, t, s, labels, dx, dt = _inputs(1e-2)
    F, dF = net.forward_difference(x, t, s, labels, dx, dt)
    F_again, part = net.forward_difference(x, t, s, labels, dx[rows], dt[rows], rows=rows)
    assert torch.equal(F_again, F)
    torch.testing.assert_close(part, dF[rows], rtol=0, atol=1e-14)


def test_labels_none():
    net = _net()
    x, t, s, _, dx, dt = _inputs(1e-2)
    for ours, null in zip(
        net.forward_difference(x, t, s, None, dx, dt),
        net.forward_difference(x, t, s, torch.full((4,), 5), dx, dt),
        strict=True,
    ):
        assert torch.equal(ours, null)


def test_the_difference_has_no_gradient_and_leaves_that_of_F_alone():
    net = _net()
    x, t, s, labels, dx, dt = _inputs(1e-2)
    gradients = []
    for function in (
        lambda: net(x, t, s, labels),
        lambda: net.forward_difference(x, t, s, labels, dx, dt)[0],
        lambda: net.forward_difference(x, t, s, labels, dx[:1], dt[:1], rows=slice(0, 1), mode="tangent")[0],
    ):
        net.zero_grad()
        function().square().sum().backward()
        gradients.append([p.grad.clone() for p in net.parameters() if p.requires_grad])
    for plain, *others in zip(*gradients, strict=True):
        assert all(torch.equal(other, plain) for other in others)
    dx = dx.requires_grad_()
    assert not net.forward_difference(x, t, s, labels, dx, dt)[1].requires_grad


def test_unknown_mode():
    net = _net()
    with pytest.raises(ValueError, match="mode='jvp' is not known; choose 'difference' or 'tangent'"):
        net.forward_difference(*_inputs(1e-2), mode="jvp")


@pytest.mark.parametrize("mode", ["difference", "tangent"])
def test_compiles_in_one_graph(mode):
    net, arguments = _net(depth=1).float(), _to(_inputs(1e-2), torch.float32)

    def function(*arguments):
        return net.forward_difference(*arguments, mode=mode)

    torch.compiler.reset()
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        net.zero_grad()
        F, dF = run(*arguments)
        assert not dF.requires_grad
        F.square().sum().backward()
        results.append([F.detach(), dF, *(p.grad.clone() for p in net.parameters() if p.requires_grad)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@torch.no_grad()
def test_inductor_keeps_the_accuracy():
    arguments = _inputs(1e-6)
    net = _net(depth=1)
    truth = net.forward_difference(*arguments)[1]
    torch.compiler.reset()
    compiled = torch.compile(net.float().forward_difference, fullgraph=True, backend="inductor")
    assert _relative(compiled(*_to(arguments, torch.float32))[1].double(), truth) < 5e-6
