"""MeanFlow and flow matching against formulas of their own, in float64."""

import math

import pytest
import torch
from fast_step_runs import make_model
from soflow_formulas import drops

from soflow_fast import DiT
from soflow_fast.kernels.reference import Stream, normal
from soflow_fast.objectives.flow_matching import FlowMatching
from soflow_fast.objectives.meanflow import MeanFlow

B, SEED, STEP = 8, 5, 7


def _batch():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, 1, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(10, (B,), generator=generator)


def _draws(velocity_share=0.75):
    """Noise, dropped rows and the two normals of the times of every row, by the library's random numbers."""
    rows = torch.arange(B)
    key = {"seed": SEED, "step": STEP}
    noise = normal(rows, 64, stream=Stream.NOISE, **key).double().view(B, 1, 8, 8)
    return noise, drops(rows, velocity_share, 0.1, **key), normal(rows, 2, stream=Stream.TIMES, **key)


def _meanflow_loss(net, x, labels, omega, kappa, interval, direction="target", p=1.0, eps=0.01):
    """The loss row by row: every row its own network calls, the derivative by torch.func.jvp."""
    noise, drop, z = _draws()
    times = torch.sigmoid(-0.4 + 1.0 * z)
    total = 0.0
    for i in range(B):
        t = times[i].max().double().view(1)
        r = times[i].min().double().view(1) if i % 4 == 3 else t  # a quarter of the rows, evenly spread
        z_t, v = (1 - t) * x[i : i + 1] + t * noise[i : i + 1], noise[i : i + 1] - x[i : i + 1]
        label = None if labels is None else labels[i : i + 1]
        guided = v
        if label is not None and not drop[i] and interval[0] <= t <= interval[1]:
            with torch.no_grad():
                own, null = net(z_t, t, t, label), net(z_t, t, t, torch.tensor([10]))
            guided = omega * v + kappa * own + (1 - omega - kappa) * null
        seen = torch.tensor([10]) if label is not None and drop[i] else label

        def u(z, t, r=r, seen=seen):
            return net(z, t, r, seen)

        with torch.no_grad():
            along = guided if direction == "target" else u(z_t, t, t)
        _, derivative = torch.func.jvp(u, (z_t, t), (along, torch.ones_like(t)))
        target = (guided - (t - r) * derivative).detach()
        error = (u(z_t, t) - target).square().sum()
        total = total + error / (error.detach() + eps) ** p
    return total / B


@pytest.mark.parametrize(
    ("derivative", "direction"),
    [("tangent", "target"), ("tangent", "prediction"), ("jvp", "target"), ("finite_difference", "target")],
)
@pytest.mark.parametrize(
    ("omega", "kappa", "interval", "labelled"),
    [
        (1.0, 0.5, (0.0, 1.0), True),
        (3.0, 0.0, (0.0, 1.0), True),
        (0.2, 0.92, (0.0, 0.6), True),
        (1.0, 0.0, (0.0, 1.0), True),
        (1.0, 0.5, (0.0, 1.0), False),
    ],
)
def test_loss_and_gradient(derivative, direction, omega, kappa, interval, labelled):
    options = {"guidance_scale": omega, "guidance_mix": kappa, "guidance_interval": interval, "direction": direction}
    model = make_model(torch.float64, lambda net: MeanFlow(net, derivative=derivative, difference_step=1e-6, **options))
    x, labels = _batch()
    labels = labels if labelled else None
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours = model.loss(x, labels, 0.0, seed=SEED, step=STEP).loss
    theirs = _meanflow_loss(model.network, x, labels, omega, kappa, interval, direction)
    tolerance = 1e-6 if derivative == "finite_difference" else 1e-10
    assert ours.item() == pytest.approx(theirs.item(), rel=tolerance)
    pairs = zip(
        torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters, allow_unused=True), strict=True
    )
    for a, b in pairs:
        assert (a - (0 if b is None else b)).norm() <= 100 * tolerance * (1e-6 + a.norm())


def test_parts_and_times():
    model = make_model(torch.float64, MeanFlow)
    out = model.loss(*_batch(), 0.0, seed=SEED, step=STEP)
    assert {name: len(part.t) for name, part in out.parts.items()} == {"velocity": 6, "average": 2}
    t, r = model.draw_times(torch.arange(1000), 600, SEED, STEP)
    assert torch.equal(t[:600], r[:600])
    assert (r[600:] < t[600:]).all()


def test_jumps_and_samples():
    model = make_model(torch.float64, MeanFlow)
    x, labels = _batch()
    t, s = torch.full((B,), 0.9, dtype=torch.float64), torch.full((B,), 0.2, dtype=torch.float64)
    assert torch.equal(model.solution(x, t, s, labels), x - (t - s).view(-1, 1, 1, 1) * model.network(x, t, s, labels))
    one, zero = torch.ones(B, dtype=torch.float64), torch.zeros(B, dtype=torch.float64)
    assert torch.equal(model.sample(x, labels), x - model.network(x, one, zero, labels))


def test_bad_settings():
    net = DiT(8, 2, 1, 32, 1, 2, num_classes=10, impl="torch")
    for options, message in (
        ({"guidance_mix": 1.0}, r"guidance_mix=1.0 is outside \[0, 1\)"),
        ({"guidance_interval": (0.8, 0.2)}, "is not an interval of times"),
        ({"derivative": "symbolic"}, "derivative='symbolic' is not known"),
        ({"direction": "down"}, "direction='down' is not known; choose one of target, prediction"),
        ({"label_drop": 0.0}, "label_drop=0 never trains"),
        ({"difference_step": 0.0}, r"difference_step=0.0 is outside"),
        ({"p": -1.0}, r"p=-1.0 is outside \[0, inf\]"),
        ({"time_std": math.nan}, "time_std=nan is outside"),
        ({"time_mean": math.nan}, "time_mean=nan is outside"),
    ):
        with pytest.raises(ValueError, match=message):
            MeanFlow(net, **options)

    class Plain(torch.nn.Module):
        num_classes = 10

    with pytest.raises(ValueError, match="derivative='jvp' needs a network with jvp; Plain has none"):
        MeanFlow(Plain(), derivative="jvp")


def test_flow_matching_loss_is_the_mean_square():
    model = make_model(torch.float64, FlowMatching)
    x, labels = _batch()
    noise, drop, z = _draws(velocity_share=1.0)
    t = torch.sigmoid(z[:, 0]).double()
    per_row = t.view(-1, 1, 1, 1)
    seen = torch.where(drop, 10, labels)
    errors = model.network((1 - per_row) * x + per_row * noise, t, t, seen) - (noise - x)
    ours = model.loss(x, labels, 0.0, seed=SEED, step=STEP)
    assert ours.loss.item() == pytest.approx(errors.square().mean().item(), rel=1e-12)
    assert set(ours.parts) == {"velocity"}


def test_flow_matching_integrates_its_velocity():
    """Against Euler's method written out, and exactly for a constant velocity."""
    model = make_model(torch.float64, lambda net: FlowMatching(net, ode_steps=3))
    x, labels = _batch()
    expected = x
    for i in range(3):
        t = torch.full((B,), 1 - i / 3, dtype=torch.float64)
        expected = expected - model.network(expected, t, t, labels) / 3
    assert torch.allclose(model.sample(x, labels), expected, atol=1e-12)
