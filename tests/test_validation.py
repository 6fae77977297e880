"""The validation loss: what it is of, that it changes nothing, and data that cannot be validated on."""

import copy
import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from fast_step_runs import BATCH, make_model, make_step, training_batch
from runs import (
    Augmented,
    Blobs,
    assert_bitwise_equal,
    final,
    refused,
    tiny_config,
    write_config,
    write_images,
    write_latents,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from soflow_fast import EMA, SoFlow, Trainer, build, checkpoint
from soflow_fast.cli import main
from soflow_fast.config import ComputeConfig, DataConfig, OptimizerConfig, SoFlowConfig
from soflow_fast.data import LatentMoments, batches, digits
from soflow_fast.data.order import permutation
from soflow_fast.distributed import Processes
from soflow_fast.logs import Quiet
from soflow_fast.objectives.alphaflow import AlphaFlow
from soflow_fast.objectives.base import TotalLoss
from soflow_fast.objectives.flow_matching import FlowMatching
from soflow_fast.objectives.improved_meanflow import ImprovedMeanFlow
from soflow_fast.objectives.meanflow import MeanFlow
from soflow_fast.objectives.scm import SCM
from soflow_fast.step import TrainStep
from soflow_fast.validation import Validation

_SEED = int.from_bytes(b"validate", "big")


def _config(run_dir, every=3, **changes):
    data = {"kind": "digits", "workers": 0, "validation": "held_out", **changes.pop("data", {})}
    config = tiny_config(run_dir, data=DataConfig(**data), **changes)
    return replace(config, output=replace(config.output, validate_every=every))


def _validations(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "validation/loss" in line]


# ------------------------------------------------------------------------------------------------ the loss of a step


@pytest.mark.parametrize("make", [SoFlow, MeanFlow, ImprovedMeanFlow, AlphaFlow, SCM, FlowMatching])
def test_it_is_the_objectives_loss_at_the_trainings_progress(make):
    network = {"condition_dim": 3} if make is ImprovedMeanFlow else {}
    step, _ = make_step(make_model(torch.float64, make, **network))
    for k in range(2):
        step(*training_batch(k, torch.float64))
    x, labels = training_batch(7, torch.float64)
    whole = step.evaluate(x, labels, seed=5)
    expected = step.model.eval().loss(x, labels, 2 / step.total_steps, seed=5, step=0)
    torch.testing.assert_close(whole.loss, expected.loss.detach())
    assert not whole.loss.requires_grad
    parts = [step.evaluate(x[rows], labels[rows], seed=5, first_row=rows.start) for rows in (slice(0, 6), slice(6, 16))]
    for name, part in expected.parts.items():
        for of_whole, of_parts in ((getattr(whole.parts[name], key), key) for key in ("mse", "weight", "t")):
            torch.testing.assert_close(of_whole, getattr(part, of_parts).detach())
            torch.testing.assert_close(torch.cat([getattr(one.parts[name], of_parts) for one in parts]), of_whole)
    if make is SoFlow:  # what is changed between two steps is what holds
        step.model.velocity_share, step.model.label_drop = 0.25, 0.5
        expected = step.model.loss(x, labels, 2 / step.total_steps, seed=5, step=0)
        torch.testing.assert_close(step.evaluate(x, labels, seed=5).loss, expected.loss.detach())


class _Noisy(nn.Module):
    """Draws by itself, also in evaluation mode, and counts its calls in a buffer."""

    num_classes = 10

    def __init__(self):
        super().__init__()
        self.inside, self.dropout = nn.Conv2d(1, 1, 3, padding=1), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, t, s, labels):
        self.calls += 1
        return self.inside(self.dropout(x)) + 0.01 * torch.randn_like(x)


def test_a_network_that_draws_and_counts_is_left_as_it_was():
    model = FlowMatching(_Noisy())
    step = TrainStep(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), total_steps=9)
    x, labels = Blobs().samples[:BATCH], torch.arange(BATCH) % 10
    state = torch.get_rng_state()
    first, second = (step.evaluate(x, labels) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.loss, second.loss)
    assert not torch.equal(step.evaluate(x, labels, seed=1).loss, first.loss)
    assert model.network.calls == 0
    assert all(module.training for module in model.modules())


class _Failing(nn.Module):
    """Counts in a buffer that it assigns, and then cannot be evaluated."""

    num_classes = 10

    def __init__(self):
        super().__init__()
        self.inside = nn.Conv2d(1, 1, 1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, t, s, labels):
        self.calls = self.calls + 1
        if not self.training:
            raise MemoryError
        return self.inside(x)


def test_an_evaluation_that_fails_leaves_the_network_as_it_was():
    model = FlowMatching(_Failing())
    step = TrainStep(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), total_steps=9)
    before = model.network.calls
    with pytest.raises(MemoryError):
        step.evaluate(Blobs().samples[:BATCH], torch.arange(BATCH) % 10)
    assert model.network.calls is before
    assert before == 0
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("world", [1, 3, 5])
def test_processes_without_a_batch_add_nothing(tmp_path, world):
    """Ten samples in batches of four: the last one, of two, is one process's alone."""
    config = tiny_config(tmp_path, batch_size=4 * world)
    model, data = FlowMatching(_WithDropout()), Blobs()
    step = TrainStep(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), total_steps=9)
    config = replace(config, data=replace(config.data, validation_samples=10))
    rows = 0
    for rank in range(world):
        processes = SimpleNamespace(rank=rank, world_size=world, device=torch.device("cpu"))
        processes.share = partial(Processes.share, processes)
        sums = Validation(config, step, EMA(model), data, processes)._sums_of_share()
        rows += sums["", "velocity"][0] if sums else 0
    assert rows == 10


class _WithDropout(nn.Module):
    num_classes = 10

    def __init__(self):
        super().__init__()
        self.inside, self.dropout = nn.Conv2d(1, 1, 3, padding=1), nn.Dropout(0.5)

    def forward(self, x, t, s, labels):
        return self.inside(self.dropout(x)) * (1 + t + s).view(-1, 1, 1, 1)


def test_what_is_compiled_stays_compiled_and_dropout_and_augmentation_are_left_out():
    """The difference forward of the training is of a network in training mode, the validation's of one in evaluation
    mode: neither takes the other's place."""
    model, compiled = SoFlow(_WithDropout(), guidance_scale=1.0), []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = TrainStep(model, optimizer=optimizer, total_steps=9, compile=backend, augment=_Mirrored())
    x, labels = Blobs().samples[:BATCH], torch.arange(BATCH) % 10
    step(x, labels)
    derived, n = model.forward_difference, len(compiled)
    out = step.evaluate(x, labels, seed=3)
    step(x, labels)
    assert model.forward_difference is derived
    assert len(compiled) == n >= 1
    expected = copy.copy(model)
    after = step.evaluate(x, labels, seed=3)
    assert torch.equal(after.loss, expected.eval().loss(x, labels, 2 / 9, seed=3, step=0).loss)
    assert after.loss != out.loss


class _Mirrored:
    """An augmentation that its network is not told of."""

    def check(self, *_):
        pass

    def __call__(self, x, labels, *_):
        return -x, labels

    def conditions(self, x, labels):
        return torch.zeros(len(x), dtype=torch.int64)


# -------------------------------------------------------------------------------------------------------- in a run


@pytest.mark.parametrize("form", ["fp32", "bf16", "own network"])
def test_a_run_ends_bitwise_as_without(tmp_path, form):
    def train(name, every, **data):
        compute = ComputeConfig(precision="bf16") if form == "bf16" else ComputeConfig()
        config = _config(tmp_path / name, every, seed=4, compute=compute, data=data)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = _WithDropout() if form == "own network" else None
            Trainer(config, model=model).fit()
        return final(tmp_path / name)

    plain = train("plain", 0, validation=None)
    assert_bitwise_equal(train("validated", 2, validation_samples=20), plain)
    assert [line["step"] for line in _validations(tmp_path / "validated")] == [2, 4, 6]
    assert not _validations(tmp_path / "plain")


def test_the_metrics_are_means_over_all_samples_of_both_weights(tmp_path):
    optimizer = OptimizerConfig(learning_rate=1e-2, accumulation=2)
    config = _config(tmp_path, seed=7, optimizer=optimizer, data={"validation_samples": 100})
    config = replace(config, output=replace(config.output, checkpoint_every=3))
    lines = []
    Trainer(config, on_log=lines.append).fit()
    found = _validations(tmp_path)
    assert [line for line in lines if "validation/loss" in line] == found
    assert [line["step"] for line in found] == [3, 6]
    images, labels = (values[permutation(450, _SEED, 0)[:100]] for values in digits("held_out").tensors)
    model = build.build_model(config).eval()
    for line in found:
        state = checkpoint.load(checkpoint.path_of(tmp_path / "checkpoints", line["step"]), torch.device("cpu"))
        for prefix, weights in (("validation", state.model), ("validation/ema", state.ema)):
            model.load_state_dict(weights)
            with torch.no_grad():
                total = model.loss(images, labels, line["step"] / 6, seed=_SEED, step=0)
            assert line[f"{prefix}/loss"] == pytest.approx(float(total.loss), rel=1e-5)
            for name, part in total.parts.items():
                assert line[f"{prefix}/{name}/mse"] == pytest.approx(float(part.mse.mean()), rel=1e-5)
                weighted = float((part.weight * part.mse).mean())
                assert line[f"{prefix}/{name}/weighted"] == pytest.approx(weighted, rel=1e-5)
                last = part.mse[part.t >= 0.5][(part.t[part.t >= 0.5] < 0.6)].mean()
                assert line[f"{prefix}/{name}/mse_by_time"][5] == pytest.approx(float(last), rel=1e-5)
        assert line["validation/loss"] != line["validation/ema/loss"]


def test_a_failure_costs_the_validation_and_not_the_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(TrainStep, "evaluate", lambda *_, **__: 1 / 0)
    Trainer(_config(tmp_path)).fit()
    assert "the validation at step 3 failed, and training goes on: division by zero" in caplog.text
    assert final(tmp_path).step == 6
    assert not _validations(tmp_path)


def test_its_settings_may_change_within_a_run(tmp_path, caplog):
    Trainer(_config(tmp_path, 0)).fit()
    assert "data.validation='held_out' is not used: output.validate_every is 0, never" in caplog.text
    Trainer(_config(tmp_path, 6, data={"validation_samples": 20})).fit()  # which has no step left to do
    assert [line["step"] for line in _validations(tmp_path)] == [6]
    Trainer(_config(tmp_path, 1, data={"validation": None, "validation_samples": 5}), validation=Blobs(n=5)).fit()
    assert [line["step"] for line in _validations(tmp_path)] == [6]


def test_the_items_do_not_depend_on_how_they_are_read():
    items, options = [5, 3, 60, 1, 7, 2, 9], {"seed": 3, "num_classes": 10, "device": torch.device("cpu")}
    whole = list(batches(Augmented(), batch=7, steps=range(1), items=items, **options))
    parts = list(batches(Augmented(), batch=3, steps=range(3), items=items, workers=1, **options))
    assert [len(x) for x, _ in parts] == [3, 3, 1]
    for a, b in zip(whole[0], (torch.cat(values) for values in zip(*parts, strict=True)), strict=True):
        assert torch.equal(a, b)
    assert whole[0][1].tolist() == [item % 10 for item in items]


# --------------------------------------------------------------------------------------------------------- the data


def _at(trainer):
    """The metrics of the weights that a trainer begins with."""
    kept, log = {}, Quiet()
    log.append = kept.update
    Validation(trainer.config, trainer.step, trainer.ema, trainer.validation, trainer.processes)(3, log)
    return kept


def test_latents_are_drawn_from_their_moments(tmp_path):
    for name in ("train", "held_out"):
        write_latents(tmp_path / name, n=40)
    model = replace(tiny_config("unused").model, in_channels=4)
    data = {"kind": "latents", "path": str(tmp_path / "train"), "validation": str(tmp_path / "held_out")}
    plain = SoFlowConfig(guidance_scale=1.0)
    run = Trainer(_config(tmp_path / "run", model=model, data=data, soflow=plain))
    assert isinstance(run.validation, LatentMoments)
    assert run.validation.path == tmp_path / "held_out"
    # of an untrained DiT, whose output is 0, the error is that of noise minus data
    error = _at(run)["validation/velocity/mse"]
    assert error == pytest.approx(1 + (0.18215 * 5.5) ** 2, rel=0.1)
    with pytest.raises(ValueError, match=r"'given': it holds samples, and the training data latent moments"):
        Trainer(_config(tmp_path / "run", model=model, data=data), validation=Blobs(shape=(4, 8, 8)))


def test_folders_are_read_unmirrored_and_must_have_the_same_classes(tmp_path, monkeypatch):
    for name in ("train", "held_out", "other"):
        write_images(tmp_path / name)
    (tmp_path / "other" / "class1").rename(tmp_path / "other" / "class2")
    data = {"kind": "folder", "path": str(tmp_path / "train"), "flip": True, "validation": str(tmp_path / "held_out")}
    model = replace(tiny_config("unused").model, in_channels=3)
    run = Trainer(_config(tmp_path / "run", model=model, data=data))
    assert (run.dataset.flip, run.validation.flip) == (True, False)
    assert set(_at(run)) >= {"validation/velocity/mse", "validation/ema/consistency/weighted"}
    data["validation"] = str(tmp_path / "other")
    with pytest.raises(ValueError, match=r"data\.validation=.* class folders are not the 2 .* \('class[12]' is in one"):
        Trainer(_config(tmp_path / "run", model=model, data=data))


def test_conditions_and_no_labels(tmp_path):
    model = replace(tiny_config("unused").model, num_classes=0)
    config = _config(tmp_path, model=replace(model, embedding_dim=3), data={"validation": None})
    conditions = TensorDataset(Blobs().samples, torch.randn(64, 3))
    told = _at(Trainer(config, dataset=conditions, validation=conditions))
    assert told["validation/loss"] == told["validation/ema/loss"]
    plain = _at(Trainer(_config(tmp_path, model=model)))
    assert plain["validation/velocity/mse"] > 0
    with pytest.raises(ValueError, match=r"data\.validation='given': the data set yields conditions of shape \(\)"):
        Trainer(config, dataset=conditions, validation=Blobs())


def test_the_same_maker_makes_data_of_another_path(tmp_path):
    data = {"kind": "test_validation.Waves", "path": "1", "validation": "2", "init_args": {"n": 20}}
    run = Trainer(_config(tmp_path, data=data))
    assert [(one.n, one.path) for one in (run.dataset, run.validation)] == [(20, "1"), (20, "2")]
    data |= {"path": None, "init_args": {"path": "1"}}
    assert Trainer(_config(tmp_path, data=data)).validation.path == "2"


class Waves(Blobs):
    def __init__(self, path, n=30):
        super().__init__(n=n)
        self.n, self.path = n, path


class _WithTerm(FlowMatching):
    """Adds the mean of the labels to the loss."""

    def loss_of_rows(self, x0, labels, *arguments, **keywords):
        total, term = super().loss_of_rows(x0, labels, *arguments, **keywords), labels.double().mean()
        return TotalLoss(total.loss + term, {**total.parts, "term": term})


def test_a_term_of_ones_own_is_a_mean_over_the_rows(tmp_path):
    config = _config(tmp_path, data={"validation_samples": 20})  # a batch of 16, and one of 4
    found = _at(Trainer(config, model=_WithTerm(_WithDropout())))
    mean = float(digits("held_out").tensors[1][permutation(450, _SEED, 0)[:20]].double().mean())
    assert found["validation/term/loss"] == found["validation/ema/term/loss"] == pytest.approx(mean)
    assert found["validation/loss"] == pytest.approx(found["validation/velocity/weighted"] + mean)


def test_a_dry_run_mentions_it(tmp_path, capsys):
    file = write_config(tmp_path / "config.yaml", _config(tmp_path / "run", data={"validation_samples": 400}))
    assert main(["train", str(file), "--dry-run"]) == 0
    assert "validation              400 of 450 samples every 3 steps\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["--data.validation=null"], "output.validate_every=3 needs data that are not trained on; set data.validation"),
        (["--data.validation=x"], "data.validation='x': data.kind='digits' has one part that is not trained on; set"),
        (["--data.validation=given"], "data.validation='given': that stands for Trainer(config, validation=dataset)"),
        (
            ["--data.kind=folder", "--data.path=real"],
            "'held_out': the image folder held_out does not exist; set data.validation to a",
        ),
        (["--data.kind=test_validation.Small", "--data.path=1"], "'held_out': the data has samples of shape (1, 4, 4)"),
        (["--data.kind=test_validation.Few", "--data.path=1"], "'held_out': the data set Few has no samples"),
        (["--data.kind=test_validation.Wrong", "--data.path=1"], "labels from -1 to 9, outside the classes 0..9"),
        (["--data.validation_samples=0"], "data.validation_samples=0 is not possible; it must be at least 1"),
        (["--output.validate_every=-1"], "output.validate_every=-1 is not possible; it must be at least 0"),
    ],
)
def test_refusals(tmp_path, monkeypatch, capsys, settings, sentence):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "real", size=(8, 8))
    file = write_config(tmp_path / "config.yaml", _config("run"))
    said = refused(capsys, "train", file, *settings)
    assert sentence in said
    assert "data.validation" in said or "validate_every" in said
    assert not (tmp_path / "run").exists()


class Small(Blobs):
    def __init__(self, path):
        super().__init__(shape=(1, 8, 8) if path == "1" else (1, 4, 4))


class Few(Blobs):
    def __init__(self, path):
        super().__init__(n=64 if path == "1" else 0)


class Wrong(Blobs):
    def __init__(self, path):
        super().__init__()
        self.labels = torch.arange(64) % 10 - (path != "1") * (torch.arange(64) == 20).long()

    def __getitem__(self, index):
        return self.samples[index], int(self.labels[index])


def test_objects_that_cannot_be_validated_on(tmp_path):
    config = _config(tmp_path)
    with pytest.raises(ValueError, match=r"data\.validation='given': .* give the data set in it, validation=loader"):
        Trainer(config, validation=DataLoader(Blobs()))
    with pytest.raises(ValueError, match=r"data\.validation='held_out': the training data were given .* as an object"):
        Trainer(config, dataset=Blobs())
