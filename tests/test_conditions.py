"""Networks that are told a condition of a sample, such as a text's embedding, in place of its class."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from _baselines import SixCalls
from conditioned import (
    CLASSES,
    WIDTH,
    ByClass,
    ByEmbedding,
    ByLabel,
    ByTokens,
    Items,
    Listed,
    conditions_of,
    data_of,
    seeded,
)
from runs import StopError, final, stop_at, tiny_config, write_latents
from torch import nn
from torch.utils.data import TensorDataset

from soflow_fast import DiT, SoFlow, Trainer, trainer
from soflow_fast.cli import main
from soflow_fast.conditions import ItemConditions
from soflow_fast.config import DataConfig, ModelConfig
from soflow_fast.data import digits
from soflow_fast.dry_run import plan
from soflow_fast.images import save_png
from soflow_fast.objectives.alphaflow import AlphaFlow
from soflow_fast.objectives.flow_matching import FlowMatching
from soflow_fast.objectives.improved_meanflow import ImprovedMeanFlow
from soflow_fast.objectives.meanflow import MeanFlow
from soflow_fast.objectives.scm import SCM
from soflow_fast.sample import Sampler
from soflow_fast.step import TrainStep


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (SoFlow, ByEmbedding),
        (SixCalls, ByEmbedding),
        (SoFlow, ByTokens),
        (MeanFlow, ByEmbedding),
        (AlphaFlow, ByTokens),
        (SCM, ByEmbedding),
        (FlowMatching, ByEmbedding),
    ],
)
def test_conditions_train_as_the_classes_that_they_stand_for(make, told):
    x0, labels = digits()[:16]
    found = []
    for net in (seeded(ByClass), seeded(told)):
        guidance = {} if make is SCM else {"guidance_scale": 2.0}
        model = make(net, label_drop=0.3, **guidance)
        given = labels if type(net) is ByClass else conditions_of(labels, net)
        out = model.loss_of_rows(x0, given, torch.arange(16), round(16 * model.velocity_share), 0.5, 3, 7)
        out.loss.backward()
        grads = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
        noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(2))
        found.append((out.loss, grads, model.sample(noise, given[:4], seed=0), model.sample(noise, None, seed=0)))
    assert found[0][0] == found[1][0]
    assert found[0][1].keys() == found[1][1].keys()
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])
    for of_class, of_condition in zip(found[0][2:], found[1][2:], strict=True):
        assert torch.equal(of_class, of_condition)
    assert not torch.equal(*found[0][2:])


@pytest.mark.parametrize(("told", "held"), [(ByEmbedding, False), (ByTokens, True)])
def test_a_run_is_that_of_the_classes(tmp_path, monkeypatch, told, held):
    def run(name, net, dataset, **changes):
        config = tiny_config(tmp_path / name, total_steps=4, **changes)
        config = replace(config, output=replace(config.output, sample_every=2, sample_labels=(3, 1)))
        return Trainer(config, model=net, dataset=dataset)

    images, labels = digits()[:32]
    by_class = run("class", seeded(ByClass), TensorDataset(images, labels))
    by_class._grid_labels = labels[torch.tensor([3, 1] * 5)]  # the classes of items 3 and 1
    by_class.fit()
    net = seeded(told)
    data = data_of(net) if held else Items(kind=told.__name__)
    workers = DataConfig(workers=0 if held else 1)
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(StopError):
            run("condition", net, data, data=workers).fit()
    again = run("condition", seeded(told), data, data=workers)
    assert again.on_device == held
    again.fit()
    of_class, of_condition = (final(tmp_path / name, 4) for name in ("class", "condition"))
    for part in ("model", "ema"):
        ours, theirs = (getattr(one, part) for one in (of_condition, of_class))
        assert all(torch.equal(ours[name], value) for name, value in theirs.items() if "label" not in name)
    grids = [(tmp_path / name / "samples" / "step-00000004.png").read_bytes() for name in ("class", "condition")]
    assert grids[0] == grids[1]
    config, model, _ = trainer.load_run(tmp_path / "condition", "cpu", model=seeded(told))
    assert config.model.num_classes == 0
    assert torch.equal(model.network.null_condition, net.null_condition)


def test_the_whole_way_by_the_commands(tmp_path, capsys):
    """A network and data named in a file: planned, trained, sampled with the conditions of items, scored."""
    pytest.importorskip("torch_fidelity")
    model = ModelConfig(preset="conditioned.ByEmbedding", input_size=8, in_channels=1)
    config = tiny_config(tmp_path / "run", total_steps=2, model=model)
    config = replace(config, data=DataConfig(kind="conditioned.Items", workers=0))
    images = tmp_path / "real"
    images.mkdir()
    for i, image in enumerate(digits()[:20][0]):
        save_png(image, images / f"{i}.png")
    evaluation = replace(config.evaluation, every=2, features="pixels", reference=str(images))
    config = replace(config, evaluation=evaluation)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert main(["train", str(tmp_path / "config.yaml"), "--dry-run"]) == 0
    assert "G per image)" in capsys.readouterr().out
    assert main(["train", str(tmp_path / "config.yaml")]) == 0
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "evaluation/frechet" in metrics
    assert main(["eval", str(tmp_path / "run"), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    score = next(line.split()[1] for line in printed.splitlines() if line.startswith("frechet"))
    assert f'"evaluation/frechet": {score[:5]}' in metrics
    arguments = ["sample", str(tmp_path / "run"), "--device", "cpu", "--count", "5", "--labels", "4,2"]
    assert main([*arguments, "--format", "npz", "--out", str(tmp_path / "drawn")]) == 0
    drawn = np.load(tmp_path / "drawn.npz")
    assert drawn["arr_1"].tolist() == [4, 2, 4, 2, 4]
    assert main([*arguments[:-1], "32", "--out", str(tmp_path / "other")]) == 2
    assert "has the item 32, and there are 0..31" in capsys.readouterr().err


def test_a_run_of_data_given_as_an_object_says_how_to_sample(tmp_path, capsys):
    config = tiny_config(tmp_path, total_steps=1, model=ModelConfig("conditioned.ByEmbedding", 8, 1))
    Trainer(config, dataset=data_of(ByEmbedding())).fit()
    assert main(["sample", str(tmp_path), "--device", "cpu"]) == 2
    assert "draw by soflow sample RUN --conditions FILE.npy, or in Python" in capsys.readouterr().err


@pytest.mark.parametrize("on_device", [False, True])
def test_latents_with_conditions_in_their_file(tmp_path, monkeypatch, on_device):
    conditions = np.random.default_rng(0).standard_normal((40, 5)).astype(np.float32)
    file = write_latents(tmp_path / "latents.hdf5", conditions=conditions, labels=None)
    data = DataConfig(kind="latents", path=str(file), workers=1, on_device=on_device)
    config = tiny_config(tmp_path / "run", total_steps=4, data=data)
    sizes = {"input_size": 8, "in_channels": 4, "patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2}
    config = replace(config, model=ModelConfig(**sizes, num_classes=0, embedding_dim=5))
    run = Trainer(config)
    assert torch.equal(run.dataset.__getitems__([7, 3])[0][1], torch.from_numpy(conditions[7]))
    given, step = [], TrainStep.__call__
    monkeypatch.setattr(TrainStep, "__call__", lambda self, x, labels: given.append(labels) or step(self, x, labels))
    run.fit()
    rows = {tuple(row) for row in conditions.tolist()}
    assert all(tuple(row) in rows for labels in given for row in labels.tolist())
    assert len({tuple(row) for row in given[0].tolist()}) == 16
    arguments = ["sample", str(tmp_path / "run"), "--device", "cpu", "--count", "2", "--labels", "1"]
    for item in ("1", "2"):
        assert main([*arguments[:-1], item, "--out", str(tmp_path / item)]) == 0
    assert not np.array_equal(np.load(tmp_path / "1.npy"), np.load(tmp_path / "2.npy"))
    shorter = write_latents(tmp_path / "shorter.hdf5", conditions=conditions[:39])
    config = replace(config, data=replace(data, path=str(shorter)))
    with pytest.raises(ValueError, match="has no array 'conditions' of 40 rows"):
        Trainer(config)


def test_conditions_of_items_are_read_when_they_are_needed():
    class Counted(Items):
        reads = 0

        def __getitem__(self, item):
            self.reads += 1
            return super().__getitem__(item)

    data = Counted()
    state = torch.get_rng_state()
    conditions = ItemConditions(data, torch.tensor([5, 3, 3, 8]))
    assert (len(conditions), data.reads) == (4, 0)
    assert torch.equal(conditions[1:3], torch.stack([data.pairs[3][1]] * 2))
    assert data.reads == 2
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("condition", "found"),
    [(torch.zeros(5), r"shape \(5,\) and torch.float32"), (torch.zeros(WIDTH).double(), "torch.float64"), (3, "int64")],
)
def test_conditions_of_another_form_are_refused(tmp_path, condition, found):
    data = [(image, condition) for image in digits()[:16][0]]
    with pytest.raises(ValueError, match=f"conditions of .*{found}.* null_condition has"):
        Trainer(tiny_config(tmp_path), model=ByEmbedding(), dataset=data)


def test_what_cannot_be_told_conditions_says_so(tmp_path):
    net = ByEmbedding()
    del net.null_condition
    for null in ([0.0] * WIDTH, torch.zeros(WIDTH)):
        net.null_condition = null
        with pytest.raises(ValueError, match="that is not saved with its weights; make it a buffer"):
            Trainer(tiny_config(tmp_path), model=net, dataset=data_of(ByEmbedding()))
    net = ByEmbedding()
    net.num_classes = 10
    with pytest.raises(ValueError, match="has num_classes=10 and a null_condition; set the first to None if"):
        Trainer(tiny_config(tmp_path), model=net, dataset=data_of(net))
    net.num_classes, net.augment_dim = None, 9
    with pytest.raises(ValueError, match=r"is told conditions \(null_condition\); set data.augment=0"):
        Trainer(tiny_config(tmp_path, data=DataConfig(augment=0.1)), model=net, dataset=data_of(net))
    with pytest.raises(ValueError, match=r"set model\.num_classes=0"):
        ModelConfig(embedding_dim=8)
    with pytest.raises(ValueError, match="guides by classes"):
        ImprovedMeanFlow(DiT(8, 4, 1, 16, 1, 2, embedding_dim=8, condition_dim=3))
    with pytest.raises(ValueError, match=r"labels of shape \(2, 5\) do not fit a DiT with embedding_dim=8"):
        DiT(8, 4, 1, 16, 1, 2, embedding_dim=8)(torch.zeros(2, 1, 8, 8), *torch.zeros(2, 2), torch.zeros(2, 5))


def test_rows_that_hold_the_null_are_dropped():
    """As rows of the label num_classes are: their velocity is not guided."""
    x0, labels = digits()[:16]
    labels = torch.where(torch.arange(16) % 4 == 0, CLASSES, labels)
    for make in (SoFlow, MeanFlow):
        losses = []
        tokens = torch.stack([labels, 0 * labels], 1)
        for told, given in ((ByClass, labels), (ByEmbedding, ByClass().label.weight[labels]), (ByTokens, tokens)):
            model = make(seeded(told), guidance_scale=3.0)
            losses.append(model.loss(x0, given, 0.5, step=1).loss)
            drop = model.draw_drop(torch.arange(16), given, 0, 1)
            assert drop[::4].all()
            assert not drop.all()
        assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("of_latents", [False, True])
def test_other_conditions_are_other_data(tmp_path, of_latents):
    def run(seed):
        drawn = np.random.default_rng(seed).standard_normal((40, WIDTH)).astype(np.float32)
        config = tiny_config(tmp_path / "run", total_steps=1)
        config = replace(config, model=replace(config.model, embedding_dim=WIDTH, num_classes=0))
        if not of_latents:
            return Trainer(config, dataset=TensorDataset(digits()[:40][0], torch.from_numpy(drawn)))
        file = write_latents(tmp_path / f"{seed}.hdf5", channels=1, conditions=drawn)
        return Trainer(replace(config, data=DataConfig(kind="latents", path=str(file), workers=0)))

    run(0).fit()
    run(0).fit()
    with pytest.raises(ValueError, match="holds a run of other data: other conditions"):
        run(1).fit()


def test_a_null_that_is_a_parameter_is_trained(tmp_path):
    config = tiny_config(tmp_path, total_steps=2, model=ModelConfig("conditioned.Learned", 8, 1))
    config = replace(config, data=DataConfig(kind="conditioned.Items", workers=0))
    assert plan(config).flops > 0
    run = Trainer(config)
    before = run.model.network.null_condition.detach().clone()
    run.fit()
    assert not torch.equal(run.model.network.null_condition, before)


@pytest.mark.parametrize(
    ("of", "workers"),
    [(np.float32, 0), (torch.tensor, 0), (lambda x: nn.Parameter(torch.tensor(x)), 0), (list, 0), (list, 1)],
)
def test_conditions_that_are_no_tensors_yet(tmp_path, workers, of):
    data = [(image, of([i / 8, 0.5, 1.0])) for i, image in enumerate(digits()[:16][0])]
    config = tiny_config(tmp_path, total_steps=2, data=DataConfig(workers=workers))
    Trainer(config, model=seeded(Listed), dataset=data).fit()
    assert final(tmp_path, 2).step == 2


def test_an_item_of_another_form_is_found_when_it_is_read(tmp_path):
    data = [(image, torch.zeros(3)) for image in digits()[:16][0]]
    data[5] = (data[5][0], torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"conditions of shape \(3,\) and torch.int64"):
        Trainer(tiny_config(tmp_path, data=DataConfig(workers=1)), model=seeded(Listed), dataset=data).fit()


def test_a_null_without_an_embedding_is_found_before_the_training(tmp_path):
    net = ByTokens()
    net.null_condition[0] = CLASSES + 1
    with pytest.raises(ValueError, match="the network ByTokens fails for its null_condition"):
        Trainer(tiny_config(tmp_path), model=net, dataset=data_of(net))


def test_digits_are_scored_without_recognition_of_classes(tmp_path):
    pytest.importorskip("torch_fidelity")
    config = tiny_config(tmp_path, total_steps=1)
    config = replace(config, evaluation=replace(config.evaluation, every=1, samples=70))
    Trainer(config, model=seeded(ByLabel)).fit()
    metrics = (tmp_path / "metrics.jsonl").read_text()
    assert "evaluation/frechet_all" in metrics
    assert "recognised" not in metrics


def test_conditions_of_another_form_than_the_null_in_a_loop_of_ones_own():
    x0 = digits()[:4][0]
    with pytest.raises(
        ValueError, match=r"conditions of shape \(4, 5\) .* do not fit a null_condition of shape \(16,\)"
    ):
        SoFlow(ByEmbedding()).loss(x0, torch.zeros(4, 5), 0.5, step=0)
    with pytest.raises(ValueError, match="there are 3 labels for 4 samples"):
        list(Sampler(SoFlow(ByEmbedding()), (1, 8, 8)).draw(torch.zeros(3, WIDTH), 4))
