"""Going on with a run whose data or configuration are no longer those it began with."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from runs import Blobs, final, tiny_config, write_images, write_latents
from torch.utils.data import TensorDataset

from soflow_fast import Trainer
from soflow_fast.config import DataConfig

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


def test_labels_that_nobody_looks_at_may_change(tmp_path):
    config = tiny_config(tmp_path)
    config = replace(config, model=replace(config.model, num_classes=0))
    config = replace(config, soflow=replace(config.soflow, guidance_scale=1.0, label_drop=0.0))
    samples = torch.randn(32, 1, 8, 8)
    for labels in (torch.zeros(32), torch.ones(32)):
        Trainer(config, dataset=TensorDataset(samples, labels.long())).fit()


def test_a_run_without_the_record_gets_it(tmp_path):
    config = _folder_run(tmp_path)
    record = (tmp_path / "run" / "data.json").read_bytes()
    (tmp_path / "run" / "data.json").unlink()
    Trainer(config).fit()
    assert (tmp_path / "run" / "data.json").read_bytes() == record


def test_the_data_may_lie_elsewhere(tmp_path, monkeypatch):
    config = _folder_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    shutil.copytree("images", "elsewhere/images")
    for path in ("images", "./images", "elsewhere/images"):
        Trainer(replace(config, data=replace(config.data, path=path))).fit()
    shutil.move("elsewhere/images/class1", "elsewhere/images/class2")
    renamed = Trainer(replace(config, data=replace(config.data, path="elsewhere/images")))
    assert "the class folder 'class2' is new and the class folder 'class1' is gone" in _refused(renamed)


def test_a_run_without_the_record_stays_with_its_path(tmp_path):
    config = _folder_run(tmp_path)
    (tmp_path / "run" / "data.json").unlink()
    shutil.copytree(tmp_path / "images", tmp_path / "others")
    elsewhere = Trainer(replace(config, data=replace(config.data, path=str(tmp_path / "others"))))
    assert "the run has no data.json" in _refused(elsewhere)
