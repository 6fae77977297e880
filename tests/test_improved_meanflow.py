"""Improved MeanFlow against its definition, row by row in float64, and its guidance chosen after the training."""

import json
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from fast_step_runs import make_model, make_step, train
from runs import tiny_config
from soflow_formulas import drops
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from soflow_fast import DiT, capture, cli
from soflow_fast.kernels import reference
from soflow_fast.kernels.reference import Stream, normal, uniform
from soflow_fast.objectives.improved_meanflow import ImprovedMeanFlow
from soflow_fast.precision import ComputeCopy
from soflow_fast.sample import Sampler
from soflow_fast.trainer import Trainer, load_run

B, SEED, STEP = 16, 5, 7


def _model(dtype=torch.float64, **options):
    model = make_model(dtype, partial(ImprovedMeanFlow, **options), condition_dim=3)
    with torch.no_grad():  # of the usual size what the network is told would hardly matter
        for p in model.network.condition_embedder.parameters():
            p.mul_(5)
    return model


def _batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, 1, 8, 8, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(10, (B,), generator=generator)


def _published(net, x, labels, guidance_max, power, eps):
    """The loss row by row, every row in network calls of its own, the derivative by torch.func.jvp."""
    key, rows = {"seed": SEED, "step": STEP}, torch.arange(B)
    noise = normal(rows, 64, stream=Stream.NOISE, **key).double().view(B, 1, 8, 8)
    drop = drops(rows, 0.5, 0.1, **key)
    times = torch.sigmoid(-0.4 + normal(rows, 2, stream=Stream.TIMES, **key))
    draws = uniform(rows, 3, stream=Stream.GUIDANCE, **key).double()
    total, seen_plain, seen_guided = 0.0, 0, 0
    for i in range(B):
        average = i % 2 == 1  # half of the rows, evenly spread
        t = times[i].max().double().view(1)
        r = times[i].min().double().view(1) if average else t
        z, v_t = (1 - t) * x[i : i + 1] + t * noise[i : i + 1], noise[i : i + 1] - x[i : i + 1]
        if power == 1:
            w = torch.exp(draws[i, 0] * torch.log(torch.tensor(guidance_max)))
        else:
            w = (1 + draws[i, 0] * (guidance_max ** (1 - power) - 1)) ** (1 / (1 - power))
        start, end = (0.5 * draws[i, 1], 0.5 + 0.5 * draws[i, 2]) if average else (0.0, 1.0)

        def told(label, w, start, end):
            return torch.tensor([[float(label), 1 - 1 / w, start, end]], dtype=torch.float32)

        inside = start <= t <= end
        seen_plain, seen_guided = seen_plain + (not inside and average), seen_guided + inside
        w_now = w if inside else 1.0
        with torch.no_grad():
            v_c = net(z, t, t, told(labels[i], w_now, 0, 1))
            v_u = net(z, t, t, told(10, 1.0, 0, 1))
        v_g = v_t if drop[i] else v_t + (1 - 1 / w_now) * (v_c - v_u)
        direction = v_u if drop[i] else v_c
        seen = told(10 if drop[i] else labels[i], w, start, end)

        def u(z, t, r=r, seen=seen):
            return net(z, t, r, seen)

        _, derivative = torch.func.jvp(u, (z, t), (direction, torch.ones_like(t)))
        error = (u(z, t) + ((t - r) * derivative).detach() - v_g).square().sum()
        total = total + error / (error.detach() + eps)
    assert min(seen_plain, seen_guided, drop.sum()) > 0  # the batch has rows of every kind
    return total / B


@pytest.mark.parametrize("derivative", ["tangent", "jvp", "finite_difference"])
@pytest.mark.parametrize(("guidance_max", "power"), [(8.0, 1.0), (4.0, 0.0), (8.0, 2.5)])
def test_loss_and_gradient(derivative, guidance_max, power):
    eps = 10.0  # far below the squared errors the loss would hardly depend on them
    options = {"derivative": derivative, "difference_step": 1e-6, "sample_scale": 2.0, "eps": eps}
    model = _model(guidance_max=guidance_max, guidance_power=power, **options)
    x, labels = _batch()
    ours = model.loss(x, labels, 0.0, seed=SEED, step=STEP).loss
    theirs = _published(model.network, x, labels, guidance_max, power, eps)
    tolerance = 1e-5 if derivative == "finite_difference" else 1e-6  # the guidance is told in float32
    assert ours.item() == pytest.approx(theirs.item(), rel=tolerance)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(loss, parameters) for loss in (ours, theirs)]
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= 10 * tolerance * (1e-3 + b.norm())


def test_draws_of_the_guidance():
    model = _model(guidance_max=8.0, guidance_power=2.0)
    mix, start, end = model.draw_guidance(torch.arange(20_000), 5000, SEED, STEP).unbind(1)
    assert (start[:5000] == 0).all()
    assert (end[:5000] == 1).all()
    assert start[5000:].max() == pytest.approx(0.5, abs=1e-3)
    assert end[5000:].min() == pytest.approx(0.5, abs=1e-3)
    w = 1 / (1 - mix)
    assert w.min() == pytest.approx(1, abs=1e-3)
    assert w.max() == pytest.approx(8, abs=1e-2)
    share = (w < 2).float().mean().item()  # of the density w^-2 on [1, 8]
    assert share == pytest.approx((1 - 1 / 2) / (1 - 1 / 8), abs=0.01)


def test_draws_of_powers_near_one_and_at_the_end(monkeypatch):
    u = _model().draw_guidance(torch.arange(2000), 0, SEED, STEP)
    for power in (0.999999, 1.000001, 1 + 1e-12):
        near = _model(guidance_power=power).draw_guidance(torch.arange(2000), 0, SEED, STEP)
        assert torch.allclose(near, u, atol=2e-6)
    monkeypatch.setattr(reference, "uniform", lambda rows, n, **key: torch.ones(len(rows), n))
    for power in (0.0, 1.0, 10.0):
        mix = _model(guidance_power=power).draw_guidance(torch.arange(2), 0, SEED, STEP)[:, 0]
        assert mix.tolist() == pytest.approx([1 - 1 / 8] * 2, abs=1e-6)


def test_samples_take_the_guidance_that_is_asked_for():
    model = _model(torch.float32)
    noise, labels = torch.randn(B, 1, 8, 8), torch.arange(B) % 10
    weak, strong = (model.sample(noise, model.conditioned(labels, scale, (0.2, 0.9))) for scale in (1.0, 8.0))
    assert not torch.equal(weak, strong)
    assert torch.equal(model.sample(noise, labels), model.sample(noise, model.conditioned(labels, 7.5, (0.4, 0.65))))
    model.set_sample_guidance(8.0, (0.2, 0.9))
    assert torch.equal(model.sample(noise, labels), strong)
    each = torch.where(torch.arange(B) < 8, 1.0, 8.0)
    mixed = model.sample(noise, model.conditioned(labels, each))
    assert torch.allclose(mixed, torch.cat([weak[:8], strong[8:]]), atol=1e-6)
    asked = model.conditioned(labels, 4.0, (0.0, 0.9))
    ends = torch.zeros(B), torch.tensor(0.9)
    assert torch.equal(model.conditioned(labels, torch.tensor(4.0), ends), asked)
    null = model.sample(noise, torch.full_like(labels, 10))
    assert torch.equal(model.sample(noise), null)


def test_a_guidance_that_was_not_trained_is_refused():
    model, labels = _model(), torch.arange(4)
    trained = r"scale=9.0 is outside \[1, 8.0\], the scales that guidance_max=8.0 trains; choose one of them, or train"
    with pytest.raises(ValueError, match=f"^{trained}"):
        model.conditioned(labels, 9.0)
    with pytest.raises(ValueError, match=f"^sample_{trained}"):
        model.set_sample_guidance(9.0)
    for interval in ((), (0.6, 0.9), (0.1, 0.4), (0.1, 0.6, 0.7), (float("nan"), 0.6)):
        with pytest.raises(ValueError, match=r"^interval=.* was not trained; choose a start in"):
            model.conditioned(labels, interval=interval)
        with pytest.raises(ValueError, match=r"^sample_interval=.* was not trained; choose a start in"):
            model.set_sample_guidance(2.0, interval)
    assert (model.sample_scale, model.sample_interval) == (7.5, (0.4, 0.65))


def test_a_compiled_sampler_takes_every_guidance(monkeypatch):
    monkeypatch.setitem(capture._OPTIONS, True, {"backend": "aot_eager"})
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model, labels = _model(torch.float32), torch.arange(4)
    plain, compiled = (Sampler(model, (1, 8, 8), batch=4, compile=how) for how in (False, True))
    seen = []
    for k in range(12):
        model.set_sample_guidance(1 + k / 2, (k / 24, 1 - k / 24))
        seen.append(plain(labels))
        assert torch.allclose(compiled(labels), seen[-1], atol=1e-6)
    assert min((a - b).abs().max() for a, b in pairwise(seen)) > 1e-4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_a_cuda_graph_takes_every_guidance():
    model, labels = _model(torch.float32).cuda(), torch.arange(4, device="cuda")
    plain, graph = (Sampler(model, (1, 8, 8), batch=4, precision="fp32", compile=how) for how in (False, True))
    assert graph.cuda_graph
    for scale in (1.0, 4.0, 8.0):
        model.set_sample_guidance(scale, (0.0, 1.0))
        torch.testing.assert_close(graph(labels), plain(labels), rtol=0, atol=1e-5)


def test_the_guidance_of_samples_goes_where_the_model_goes():
    model, labels = _model(torch.float32), torch.arange(4)
    model.set_sample_guidance(3.0, (0.1, 0.9))
    assert all(name.startswith("network.") for name in model.state_dict())
    copied = deepcopy(model)
    model.set_sample_guidance(2.0)
    assert torch.equal(copied.conditioned(labels), model.conditioned(labels, 3.0, (0.1, 0.9)))
    assert copied.to("meta").conditioned(labels.to("meta")).is_meta
    noise = torch.randn(4, 1, 8, 8)
    low = {name: copy.float() for name, copy in ComputeCopy(model).copies.items()}
    swapped = functional_call(_Solution(model), {f"model.{name}": p for name, p in low.items()}, (noise, labels))
    model.load_state_dict(low)
    assert torch.equal(swapped, _Solution(model)(noise, labels))


class _Solution(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, noise, labels):
        return self.model.solution(noise, torch.ones(len(noise)), torch.zeros(len(noise)), labels)


def test_compiles_as_one_graph():
    options = {"objective": ImprovedMeanFlow, "network": {"condition_dim": 3}, "steps": 3}
    plain, _ = train(torch.float64, **options)
    compiled, _ = train(torch.float64, **options, compile="aot_eager")
    assert compiled == pytest.approx(plain, rel=1e-12)


def _run(folder, **changes):
    config = tiny_config(folder, objective="improved_meanflow", total_steps=2, **changes)
    Trainer(replace(config, output=replace(config.output, sample_every=2))).fit()
    return config


def test_a_run_is_sampled_and_scored_with_guidance_of_any_scale(tmp_path, capsys):
    config = _run(tmp_path)
    assert (tmp_path / "samples" / "step-00000002.png").is_file()
    arguments = ["sample", str(tmp_path), "--count", "8", "--device", "cpu"]
    assert cli.main(arguments) == 0
    assert cli.main([*arguments, "--guidance-scale", "2.5", "--guidance-interval", "0.1,0.9"]) == 0
    name = "step-00000002-1-step-8-samples-guidance-2_5-interval-0_1-0_9.png"
    assert (tmp_path / "samples" / name).is_file()
    score = ["eval", str(tmp_path), "--count", "20", "--device", "cpu", "--guidance-scale", "3"]
    assert cli.main(score) == 0
    written = json.loads((tmp_path / "evaluation" / "step-00000002-1-step-20-samples-guidance-3_0.json").read_text())
    assert (written["guidance_scale"], written["guidance_interval"]) == (3.0, [0.4, 0.65])
    assert cli.main([*score[:-2], "--guidance-interval", "0.10, 0.9"]) == 0
    written = json.loads(
        (tmp_path / "evaluation" / "step-00000002-1-step-20-samples-interval-0_1-0_9.json").read_text()
    )
    assert (written["guidance_scale"], written["guidance_interval"]) == (7.5, [0.1, 0.9])
    capsys.readouterr()
    for wrong, message in (
        (["--guidance-scale", "9"], "soflow: --guidance-scale 9.0 is outside [1, 8.0], the scales that guidance_max"),
        (["--guidance-interval", "0.6,0.9"], "soflow: --guidance-interval (0.6, 0.9) was not trained"),
    ):
        assert cli.main([*arguments, *wrong]) == 2
        assert message in capsys.readouterr().err
    for wrong in ("early", "0.3", "0.3,0.5,0.8"):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*arguments, "--guidance-interval", wrong])
        assert stopped.value.code == 2
        assert f"--guidance-interval: '{wrong}' is not two times, such as 0.3,0.8" in capsys.readouterr().err
    model = load_run(tmp_path, "cpu")[1]
    assert model.sample_scale == config.improved_meanflow.sample_scale


def test_the_guidance_of_samples_may_change_during_a_run(tmp_path):
    config = _run(tmp_path)
    section = replace(config.improved_meanflow, sample_scale=2.0, sample_interval=(0.0, 1.0))
    Trainer(replace(config, improved_meanflow=section, total_steps=2)).fit()


def test_other_runs_have_their_guidance_in_their_weights(tmp_path, capsys):
    Trainer(tiny_config(tmp_path, total_steps=1)).fit()
    assert cli.main(["sample", str(tmp_path), "--count", "4", "--device", "cpu", "--guidance-scale", "2"]) == 2
    assert "--guidance-scale is for runs of improved_meanflow" in capsys.readouterr().err
    assert cli.main(["eval", str(tmp_path), "--count", "20", "--device", "cpu"]) == 0
    written = json.loads((tmp_path / "evaluation" / "step-00000001-1-step-20-samples.json").read_text())
    assert not any(name.startswith("guidance") for name in written)


class _Given(torch.nn.Module):
    """A network of one's own that is told the guidance."""

    num_classes, condition_dim = 10, 3

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Linear(2 + 11 + 3, 16)
        self.first, self.last = torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x, t, s, labels):
        classes = torch.nn.functional.one_hot(labels[:, 0].long(), 11)
        c = self.embed(torch.cat([torch.stack([t, s], 1), classes.to(x), labels[:, 1:].to(x)], 1))
        return self.last(torch.nn.functional.silu(self.first(x) + c[:, :, None, None]))


def test_a_given_network_is_told_the_guidance(tmp_path):
    torch.manual_seed(0)
    config = tiny_config(tmp_path, objective="improved_meanflow", total_steps=2)
    Trainer(config, model=_Given()).fit()
    _, model, step = load_run(tmp_path, "cpu", model=_Given())
    assert step == 2
    noise, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    assert not torch.equal(*(model.sample(noise, model.conditioned(labels, scale)) for scale in (1.0, 8.0)))


def test_without_classes_nothing_is_begun(tmp_path):
    config = tiny_config(tmp_path / "run", objective="improved_meanflow")
    config.model.num_classes = 0
    for model in (None, _Given(), ImprovedMeanFlow(_Given())):
        with pytest.raises(ValueError, match=r"model.num_classes=0 .* set model.num_classes to the number of classes"):
            Trainer(config, model=model)
    assert not (tmp_path / "run").exists()


def test_a_compiled_step_says_what_labels_it_needs():
    step, _ = make_step(_model(torch.float32), compile="aot_eager")
    for labels, form in ((None, "no labels"), (torch.zeros(B, 4), r"labels of shape \(16, 4\)")):
        with pytest.raises(ValueError, match=rf"trains with labels \(B,\), and there are {form}"):
            step(torch.zeros(B, 1, 8, 8), labels)


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.called.append(operator)
        return operator(*args, **(kwargs or {}))


def test_preparing_launches_nothing():
    """A CUDA graph would replay it with every step."""
    model, (x, labels) = _model(), _batch()
    with _Operators() as operators:
        model.prepare(x, labels)
    assert operators.called == [torch.ops.aten.new_empty.default]


def test_bad_settings(tmp_path, capsys):
    net = DiT(8, 2, 1, 32, 1, 2, num_classes=10, condition_dim=3, impl="torch")
    for options, message in (
        ({"guidance_max": 1.0}, r"guidance_max=1.0 is outside \(1, 10000\]; choose one above 1"),
        ({"guidance_max": 1e20}, r"guidance_max=1e\+20 is outside \(1, 10000\]"),
        ({"guidance_max": 4.0}, r"sample_scale=7.5 is outside \[1, 4.0\], the scales that guidance_max=4.0 trains"),
        ({"guidance_power": -1.0}, "guidance_power=-1.0 is outside"),
        ({"sample_scale": 9.0}, r"sample_scale=9.0 is outside \[1, 8.0\]"),
        ({"sample_interval": (0.6, 0.9)}, r"sample_interval=\(0.6, 0.9\) was not trained"),
        ({"label_drop": 0.0}, "label_drop=0 never trains"),
    ):
        with pytest.raises(ValueError, match=message):
            ImprovedMeanFlow(net, **options)
    with pytest.raises(ValueError, match=r"this DiT has num_classes=0; set model.num_classes"):
        ImprovedMeanFlow(DiT(8, 2, 1, 32, 1, 2, num_classes=0, condition_dim=3, impl="torch"))
    for other in (DiT(8, 2, 1, 32, 1, 2, impl="torch"), torch.nn.Conv2d(1, 1, 1)):
        with pytest.raises(
            ValueError, match=r"choose a MiT or DiT preset, or give .* condition_dim = 3 .* labels \(B, 4\)"
        ):
            ImprovedMeanFlow(other)
    with pytest.raises(ValueError, match=r"trains with labels \(B,\), and there are no labels"):
        ImprovedMeanFlow(net).loss(torch.zeros(4, 1, 8, 8), None, 0.0, step=0)
    with pytest.raises(ValueError, match=r"labels of shape \(4, 3\) do not fit a DiT with condition_dim=3"):
        net(torch.zeros(4, 1, 8, 8), torch.ones(4), torch.zeros(4), torch.zeros(4, 3))
    plain = DiT(8, 2, 1, 32, 1, 2, num_classes=10, impl="torch")
    with pytest.raises(ValueError, match=r"condition_dim=0; give \(B,\) or \(B, 1\)"):
        plain(torch.zeros(4, 1, 8, 8), torch.ones(4), torch.zeros(4), torch.zeros(4, 4))
