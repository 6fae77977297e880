"""Autoencoders of any class, and latents that are normalised channel by channel."""

import json
import re
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import yaml
from encode_runs import SMALL, read_arrays, write_pictures, write_vae
from PIL import Image
from runs import tiny_config

from soflow_fast.autoencoder import decoder_of, load_vae, vae_decoder
from soflow_fast.build import check_dataset
from soflow_fast.cli import main
from soflow_fast.config import DataConfig, TrainConfig
from soflow_fast.data import LatentMoments, MomentsFolder
from soflow_fast.data.crop import centre_crop
from soflow_fast.encode import encode
from soflow_fast.run_folder import load_run

CPU = torch.device("cpu")


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "pictures")
    return tmp_path / "pictures"


def _cropped(pictures: Path) -> torch.Tensor:
    """The first image as the encoder sees it, (1, 3, 16, 16)."""
    pixels = np.array(centre_crop(Image.open(pictures / "a" / "0.png"), 16))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1


def test_a_run_with_an_autoencoder_of_ones_own(pictures, capsys):
    command = ["encode", str(pictures), "out.hdf5", "--size", "16", "--workers", "0", "--device", "cpu"]
    assert main([*command, "--vae", "own_autoencoders.Shuffled", "--per-channel"]) == 0
    given = yaml.safe_load(capsys.readouterr().out)
    stored = read_arrays("out.hdf5")["latents"].astype(np.float64)
    assert not stored[:, 12:].any()
    np.testing.assert_allclose(given["data"]["latent_mean"], stored[:, :12].mean((0, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(given["data"]["latent_std"], stored[:, :12].std((0, 2, 3)), rtol=1e-4)
    assert given["data"]["latent_scale"] == 1

    settings = yaml.safe_load(tiny_config("run", batch_size=4, total_steps=2).to_yaml())
    settings["model"] |= given["model"]
    settings["data"] = given["data"] | {"workers": 0}
    settings["output"]["sample_every"] = 2
    Path("config.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", "config.yaml"]) == 0
    assert Image.open("run/samples/step-00000002.png").size == (5 * 34, 2 * 34)

    config, _, _ = load_run("run", "cpu")
    moments, _ = LatentMoments(
        "out.hdf5",
        channels=12,
        size=8,
        num_classes=2,
        scale=config.data.latent_scale,
        mean=config.data.latent_mean,
        std=config.data.latent_std,
    ).read_range(0, 7)
    latents = moments[:, :12]
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(12), rtol=0, atol=1e-3)
    torch.testing.assert_close(latents.std((0, 2, 3), correction=0), torch.ones(12), rtol=1e-4, atol=0)
    torch.testing.assert_close(decoder_of(config.data, CPU)(latents[:1]), _cropped(pictures), rtol=0, atol=1e-5)
    assert main(["export", "run", "run.pt2"]) == 0
    assert torch.export.load("run.pt2").module()(torch.randn(2, 12, 8, 8), torch.arange(2)).shape == (2, 3, 16, 16)


def test_standard_deviations_are_normalised_too(pictures, tmp_path):
    done = encode(pictures, "out.hdf5", vae="own_autoencoders.Uncertain", per_channel=True, **SMALL)
    stored = read_arrays("out.hdf5")["latents"]
    assert (stored[:, 12:] == 0.5).all()
    variance = stored[:, :12].astype(np.float64).var((0, 2, 3)) + 0.25
    np.testing.assert_allclose(done.std, np.sqrt(variance), rtol=1e-4)
    form = {"channels": 12, "size": 8, "num_classes": 2, "scale": done.scale, "mean": done.mean, "std": done.std}
    moments, _ = LatentMoments(done.path, **form).read_range(0, 7)
    expected = np.broadcast_to(0.5 / np.array(done.std)[:, None, None], (7, 12, 8, 8))
    np.testing.assert_allclose(moments[:, 12:], expected, rtol=1e-6)

    folder = tmp_path / "files"
    folder.mkdir()
    for number, sample in enumerate(stored):
        np.save(folder / f"{number}.npy", sample)
    names = [[f"{number}.npy", int(number > 2)] for number in range(7)]
    (folder / "dataset.json").write_text(json.dumps({"labels": names}))
    assert torch.equal(MomentsFolder(folder, **form).read_range(0, 7)[0], moments)


def test_a_deterministic_autoencoder_of_diffusers(pictures, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        diffusers.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
        ).save_pretrained(tmp_path / "dc")
    done = encode(pictures, "out.hdf5", vae="dc", per_channel=True, **SMALL)
    original = diffusers.AutoencoderDC.from_pretrained(tmp_path / "dc").eval()
    with torch.no_grad():
        expected = original.encode(_cropped(pictures)).latent
        images = original.decode(expected).sample
    stored = read_arrays("out.hdf5")["latents"]
    np.testing.assert_allclose(stored[:1, :4], expected, rtol=1e-4, atol=1e-5)
    assert not stored[:, 4:].any()
    form = {"channels": 4, "size": 8, "num_classes": 2, "scale": done.scale, "mean": done.mean, "std": done.std}
    moments, _ = LatentMoments(done.path, **form).read_range(0, 1)
    decoded = vae_decoder("dc", done.scale, CPU, mean=done.mean, std=done.std)(moments[:, :4])
    torch.testing.assert_close(decoded, images, rtol=1e-3, atol=1e-3)


def test_what_an_autoencoder_says_of_its_channels_is_taken(pictures, tmp_path):
    """Such as that of Playground 2.5, whose latents are (z - mean) / std · scale."""
    mean, std = [1.0, -1.0, 0.5, 0.0], [6.0, 4.0, 5.0, 5.0]
    name = write_vae(tmp_path / "vae", latents_mean=mean, latents_std=std, scaling_factor=0.9, shift_factor=0.25)
    done = encode(pictures, "out.hdf5", vae=name, **SMALL)
    assert done.mean == (0.75, -1.25, 0.25, -0.25)  # of means that are stored less the shift
    data = done.configuration()["data"]
    assert (data["latent_mean"], data["latent_std"], data["latent_scale"]) == ([0.75, -1.25, 0.25, -0.25], std, 0.9)
    form = {"channels": 4, "size": 8, "num_classes": 2, "scale": 0.9, "mean": done.mean, "std": done.std}
    moments, _ = LatentMoments(done.path, **form).read_range(0, 1)
    vae = load_vae(name)
    with torch.no_grad():
        raw = vae.encode(_cropped(pictures)).latent_dist.mean
        images = vae.decode(raw).sample
    expected = (raw - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    torch.testing.assert_close(moments[:, :4], expected, rtol=1e-4, atol=1e-4)
    decoded = decoder_of(TrainConfig.from_dict(done.configuration()).data, CPU)(moments[:, :4] * 0.9)
    torch.testing.assert_close(decoded, images, rtol=1e-3, atol=1e-3)


def test_statistics_of_another_number_of_channels_are_refused_before_encoding(pictures, tmp_path):
    name = write_vae(tmp_path / "vae", latents_mean=[0.0] * 3)
    with pytest.raises(
        ValueError, match=r"has 3 numbers in latents_mean and latents of 4 channels; measure them by --p"
    ):
        encode(pictures, "out.hdf5", vae=name, **SMALL)
    assert not list(tmp_path.glob("out.hdf5*"))
    nested = write_vae(tmp_path / "nested", latents_std=[[[5.0]], [[4.0]], [[5.0]], [[6.0]]])
    assert encode(pictures, "out.hdf5", vae=nested, **SMALL).std == (5.0, 4.0, 5.0, 6.0)


def test_an_autoencoder_whose_configuration_does_not_name_its_class(tmp_path):
    name = write_vae(tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    del config["_class_name"]
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    assert isinstance(load_vae(name), diffusers.AutoencoderKL)


def test_what_decodes_alone_has_no_encoder(tmp_path):
    decode = vae_decoder(write_vae(tmp_path / "vae"), 1.0, CPU)
    assert not [name for name in decode.state_dict() if "encoder" in name]
    assert decode(torch.zeros(1, 4, 8, 8)).shape == (1, 3, 16, 16)


def test_images_in_0_to_1_are_made_of_ours(monkeypatch):
    """Of diffusers' AutoencoderRAE, which needs another package; here one that does what it does to images."""
    output = namedtuple("Output", ["latent", "sample"])

    class AutoencoderRAE(torch.nn.Module):
        def encode(self, images):
            assert 0 <= images.min() <= images.max() <= 1
            return output(images, None)

        def decode(self, latents):
            return output(None, latents)

    monkeypatch.setattr(diffusers.AutoModel, "from_pretrained", lambda *_, **__: AutoencoderRAE())
    vae, images = load_vae("owner/rae"), torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(vae.encode(images), (images + 1) / 2)
    torch.testing.assert_close(vae.decode(vae.encode(images)), images)


def test_a_channel_without_spread_and_an_autoencoder_without_parameters(pictures):
    done = encode(pictures, "out.hdf5", vae="own_autoencoders.WithoutParameters", per_channel=True, **SMALL)
    assert (done.mean[0], done.std[0], done.scale) == (0.3, 1.0, 1.0)
    assert all(0.3 < std < 1 for std in done.std[1:])
    with pytest.raises(
        ValueError, match=r"made with autoencoder own_autoencoders\.WithoutParameters, and this command"
    ):
        encode(pictures, "out.hdf5", vae="own_autoencoders.Louder", **SMALL)


def test_latents_that_are_all_the_same_are_refused(pictures):
    with pytest.raises(ValueError, match=r"the latents in out\.hdf5 are all the same"):
        encode(pictures, "out.hdf5", vae="own_autoencoders.Silent", per_channel=True, **SMALL)


def test_an_autoencoders_own_error_is_shown_as_it_is(pictures):
    with pytest.raises(RuntimeError, match=r"mat1 and mat2|size mismatch|shape"):
        encode(pictures, "out.hdf5", vae="own_autoencoders.Broken", **SMALL)


def test_what_an_autoencoder_draws_is_no_draw_of_ours():
    before = torch.get_rng_state()
    weights = [load_vae("own_autoencoders.Drawn").weight for _ in range(2)]
    assert torch.equal(*weights)
    assert torch.equal(torch.get_rng_state(), before)


def test_moments_of_ones_own_data_set_are_not_normalised(pictures, tmp_path):
    done = encode(pictures, "out.hdf5", vae="own_autoencoders.Uncertain", per_channel=True, **SMALL)
    given = done.configuration()
    config = TrainConfig.from_dict({**given, "batch_size": 2, "run_dir": str(tmp_path / "run"), "device": "cpu"})
    moments = torch.ones(8, 24, 8, 8)
    own = torch.utils.data.TensorDataset(moments, torch.zeros(8, dtype=torch.int64))
    words = r"and the moments of the data set TensorDataset are normalised by \(\(\), \(\)\); they are what files"
    with pytest.raises(ValueError, match=words):
        check_dataset(config, own)
    form = {"channels": 12, "size": 8, "num_classes": 2, "scale": done.scale}
    normalised = LatentMoments(done.path, **form, mean=done.mean, std=done.std)
    assert check_dataset(config, normalised) == 1
    assert check_dataset(config, torch.utils.data.Subset(normalised, range(5))) == 1
    with pytest.raises(
        ValueError, match=r"latent_std are \(\(\), \(\)\), and the moments of the data set LatentMoments"
    ):
        check_dataset(replace(config, data=DataConfig(latent_scale=1.0)), normalised)


def test_an_autoencoder_in_a_folder_of_a_repository(monkeypatch, tmp_path):
    name, asked = write_vae(tmp_path / "vae"), []
    own = diffusers.AutoModel.from_pretrained

    def from_pretrained(repository, **options):
        asked.append((repository, options.get("subfolder")))
        return own(name, low_cpu_mem_usage=False)

    monkeypatch.setattr(diffusers.AutoModel, "from_pretrained", from_pretrained)
    for wanted in ("owner/name", "owner/name/vae", str(tmp_path / "vae")):
        load_vae(wanted)
    assert asked == [("owner/name", None), ("owner/name", "vae"), (str(tmp_path / "vae"), None)]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_autoencoders.nowhere", "vae='own_autoencoders.nowhere' cannot be imported (AttributeError:"),
        ("own_autoencoders.nothing", "vae='own_autoencoders.nothing' is a str, and is to be a torch.nn.Module with de"),
        ("own_autoencoders.OnlyDecodes", "vae='own_autoencoders.OnlyDecodes' is a OnlyDecodes and has no encode(ima"),
        ("own_autoencoders.Tokens", "encode(images) of the autoencoder Tokens gives a Tensor of shape (1, 64, 12); it"),
        ("owner/name/x/y", "vae='owner/name/x/y' cannot be read ("),
    ],
)
def test_what_is_no_autoencoder(pictures, capsys, name, words):
    assert main(["encode", str(pictures), "out.hdf5", "--vae", name, "--size", "16", "--device", "cpu"]) == 2
    assert f"soflow: {words}" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"latent_std": [1.0, 2.0]}, "data.latent_std has 2 numbers and model.in_channels=4; give one a channel"),
        ({"latent_mean": [1.0]}, "data.latent_mean has 1 numbers and model.in_channels=4; give one a channel"),
        ({"latent_std": [1.0, 2.0, 0.0, 1.0]}, "data.latent_std=[1.0, 2.0, 0.0, 1.0] must be greater than 0"),
        ({"latent_mean": [0.0] * 4, "kind": "folder"}, "do nothing with data.kind='folder'; leave them out"),
    ],
)
def test_channels_that_cannot_be(data, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        TrainConfig.from_dict({"data": data})
