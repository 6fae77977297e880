"""What deriving a difference forward costs, and what it keeps of a network: casts, dtypes, the choice of kernels."""

import logging
import sys

import pytest
import torch
import torch.nn.functional as nnf
from foreign_networks import Function, UNet
from image_operators import inputs
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef

from soflow_fast import SoFlow, kernels
from soflow_fast.difference_rules import RULES
from soflow_fast.differencing import ForwardDifference
from soflow_fast.objectives.meanflow import MeanFlow


def _batch():
    g = torch.Generator().manual_seed(1)
    x, dx = (torch.randn(4, 3, 8, 8, generator=g) for _ in range(2))
    t = torch.rand(4, generator=g)
    return x, t, t / 3, None, 0.01 * dx, -0.01 * t


class _Casting(nn.Module):
    """Two convolutions, and between them what is written in float32 by casts."""

    num_classes = 0

    def __init__(self, between):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.between, self.seen = between, ()

    def forward(self, x, t, s, labels):
        h = self.enter(x)
        out = h + self.between(h, t).to(h.dtype)
        self.seen = (h.dtype, out.dtype)
        return self.leave(torch.tanh(out * (1 + h)))


def _rms_norm(h, t):
    wide = h.float()
    wide = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + 1e-6)
    return wide.type_as(h) * (1 + t.to(h.dtype)).view(-1, 1, 1, 1)


def _product_without_autocast(h, t):
    with torch.no_grad(), torch.autocast("cpu", enabled=False):  # as of rotary positions
        angle = torch.arange(8.0)[:, None] @ torch.linspace(0, 1, 8)[None]
    with torch.autocast("cpu", enabled=False):
        return torch.cos(9 * t).view(-1, 1, 1, 1) * (h.float() @ angle.cos())


def _product_with_autocast(h, t):
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", torch.bfloat16):
        wide = h @ h.mT + t.view(-1, 1, 1, 1)
    return 0.05 * wide + (h.float() @ h.float().mT)


CASTS = {
    "exp": lambda h, t: (20 * h.float()).exp(),
    "rms_norm": _rms_norm,
    "to": lambda h, t: torch.sin(50 * h.to(torch.float32)).to(h) + torch.sin(50 * h.to(t)).to(h.dtype),
    "times": lambda h, t: torch.cos(300 * t.float()).view(-1, 1, 1, 1).to(h.dtype) * h,
    "eps": lambda h, t: h.float() / (h.detach().abs().float() + torch.finfo(h.dtype).eps),
    "of_a_mask": lambda h, t: (torch.arange(8) > 3).to(h.dtype) * h,
    "without_autocast": _product_without_autocast,
    "with_autocast": _product_with_autocast,
    "softmax": lambda h, t: torch.softmax(30 * h, 1, dtype=torch.float32) * torch.softmax(h, 1, dtype=h.dtype),
}


@pytest.mark.parametrize("name", CASTS)
@pytest.mark.parametrize("compile", [False, True])
def test_what_is_cast_to_float32_stays_float32_under_autocast(name, compile):
    """And what is cast back is not: the value is the network's own, bit by bit, with and without autocast."""
    net, exact = _Casting(CASTS[name]), _Casting(CASTS[name]).double()
    x, t, s, _, dx, dt = batch = _batch()
    with torch.no_grad():
        before, after = (exact(*(z.double() for z in inputs), None) for inputs in ((x, t, s), (x + dx, t + dt, s)))
    forward = ForwardDifference(net)
    forward.prepare(x, None)
    torch._dynamo.reset()
    run = torch.compile(forward, fullgraph=True, backend="aot_eager") if compile else forward
    for low in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            value, difference = run(*batch)
            expected = net(x, t, s, None)
        dtype = torch.bfloat16 if low else torch.float32
        assert net.seen == (dtype, dtype)
        assert difference.dtype == value.dtype
        if not low or name not in ("eps", "softmax"):  # numbers, and dtypes asked for, are those of float32
            assert torch.equal(value, expected)
    assert (difference - (after - before)).norm() <= 1e-3 * (after - before).norm()  # t is rounded in the truth too
    ours, wanted = (torch.autograd.grad(y.square().sum(), list(net.parameters())) for y in (value, expected))
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


class _Chain(nn.Module):
    """Every link is saved for the backward."""

    def forward(self, x, t, s, labels):
        links, x = [], x * x.new_ones(()).requires_grad_()
        for _ in range(10):
            x = torch.sin(x)
            links.append(StorageWeakRef(x.untyped_storage()))
        self.alive = sum(not link.expired() for link in links)
        return x


def test_deriving_saves_nothing_for_a_backward():
    """Else it would take the activations of a training step in float32."""
    net, alive = _Chain(), []
    net.register_forward_hook(lambda *_: alive.append(net.alive))
    x, t, s, *_ = _batch()
    net(x, t, s, None)
    ForwardDifference(net).prepare(x, None)
    assert alive[0] == 10
    assert alive[1] <= 2


def test_forward_hooks_are_captured_and_warned_of_once(caplog):
    """What they make of the output is part of the graph, also of those registered later; nothing else is done again."""
    torch.manual_seed(0)
    net, seen = UNet(), []
    forward, (x, t, s, labels, dx, dt) = ForwardDifference(net), _batch()
    forward(x, t, s, labels, dx, dt)
    assert "hooks" not in caplog.text
    net.down.register_forward_hook(lambda module, inputs, output: seen.append(1) or 2 * output)
    for n in (4, 4, 2):
        value, _ = forward(x[:n], t[:n], s[:n], labels, dx[:n], dt[:n])
    captured = len(seen)
    forward(x, t, s, labels, dx, dt)
    assert len(seen) == captured
    assert torch.equal(value, net(x[:2], t[:2], s[:2]))
    assert caplog.text.count("the network UNet has forward hooks (first on 'down')") == 1


def test_a_graph_of_parameters_of_another_dtype_is_not_used():
    torch.manual_seed(0)
    net = UNet()
    forward = ForwardDifference(net)
    batch = _batch()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        net.to(dtype)
        x, t, s, labels, dx, dt = (None if z is None else z.to(dtype) for z in batch)
        value, difference = forward(x, t, s, labels, dx, dt)
        assert difference.dtype == dtype
        torch.testing.assert_close(value, net(x, t, s))


@pytest.mark.parametrize("impl", ["torch", "auto"])
def test_a_derived_graph_has_the_objective_s_choice_of_kernels(impl, monkeypatch):
    """Of the attention's difference, where the inputs are on a GPU."""
    net = Function(lambda x, t: nn.functional.scaled_dot_product_attention(x, x, x))
    net.num_classes = 0
    model, asked = MeanFlow(net, guidance_scale=1.0, guidance_mix=0.0, label_drop=0.0, impl=impl), []
    model.derive(_batch()[0], None, "tangent")
    assert model.forward_difference.impl == model.impl
    monkeypatch.setattr(kernels, "resolve_impl", lambda name: asked.append(name) or "torch")
    monkeypatch.setattr(FakeTensor, "is_cuda", True)
    ForwardDifference(net, impl).prepare(_batch()[0], None)
    assert asked == [impl]


class _Printing(_Casting):
    def forward(self, x, t, s, labels):
        print("called", file=sys.stderr)
        return super().forward(x, t, s, labels)


class _Branching(_Printing):
    """Its graph depends on values."""

    def forward(self, x, t, s, labels):
        h = super().forward(x, t, s, labels)
        return h if h.mean() > 0 else 2 * h


@pytest.mark.parametrize("kind", [_Branching, _Printing])
def test_a_network_that_cannot_be_captured_is_one_sentence(kind, caplog, capfd):
    """torch prints the graph of its own accord; what a network prints is printed."""
    objective = SoFlow(kind(CASTS["exp"]), guidance_scale=1.0, label_drop=0.0)
    objective.loss(_batch()[0], None, progress=0.5, step=0)
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == (kind is _Branching)
    assert all("_Branching cannot be captured by torch.export" in sentence for sentence in said)
    assert set(capfd.readouterr().err.split()) == {"called"}
    assert not logging.getLogger("torch.export._trace").disabled


class _Energy(torch.nn.Module):
    """Its output is a gradient, made in its forward."""

    num_classes = 0

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(1, 2, 1)

    def forward(self, x, t, s, labels):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.layer(x).square().sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0]


def test_a_network_that_differentiates_in_its_forward_takes_two_forwards(caplog):
    objective = SoFlow(_Energy(), guidance_scale=1.0, label_drop=0.0)
    x = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert objective.loss(x, None, progress=0.5, step=0).loss.isfinite()
    assert "takes two forwards in float32" in caplog.text


class _Norms(nn.Module):
    """Instance norms one after the other, in evaluation; some keep statistics, by which they then normalise."""

    def __init__(self, kept):
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ModuleList(nn.InstanceNorm2d(3, affine=True, track_running_stats=k).eval() for k in kept)
        for norm in self.norms:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            if norm.running_mean is not None:
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)

    def forward(self, x, t, s, labels):
        for norm in self.norms:
            x = torch.sin(3 * norm(x)) + t.view(-1, 1, 1, 1)
        return x


@pytest.mark.parametrize("kept", [(True, False), (False, True, False, True, True), (True, True)])
def test_calls_that_a_rule_refuses_are_taken_apart_and_no_others(kept):
    """Of an instance norm without statistics torch's definition has no rule."""
    net = _Norms(kept).double()
    forward = ForwardDifference(net)
    x, t, s, labels, dx, dt = (None if z is None else z.double() for z in _batch())
    value, difference = forward(x, t, s, labels, dx, dt)
    assert torch.equal(value, net(x, t, s, labels))
    truth = net(x + dx, t + dt, s, labels) - value
    assert (difference - truth).norm() <= 1e-12 * truth.norm()
    (derived,) = forward._derived.values()
    called = [node.meta.get("operator") for node in derived.run.graph.nodes]
    assert called.count(torch.ops.aten.instance_norm.default) == kept.count(False)
    assert called.count(torch.ops.aten._native_batch_norm_legit_no_training.default) == kept.count(True)


def test_rules_keep_their_digits_when_compiled():
    """Inductor rewrites some functions into forms that cancel."""

    def function(x, t):
        y = torch.log(x) + torch.exp(-x) + torch.tanh(x) + nnf.silu(x) + nnf.gelu(x) + x.rsqrt() + nnf.softplus(x)
        return torch.softmax(y, -1) + torch.sin(y) + nnf.normalize(y) + 1 / y

    forward = ForwardDifference(Function(function))
    x, t, dx, dt = inputs(1e-5)
    single = [z.float() for z in (x, t, t / 2)]
    forward.prepare(single[0], None)
    _, difference = torch.compile(forward, fullgraph=True)(*single, None, dx.float(), dt.float())
    truth = function(x + dx, t + dt) - function(x, t)
    assert (difference - truth).norm() <= 3e-6 * truth.norm()


def test_a_rule_can_be_added(monkeypatch):
    net = Function(lambda x, t: x.cummax(1)[0])

    def cummax(operator, out, arguments, differences, tangent):
        return differences[0].gather(arguments[1], out[1]), None

    monkeypatch.setitem(RULES, torch.ops.aten.cummax, cummax)
    x, t, dx, dt = inputs(1e-6)
    difference = ForwardDifference(net)(x, t, t / 2, None, dx, dt)[1]
    assert torch.allclose(difference, (x + dx).cummax(1)[0] - x.cummax(1)[0], atol=1e-12)
