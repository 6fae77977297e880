"""sCM against its definition, row by row in float64 with torch.func.jvp, and its training."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from fast_step_runs import make_model, make_step, train, training_batch
from foreign_networks import UNet
from runs import StopError, assert_bitwise_equal, final, scores_of_digits, stop_at, tiny_config
from soflow_formulas import drops

from soflow_fast import SCM, DiT, demo
from soflow_fast.config import SCMConfig
from soflow_fast.kernels.reference import Stream, normal
from soflow_fast.trainer import Trainer

B, SEED, STEP = 8, 5, 8


def _batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, 1, 8, 8, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(10, (B,), generator=generator)


def _published(net, x, labels, r, label_drop=0.1, norm_constant=0.1, p=0.0, eps=0.01):
    """The loss row by row by Algorithm 1, whose time is the angle."""
    rows, key = torch.arange(B), {"seed": SEED, "step": STEP}
    noise = normal(rows, 64, stream=Stream.NOISE, **key).double().view(B, 1, 8, 8)
    drop = drops(rows, 0, label_drop, **key)
    sigma = torch.exp(-1.0 + 1.4 * normal(rows, 1, stream=Stream.TIMES, **key)[:, 0].double())
    total = 0.0
    for i in range(B):
        tau = torch.atan(sigma[i : i + 1] / 0.5)
        cos, sin = tau.cos(), tau.sin()
        x_tau, dx = cos * x[i : i + 1] + sin * noise[i : i + 1], cos * noise[i : i + 1] - sin * x[i : i + 1]
        seen = torch.tensor([10]) if labels is None or drop[i] else labels[i : i + 1]

        def F(x, tau, seen=seen):
            return net(x, tau * 2 / math.pi, torch.zeros_like(tau), seen)

        value, derivative = torch.func.jvp(F, (x_tau, tau), (dx, torch.ones_like(tau)))
        g = -(cos**2) * (value - dx) - r * cos * sin * (x_tau + derivative)
        g = (g / (g.norm() / g.numel() ** 0.5 + norm_constant)).detach()
        error = (F(x_tau, tau) - value.detach() - g).square().sum() / g.numel()
        total = total + error / (error.detach() + eps) ** p
    return total / B


def _gradients(model, loss):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


@pytest.mark.parametrize("derivative", ["tangent", "jvp", "finite_difference"])
@pytest.mark.parametrize(
    ("options", "progress", "r"),
    [
        ({}, 0.0, 0.0),
        ({}, 0.25, 0.5),
        ({"p": 1.0, "label_drop": 0.5}, 1.0, 1.0),
        ({"tangent_warmup": 0.0, "norm_constant": 2.0, "p": 0.5, "eps": 0.3}, 0.0, 1.0),
    ],
)
@pytest.mark.parametrize("labelled", [True, False])
def test_loss_and_gradient(derivative, options, progress, r, labelled):
    """The times are drawn in float32."""
    model = make_model(torch.float64, partial(SCM, derivative=derivative, difference_step=1e-7, **options))
    x, labels = _batch()
    labels = labels if labelled else None
    ours = model.loss(x, labels, torch.tensor(progress, dtype=torch.float64), seed=SEED, step=STEP).loss
    how = {name: value for name, value in options.items() if name != "tangent_warmup"}
    theirs = _published(model.network, x, labels, r, **how)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    ours, theirs = (_gradients(model, loss) for loss in (ours, theirs))
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_a_network_with_a_derived_difference_forward():
    torch.manual_seed(0)
    model = SCM(UNet(channels=1).double())
    x, labels = _batch()
    ours, theirs = model.loss(x, labels, 1.0, seed=SEED, step=STEP).loss, _published(model.network, x, labels, 1.0)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    ours, theirs = (_gradients(model, loss) for loss in (ours, theirs))
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_the_tangent_is_that_of_the_data_that_a_sample_stands_for():
    """cos τ df/dτ, the derivative of f as a whole; before the warm-up the error of a velocity."""
    model = make_model(torch.float64, SCM)
    x, labels = _batch()
    t = torch.linspace(0.01, 0.99, B, dtype=torch.float64)
    dx, zero = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype), torch.zeros_like(t)
    with torch.no_grad():
        F, dF = model.with_derivative(x, t, zero, labels, dx, slice(None))
        g = model.tangent(x, t, dx, F, dF, 1.0)
        velocity = model.tangent(x, t, dx, F, dF, 0.0)
    _, df = torch.func.jvp(lambda x, t: model.solution(x, t, zero, labels), (x, t), (dx, torch.ones_like(t)))
    cos = (t * math.pi / 2).cos().view(-1, 1, 1, 1)
    torch.testing.assert_close(g, cos * df * 2 / math.pi, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(velocity, cos.square() * (dx * 2 / math.pi - F), rtol=1e-9, atol=1e-12)


def test_the_warm_up():
    net = DiT(8, 2, 1, 32, 1, 2, num_classes=10, impl="torch")
    model = SCM(net, tangent_warmup=0.4)
    assert [model.warmup(k).item() for k in (0.0, 0.1, 0.4, 1.0)] == pytest.approx([0.0, 0.25, 1.0, 1.0])
    assert model.warmup(torch.tensor(0.2, dtype=torch.float64)) == torch.tensor(0.5, dtype=torch.float64)
    assert [SCM(net, tangent_warmup=0.0).warmup(k).item() for k in (0.0, 1.0)] == [1.0, 1.0]


@pytest.mark.parametrize("size", [8, 16])
def test_the_normalisation_is_by_the_root_mean_square(size):
    """Of every row its own; rows of no error stay without."""
    net = DiT(size, 4, 1, 16, 1, 2, num_classes=10, impl="torch")
    F = torch.zeros(3, 1, size, size, dtype=torch.float64, requires_grad=True)
    scales = torch.tensor([0.0, 0.1, 1e6], dtype=torch.float64)
    g = scales.view(-1, 1, 1, 1) * torch.ones_like(F)
    part = SCM(net)._reduce(F, g, scales)
    expected = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(part.mse, scales.square())
    torch.testing.assert_close((part.weight * part.mse).sqrt(), expected, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(part.loss, F)
    expected = -2 / F.numel() * expected.view(-1, 1, 1, 1).expand_as(F)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0)


def test_times():
    net = DiT(8, 2, 1, 32, 1, 2, num_classes=10, impl="torch")
    t = SCM(net).draw_times(torch.arange(20000), SEED, STEP)
    assert ((t > 0) & (t < 1)).all()
    log = torch.tan(t.double() * math.pi / 2).log()
    assert log.mean().item() == pytest.approx(-1.0 + math.log(2), abs=0.05)
    assert log.std().item() == pytest.approx(1.4, rel=0.03)
    other = SCM(net, time_mean=-1.0 + math.log(2), sigma_data=1.0).draw_times(torch.arange(20000), SEED, STEP)
    torch.testing.assert_close(other, t)


def test_boundary_and_samples():
    model = make_model(torch.float64, SCM)
    x, labels = _batch()
    one, zero = torch.ones(B, dtype=torch.float64), torch.zeros(B, dtype=torch.float64)
    assert torch.equal(model.solution(x, zero, zero, labels), x)
    clean = -model.network(x, one, zero, labels)
    torch.testing.assert_close(model.sample(x, labels), clean, rtol=0, atol=1e-14)
    fresh = normal(torch.arange(B), 64, seed=3, step=1, stream=Stream.RENOISE).view(x.shape).double()
    again = 0.5**0.5 * (clean + fresh)
    expected = 0.5**0.5 * (again - model.network(again, one / 2, zero, labels))
    torch.testing.assert_close(model.sample(x, labels, steps=2, seed=3), expected, rtol=0, atol=1e-12)


def test_a_further_term_sees_the_data_that_samples_stand_for():
    def terms(self, batch):
        seen.append(batch)
        a, b = (torch.cos(batch.t * math.pi / 2), torch.sin(batch.t * math.pi / 2))
        predicted = a.view(-1, 1, 1, 1) * batch.x_t - b.view(-1, 1, 1, 1) * batch.F
        return {"far": (predicted - batch.x0).square().mean()}

    seen = []
    model = make_model(torch.float64, type("Further", (SCM,), {"further_terms": terms}))
    x, labels = _batch()
    total = model.loss(x, labels, 0.5, seed=SEED, step=STEP)
    torch.testing.assert_close(seen[0].x0, x)
    assert (seen[0].s == 0).all()
    assert seen[0].n_velocity == 0
    clean = model.solution(seen[0].x_t, seen[0].t, seen[0].s, seen[0].labels)
    torch.testing.assert_close(total.parts["far"], (clean - x).square().mean())


@pytest.mark.parametrize("derivative", ["tangent", "finite_difference"])
def test_bfloat16_keeps_the_tangent(derivative):
    """Where two bfloat16 outputs differ by less than their rounding."""
    x, labels = _batch()
    exact = make_model(torch.float64, SCM)
    exact = _gradients(exact, exact.loss(x, labels, 1.0, seed=SEED, step=STEP).loss)
    model = make_model(
        torch.float32, partial(SCM, derivative=derivative), compute_dtype=torch.bfloat16, residual_dtype=torch.float32
    )
    loss = model.loss(x.float(), labels, 1.0, seed=SEED, step=STEP).loss
    error = ((_gradients(model, loss) - exact).norm() / exact.norm()).item()
    assert error < 0.03 if derivative == "tangent" else error > 0.1


def test_accumulation_and_compilation_change_nothing():
    plain, model = train(torch.float32, steps=4, objective=SCM)
    micro, other = train(torch.float32, steps=4, objective=SCM, accumulation=4)
    assert micro == pytest.approx(plain, rel=1e-5)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    double, _ = train(torch.float64, steps=4, objective=SCM)
    compiled, _ = train(torch.float64, steps=4, objective=SCM, compile="aot_eager")
    assert compiled == pytest.approx(double, rel=1e-12)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1  # during the warm-up and after it
    assert not counters["graph_break"]


def test_rows_draw_the_same_in_any_part_of_a_batch():
    step, _ = make_step(make_model(torch.float64, SCM))
    x, labels = training_batch(0, torch.float64)
    whole = step.evaluate(x, labels, seed=5).parts["consistency"]
    parts = [step.evaluate(x[a:b], labels[a:b], seed=5, first_row=a).parts["consistency"] for a, b in ((0, 6), (6, 16))]
    for name in ("mse", "weight", "t"):
        torch.testing.assert_close(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """In the middle of the warm-up, bit by bit."""
    config = tiny_config(tmp_path / "whole", objective="scm", scm=SCMConfig(tangent_warmup=0.8))
    config = replace(config, optimizer=replace(config.optimizer, accumulation=2))
    Trainer(config).fit()
    config = replace(config, run_dir=str(tmp_path / "parts"))
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(StopError):
            Trainer(config).fit()
    Trainer(config).fit()
    assert_bitwise_equal(final(tmp_path / "parts"), final(tmp_path / "whole"))


def test_bad_settings(tmp_path):
    net = DiT(8, 2, 1, 32, 1, 2, num_classes=10, impl="torch")
    for options, message in (
        ({"tangent_warmup": 1.5}, r"tangent_warmup=1.5 is outside \[0, 1\]"),
        ({"norm_constant": 0.0}, "norm_constant=0.0 must be a number greater than 0"),
        ({"norm_constant": math.nan}, "norm_constant=nan must be a number greater than 0"),
        ({"sigma_data": -0.5}, "sigma_data=-0.5 must be a number greater than 0"),
        ({"label_drop": -0.1}, "label_drop=-0.1 is outside"),
        ({"p": -1.0}, "p=-1.0 is outside"),
        ({"time_std": math.nan}, "time_std=nan is outside"),
        ({"derivative": "difference"}, "derivative='difference' is not known; choose one of tangent, jvp"),
    ):
        with pytest.raises(ValueError, match=message):
            SCM(net, **options)
    x, labels = _batch(torch.float32)
    with pytest.raises(ValueError, match="n_velocity=4, and SCM has no rows that train the velocity; give 0"):
        SCM(net).loss_of_rows(x, labels, torch.arange(B), 4, 0.5, 0, 0)
    without = DiT(8, 2, 1, 32, 1, 2, num_classes=10, class_dropout_prob=0, impl="torch")
    with pytest.raises(ValueError, match="has no row for 'no label'"):
        SCM(without)
    assert SCM(without, label_drop=0.0).loss(x, labels, 0.5, step=0).loss.isfinite()
    config = tiny_config(tmp_path, objective="scm")
    config.scm.norm_constant = -1.0
    with pytest.raises(ValueError, match=r"norm_constant=-1\.0 must be a number greater than 0, such as"):
        Trainer(config)


@pytest.mark.slow
def test_four_hundred_quarter_batches_learn_the_digits(tmp_path):
    """With a larger learning rate than the demo's: its gradients are of one length at any error."""
    config = replace(demo.demo_config(str(tmp_path), device="cpu"), total_steps=400, batch_size=64, objective="scm")
    config = replace(config, scm=SCMConfig(tangent_warmup=1.0))
    config.optimizer.learning_rate = 3e-3
    scores = scores_of_digits(config)
    assert scores["frechet_all"] < 3.2
    assert scores["recognised"] > 0.5  # 0.1 by chance
