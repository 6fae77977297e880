"""The difference forward derived from a network's operators: whole networks, objectives and steps over them."""

import copy
import functools
import logging
import pickle

import pytest
import torch
from _baselines import SixCalls
from diffusers import UNet2DModel
from foreign_networks import Function, Transformer, UNet
from torch import nn

from soflow_fast import DiT, SoFlow
from soflow_fast.differencing import ForwardDifference
from soflow_fast.objectives.meanflow import MeanFlow
from soflow_fast.step import TrainStep


def _net(kind, **options):
    torch.manual_seed(0)
    if kind is DiT:
        net = DiT(8, 2, 3, 32, 1, 2, num_classes=10, impl="torch", attention="math")
        for p in net.parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=0.1)
        return net
    return kind(**options)


def _batch(step=1e-3, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    x, v = (torch.randn(4, 3, 8, 8, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    t = torch.tensor([0.9, 0.5, 0.7, 0.3], dtype=dtype)
    return x, t, t / 3, torch.tensor([1, 10, 0, 7]), step * v, -step * t


@pytest.mark.parametrize("kind", [UNet, Transformer, DiT])
def test_whole_networks(kind):
    """As accurate as one float32 forward at every step, in value, difference, tangent and gradient."""
    net, exact = _net(kind), _net(kind).double()
    forward = ForwardDifference(net)
    for step in (1e-1, 1e-3, 1e-5):
        wide = _batch(step, torch.float64)
        x, t, s, labels, dx, dt = wide
        with torch.no_grad():
            truth = exact(x + dx, t + dt, s, labels) - exact(x, t, s, labels)
        F, dF = forward(*(z.float() if z.is_floating_point() else z for z in wide))
        assert (dF - truth).norm() <= 3e-6 * truth.norm()
        assert not dF.requires_grad
    x, t, s, labels, dx, dt = _batch(step)
    torch.testing.assert_close(F, net(x, t, s, labels), rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(F.square().sum(), list(net.parameters())[-1])[0]
    expected = torch.autograd.grad(net(x, t, s, labels).square().sum(), list(net.parameters())[-1])[0]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


class _FromDiffusers(nn.Module):
    num_classes = 10

    def __init__(self):
        super().__init__()
        self.unet = UNet2DModel(
            sample_size=8, in_channels=4, out_channels=3, block_out_channels=(16, 32), layers_per_block=1,
            norm_num_groups=4, attention_head_dim=8, num_class_embeds=11,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip

    def forward(self, x, t, s, labels):
        x = torch.cat([x, (t - s).view(-1, 1, 1, 1).expand_as(x[:, :1])], 1)
        return self.unet(x, 1000 * t, class_labels=labels).sample


def test_a_network_of_another_library():
    """With t fixed, as it computes the features of t in float32 whatever it is given."""
    net, exact = _net(_FromDiffusers), _net(_FromDiffusers).double()
    for step in (1e-1, 1e-5):
        wide = _batch(step, torch.float64)
        x, t, s, labels, dx, dt = wide
        with torch.no_grad():
            truth = exact(x + dx, t, s, labels) - exact(x, t, s, labels)
        x, t, s, dx, dt = (z.float() for z in (x, t, s, dx, 0 * dt))
        F, dF = ForwardDifference(net)(x, t, s, labels, dx, dt)
        assert (dF - truth).norm() <= 3e-6 * truth.norm()
        torch.testing.assert_close(F, net(x, t, s, labels), rtol=1e-5, atol=1e-6)


def test_the_library_s_own_network_derived_is_the_one_written_by_hand():
    net = _net(DiT).double()
    x, t, s, labels, dx, dt = _batch(0.1, torch.float64)
    rows = slice(1, None)
    for mode in ("difference", "tangent"):
        for labels_or_none in (labels, None):
            arguments = (x, t, s, labels_or_none, dx[rows], dt[rows])
            ours = ForwardDifference(net)(*arguments, rows=rows, mode=mode)
            for a, b in zip(ours, net.forward_difference(*arguments, rows=rows, mode=mode), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_compiles_as_one_graph_in_bfloat16():
    net, exact = _net(UNet), _net(UNet).double()
    x, t, s, labels, dx, dt = _batch(1e-3)
    forward = ForwardDifference(net)
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="call prepare"):
        compiled(x, t, s, labels, dx, dt)
    torch._dynamo.reset()
    forward.prepare(x, labels)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        two = net(x + dx, t + dt, s, labels) - net(x, t, s, labels)
    with torch.autocast("cpu", torch.bfloat16):
        F, dF = compiled(x, t, s, labels, dx, dt)
    x, t, s, dx, dt = (z.double() for z in (x, t, s, dx, dt))
    with torch.no_grad():
        truth = exact(x + dx, t + dt, s, labels) - exact(x, t, s, labels)
    assert (dF - truth).norm() <= 0.02 * truth.norm()
    assert (two - truth).norm() > 0.5 * truth.norm()  # what the derived form is for
    assert F.requires_grad


@pytest.mark.parametrize("objective", [SixCalls, SoFlow, MeanFlow])
def test_objectives_derive_it(objective):
    """The loss and its gradient are those of the definition in float64."""
    x0 = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    labels = torch.arange(8)
    results = []
    for dtype, definition in ((torch.float32, False), (torch.float64, True)):
        net = _net(Transformer).to(dtype)
        if issubclass(objective, SoFlow):
            model = objective(net, quotient="two_forwards" if definition else "difference", impl="torch")
        else:
            model = MeanFlow(net, impl="torch")
            if definition:
                net.forward_difference = lambda *a, rows, mode, net=net: _by_jvp(net, rows, *a)
                model = MeanFlow(net, impl="torch")
        rows = torch.arange(8)
        loss = model.loss_of_rows(x0.to(dtype), labels, rows, 6, 0.5, 0, 3).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in net.parameters())])
    for ours, expected in zip(*results, strict=True):
        assert (ours - expected).norm() <= 1e-4 * expected.norm() + 1e-7


def _by_jvp(net, rows, x, t, s, labels, dx, dt):
    F = net(x, t, s, labels)
    x, t, s, labels = (z[rows] for z in (x, t, s, labels))
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return F, torch.func.jvp(lambda x, t: net(x, t, s, labels), (x, t), (dx, dt))[1]


def test_a_compiled_step_in_bfloat16():
    """Its loss and its update are those of a plain float32 step, but for the rounding of one forward."""
    x0, labels = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(2)), torch.arange(8)
    results = []
    for objective, settings in (
        (SoFlow, {"precision": "bf16", "compile": "aot_eager"}),
        (SixCalls, {"precision": "fp32"}),
    ):
        net = _net(Transformer)
        model = objective(net, impl="torch")
        step = TrainStep(model, optimizer=torch.optim.SGD(net.parameters(), lr=1.0), total_steps=10, **settings)
        before = [p.detach().clone() for p in net.parameters()]
        loss = step(x0, labels).loss.item()
        update = torch.cat([(p - b).flatten() for p, b in zip(net.parameters(), before, strict=True)])
        assert not model.needs_float32
        results.append((loss, update))
    (ours, our_update), (plain, update) = results
    assert ours == pytest.approx(plain, rel=0.01)
    assert (our_update - update).norm() <= 0.03 * update.norm()


# --------------------------------------------------------------------------------------- what networks do besides


class _Small(nn.Module):
    """Two convolutions, what is between them in a method of its own."""

    num_classes = 10

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, t, s, labels=None):
        return self.leave(torch.tanh(self.features(x) * (1 + t - s).view(-1, 1, 1, 1)))

    def features(self, x):
        return self.enter(x)


@functools.cache
def _ramp(n):
    return torch.linspace(0, 1, n)


class _CachedOutside(_Small):
    def features(self, x):
        return self.enter(x) + _ramp(x.shape[-1])


class _CachedInside(_Small):
    def features(self, x):
        if not hasattr(self, "ramp"):
            self.ramp = torch.linspace(0, 1, x.shape[-1])
        return self.enter(x) + self.ramp


class _PartlyFrozen(_Small):
    def features(self, x):
        with torch.no_grad():
            return self.enter(x)


class _Dropping(_Small):
    def features(self, x):
        return self.dropout(self.enter(x))


@pytest.mark.parametrize("kind", [_CachedOutside, _CachedInside, _PartlyFrozen])
def test_a_step_is_that_of_two_forwards(kind):
    """With caches filled by the first forward, and a part without gradient."""
    x0, results = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(2)), []
    for quotient in ("difference", "two_forwards"):
        _ramp.cache_clear()
        model = SoFlow(_net(kind), quotient=quotient, impl="torch")
        step = TrainStep(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), total_steps=10)
        loss = step(x0, torch.arange(8)).loss
        assert type(loss) is torch.Tensor
        assert model.needs_float32 is False
        results.append([loss, *model.parameters()])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_a_graph_of_other_modes_is_not_used():
    net = _net(_Dropping)
    forward = ForwardDifference(net)
    x, t, s, _, dx, dt = _batch()
    first = forward(x, t, s, None, dx, dt)
    assert not torch.equal(forward(x, t, s, None, dx, dt)[0], first[0])
    net.dropout.eval()
    torch.testing.assert_close(forward(x, t, s, None, dx, dt)[0], net(x, t, s, None))
    net.leave = nn.Sequential(nn.Conv2d(8, 3, 1), nn.Tanh())
    torch.testing.assert_close(forward(x, t, s, None, dx, dt)[0], net(x, t, s, None))


def test_another_network_in_the_objective():
    model, x0 = SoFlow(_net(_Small), impl="torch"), torch.randn(8, 3, 8, 8)
    model.loss(x0, torch.arange(8), 0.5, step=0).loss.backward()
    model.network = Transformer()
    model.loss(x0, torch.arange(8), 0.5, step=0).loss.backward()
    assert all(p.grad is not None for p in model.network.blocks.parameters())


def test_a_compiled_step_follows_modes_and_labels():
    net = _net(_Small)
    model = SoFlow(net, impl="torch")
    step = TrainStep(model, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), total_steps=10, compile="aot_eager")
    x0 = torch.randn(8, 3, 8, 8)
    step(x0, torch.arange(8))
    net.eval()
    step(x0, torch.arange(8))
    assert step(x0, None).loss.isfinite()


def test_an_objective_can_be_copied_and_pickled_after_a_step():
    model, x0 = SoFlow(_net(_Small), impl="torch"), torch.randn(8, 3, 8, 8)
    loss = model.loss(x0, torch.arange(8), 0.5, step=0).loss
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.loss(x0, torch.arange(8), 0.5, step=0).loss, loss)
        assert other.network is not model.network


def test_without_rows_that_need_it():
    model = MeanFlow(_net(_Small), velocity_share=1.0, impl="torch")
    assert model.loss(torch.randn(4, 3, 8, 8), torch.arange(4), 0.5, step=0).loss.isfinite()


# ------------------------------------------------------------------------------------- what cannot be derived


class _Branching(Function):
    def forward(self, x, t, s, labels):
        return x if t.max() > 0.5 else 2 * x


class _Counting(Function):
    def __init__(self):
        super().__init__(None)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, t, s, labels):
        self.calls += 1
        return 2 * x


class _Recurrent(nn.Module):
    """Over the rows of an image."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x, t, s, labels):
        return self.lstm(x[:, 0])[0][:, None].expand_as(x)


_FIRST = torch.zeros(4, 1, 4, 4, dtype=torch.int64)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def _with_own_autocast(x, t):
    """And with a cast that is known under autocast alone."""
    y = x @ x
    y = y if y.dtype == torch.float32 else y.sin()
    with torch.autocast("cpu", enabled=False):
        return y.float() @ y.float()


@pytest.mark.parametrize(
    ("net", "sentence"),
    [
        (Function(lambda x, t: x.cummax(1)[0]), r"Function calls aten.cummax.default, which has no rule; add one to"),
        (Function(lambda x, t: (x > 1).to(x)), "makes torch.bool of what changes, by aten.gt.Scalar; choices that"),
        (Function(lambda x, t: x + t.long()[:, None, None, None]), "Function makes torch.int64 of what changes"),
        (Function(lambda x, t: torch.ones_like(x)), "Function must return one tensor that depends on x"),
        (Function(lambda x, t: (x, x)), "Function must return one tensor that depends on x"),
        (Function(lambda x, t: nn.functional.grid_sample(x, x[..., :2])), "has a rule only for a change of its first"),
        (Function(_with_own_autocast), "Function turns autocast off around aten.matmul.default, and calls"),
        (Function(lambda x, t: _Straight.apply(x * x.new_ones(1).requires_grad_())), "an autograd.Function, _Straight"),
        (Function(lambda x, t: x.half().float()), "Function makes torch.float16 of what changes"),
        (Function(lambda x, t: x.gather(1, x.topk(2, 1).indices)), "makes torch.int64 of what changes, by aten.topk"),
        (Function(lambda x, t: x.scatter(1, _FIRST, 2.0, reduce="add")), "aten.scatter.value_reduce has no rule for"),
        (_Recurrent(), "_Recurrent calls aten.lstm.input, which has no rule"),
        (Function(lambda x, t: torch.div(x, 2, rounding_mode="floor")), "has no rule for rounding_mode='floor'"),
        (_Branching(None), r"_Branching cannot be captured by torch.export \(.*, at .*test_differencing.py:\d+\)"),
        (_Counting(), "_Counting changes 'calls' in its forward"),
    ],
)  # fmt: skip
def test_what_cannot_be_derived_is_named(net, sentence, caplog):
    x = torch.rand(4, 4, 4, 4)
    with pytest.raises(ValueError, match=sentence):
        ForwardDifference(net).prepare(x, None)
    net.num_classes = 0
    model = SoFlow(net, guidance_scale=1.0, label_drop=0.0, impl="torch")
    with caplog.at_level(logging.WARNING):
        model.prepare(x, None)
    assert "takes two forwards in float32: " in caplog.text
    assert model.needs_float32
    for model, remedy in (
        (SoFlow(net, guidance_scale=1.0, label_drop=0.0, quotient="tangent"), "quotient='tangent' needs a difference"),
        (SoFlow(net, guidance_scale=1.0, label_drop=0.0, min_gap=0.0), "min_gap=0 needs a difference"),
        (
            MeanFlow(net, guidance_scale=1.0, guidance_mix=0.0, label_drop=0.0),
            "derivative='tangent' needs a difference",
        ),
    ):
        with pytest.raises(ValueError, match=remedy):
            model.prepare(x, None)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_attention_of_a_token_whose_keys_are_all_masked_is_zero(dropout):
    keep = torch.ones(4, 4, dtype=torch.bool)
    keep[1] = False

    def attention(x, t):
        return x + torch.nn.functional.scaled_dot_product_attention(x, 2 * x, x, attn_mask=keep, dropout_p=dropout)

    x, dx = torch.rand(2, 4, 4, 4), 0.1 * torch.rand(2, 4, 4, 4)
    t = torch.rand(2)
    value, difference = ForwardDifference(Function(attention))(x, t, t / 2, None, dx, -t)
    assert torch.equal(value[:, :, 1], x[:, :, 1])
    assert torch.equal(difference[:, :, 1], dx[:, :, 1])
    assert value.isfinite().all()
    assert difference.isfinite().all()


def test_two_forwards_are_no_way_out_where_each_draws_another_dropout():
    x = torch.rand(4, 4, 4, 4)
    net = Function(lambda x, t: torch.nn.functional.dropout(x.cummax(1)[0], 0.5, net.training))
    net.num_classes = 0
    model = SoFlow(net, guidance_scale=1.0, label_drop=0.0)
    before = torch.get_rng_state()
    with pytest.raises(
        ValueError, match=r"draws random numbers.*aten.cummax.default, which has no rule.*turn its dropout off"
    ):
        model.prepare(x, None)
    assert torch.equal(torch.get_rng_state(), before)
    net.eval()
    model.prepare(x, None)
    assert model.needs_float32


@pytest.mark.parametrize(
    ("objective", "setting"), [(SoFlow, {"quotient": "two_forwards"}), (MeanFlow, {"derivative": "finite_difference"})]
)
def test_dropout_and_what_subtracts_two_forwards(objective, setting):
    """Refused in every mode that draws, and only there."""
    model = objective(_net(UNet, dropout=0.2), **setting)
    x, labels = torch.rand(8, 3, 8, 8), torch.arange(8)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"subtracts two outputs of the network, which draws.*model\.dropout=0"):
            model.loss(x, labels, 0.5, step=0)
        assert model.eval().loss(x, labels, 0.5, step=0).loss.isfinite()
        model.train()
    model = objective(_net(UNet), **setting)
    assert model.loss(x, labels, 0.5, step=0).loss.isfinite()
