"""What is given to the Trainer as an object and cannot work is refused in one sentence, before or at the first step."""

import copy
import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from runs import Augmented, Blobs, final, tiny_config, write_images
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from soflow_fast import DiT, SoFlow, Trainer, TrainStep
from soflow_fast.config import DataConfig
from soflow_fast.data import ImageFolder
from soflow_fast.fingerprint import fingerprint
from soflow_fast.objectives.base import Objective
from soflow_fast.optim import AdamW


class _Net(nn.Module):
    """With as many rows of labels as wanted."""

    num_classes = 10

    def __init__(self, rows=11, answer=lambda x: x):
        super().__init__()
        self.weight, self.labels, self.answer = nn.Parameter(torch.ones(1)), nn.Embedding(rows, 1), answer
        self.dropout, self.norm, self.device = nn.Dropout(0.5), nn.BatchNorm2d(1), None

    def forward(self, x, t, s, labels):
        self.device = x.device  # what a first call leaves behind
        h = self.norm(self.dropout(x * self.weight + self.labels(labels)[:, :, None, None]))
        return self.answer(h)


def _refused(tmp_path, sentence, **given):
    config = given.pop("config", None) or tiny_config(tmp_path)
    with pytest.raises(ValueError, match=sentence) as error:
        Trainer(config, **given).fit()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "checkpoints").exists()


class _WithState(_Net):
    def get_extra_state(self):
        return {"calls": 1}

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize(
    ("net", "sentence"),
    [
        (_Net().requires_grad_(False), "the network _Net has no parameter with requires_grad"),
        (_Net().double(), r"the network _Net has parameters in torch.float64, .* call \.float\(\) on it"),
        (_Net().bfloat16(), r"parameters in torch.bfloat16"),
        (_WithState(), r"the state of the network _WithState has at 'network._extra_state' a dict"),
    ],
)
def test_networks_that_cannot_be_trained(tmp_path, net, sentence):
    _refused(tmp_path, sentence, model=net)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (lambda h: (h, h), "a tuple"),
        (lambda h: h.mean((2, 3)), r"a tensor of shape \(1, 1\)"),
        (lambda h: torch.cat([h, h], 1), r"a tensor of shape \(1, 2, 8, 8\)"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_networks_of_another_output(tmp_path, answer, found, wrapped):
    net = _Net(answer=answer)
    sentence = rf"the network _Net returns {found} for x of shape \(1, 1, 8, 8\); .* one tensor of the shape of x"
    _refused(tmp_path, sentence, model=SoFlow(net) if wrapped else net)


def test_a_network_without_a_row_for_no_label(tmp_path):
    sentence = (
        r"the network _Net fails for the label 10, .* 'no label' \(index out of range in self\); .* \+ 1 rows, or"
    )
    _refused(tmp_path, sentence, model=_Net(rows=10))
    config = tiny_config(tmp_path)
    config = replace(config, soflow=replace(config.soflow, guidance_scale=1.0, label_drop=0.0))
    Trainer(config, model=_Net(rows=10))


def test_the_look_at_a_network_leaves_no_trace(tmp_path):
    net = _Net()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    Trainer(tiny_config(tmp_path), model=net)
    assert net.device is None
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_look_at_the_data_leaves_the_generators(tmp_path):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    Trainer(tiny_config(tmp_path), dataset=Augmented())
    write_images(tmp_path / "images")
    fingerprint(ImageFolder(tmp_path / "images", channels=3, size=8, num_classes=2, flip=True), num_classes=2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


class _NoLoss(Objective):
    path = "linear"


class _TensorLoss(SoFlow):
    def loss_of_rows(self, *args, **kwargs):
        return super().loss_of_rows(*args, **kwargs).loss


class _NoSolution(Objective):
    path = "linear"
    loss_of_rows = SoFlow.loss_of_rows


def test_objectives_that_lack_something(tmp_path):
    _refused(tmp_path, "the objective _NoLoss has no loss_of_rows; implement it", model=_NoLoss(_Net(), 0.75, None))
    sentence = r"_TensorLoss\.loss_of_rows returns a Tensor; it must return a TotalLoss\(loss, parts\)"
    _refused(tmp_path, sentence, model=_TensorLoss(DiT(8, 4, 1, 16, 1, 2, num_classes=10)))
    config = tiny_config(tmp_path)
    sampling = replace(config, output=replace(config.output, sample_every=2))
    sentence = r"_NoSolution has no solution; .*, or set output\.sample_every=0 and evaluation\.every=0"
    _refused(tmp_path, sentence, model=_NoSolution(_Net(), 0.75, None), config=sampling)
    Trainer(config, model=_NoSolution(_Net(), 0.75, None))


class _Stream(IterableDataset):
    def __len__(self):
        return 64

    def __iter__(self):
        yield from Blobs()


class _From1(Blobs):
    def __getitem__(self, index):
        sample, label = super().__getitem__(index)
        return sample, label + 1


def test_data_of_another_kind(tmp_path):
    _refused(tmp_path, r"dataset is a DataLoader, .* dataset=loader\.dataset", dataset=DataLoader(Blobs()))
    _refused(tmp_path, "the data set _Stream cannot be indexed; give a map-style one", dataset=_Stream())
    _refused(tmp_path, "the data set set cannot be indexed", dataset={1, 2})


def test_labels_that_start_at_1(tmp_path):
    sentence = r"labels from 1 to 10, outside the classes 0\.\.9; labels start at 0, and model\.num_classes"
    labels = torch.arange(60) % 10 + 1
    _refused(tmp_path, sentence, dataset=TensorDataset(torch.randn(60, 1, 8, 8), labels))
    twice = TensorDataset(torch.randn(60, 2, 8, 8), torch.arange(60) % 10)
    _refused(tmp_path, "2 channels, twice model.in_channels=1, .* are negative; for samples of so many", dataset=twice)
    _refused(tmp_path, "must be a pair of", dataset=TensorDataset(torch.randn(60, 1, 8, 8), torch.eye(10).repeat(6, 1)))
    config = tiny_config(tmp_path)
    with pytest.raises(ValueError, match=r"outside the classes 0\.\.9; labels start at 0, and model\.num_classes"):
        Trainer(config, dataset=_From1(n=160)).fit()
    more = replace(config, run_dir=str(tmp_path / "more"), model=replace(config.model, num_classes=11))
    Trainer(more, dataset=_From1()).fit()
    assert final(tmp_path / "more").step == 6


def test_another_number_of_classes_than_the_network_has(tmp_path):
    config = tiny_config(tmp_path)
    for number, refused in ((7, True), (0, False), (10, False), (1000, False)):
        changed = replace(config, model=replace(config.model, num_classes=number))
        if refused:
            with pytest.raises(
                ValueError, match=r"model\.num_classes=7 and the network DiT has 10; leave the first out"
            ):
                Trainer(changed, model=DiT(8, 4, 1, 16, 1, 2, num_classes=10))
        else:
            trained = Trainer(changed, model=DiT(8, 4, 1, 16, 1, 2, num_classes=10))
            assert trained.config.model.num_classes == (number and 10)


class _Varying(Blobs):
    """One of its samples has another shape."""

    def __getitem__(self, index):
        x, label = super().__getitem__(index)
        return (x[:, :4] if index == 9 else x), label


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_of_several_shapes(tmp_path, workers):
    config = tiny_config(tmp_path, data=DataConfig(workers=workers))
    _refused(tmp_path, r"samples of shape \(1, .*; make all of one shape", config=config, dataset=_Varying(16))


def test_an_error_of_the_data_leaves_the_process_as_it_was(tmp_path):
    """The tracebacks that are kept here also keep what torch read with."""
    kept = []
    for i in range(2):
        config = tiny_config(tmp_path / str(i), data=DataConfig(workers=2), total_steps=8)
        with pytest.raises(ValueError, match="make all of one shape") as error:  # after the first batch
            Trainer(config, dataset=_Varying(128)).fit()
        kept.append(error)
        time.sleep(0.2)  # a reader that is killed is noticed by a signal
    Trainer(tiny_config(tmp_path / "good", data=DataConfig(workers=2), total_steps=2), dataset=Blobs(16)).fit()


def test_objects_of_another_kind(tmp_path):
    config, net = tiny_config(tmp_path), _Net()
    net.velocity_share = 0.75  # does not make an objective of it
    for given, sentence in (
        (lambda: Trainer("imagenet.yaml"), "config is a str; give a TrainConfig, such as TrainConfig.from_yaml"),
        (lambda: Trainer(config, model=_Net), "no torch.nn.Module; give an object, such as Net"),
        (
            lambda: TrainStep(net, optimizer=None, total_steps=1),
            r"no objective; give one over it, such as SoFlow\(net\)",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            given()
    model = SoFlow(net)
    step = TrainStep(model, optimizer=AdamW(net.parameters()), total_steps=1)
    with pytest.raises(ValueError, match=r"x0 has dtype torch\.uint8; give samples in floating point"):
        step(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="there are 3 labels for 1 samples of noise"):
        model.sample(torch.zeros(1, 1, 8, 8), torch.zeros(3, dtype=torch.int64))
