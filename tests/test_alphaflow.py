"""α-Flow against its definition, row by row in float64, and over its whole curriculum."""

from functools import partial

import pytest
import torch
from fast_step_runs import make_model, train
from runs import tiny_config
from soflow_formulas import drops

from soflow_fast import DiT
from soflow_fast.kernels.reference import Stream, normal
from soflow_fast.objectives.alphaflow import AlphaFlow
from soflow_fast.trainer import Trainer

B, SEED, STEP = 8, 5, 8
# Of the training, where α is 1, on its way, just above its clamp, and 0.
PROGRESS = (0.0, 0.45, 0.7, 1.0)


def _batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, 1, 8, 8, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(10, (B,), generator=generator)


def _published(net, x, labels, alpha, guidance=(1.0, 0.5, (0.0, 1.0)), clip=None, eps=0.001):
    """The loss row by row: two forwards where 0 < α < 1, torch.func.jvp where α = 0."""
    (omega, kappa, interval), key, rows = guidance, {"seed": SEED, "step": STEP}, torch.arange(B)
    noise = normal(rows, 64, stream=Stream.NOISE, **key).double().view(B, 1, 8, 8)
    drop = drops(rows, 0.25, 0.1, **key)
    times = torch.sigmoid(-0.4 + normal(rows, 2, stream=Stream.TIMES, **key))
    total = 0.0
    for i in range(B):
        t = r = times[i, 0].double().view(1)
        if i % 4:  # but a quarter of the rows, evenly spread
            t, r = (end.double().view(1) for end in (times[i].max(), times[i].min()))
        z, v = (1 - t) * x[i : i + 1] + t * noise[i : i + 1], noise[i : i + 1] - x[i : i + 1]
        null = torch.tensor([10])
        seen = None if labels is None else null if drop[i] else labels[i : i + 1]
        with torch.no_grad():
            if labels is not None and not drop[i] and interval[0] <= t <= interval[1]:
                v = omega * v + kappa * net(z, t, t, seen) + (1 - omega - kappa) * net(z, t, t, null)
            weight, target = 1.0, v
            if i % 4 and alpha == 0:
                one = torch.ones_like(t)
                _, derivative = torch.func.jvp(lambda z, t, r=r, seen=seen: net(z, t, r, seen), (z, t), (v, one))
                target = v - (t - r) * derivative
            elif i % 4:
                h = alpha * (t - r)
                weight, target = alpha, alpha * v + (1 - alpha) * net(z - h * v, t - h, r, seen)
                target = target if clip is None else target.clamp(-clip, clip)
        mse = (net(z, t, r, seen) - target).square().mean()
        total = total + weight * mse / (mse.detach() + eps)
    return total / B


def _gradients(model, loss):
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)  # without labels, those of the label table
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, gradients)])  # noqa: B905


@pytest.mark.parametrize("derivative", ["difference", "finite_difference"])
@pytest.mark.parametrize("progress", PROGRESS)
@pytest.mark.parametrize(
    ("guidance", "labelled", "clip"),
    [
        ((1.0, 0.5, (0.0, 1.0)), True, None),
        ((0.2, 0.92, (0.0, 0.6)), True, 0.5),
        ((1.0, 0.0, (0.0, 1.0)), True, None),
        ((1.0, 0.5, (0.0, 1.0)), False, None),
    ],
)
def test_loss_and_gradient(derivative, progress, guidance, labelled, clip):
    scale, mix, interval = guidance
    options = {"guidance_scale": scale, "guidance_mix": mix, "guidance_interval": interval, "target_clip": clip}
    options |= {"derivative": derivative, "difference_step": 1e-6}
    model = make_model(torch.float64, partial(AlphaFlow, **options))
    x, labels = _batch()
    labels = labels if labelled else None
    alpha = model.alpha(torch.tensor(progress, dtype=torch.float64)).item()
    ours = model.loss(x, labels, torch.tensor(progress, dtype=torch.float64), seed=SEED, step=STEP).loss
    theirs = _published(model.network, x, labels, alpha, guidance, clip)
    tolerance = 1e-9 if alpha else 1e-5  # of the step instead of the derivative
    assert ours.item() == pytest.approx(theirs.item(), rel=tolerance)
    ours, theirs = _gradients(model, ours), _gradients(model, theirs)
    assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_the_curriculum():
    net = DiT(8, 2, 1, 32, 1, 2, num_classes=10, impl="torch")
    whole = AlphaFlow(net)
    assert [whole.alpha(k).item() for k in (0.0, 0.25, 0.75, 1.0)] == [1.0, 1.0, 0.0, 0.0]
    assert whole.alpha(0.3).item() == pytest.approx(0.9933, abs=1e-4)
    alphas = torch.stack([whole.alpha(k / 100) for k in range(101)])
    assert (alphas.diff() <= 0).all()
    assert not ((alphas > 0) & (alphas < 0.005)).any()
    late = AlphaFlow(net, alpha_interval=(0.5, 0.8), alpha_clamp=0.0)
    assert [late.alpha(k).item() for k in (0.0, 0.49, 0.81, 1.0)] == [1.0, 1.0, 0.0, 0.0]
    assert late.alpha(0.65).item() == pytest.approx(0.5, abs=1e-6)
    for steepness, clamp, expected in ((10.0, 0.005, 0.9241), (10.0, 0.1, 1.0), (25.0, 0.0, 0.9981)):
        shaped = AlphaFlow(net, alpha_steepness=steepness, alpha_clamp=clamp)
        assert shaped.alpha(0.25).item() == pytest.approx(expected, abs=1e-4)
        assert shaped.alpha(0.75).item() == pytest.approx(1 - expected, abs=1e-4)
    progress = torch.tensor(0.65, dtype=torch.float64)
    assert late.alpha(progress).dtype == torch.float64


class _Overflowing(AlphaFlow):
    def _with_change(self, *arguments):
        u, change = super()._with_change(*arguments)
        return u, change / 0


def test_flow_matching_needs_no_finite_change():
    model = make_model(torch.float64, _Overflowing)
    parts = model.loss(*_batch(), 0.0, seed=SEED, step=STEP).parts
    assert all(part.loss.isfinite() for part in parts.values())
    assert not model.loss(*_batch(), 0.5, seed=SEED, step=STEP).parts["average"].loss.isfinite()


@pytest.mark.parametrize(("progress", "lost"), [(0.7, 0.05), (1.0, 0.2)])
def test_bfloat16_keeps_the_error_where_two_forwards_lose_it(progress, lost):
    """α near its end: two bfloat16 outputs differ by less than their rounding."""
    x, labels = _batch()
    exact = make_model(torch.float64, partial(AlphaFlow, velocity_share=0))
    exact = _gradients(exact, exact.loss(x, labels, progress, seed=SEED, step=STEP).loss)
    errors = {}
    for derivative in AlphaFlow.derivatives:
        low = {"compute_dtype": torch.bfloat16, "residual_dtype": torch.float32}
        objective = partial(AlphaFlow, velocity_share=0, derivative=derivative)
        model = make_model(torch.float32, objective, **low)
        loss = model.loss(x.float(), labels, progress, seed=SEED, step=STEP).loss
        errors[derivative] = ((_gradients(model, loss) - exact).norm() / exact.norm()).item()
    assert errors["difference"] < 0.02 < lost < errors["finite_difference"]


def _sharpened(dtype, derivative):
    """A network of which each query attends to one key, and to another where the step is a large part of the time."""
    model = make_model(torch.float32, partial(AlphaFlow, velocity_share=0, derivative=derivative))
    for block in model.network.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight[:64], std=1.0, generator=torch.Generator().manual_seed(0))
        block.adaLN_modulation[1].weight.data.mul_(20)
    return model.to(dtype)


@pytest.mark.parametrize("progress", [0.3, 0.45, 0.55])
def test_full_steps_of_peaked_attention(progress):
    """The error of each row is that of two forwards in float64."""
    x, labels = _batch()
    model, exact = _sharpened(torch.float32, "difference"), _sharpened(torch.float64, "finite_difference")
    ours = model.loss(x.float(), labels, progress, seed=SEED, step=STEP).parts["average"].mse
    theirs = exact.loss(x, labels, progress, seed=SEED, step=STEP).parts["average"].mse
    assert ours.double() == pytest.approx(theirs, rel=1e-3)


def test_one_graph_serves_the_whole_curriculum():
    plain, _ = train(torch.float64, objective=AlphaFlow)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled, _ = train(torch.float64, objective=AlphaFlow, compile="aot_eager")
    assert compiled == pytest.approx(plain, rel=1e-12)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_bad_settings(tmp_path):
    net = DiT(8, 2, 1, 32, 1, 2, num_classes=10, impl="torch")
    for options, message in (
        ({"alpha_interval": (0.5, 0.5)}, r"alpha_interval=\(0.5, 0.5\) is not an interval of the training's progress"),
        ({"alpha_clamp": 0.6}, r"alpha_clamp=0.6 is outside \[0, 0.5\]"),
        ({"alpha_steepness": -1.0}, "alpha_steepness=-1.0 is outside"),
        ({"target_clip": 0.0}, "target_clip=0.0 must be greater than 0, or None"),
        ({"derivative": "tangent"}, "derivative='tangent' is not known; choose one of difference, finite_difference"),
        ({"label_drop": 0.0}, "label_drop=0 never trains"),
    ):
        with pytest.raises(ValueError, match=message):
            AlphaFlow(net, **options)
    config = tiny_config(tmp_path, objective="alphaflow")
    config.alphaflow.derivative = "jvp"
    with pytest.raises(ValueError, match="derivative='jvp' is not known"):
        Trainer(config)
