"""Training with a network, an objective or data given as objects."""

import logging
from dataclasses import replace

import pytest
import torch
from foreign_networks import UNet
from runs import Augmented, Blobs, StopError, assert_bitwise_equal, final, stop_at, tiny_config

from soflow_fast import DiT, SoFlow, Trainer, trainer
from soflow_fast.config import ComputeConfig, DataConfig, EMAConfig, ModelConfig, OptimizerConfig
from soflow_fast.objectives.alphaflow import AlphaFlow
from soflow_fast.objectives.flow_matching import FlowMatching
from soflow_fast.objectives.meanflow import MeanFlow
from soflow_fast.objectives.scm import SCM


def _network(classes=10):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DiT(8, 4, 1, 16, 1, 2, num_classes=classes)


@pytest.mark.parametrize("wrapped", [False, True])
def test_given_network_and_data(tmp_path, wrapped):
    net = _network()
    before = net.final_layer.linear.weight.detach().clone()
    config = tiny_config(tmp_path, data=DataConfig(kind="latents", path="nowhere", workers=0))
    # with the default of 1000 classes: the network's ten are what counts
    config = replace(config, model=ModelConfig(input_size=8, in_channels=1))
    config = replace(config, output=replace(config.output, sample_every=3))
    run = Trainer(config, model=SoFlow(net) if wrapped else net, dataset=Blobs())
    assert run.model.guidance_scale == (3.0 if wrapped else 2.0)
    run.fit()
    assert not torch.equal(net.final_layer.linear.weight, before)
    with pytest.raises(ValueError, match="was given to the Trainer as an object"):
        trainer.load_run(tmp_path)
    # the record has what was used, and a network alone is enough to have the model back
    loaded, model, step = trainer.load_run(tmp_path, "cpu", model=_network())
    assert (loaded.model.num_classes, loaded.soflow.guidance_scale, step) == (10, run.model.guidance_scale, 6)
    assert model.guidance_scale == run.model.guidance_scale
    assert all(torch.equal(value, run.ema.state_dict()[name]) for name, value in model.state_dict().items())


class _Tied(DiT):
    """Both times are embedded by the same weights."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.s_embedder = self.t_embedder


def test_tied_parameters_are_saved_and_averaged_under_both_names(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        nets = [_Tied(8, 4, 1, 16, 1, 2, num_classes=10) for _ in range(2)]
    ema = EMAConfig(posthoc=[0.05, 0.1], snapshot_every=1)
    config = tiny_config(tmp_path, ema=ema, optimizer=OptimizerConfig(learning_rate=0.1))
    run = Trainer(config, model=nets[0])
    run.fit()
    for std in (None, 0.08):
        _, model, _ = trainer.load_run(tmp_path, "cpu", model=nets[1], ema_std=std)
        weight = model.network.s_embedder.mlp[0].weight
        assert weight is model.network.t_embedder.mlp[0].weight
        assert not torch.equal(weight, nets[0].t_embedder.mlp[0].weight)
        if std is None:
            assert torch.equal(weight, run.ema.averages["network.t_embedder.mlp.0.weight"])
    Trainer(config, model=nets[0]).fit()  # of the same configuration, with its lists as tuples


class _Branching(UNet):
    def forward(self, x, t, s, labels=None):
        return super().forward(x, t, s, labels) if t.max() <= 2 else x


def test_an_objective_that_took_two_forwards_is_still_the_same(tmp_path, caplog):
    """Its network cannot be captured; what the run records is what was asked for."""
    model = SoFlow(_Branching(channels=1))
    with caplog.at_level(logging.WARNING):
        Trainer(tiny_config(tmp_path, total_steps=1), model=model).fit()
    assert "takes two forwards in float32: _Branching cannot be captured by torch.export" in caplog.text
    config, _, step = trainer.load_run(tmp_path, model=model)
    assert (config.soflow.quotient, step) == ("difference", 1)
    Trainer(tiny_config(tmp_path, total_steps=1), model=model).fit()


@pytest.mark.parametrize(
    ("make", "name"),
    [*((make, "guidance_scale") for make in (SoFlow, MeanFlow, AlphaFlow, FlowMatching)), (SCM, "sigma_data")],
)
def test_a_given_objective_of_other_values_is_another_run(tmp_path, make, name):
    def run(value):
        model = make(_network(), **{name: value})
        return Trainer(tiny_config(tmp_path, total_steps=1), model=model)

    run(2.0).fit()
    run(2.0).fit()
    with pytest.raises(ValueError, match=rf"{name}=2\.0, and this one has 3\.0"):
        run(3.0).fit()
    with pytest.raises(ValueError, match=r"label_drop=0\.1, and this one has 0\.5"):
        trainer.load_run(tmp_path, model=make(_network(), **{name: 2.0}, label_drop=0.5))


class _OwnObjective(SoFlow):
    pass


def test_an_objective_of_ones_own_is_recorded_as_given(tmp_path):
    config = tiny_config(tmp_path, total_steps=1)
    Trainer(config, model=_OwnObjective(_network(), guidance_scale=2.0)).fit()
    text = (tmp_path / "config.yaml").read_text()
    assert "objective: given" in text
    assert "guidance_scale" not in text
    with pytest.raises(ValueError, match="objective='given', and this one has 'soflow'"):
        Trainer(config, model=SoFlow(_network())).fit()
    with pytest.raises(ValueError, match="objective was given to the Trainer as an object"):
        trainer.load_run(tmp_path, model=_network())
    assert trainer.load_run(tmp_path, "cpu", model=_OwnObjective(_network()))[2] == 1


def test_the_classes_are_the_networks(tmp_path):
    config = tiny_config(tmp_path, total_steps=1)
    config = replace(config, model=replace(config.model, num_classes=1000))
    with pytest.raises(ValueError, match=r"labels from 0 to 9, outside the classes 0\.\.4"):
        Trainer(config, model=_network(classes=5), dataset=Blobs(n=16)).fit()
    net = _network()
    del net.num_classes
    with pytest.raises(ValueError, match="the network DiT has num_classes=None; set it to"):
        Trainer(config, model=net)


@pytest.mark.parametrize("workers", [0, 1])
def test_random_augmentation_goes_on_exactly(tmp_path, monkeypatch, workers):
    def run(name, dataset):
        config = tiny_config(tmp_path / name, data=DataConfig(workers=workers), total_steps=4)
        Trainer(config, model=_network(), dataset=dataset).fit()

    run("straight", Augmented(16))
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(StopError):
            run("stopped", Augmented(16))
    torch.rand(1)  # the caller's generators are at other places
    run("stopped", Augmented(16))
    assert_bitwise_equal(final(tmp_path / "straight", 4), final(tmp_path / "stopped", 4))
    run("without", Blobs(16))
    ours, theirs = (final(tmp_path / name, 4).model["network.final_layer.linear.weight"]
                    for name in ("straight", "without"))  # fmt: skip
    assert not torch.equal(ours, theirs)


def test_a_network_with_dropout_goes_on_exactly(tmp_path, monkeypatch):
    """Its masks are those of the step, and the caller's random state stays as it was."""

    def run(name, dropout):
        torch.manual_seed(0)
        net = UNet(dropout, channels=1)
        torch.manual_seed(len(name))
        trained = Trainer(tiny_config(tmp_path / name, total_steps=4, compute=ComputeConfig(compile=False)), model=net)
        state = torch.get_rng_state()
        trained.fit()
        assert torch.equal(torch.get_rng_state(), state)

    run("straight", 0.3)
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(StopError):
            run("stopped", 0.3)
    run("stopped", 0.3)
    assert_bitwise_equal(final(tmp_path / "straight", 4), final(tmp_path / "stopped", 4))
    run("without", 0.0)
    assert not torch.equal(final(tmp_path / "straight", 4).model["network.leave.weight"],
                           final(tmp_path / "without", 4).model["network.leave.weight"])  # fmt: skip


class _Dropping(UNet):
    def __init__(self):
        super().__init__(0.3, channels=1)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_network_given_compiled_is_taken_without_that(tmp_path, caplog, wrapped):
    config = tiny_config(tmp_path, total_steps=2, ema=EMAConfig(posthoc=(0.05, 0.1), snapshot_every=1))
    net = _network()
    compiled = torch.compile(net, backend="eager")
    Trainer(config, model=SoFlow(compiled, guidance_scale=2.0) if wrapped else compiled).fit()
    assert "the network DiT was given compiled, and is taken without that: training compiles" in caplog.text
    assert not any("_orig_mod" in name for name in final(tmp_path, 2).model)
    assert torch.equal(final(tmp_path, 2).model["network.final_layer.linear.weight"], net.final_layer.linear.weight)
    for std in (None, 0.05):
        plain, loaded = (trainer.load_run(tmp_path, "cpu", model=model, ema_std=std)[1].state_dict()
                         for model in (_network(), torch.compile(_network(), backend="eager")))  # fmt: skip
        assert all(torch.equal(value, plain[name]) for name, value in loaded.items())
    changed = replace(config, total_steps=3)
    Trainer(changed, model=SoFlow(_network(), guidance_scale=2.0) if wrapped else _network(), accept_changes=True).fit()


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_network_given_in_eval_mode_is_put_into_training_mode(tmp_path, caplog, wrapped):
    net = _Dropping()
    Trainer(tiny_config(tmp_path, total_steps=1), model=SoFlow(net) if wrapped else net)
    assert "eval mode" not in caplog.text
    given = SoFlow(net).eval() if wrapped else net.eval()
    Trainer(tiny_config(tmp_path, total_steps=1), model=given)
    assert "the network _Dropping was given in eval mode, as from_pretrained returns it; it is put" in caplog.text
    assert all(module.training for module in net.modules())
