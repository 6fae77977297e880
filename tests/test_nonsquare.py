"""Samples whose height and width differ: runs of every kind of network on every kind of data, and their pictures."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import (
    Blobs,
    StopError,
    assert_bitwise_equal,
    final,
    stop_at,
    tiny_config,
    write_config,
    write_images,
    write_latents,
)
from torch import nn

from soflow_fast import Trainer
from soflow_fast.cli import main
from soflow_fast.config import DataConfig, ModelConfig, OutputConfig, SoFlowConfig, TrainConfig
from soflow_fast.data import ImageFolder, LatentMoments
from soflow_fast.data.crop import centre_crop, centred
from soflow_fast.dry_run import plan
from soflow_fast.images import grid, to_uint8
from soflow_fast.sample import Sampler
from soflow_fast.trainer import load_run

H, W = 8, 12


class Painter(nn.Module):
    """A convolution, which starts out such that every sample is nearly one picture: brighter to the right, dark below.

    One step from noise x is ``x − F``.
    """

    num_classes = 10

    def __init__(self, height=H, width=W):
        super().__init__()
        across, down = torch.linspace(-1, 1, width).expand(height, -1), torch.linspace(-1, 1, height)[:, None]
        self.register_buffer("picture", torch.where(down < 0.5, across, -1.0))
        self.label = nn.Embedding(11, 1)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        for p in (self.label.weight, self.conv.weight, self.conv.bias):
            nn.init.zeros_(p)

    def forward(self, x, t, s, labels):
        return x - self.picture + self.conv(x) + self.label(labels)[:, :, None, None]


def _model(kind):
    sizes = {"input_size": (H, W), "in_channels": 1, "num_classes": 10}
    unet = {"model_channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "attention_resolutions": (4,)}
    return {
        "DiT": ModelConfig(**sizes, patch_size=4, hidden_size=16, depth=1, num_heads=2),
        "UNet": ModelConfig("UNet", **sizes, **unet),
        "given": ModelConfig(**sizes),
    }[kind]


@pytest.mark.parametrize("kind", ["DiT", "UNet", "given"])
def test_runs_go_on_exactly_and_draw_upright_pictures(tmp_path, monkeypatch, kind):
    output = OutputConfig(log_every=2, sample_every=2, sample_shape=(2, 3), checkpoint_every=2)
    config = tiny_config(tmp_path / "straight", model=_model(kind), total_steps=4, output=output)
    config = replace(config, optimizer=replace(config.optimizer, learning_rate=1e-5))
    if kind == "UNet":  # to derive its difference forward takes a while, and the network given has one too
        config = replace(config, soflow=SoFlowConfig(velocity_share=1.0, guidance_scale=1.0))

    def trainer(run_dir):
        given = Painter() if kind == "given" else None
        return Trainer(replace(config, run_dir=str(run_dir)), model=given, dataset=Blobs(shape=(1, H, W)))

    trainer(tmp_path / "straight").fit()
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(StopError):
            trainer(tmp_path / "stopped").fit()
    trainer(tmp_path / "stopped").fit()
    assert_bitwise_equal(final(tmp_path / "straight", 4), final(tmp_path / "stopped", 4))

    read, model, _ = load_run(tmp_path / "straight", "cpu", model=Painter() if kind == "given" else None)
    assert read.model.input_size == (H, W)
    assert f"input_size: [{H}, {W}]\n" in (tmp_path / "straight" / "config.yaml").read_text()
    labels = torch.arange(6) * 10 // 6
    samples = to_uint8(next(Sampler(model, (1, H, W), seed=0, batch=6).draw(labels, 6)))
    picture = np.asarray(Image.open(tmp_path / "straight" / "samples" / "step-00000004.png"))
    high, wide = 2 * H + 2, 2 * W + 2  # small images are enlarged, and have a border
    assert picture.shape == (2 * high, 3 * wide)
    for number, sample in enumerate(samples):
        row, column = divmod(number, 3)
        cell = picture[row * high : (row + 1) * high, column * wide : (column + 1) * wide][1:-1:2, 1:-1:2]
        assert np.array_equal(cell, sample[0].numpy())
    if kind == "given":
        shown = cell.astype(float) / 127.5 - 1
        np.testing.assert_allclose(shown, Painter().picture.numpy(), atol=0.05)


def test_the_command_reads_the_size_and_writes_pictures_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(Path("images"), n=16)
    config = tiny_config("run", total_steps=2, data=DataConfig(kind="folder", path="images", workers=0))
    config = replace(config, model=replace(config.model, in_channels=3, num_classes=2))
    command = ["train", str(write_config(tmp_path / "config.yaml", config)), "--model.input_size", f"[{W}, {H}]"]
    assert main([*command, "--dry-run"]) == 0
    assert main(command) == 0
    assert main(["sample", "run", "--count", "3", "--format", "folder", "--out", "drawn", "--device", "cpu"]) == 0
    assert {Image.open(file).size for file in (tmp_path / "drawn").iterdir()} == {(H, W)}  # PIL has the width first
    assert main(["sample", "run", "--count", "3", "--format", "npz", "--out", "all.npz", "--device", "cpu"]) == 0
    assert np.load("all.npz")["arr_0"].shape == (3, W, H, 3)


def test_small_pictures_are_enlarged_alike_in_both_directions():
    assert grid(torch.zeros(2, 1, 4, 16), columns=2).shape == (1, 8 + 2, 2 * (32 + 2))
    assert grid(torch.zeros(2, 1, 16, 4), columns=2).shape == (1, 32 + 2, 2 * (8 + 2))


# --------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize("overrides", [["--model.input_size", "[32, 64]"], ["--model.input_size=[32,64]"]])
def test_the_size_in_files_and_on_the_command_line(overrides):
    for config in (TrainConfig.from_dict({"model": {"input_size": [32, 64]}}), TrainConfig.from_dict({}, overrides)):
        assert config.model.input_size == (32, 64)
        assert TrainConfig.from_dict(config.to_dict()) == config
        assert config.differences(TrainConfig()) == ["model.input_size"]
    assert TrainConfig.from_dict({"data_size": [32, 64]}).model.input_size == (32, 64)  # a published file


def test_a_square_has_one_number():
    square = TrainConfig.from_dict({"model": {"input_size": [32, 32]}})
    assert square.to_yaml() == TrainConfig().to_yaml()
    assert square.differences(TrainConfig()) == []


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ([32], "model.input_size=[32] does not fit; it must be: a whole number or [a whole number, a whole number]"),
        ([8, 8, 8], "model.input_size=[8, 8, 8] does not fit; it must be: a whole number or [a whole"),
        ([8, 0], "model.input_size=[8, 0] is not possible; it must be at least 1"),
        (-1, "model.input_size=-1 is not possible; it must be at least 1"),
    ],
)
def test_sizes_that_are_none(size, words):
    for raw, overrides in (({"model": {"input_size": size}}, []), ({}, [f"--model.input_size={size}"])):
        with pytest.raises(ValueError, match=r"model\.input_size") as error:
            TrainConfig.from_dict(raw, overrides)
        assert str(error.value).startswith(words)


def test_what_a_step_is_said_to_need(tmp_path):
    """A grid of as many tokens needs as much, whichever way round."""
    write_images(tmp_path / "images", n=16)
    config = tiny_config(tmp_path / "run", data=DataConfig(kind="folder", path=str(tmp_path / "images"), workers=0))
    sizes = {**_sizes(config), "num_classes": 2, "in_channels": 3}
    square, wide, high, larger = (
        plan(replace(config, model=ModelConfig(**{**sizes, "input_size": size})))
        for size in (8, (4, 16), (16, 4), (8, 16))
    )
    assert square == wide == high
    assert larger.flops > 1.5 * square.flops
    assert larger.bytes > square.bytes


def _sizes(config):
    model = config.model
    return {name: getattr(model, name) for name in ("patch_size", "hidden_size", "depth", "num_heads")}


# ------------------------------------------------------------------------------------------------------------ data


def test_a_folder_is_cropped_to_the_aspect_ratio(tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "x.png")

    def read(size):
        return ImageFolder(tmp_path, channels=1, size=size, num_classes=0)[0][0]

    exact = torch.from_numpy(levels)[None].float() / 127.5 - 1
    assert torch.equal(read(16), exact)
    assert torch.equal(read((8, 16)), exact[:, 4:12])
    assert torch.equal(read((16, 4)), exact[:, :, 6:10])
    assert read((4, 8)).shape == (1, 4, 8)
    (tmp_path / "x.png").unlink()
    Image.new("L", (40, 1), 255).save(tmp_path / "x.png")  # less than a pixel of it would be as narrow
    assert torch.equal(read((8, 2)), torch.ones(1, 8, 2))


@pytest.mark.parametrize(("width", "height"), [(31, 50), (64, 25), (7, 9), (100, 300), (24, 48)])
@pytest.mark.parametrize("crop", [centred, centre_crop])
def test_crops_are_of_the_centre_and_stretch_nothing(crop, width, height):
    """A ramp along each axis is as steep in pixels of the image, and its middle is in the middle, to half a pixel."""
    factor, steep = max(24 / width, 16 / height), 100 / max(width, height)
    for axis, sides in enumerate(((height, 16), (width, 24))):
        before, after = (np.arange(side) - (side - 1) / 2 for side in sides)
        ramp = np.expand_dims(steep * before + 128, 1 - axis).repeat((height, width)[1 - axis], 1 - axis)
        found = np.asarray(crop(Image.fromarray(ramp.round().astype(np.uint8)), (16, 24)))
        assert found.shape == (16, 24)
        inner = slice(sides[1] // 4, -(sides[1] // 4))
        wanted = 128 + steep / factor * after
        np.testing.assert_allclose(found.mean(1 - axis)[inner], wanted[inner], atol=1.5 + 0.5 * steep / factor)


def test_latents(tmp_path):
    form = {"channels": 4, "num_classes": 10, "scale": 0.18215}
    path = write_latents(tmp_path / "latents.hdf5", size=(H, W))
    assert LatentMoments(path, size=(H, W), **form)[0][0].shape == (8, H, W)
    with pytest.raises(ValueError, match=r"have shape \(40, 8, 8, 12\), and this model needs \(N, 8, 12, 8\)"):
        LatentMoments(path, size=(W, H), **form)
    write_latents(path, size=(H, W), latent_size=np.int64(H))
    with pytest.raises(ValueError, match="says latent_size=8 and holds 8x12; it is incomplete or of another size"):
        LatentMoments(path, size=(H, W), **form)
    write_latents(path, size=(H, W), latent_size=None)
    data = DataConfig(kind="latents", path=str(path), workers=0)
    model = replace(_model("DiT"), in_channels=4)
    config = tiny_config(tmp_path / "run", data=data, model=model, total_steps=2)
    Trainer(replace(config, output=replace(config.output, sample_every=2))).fit()
    assert np.load(tmp_path / "run" / "samples" / "step-00000002.npy").shape == (10, 4, H, W)


def test_data_of_another_shape_are_refused(tmp_path):
    config = tiny_config(tmp_path, model=_model("DiT"))
    with pytest.raises(ValueError, match=r"samples of shape \(1, 12, 8\) and the model takes \(1, 8, 12\); set model"):
        Trainer(config, dataset=Blobs(shape=(1, W, H))).fit()
