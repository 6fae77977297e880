"""Latent moments as EDM2's and REPA's preprocessing leave them: one file per image and an index."""

import json
import re
import threading
import time

import numpy as np
import pytest
import torch
from runs import tiny_config, write_config

from soflow_fast.build import build_dataset
from soflow_fast.cli import main
from soflow_fast.config import DataConfig, ModelConfig
from soflow_fast.data import LatentMoments, MomentsFolder, batches, find_moments_folder, load_resident

FORM = {"channels": 4, "size": 8, "num_classes": 10, "scale": 0.18215}
CPU = torch.device("cpu")


def _moments(n=70, size=(8, 8)):
    generator = np.random.default_rng(0)
    mean = 5.5 * generator.standard_normal((n, 4, *size))
    return np.concatenate([mean, generator.uniform(0.01, 0.1, mean.shape)], axis=1).astype(np.float32)


def _write(folder, moments, labels=True):
    """As the published tools lay it out; the index is not in the order of the files."""
    entries = []
    for number, one in enumerate(moments):
        name = f"{number // 25:05d}/img-mean-std-{number:08d}.npy"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / name, one)
        entries.append([name, number * 7 % 10])
    (folder / "dataset.json").write_text(json.dumps({"labels": entries[::-1] if labels else None}))
    return folder


@pytest.mark.parametrize("inside", ["", "vae-sd"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_is_recognised_and_read_as_it_is_on_the_disk(tmp_path, inside, precision):
    moments = _moments()
    _write(tmp_path / inside, moments)
    config = tiny_config(
        tmp_path / "run",
        data=DataConfig(path=str(tmp_path), latent_precision=precision),
        model=ModelConfig(input_size=8, in_channels=4, num_classes=10),
    )
    data, truth = build_dataset(config), torch.from_numpy(moments)
    assert type(data) is MomentsFolder
    assert len(data) == 70
    wanted = [69, 3, 0, 3, 41]
    for (one, label), index in zip(data.__getitems__(wanted), wanted, strict=True):
        assert one.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
        assert torch.equal(one, truth[index].to(one.dtype))
        assert label == index * 7 % 10
    held = load_resident(data, CPU, 10)
    assert torch.equal(held.samples, truth.to(held.samples.dtype))
    assert held.labels.tolist() == [index * 7 % 10 for index in range(70)]
    options = {"batch": 8, "seed": 3, "num_classes": 10, "device": CPU, "steps": range(3)}
    for (x, y), (x_held, y_held) in zip(batches(data, workers=2, **options), batches(held, **options), strict=True):
        assert torch.equal(x, x_held)
        assert torch.equal(y, y_held)


def test_one_thread_at_a_time_is_in_pythons_parser(tmp_path, monkeypatch):
    free, was_free, read_array = threading.Lock(), [], np.lib.format.read_array

    def parse_slowly(*args, **kwargs):
        was_free.append(alone := free.acquire(blocking=False))
        time.sleep(0.001)  # the others run meanwhile
        if alone:
            free.release()
        return read_array(*args, **kwargs)

    _write(tmp_path, _moments())
    data = MomentsFolder(tmp_path, **FORM)
    monkeypatch.setattr(np.lib.format, "read_array", parse_slowly)
    assert data.read_range(0, 70)[0].shape == (70, 8, 8, 8)
    assert was_free == 70 * [True]


def test_of_a_height_and_a_width(tmp_path):
    moments = _moments(3, (8, 12))
    _write(tmp_path, moments)
    assert np.array_equal(MomentsFolder(tmp_path, **{**FORM, "size": (8, 12)}).read_range(0, 3)[0].numpy(), moments)
    with pytest.raises(ValueError, match=r"of shape \(8, 8, 12\), and this model needs floats of shape \(8, 12, 8\)"):
        MomentsFolder(tmp_path, **{**FORM, "size": (12, 8)})


def test_without_labels(tmp_path):
    _write(tmp_path, _moments(3), labels=False)
    data = MomentsFolder(tmp_path, **{**FORM, "num_classes": 0})
    assert np.array_equal(data.read_range(0, 3)[0].numpy(), _moments(3))
    assert data.read_range(0, 3)[1].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"dataset\.json has no labels; set model\.num_classes=0"):
        MomentsFolder(tmp_path, **FORM)


def test_a_run_on_them(tmp_path):
    _write(tmp_path / "latents", _moments())
    config = tiny_config(
        tmp_path / "run",
        data=DataConfig(path=str(tmp_path / "latents"), workers=0),
        model=ModelConfig(
            input_size=8, in_channels=4, num_classes=10, patch_size=4, hidden_size=16, depth=1, num_heads=2
        ),
        total_steps=2,
    )
    assert main(["train", str(write_config(tmp_path / "config.yaml", config))]) == 0
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()


def test_what_is_no_folder_of_this_form_is_read_as_hdf5(tmp_path):
    assert find_moments_folder(tmp_path) is None
    assert find_moments_folder(tmp_path / "latents.hdf5") is None
    with pytest.raises(ValueError, match=r"imagenet_latent\.hdf5 does not exist; .* or to a folder with dataset\.json"):
        LatentMoments(tmp_path, **FORM)


def _index(labels):
    return lambda folder: (folder / "dataset.json").write_text(json.dumps({"labels": labels}))


def _array(array, number=0):
    return lambda folder: np.save(folder / "00000" / f"img-mean-std-{number:08d}.npy", array)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "dataset.json").write_text("{"), 'dataset.json is not {"labels": [["00000/img-'),
        (lambda folder: (folder / "dataset.json").write_text("[]"), "dataset.json is not"),
        (lambda folder: (folder / "dataset.json").write_text("{}"), "dataset.json is not"),
        (_index([["a.npy", 1], ["b.npy"]]), "dataset.json is not"),
        (_index(3), "dataset.json is not"),
        (_index([]), "holds no samples"),
        (_index([["00000/img00000000.png", 1]]), "lists '00000/img00000000.png'; set data.path to a folder of latents"),
        (_index([["00000/img-mean-std-00000000.npy", [0, 1]]]), "must be integers, one per file"),
        (_index([["00000/img-mean-std-00000000.npy", 10]]), "go from 10 to 10, outside the classes 0..9; set model."),
        (_index([["00000/img-mean-std-00000000.npy", -1]]), "go from -1 to -1, outside"),
        (_index([["nowhere.npy", 1]]), "nowhere.npy cannot be read ("),
        (lambda folder: next(folder.rglob("*0.npy")).write_bytes(b""), "00000000.npy cannot be read ("),
        (lambda folder: next(folder.rglob("*0.npy")).write_bytes(b"text"), "00000000.npy cannot be read ("),
        (_array(np.zeros((4, 8, 8), np.float32)), "are float32 of shape (4, 8, 8), and this model needs floats of"),
        (_array(np.zeros((8, 8, 8), np.uint8)), "are uint8 of shape (8, 8, 8), and this model needs floats of"),
        (_array(np.full((8, 8, 8), np.nan, np.float32)), "have values that are not finite; write them again"),
        (
            _array(np.full((8, 8, 8), -1, np.float32)),
            "must not be negative; store the mean, then the standard deviation",
        ),
        (
            _array(np.full((8, 8, 8), 1e3, np.float32)),
            "it should be near 1: store them unscaled, or set data.latent_",
        ),
    ],
)
def test_what_is_refused(tmp_path, damage, words):
    _write(tmp_path, _moments(3))
    MomentsFolder(tmp_path, **FORM)
    damage(tmp_path)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        MomentsFolder(tmp_path, **FORM)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_damaged_since_is_one_sentence_from_a_reader(tmp_path):
    _write(tmp_path, _moments(8))
    data = MomentsFolder(tmp_path, **FORM)
    next(tmp_path.rglob("*3.npy")).unlink()
    with pytest.raises(ValueError, match=r"00000003\.npy cannot be read \(.*\); write or copy it again"):
        list(batches(data, batch=8, steps=range(1), seed=0, num_classes=10, device=CPU, workers=1))


def test_without_an_index_of_names_links_are_followed(tmp_path):
    moments = _moments()
    _write(tmp_path / "data", moments, labels=False)
    (tmp_path / "data" / "00001").rename(tmp_path / "elsewhere")
    (tmp_path / "data" / "00001").symlink_to(tmp_path / "elsewhere")
    data = MomentsFolder(tmp_path / "data", **{**FORM, "num_classes": 0})
    assert torch.equal(data.read_range(0, 70)[0], torch.from_numpy(moments))
