"""Objectives of the user's own: by import path, on record, with modules beside the network, and where they override."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from _baselines import SixCalls
from own_objectives import Aligned, Distilled, Given, Pulled, small_dit
from runs import Blobs, assert_bitwise_equal, final, refused, tiny_config, write_config
from safetensors.torch import load_file
from torch import nn

from soflow_fast import DiT, SoFlow, Trainer, TrainStep, load_run, load_weights
from soflow_fast.cli import main
from soflow_fast.config import ComputeConfig, OptimizerConfig, TrainConfig
from soflow_fast.kernels.reference import Stream, noisy_sample, normal
from soflow_fast.objectives.alphaflow import AlphaFlow
from soflow_fast.objectives.base import TotalLoss
from soflow_fast.objectives.meanflow import MeanFlow
from soflow_fast.optim import AdamW
from soflow_fast.paths import PATHS
from soflow_fast.precision import ComputeCopy


def _config(run_dir, objective="own_objectives.Aligned", precision="fp32", **arguments):
    optimizer = OptimizerConfig(learning_rate=1e-3, accumulation=2)
    config = tiny_config(run_dir, total_steps=4, optimizer=optimizer, compute=ComputeConfig(precision=precision))
    return replace(config, objective=objective, objective_args=arguments)


def _batch(n=8):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(n) % 10


def _losses(model):
    (x, labels), rows = _batch(), torch.arange(8)
    return model.loss_of_rows(x, labels, rows, 6, 0.5, 0, 0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_term_with_a_trained_part_and_a_frozen_one(tmp_path, precision):
    """Trained from a file, resumed bitwise, sampled; the encoder is nowhere in the run."""
    config = _config(tmp_path / "run", precision=precision, weight=0.25, guidance_scale=2.0)
    run = Trainer(TrainConfig.from_yaml(write_config(tmp_path / "c.yaml", config)))
    before = copy.deepcopy(run.model.projection.weight)
    run.fit()
    assert run.model.projection.weight.dtype == torch.float32
    assert not torch.equal(run.model.projection.weight, before)
    whole = final(tmp_path / "run", 4)
    for state in (whole.model, whole.ema):
        beside = [name for name in state if not name.startswith("network.")]
        assert beside == ["projection.bias", "projection.weight"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["alignment/loss"] > 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    torch.manual_seed(3)
    Trainer(TrainConfig.from_yaml(tmp_path / "run" / "config.yaml")).fit()
    assert_bitwise_equal(final(tmp_path / "run", 4), whole)
    assert main(["sample", str(tmp_path / "run"), "--count", "4", "--precision", precision]) == 0
    found, model, _ = load_run(tmp_path / "run")
    assert (found.objective_args, model.weight, model.guidance_scale) == (config.objective_args, 0.25, 2.0)
    assert torch.equal(model.projection.bias, whole.ema["projection.bias"])


def test_the_same_network_is_drawn_as_for_another_objective(tmp_path):
    first, other = (Trainer(_config(tmp_path, name)).model for name in ("own_objectives.Aligned", "soflow"))
    assert type(first) is Aligned
    for name, p in other.network.named_parameters():
        assert torch.equal(p, first.network.get_parameter(name)), name


def test_a_dry_run_and_what_is_compared(tmp_path, capsys):
    file = write_config(tmp_path / "c.yaml", _config(tmp_path / "run", weight=0.25))
    assert main(["train", str(file), "--dry-run"]) == 0
    assert " G per image" in capsys.readouterr().out
    assert main(["train", str(file), "--total_steps", "1", "--optimizer.accumulation", "1"]) == 0
    capsys.readouterr()
    other = refused(capsys, "train", file, "--total_steps=1", "--optimizer.accumulation=1", "--objective_args.weight=5")
    assert "holds a run with objective_args={'weight': 0.25}, and this one has {'weight': 5}" in other


@pytest.mark.parametrize(
    ("objective", "arguments", "sentence"),
    [
        ("own_objectives.Misaligned", {}, "objective='own_objectives.Misaligned' cannot be imported .AttributeError"),
        ("own_objectives.network_alone", {}, "makes an object of class Function; make a soflow_fast.objectives.base."),
        ("own_objectives.Distilled", {"weigth": 1}, "unexpected keyword argument 'weigth'"),
        ("own_objectives.network_alone", {"w": 1}, "objective='own_objectives.network_alone' cannot be called with"),
        ("soflow", {"weight": 1}, "objective_args={'weight': 1} does nothing with 'soflow'"),
        ("own_objectives.Aligned", {"weight": (1, 2)}, r"objective_args={'weight': \(1, 2\)} cannot be kept on record"),
        ("aligned", {}, "objective='aligned' is not known; choose one of soflow.* or package.module.Class"),
    ],
)
def test_what_is_no_objective_is_refused(tmp_path, objective, arguments, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        Trainer(_config(tmp_path, objective, **arguments))


# ------------------------------------------------------------------------------------------------------- on record


def _trained(run_dir, model, **changes):
    return Trainer(tiny_config(run_dir, total_steps=1), model=model, dataset=Blobs(), **changes).fit()


def test_a_frozen_network_and_a_part_of_any_name(tmp_path):
    """What is beside a DiT is trained alone, in bfloat16; its term is called as the whole might be."""

    class Beside(Aligned):
        def loss_of_rows(self, *arguments, **keywords):
            total = super().loss_of_rows(*arguments, **keywords)
            return TotalLoss(total.loss, {**total.parts, "total": total.parts["alignment"]})

    model = Beside(small_dit())
    model.network.requires_grad_(False)
    before = model.projection.weight.detach().clone()
    _step(model, precision="bf16")(*_batch())
    assert not torch.equal(model.projection.weight, before)
    _trained(tmp_path, model)
    (line,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert line["total/loss"] == line["alignment/loss"]


def test_what_is_given_as_an_object_is_on_record(tmp_path):
    class Other(DiT):
        pass

    _trained(tmp_path, Aligned(small_dit()))
    record = json.loads((tmp_path / "given.json").read_text())
    assert record["network"] == {"class": "soflow_fast.dit.DiT"}
    known = {"class": "own_objectives.Aligned", "weight": 0.5, "scales": [1.0, 0.5], "guidance_scale": 3.0}
    assert known.items() <= record["objective"].items()
    assert not {"training", "impl", "network", "encoder", "needs_float32"} & record["objective"].keys()
    for model, sentence in (
        (Aligned(small_dit(), weight=5.0), "holds a run with objective scales .*, and this one has"),
        (Aligned(small_dit(), guidance_scale=9.0), "with objective guidance_scale 3.0, and this one has 9.0; make it"),
        (Distilled(small_dit()), "with objective class 'own_objectives.Aligned', and this one has 'own_objectives.Dis"),
    ):
        with pytest.raises(ValueError, match=sentence):
            _trained(tmp_path, model)
    other = Aligned(small_dit())
    other.renoises, other.impl = False, "torch"
    _trained(tmp_path, other)  # may change
    other = Other(8, 4, 1, 16, 1, 2, num_classes=10, impl="torch")
    with pytest.raises(ValueError, match=r"with network class 'soflow_fast.dit.DiT', and this one has '.*\.Other'"):
        _trained(tmp_path, Aligned(other))
    _trained(tmp_path, Aligned(small_dit(), guidance_scale=9.0), accept_changes=True)
    changes = (tmp_path / "changes.jsonl").read_text().splitlines()
    changed = {"step": 1, "key": "objective guidance_scale", "before": 3.0, "after": 9.0}
    assert [json.loads(line) for line in changes] == [changed]
    _trained(tmp_path, Aligned(small_dit(), guidance_scale=9.0))


def test_a_run_of_an_earlier_version_takes_any(tmp_path):
    _trained(tmp_path, Aligned(small_dit()))
    (tmp_path / "given.json").unlink()
    _trained(tmp_path, Aligned(small_dit(), weight=5.0))
    assert json.loads((tmp_path / "given.json").read_text())["objective"]["weight"] == 5.0


# ------------------------------------------------------------------------------------------- beside the network


def test_the_weights_of_the_network_alone(tmp_path):
    class Beside(SoFlow):
        def __init__(self, net):
            super().__init__(net)
            self.teacher = nn.Linear(2, 2).requires_grad_(False)

    _trained(tmp_path, Beside(small_dit()))
    kept = load_file(tmp_path / "checkpoints" / "step-00000001" / "ema.safetensors")
    for model, prefix in ((small_dit(), "network."), (SoFlow(small_dit()), ""), (MeanFlow(small_dit()), "")):
        load_weights(model, tmp_path)
        assert all(torch.equal(value, kept[prefix + name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"projection\.bias is missing there"):
        load_weights(Aligned(small_dit()), tmp_path)
    load_weights(Aligned(small_dit()), tmp_path, keep=["projection"])


def test_a_companion_is_no_part_of_the_model():
    model = Aligned(small_dit())
    model.train().requires_grad_(True).double()
    names = {*model.state_dict(), *dict(model.named_parameters()), *dict(model.named_modules())}
    assert not any("encoder" in name for name in names)
    assert not any(module.training for module in model.encoder.modules())
    assert {(p.requires_grad, p.dtype) for p in model.encoder.parameters()} == {(False, torch.float64)}
    other = copy.deepcopy(model)
    assert other.encoder is other._companions[0] is not model.encoder


@pytest.mark.parametrize(
    ("name", "make", "sentence"),
    [
        ("teacher", lambda model: model.network, "'teacher' has parameters of this SoFlow, and would freeze them"),
        ("network", lambda model: nn.Linear(1, 1), "this SoFlow has 'network' already; give the companion another"),
        ("teacher", lambda model: torch.relu, "the companion 'teacher' is a builtin_function_or_method; give a"),
    ],
)
def test_what_is_no_companion(name, make, sentence):
    model = SoFlow(small_dit())
    with pytest.raises(ValueError, match=sentence):
        model.add_companion(name, make(model))
    assert all(p.requires_grad for p in model.network.blocks.parameters())


def _step(model, **options):
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, impl="torch")
    return TrainStep(model, optimizer=optimizer, total_steps=4, **options)


def test_a_compiled_step_on_copies_computes_what_is_beside_them_in_float32():
    class Both(Aligned):
        further_terms = Pulled.further_terms

        def data_velocity(self, x_t, v_t, t, labels):
            return v_t + self.encoder(x_t).mean()

    torch.manual_seed(0)
    models = [Both(small_dit(), guidance_scale=1.0, velocity_share=1.0)]
    models.append(copy.deepcopy(models[0]))
    eager, whole = (
        _step(model, precision="bf16", compile=how)(*_batch())
        for model, how in zip(models, (False, "eager"), strict=True)
    )
    torch.testing.assert_close(whole.loss, eager.loss)
    assert whole.parts["alignment"].dtype == torch.float32
    assert whole.parts["pull"] > 0
    torch.testing.assert_close(whole.parts["pull"], eager.parts["pull"])
    torch.testing.assert_close(*(model.projection.weight.grad for model in models))


def test_an_optimizer_that_writes_copies_has_a_place_for_those_of_other_parameters():
    model = Aligned(small_dit())
    copies = ComputeCopy(model, model.network)
    assert all(name.startswith("network.") for name in {**copies.copies, **copies.parameters()})
    beside = list(model.projection.parameters())
    for own, place in zip(beside, copies.copies_of(beside), strict=True):
        assert (place.shape, place.dtype) == (own.shape, torch.bfloat16)


def test_a_teacher_stays_in_its_mode(tmp_path):
    class Taught(SoFlow):
        def __init__(self, net):
            super().__init__(net)
            self.teacher, self.head = nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)

    model = Taught(small_dit()).eval()
    Trainer(tiny_config(tmp_path), model=model, dataset=Blobs())
    assert [module.training for module in (model.network.blocks, model.head, model.teacher)] == [True, True, False]


# ---------------------------------------------------------------------------------------------- what is overridden


def test_distillation_in_a_run(tmp_path):
    Trainer(_config(tmp_path, "own_objectives.Distilled", guidance_scale=1.0, velocity_share=0.5)).fit()
    assert all(name.startswith("network.") for name in final(tmp_path, 4).model)
    assert load_run(tmp_path)[2] == 4


def _by_six_calls(objective):
    return type("Apart", (objective, SixCalls), {})


def test_the_velocity_that_is_regressed():
    """In the loss of a batch, with other network calls, and in each loss of its own."""
    settings = {"label_drop": 0.0, "guidance_scale": 1.0, "p": 0.0}
    model = Distilled(small_dit(), **settings)
    ours, apart = _losses(model), _losses(_by_six_calls(Distilled)(small_dit(), **settings))
    torch.testing.assert_close(ours.loss, apart.loss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.parts["velocity"].mse, torch.zeros(6), rtol=0, atol=1e-8)  # it is the teacher
    x, labels = _batch()
    noise, t = torch.flip(x, [0]), torch.linspace(0.1, 0.9, 8)
    assert model.velocity_loss(x, noise, t, labels).loss < 1e-8
    both = [m.consistency_loss(x, noise, t, t / 2, t / 4, labels).loss for m in (model, SoFlow(model.network, p=0.0))]
    assert both[0] < both[1]


def test_the_weight_of_a_row():
    for own, objective in ((Given, SoFlow), (_by_six_calls(Given), SixCalls)):
        plain, weighted = objective(small_dit()), own(small_dit(), weight=lambda t, s: 1 + t + 2 * s)
        ours, theirs = _losses(weighted).parts, _losses(plain).parts
        times = plain.draw_times(torch.arange(8), 6, 0.5, 0, 0)
        for name, s in (("velocity", times.t[:6]), ("consistency", times.s)):
            factor = 1 + ours[name].t + 2 * s
            torch.testing.assert_close(ours[name].weight, theirs[name].weight * factor)
        part = ours["velocity"]
        torch.testing.assert_close(part.loss.detach(), (part.weight * part.mse).mean())


def test_the_schedule_of_the_gap():
    halved = Given(small_dit(), ratio=lambda progress: torch.as_tensor(0.5), min_gap=0.0)
    times = halved.draw_times(torch.arange(8), 2, 0.3, 0, 0)
    torch.testing.assert_close(times.gap, (times.t[2:] - times.s) / 2)


def test_a_part_that_is_neither_rows_nor_a_number():
    class Vector(SoFlow):
        def loss_of_rows(self, *arguments, **keywords):
            total = super().loss_of_rows(*arguments, **keywords)
            return total._replace(parts={**total.parts, "extra": torch.ones(2)})

    with pytest.raises(ValueError, match=r"the part 'extra' of the loss is a tensor of shape \(2,\); report a LossOut"):
        _step(Vector(small_dit()))(*_batch())


def test_another_share_of_rows_between_two_steps():
    model = SoFlow(small_dit())
    step = _step(model)
    assert len(step(*_batch()).parts["velocity"].t) == 6
    model.velocity_share = 0.5
    assert len(step(*_batch()).parts["velocity"].t) == 4


# --------------------------------------------------------------------------------------------------- further terms


def _with_terms(objective, terms):
    """An objective with that function for its further terms."""
    return type("Further", (objective,), {"further_terms": lambda self, batch: terms(batch)})


def _expected_data(x_t, t, F):
    return x_t - t.view(-1, 1, 1, 1) * F


@pytest.mark.parametrize("objective", [SoFlow, MeanFlow, AlphaFlow])
def test_a_further_term_is_that_of_another_call(objective):
    """Its gradient too; and that other call is not made."""

    def terms(batch):
        return {"far": 3 * (_expected_data(batch.x_t, batch.t, batch.F) - batch.x0).pow(4).mean()}

    net, (x, labels), rows = small_dit().double(), _batch(), torch.arange(8)
    plain, model = objective(net), _with_terms(objective, terms)(net)
    calls = []
    with net.x_embedder.register_forward_hook(lambda *_: calls.append(1)):
        without, total = (m.loss_of_rows(x.double(), labels, rows, 6, 0.5, 0, 7) for m in (plain, model))
    assert len(calls) == 2 * 2
    if objective is SoFlow:
        t, s, _ = plain.draw_times(rows, 6, 0.5, 0, 7)
        s = torch.cat([t[:6], s])
    else:
        t, s = plain.draw_times(rows, 6, 0, 7)
    t, s = t.double(), s.double()
    x_t, _ = noisy_sample(x.double(), t, rows, seed=0, step=7, path="linear")
    F = net(x_t, t, s, plain.input_labels(labels, plain.draw_drop(rows, labels, 0, 7), x))
    term = 3 * (_expected_data(x_t, t, F) - x.double()).pow(4).mean()
    torch.testing.assert_close(total.parts["far"], term)
    torch.testing.assert_close(total.loss, without.loss + term)
    parameters = [p for p in net.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(loss, parameters) for loss in (total.loss, without.loss + term))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("latent_scale", [None, 0.2])
def test_what_a_further_term_gets(path, latent_scale):
    """The clean samples whatever is regressed, of moments those that were drawn."""
    seen = []
    model = _with_terms(Given, lambda batch: seen.append(batch) or {})(
        small_dit(), velocity=lambda x_t, v_t, t, labels: 5 * v_t, path=path, label_drop=0.5
    )
    (x, labels), rows, progress = _batch(), torch.arange(8), torch.tensor(0.5)
    moments = x if latent_scale is None else torch.cat([x, 0.5 + x.square()], 1)
    total = model.loss_of_rows(moments, labels, rows, 6, progress, 3, 7, latent_scale)
    assert total.parts.keys() == {"velocity", "consistency"}
    if latent_scale is not None:
        drawn = normal(rows, x[0].numel(), seed=3, step=7, stream=Stream.LATENT).view_as(x)
        x = (x + (0.5 + x.square()) * drawn) * latent_scale
    (batch,), times = seen, model.draw_times(rows, 6, progress, 3, 7)
    torch.testing.assert_close(batch.x0, x, rtol=0, atol=1e-5)
    x_t, _ = noisy_sample(moments, times.t, rows, seed=3, step=7, path=path, latent_scale=latent_scale)
    assert torch.equal(batch.x_t, x_t)
    assert torch.equal(batch.t, times.t)
    assert torch.equal(batch.s, torch.cat([times.t[:6], times.s]))
    assert torch.equal(batch.labels, torch.where(model.draw_drop(rows, labels, 3, 7), 10, labels))
    assert torch.equal(batch.rows, rows)
    assert batch.F.shape == x.shape
    assert batch.F.requires_grad
    assert (batch.n_velocity, batch.progress, batch.seed, batch.step) == (6, progress, 3, 7)


def test_a_further_term_in_micro_batches_an_evaluation_and_a_run(tmp_path):
    torch.manual_seed(0)
    model = Pulled(small_dit())
    whole, parts = (_step(copy.deepcopy(model), accumulation=n)(*_batch()) for n in (1, 2))
    torch.testing.assert_close(parts.parts["pull"], whole.parts["pull"])
    torch.testing.assert_close(parts.loss, whole.loss)
    evaluated = _step(model).evaluate(*_batch())
    assert evaluated.parts["pull"] > 0
    assert not evaluated.loss.requires_grad
    Trainer(_config(tmp_path, "own_objectives.Pulled", weight=0.25)).fit()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["pull/loss"] > 0
    assert not any("encoder" in name for name in final(tmp_path, 4).model)


@pytest.mark.parametrize(
    ("terms", "compile", "sentence"),
    [
        (lambda batch: {"velocity": batch.F.mean()}, False, "has a part 'velocity' already; give the further term ano"),
        (lambda batch: {"velocity": batch.F.mean()}, "eager", "has a part 'velocity' already; give the further term"),
        (lambda batch: {"far": batch.F.mean(0)}, False, r"term 'far' of the loss is of shape \(1, 8, 8\); give a 0-d"),
        (lambda batch: {"far": 1.0}, False, "the further term 'far' of the loss is a float; give a 0-d tensor"),
    ],
)
def test_what_is_no_further_term(terms, compile, sentence):
    model = _with_terms(SoFlow, terms)(small_dit(), velocity_share=1.0, guidance_scale=1.0)
    with pytest.raises(ValueError, match=sentence):
        _step(model, compile=compile)(*_batch())
