"""What is said of a data set before a run: its size, labels that are no classes, pixels in another range."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from runs import Augmented, Blobs, tiny_config, write_config
from torch.utils.data import TensorDataset

from soflow_fast import Trainer
from soflow_fast.cli import main
from soflow_fast.data import digits
from soflow_fast.data.checks import described, require_labels_at_hand, warn_of_other_range


def test_samples_and_classes_are_counted():
    assert described(digits(), 10) == "1,347 samples of 10 classes"
    assert described(digits(), 12) == "1,347 samples of 10 of 12 classes"
    assert described(Blobs(), 7) == "64 samples of 7 classes"
    assert described(Blobs(), 0) == "64 samples without classes"
    assert described(Blobs(), 0, torch.zeros(5)) == "64 samples with conditions"


def test_training_and_a_dry_run_say_them(tmp_path, capsys):
    path = str(write_config(tmp_path / "config.yaml", tiny_config(tmp_path / "run", total_steps=1)))
    assert main(["train", path, "--dry-run"]) == 0
    assert "data set                1,347 samples of 10 classes\n" in capsys.readouterr().out
    assert main(["train", path]) == 0
    assert capsys.readouterr().err.count("data: 1,347 samples of 10 classes\n") == 1


# --------------------------------------------------------------------------------------------------------- labels


def test_a_dry_run_refuses_labels_that_training_would(tmp_path, capsys):
    path = str(write_config(tmp_path / "config.yaml", tiny_config(tmp_path / "run")))
    for options in (["--dry-run"], []):
        assert main(["train", path, "--model.num_classes", "3", *options]) == 2
        assert "labels from 0 to 9, outside the classes 0..2; labels start at 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


class _Kept(Blobs):
    """Keeps labels that it does not, or does, yield."""

    def __init__(self, targets, yields):
        super().__init__(n=len(targets))
        self.targets, self.yields = targets, yields

    def __getitem__(self, index):
        return self.samples[index], self.yields(self.targets[index])


def test_labels_at_hand_count_only_if_they_are_what_an_item_has():
    for targets in ([0, 1, 30, 2], [0, -1, 1, 2], np.array([0, 1, 30, 2], np.uint8)):
        require_labels_at_hand(_Kept(targets, lambda label: label % 3), 3)
        require_labels_at_hand(_Kept(targets, int), 0)
        require_labels_at_hand(_Kept(targets, int), 31 if min(targets) >= 0 else 0)
        with pytest.raises(ValueError, match=r"labels from -?\d to (30|2), outside the classes 0\.\.2"):
            require_labels_at_hand(_Kept(targets, int), 3)


# ---------------------------------------------------------------------------------------------------------- range


@pytest.mark.parametrize(
    ("scale", "found", "remedy"),
    [
        (lambda x: x, None, None),
        (lambda x: 1 + 0 * x, None, None),
        (lambda x: 300 * x.abs(), None, None),
        (lambda x: (x + 1) / 2, "[0, 1]", "x * 2 - 1"),
        (lambda x: ((x + 1) * 127.5).double(), "[0, 255]", "x / 127.5 - 1"),
    ],
)
def test_pixels_in_another_range_are_a_warning(tmp_path, caplog, monkeypatch, scale, found, remedy):
    images, labels = digits("train").tensors
    words = f"the samples lie in {found} (16 were looked at), and images should lie in about [-1, 1]; scale them by"
    expected = [] if found is None else [f"{words} {remedy}"]
    Trainer(tiny_config(tmp_path), dataset=TensorDataset(scale(images), labels))
    assert caplog.messages == expected
    monkeypatch.setenv("RANK", "1")
    warn_of_other_range(TensorDataset(scale(images), labels))
    assert caplog.messages == expected


def test_only_pixels_are_looked_at(tmp_path, caplog):
    config = tiny_config(tmp_path)
    config = replace(config, model=replace(config.model, in_channels=4))
    data = TensorDataset(torch.rand(40, 4, 8, 8), torch.arange(40) % 10)
    Trainer(config, dataset=data)
    assert caplog.messages == []


class _Broken(Blobs):
    def __getitem__(self, index):
        if index:
            raise OSError("this item cannot be read")
        return super().__getitem__(index)


def test_the_look_draws_nothing_and_is_never_an_error(caplog):
    def states():
        return str((torch.get_rng_state().tolist(), np.random.get_state(), random.getstate()))

    before = states()
    warn_of_other_range(Augmented())
    assert states() == before
    for dataset in (_Broken(), [(None, 0)], []):
        warn_of_other_range(dataset)
    assert caplog.messages == []
