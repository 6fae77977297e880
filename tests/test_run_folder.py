"""Going on with a run whose data or configuration are no longer those it began with."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partialmethod

import pytest
import torch
from runs import Blobs, files, final, tiny_config, write_config, write_images, write_latents
from torch.utils.data import TensorDataset

from soflow_fast import Trainer, run_folder, trainer
from soflow_fast.cli import main
from soflow_fast.config import ComputeConfig, DataConfig, EMAConfig, OptimizerConfig, OutputConfig
from soflow_fast.require import brief_difference
from soflow_fast.trainer import load_run

# ---------------------------------------------------------------------------------------------------------- the data


def _folder_run(tmp_path, **changes):
    """A run of 2 of 6 steps on images of two classes, and the configuration to go on with."""
    write_images(tmp_path / "images")
    data = DataConfig(kind="folder", path=str(tmp_path / "images"), workers=0)
    config = tiny_config(tmp_path / "run", data=data, **changes)
    config = replace(config, model=replace(config.model, in_channels=3))
    Trainer(config).fit()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    return config


def _refused(run):
    with pytest.raises(ValueError, match="holds a run of other data: ") as error:
        run.fit()
    return str(error.value)


def test_the_classes_are_on_record(tmp_path):
    config = _folder_run(tmp_path)
    record = json.loads((tmp_path / "run" / "data.json").read_text())
    assert (record["samples"], record["shape"], record["classes"]) == (30, [3, 8, 8], ["class0", "class1"])
    Trainer(config).fit()
    assert json.loads((tmp_path / "run" / "data.json").read_text()) == record


def test_images_that_changed_are_refused(tmp_path):
    config = _folder_run(tmp_path)
    images, aside = tmp_path / "images", tmp_path / "aside"
    shutil.copytree(images / "class0", images / "aardvark")
    assert "other data: the class folder 'aardvark' is new; put the data back as they were" in _refused(Trainer(config))
    shutil.rmtree(images / "aardvark")
    shutil.move(images / "class1" / "1.png", aside)
    assert "29 samples in place of 30" in _refused(Trainer(config))
    shutil.copy(aside, images / "class1" / "x.png")
    assert "other names of files or other labels" in _refused(Trainer(config))
    shutil.move(images / "class1" / "x.png", images / "class1" / "1.png")
    Trainer(config).fit()
    assert final(tmp_path / "run").step == 6


@pytest.mark.parametrize("on_device", [False, True])
def test_latents_that_changed_are_refused(tmp_path, on_device):
    file = tmp_path / "latents.hdf5"
    data = DataConfig(path=str(write_latents(file)), workers=0, on_device=on_device)
    config = tiny_config(tmp_path / "run", data=data)
    config = replace(config, model=replace(config.model, in_channels=4))
    Trainer(config).fit()
    write_latents(file, labels=torch.arange(40).flip(0).numpy() % 10)
    assert "other names of files or other labels" in _refused(Trainer(config))
    file.unlink()  # it is still open
    write_latents(file, n=39)
    assert "39 samples in place of 40" in _refused(Trainer(config))


def test_given_data_that_changed_are_refused(tmp_path):
    config = tiny_config(tmp_path)
    Trainer(config, dataset=Blobs()).fit()
    assert json.loads((tmp_path / "data.json").read_text()) == {"samples": 64}
    assert "63 samples in place of 64" in _refused(Trainer(config, dataset=Blobs(n=63)))


class _Labelled(Blobs):
    """With its labels at hand, as torchvision's data sets have them."""

    def __init__(self, shift):
        super().__init__()
        self.targets = [(i + shift) % 10 for i in range(len(self))]

    def __getitem__(self, index):
        return super().__getitem__(index)[0], self.targets[index]


def test_given_labels_that_changed_are_refused(tmp_path):
    config = tiny_config(tmp_path)
    Trainer(config, dataset=_Labelled(0)).fit()
    Trainer(config, dataset=_Labelled(10)).fit()
    assert "holds a run of other data: other labels; put" in _refused(Trainer(config, dataset=_Labelled(3)))
    record = tmp_path / "data.json"
    assert len(json.loads(record.read_text())["labels"]) == 64
    Trainer(config, dataset=Blobs()).fit()  # has none at hand


def test_labels_that_nobody_looks_at_may_change(tmp_path):
    config = tiny_config(tmp_path)
    config = replace(config, model=replace(config.model, num_classes=0))
    config = replace(config, soflow=replace(config.soflow, guidance_scale=1.0, label_drop=0.0))
    samples = torch.randn(32, 1, 8, 8)
    for labels in (torch.zeros(32), torch.ones(32)):
        Trainer(config, dataset=TensorDataset(samples, labels.long())).fit()


def test_the_data_may_lie_elsewhere(tmp_path, monkeypatch):
    config = _folder_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    shutil.copytree("images", "elsewhere/images")
    for path in ("images", "./images", "elsewhere/images"):
        Trainer(replace(config, data=replace(config.data, path=path))).fit()
    shutil.move("elsewhere/images/class1", "elsewhere/images/class2")
    renamed = Trainer(replace(config, data=replace(config.data, path="elsewhere/images")))
    assert "the class folder 'class2' is new and the class folder 'class1' is gone" in _refused(renamed)


def test_a_run_without_one_of_its_records_is_refused(tmp_path):
    config = tiny_config(tmp_path, total_steps=1)
    Trainer(config).fit()
    for name in ("optimizer.json", "data.json"):
        (tmp_path / name).unlink()
        with pytest.raises(
            ValueError, match=f"holds a run without its {name}; put that back, or choose another folder"
        ):
            Trainer(config).fit()


@pytest.mark.parametrize("left", ["", "\0\0\0"])
@pytest.mark.parametrize("name", ["config.yaml", "data.json", "optimizer.json", "given.json"])
def test_a_record_that_a_power_loss_emptied_is_told_as_lost(tmp_path, name, left):
    config = tiny_config(tmp_path / "run", total_steps=1)
    Trainer(config).fit()
    (tmp_path / "run" / name).write_text(left)
    with pytest.raises(ValueError, match=f"holds a run whose {name} is empty: it was lost, .* put a copy of it back"):
        Trainer(config).fit()
    Trainer(replace(config, run_dir=str(tmp_path / "other"), initial_weights=str(tmp_path / "run"))).fit()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert Trainer(config).fit().name == "step-00000001"  # a run that had not begun


# ------------------------------------------------------------------------------------------------- declared changes


def _changes(run_dir):
    return [json.loads(line) for line in (run_dir / "changes.jsonl").read_text().splitlines()]


def _learning_rate(config, value, **others):
    return replace(config, optimizer=replace(config.optimizer, learning_rate=value, **others))


def test_a_run_goes_on_with_declared_changes(tmp_path, capsys):
    first = tiny_config(tmp_path, total_steps=4)
    Trainer(first).fit()
    second = _learning_rate(replace(first, total_steps=6), 2e-3, betas=(0.5, 0.6), weight_decay=0.1)
    flag = r"choose another run_dir, or go on with --accept-changes \(in Python, Trainer\(\.\.\., accept_changes=True"
    with pytest.raises(ValueError, match=rf"total_steps=4, and this one has 6; use that value, {flag}"):
        Trainer(second).fit()
    assert not (tmp_path / "changes.jsonl").exists()
    run = Trainer(second, accept_changes=True)
    run.fit()
    assert "changed after step 4: optimizer.learning_rate from 0.001 to 0.002" in capsys.readouterr().err
    assert _changes(tmp_path) == [
        {"step": 4, "key": "total_steps", "before": 4, "after": 6},
        {"step": 4, "key": "optimizer.learning_rate", "before": 1e-3, "after": 2e-3},
        {"step": 4, "key": "optimizer.betas", "before": [0.9, 0.99], "after": [0.5, 0.6]},
        {"step": 4, "key": "optimizer.weight_decay", "before": 0.0, "after": 0.1},
    ]
    group = run.optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"], group["lr"]) == ((0.5, 0.6), 0.1, 2e-3)
    Trainer(second).fit()  # the changed run is now the run
    assert len(_changes(tmp_path)) == 4
    assert final(tmp_path).step == 6


def test_changes_are_recorded_once_though_a_kill_follows(tmp_path, monkeypatch):
    config = tiny_config(tmp_path)
    Trainer(config).fit()
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000006")
    changed = replace(config, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(type(config), "to_yaml", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Trainer(changed, accept_changes=True).fit()
    Trainer(changed, accept_changes=True).fit()
    assert _changes(tmp_path) == [{"step": 4, "key": "seed", "before": 0, "after": 1}]


@pytest.mark.parametrize(
    "change",
    [
        {"objective": "flow_matching"},
        {"optimizer": OptimizerConfig(name="radam", learning_rate=1e-3, weight_decay=0.1)},
        {"batch_size": 8},
        {"ema": EMAConfig(decay=0.9)},
    ],
    ids=str,
)
def test_what_can_change(tmp_path, change):
    config = tiny_config(tmp_path, ema=EMAConfig(posthoc=(0.05, 0.1), snapshot_every=6))
    Trainer(config).fit()
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000006")
    Trainer(replace(config, **change), accept_changes=True).fit()
    assert final(tmp_path).step == 6
    assert _changes(tmp_path)[0]["step"] == 4


def test_the_precision_that_was_chosen_is_the_runs(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, total_steps=2)
    Trainer(config).fit()
    record = (tmp_path / "config.yaml").read_text()
    assert "compute:\n  precision: fp32\n" in record

    def computed(**values):
        return replace(config, compute=ComputeConfig(**values))

    for same in (config, computed(precision="fp32"), computed(compile=False, cuda_graph=False)):
        Trainer(same).fit()
    with pytest.raises(ValueError, match=r"compute\.precision='fp32', and this one has 'bf16'; use that value"):
        Trainer(computed(precision="bf16")).fit()
    with monkeypatch.context() as patch:  # as on another device
        patch.setattr(trainer.TrainStep, "__init__", partialmethod(trainer.TrainStep.__init__, precision="bf16"))
        patch.setattr(trainer, "asdict", lambda compute: {"compile": False, "cuda_graph": False})
        with pytest.raises(ValueError, match=r"compute\.precision='fp32', and this one has 'bf16'; use that value"):
            Trainer(config).fit()


def test_what_cannot_change(tmp_path):
    config = tiny_config(tmp_path)
    Trainer(config).fit()
    before = files(tmp_path)
    for change, words in (
        ({"model": replace(config.model, hidden_size=32)}, r"of another model: network\."),
        ({"total_steps": 4}, "total_steps=4 is less than the 6 steps that the run has done"),
        (
            {"ema": EMAConfig(posthoc=(0.05, 0.1), snapshot_every=6)},
            r"ema\.posthoc has 0\.05, which the run has not averaged",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            Trainer(replace(config, **change), accept_changes=True).fit()
    assert files(tmp_path) == before


def test_data_that_changed_can_be_accepted(tmp_path):
    config = _folder_run(tmp_path)
    (tmp_path / "images" / "class1" / "1.png").unlink()
    Trainer(config, accept_changes=True).fit()
    (change,) = _changes(tmp_path / "run")
    assert (change["key"], change["before"]["samples"], change["after"]["samples"]) == ("data", 30, 29)
    assert json.loads((tmp_path / "run" / "data.json").read_text()) == change["after"]


def test_a_dry_run_in_a_run_s_folder_says_what_training_would(tmp_path, capsys):
    config = tiny_config(tmp_path / "run")
    Trainer(config).fit()
    path, before = write_config(tmp_path / "config.yaml", config), files(tmp_path / "run")
    capsys.readouterr()
    dry_run = ["train", str(path), "--dry-run"]
    assert main(dry_run) == 0
    same = capsys.readouterr().out
    assert "goes on after step      6\n" in same
    assert "change of" not in same
    assert main([*dry_run, "--total_steps", "8"]) == 2
    assert "holds a run with total_steps=6, and this one has 8" in capsys.readouterr().err
    assert main([*dry_run, "--total_steps", "8", "--accept-changes"]) == 0
    assert "change of total_steps   from 6 to 8\n" in capsys.readouterr().out
    assert files(tmp_path / "run") == before


def test_a_dry_run_leaves_the_precision_to_the_machine_that_trains(tmp_path, capsys):
    """Of a run on a GPU, on a machine without."""
    config = tiny_config(tmp_path / "run")
    Trainer(config).fit()
    record = tmp_path / "run" / "config.yaml"
    record.write_text(record.read_text().replace("\n  precision: fp32", "\n  precision: bf16"))
    dry_run = ["train", str(write_config(tmp_path / "config.yaml", config)), "--dry-run"]
    assert main(dry_run) == 0
    assert main([*dry_run, "--compute.precision", "fp32"]) == 2
    assert "holds a run with compute.precision='bf16'" in capsys.readouterr().err


def test_the_advice_after_a_divergence_can_be_followed(tmp_path, capsys):
    output = OutputConfig(log_every=1, sample_every=0)
    path = write_config(tmp_path / "config.yaml", tiny_config(tmp_path / "run", output=output))
    assert main(["train", str(path), "--optimizer.learning_rate", "1e30"]) == 1
    assert "lower optimizer.learning_rate or set optimizer.grad_clip and go on with --accept-changes" in (
        capsys.readouterr().err
    )
    assert main(["train", str(path)]) == 2
    assert "or go on with --accept-changes" in capsys.readouterr().err
    assert main(["train", str(path), "--accept-changes"]) == 0
    assert final(tmp_path / "run").step == 6


# ---------------------------------------------------------------------------------------------------------- the lock

_HOLD = """
import sys
from pathlib import Path
from soflow_fast.run_folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_in_which_another_process_trains_is_refused_until_that_ends(tmp_path):
    config = tiny_config(tmp_path)
    Trainer(replace(config, total_steps=4, output=OutputConfig(checkpoint_every=2))).fit()
    command = [sys.executable, "-c", _HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        before = files(tmp_path)
        with pytest.raises(ValueError, match=f"is being trained in by process {other.pid} of .*; wait for its end"):
            Trainer(config, accept_changes=True).fit()
        assert files(tmp_path) == before
        load_run(tmp_path, "cpu")  # reading is no training
        other.kill()
    Trainer(config, accept_changes=True).fit()
    assert final(tmp_path).step == 6


def test_a_folder_in_which_this_process_trains_is_refused_and_stays_locked(tmp_path):
    with run_folder.locked(tmp_path):
        with pytest.raises(ValueError, match=f"is being trained in by process {os.getpid()} of"):
            Trainer(tiny_config(tmp_path)).fit()
        assert not (tmp_path / "config.yaml").exists()
        other = subprocess.run([sys.executable, "-c", _HOLD, str(tmp_path)], input="", capture_output=True, text=True)
        assert "is being trained in by" in other.stderr
    Trainer(tiny_config(tmp_path)).fit()
    assert final(tmp_path).step == 6


def test_what_another_process_trained_meanwhile_is_not_lost(tmp_path, monkeypatch):
    """It came and went between the reading of the folder and its lock."""
    locked = run_folder.locked

    def late(folder):
        monkeypatch.setattr(run_folder, "locked", locked)
        Trainer(tiny_config(tmp_path)).fit()
        return locked(folder)

    ours = Trainer(replace(tiny_config(tmp_path), seed=1))
    monkeypatch.setattr(run_folder, "locked", late)
    with pytest.raises(ValueError, match="holds a run with seed=0"):
        ours.fit()
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000006")
    monkeypatch.setattr(run_folder, "locked", late)
    with pytest.raises(ValueError, match="was trained in by another process while this one read its step 4; give the"):
        Trainer(tiny_config(tmp_path)).fit()
    assert final(tmp_path).step == 6


def test_readers_that_outlive_a_killed_run_do_not_hold_its_folder(tmp_path):
    with run_folder.locked(tmp_path):
        reader = os.fork()
        if not reader:
            time.sleep(60)
            os._exit(0)
    other = [sys.executable, "-c", _HOLD, str(tmp_path)]
    try:
        assert subprocess.run(other, stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout == "held\n"
    finally:
        os.kill(reader, signal.SIGKILL)
        os.waitpid(reader, 0)


def test_where_files_cannot_be_locked_a_run_trains_without(tmp_path, monkeypatch):
    def unable(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(run_folder.fcntl, "flock", unable)
    Trainer(tiny_config(tmp_path)).fit()
    assert final(tmp_path).step == 6


def test_what_differs_of_long_values_is_told():
    long = tuple(range(300))
    assert brief_difference(long, (*long[:40], -1.5, *long[41:])) == (
        "40 in place 41 of 300",
        "-1.5 in place 41 of 300",
    )
    many = {f"setting_{i}": i for i in range(60)}
    assert brief_difference(many, {**many, "setting_50": "x"}) == ("{'setting_50': 50}", "{'setting_50': 'x'}")
    assert brief_difference({"a": 1, "b": None}, {"a": 1}) == ("{'a': 1, 'b': None}", "{'a': 1}")
    assert brief_difference(long, ())[0] == "(0, 1, 2, 3, 4, 5, 6, 7, ...)"
