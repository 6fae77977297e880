"""``soflow encode``: what it writes, and what it refuses."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from encode_runs import FORM, SMALL, random_image, read_arrays, write_pictures, write_vae
from PIL import Image
from runs import tiny_config

from soflow_fast.autoencoder import vae_decoder
from soflow_fast.cli import main
from soflow_fast.config import TrainConfig
from soflow_fast.data import LatentMoments
from soflow_fast.encode import centre_crop, encode


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder)
    (folder / "a" / "notes.txt").write_text("not an image")
    for hidden in (".cache", "__MACOSX", "a/.ipynb_checkpoints"):
        (folder / hidden).mkdir()
        random_image(9, 16, 16).save(folder / hidden / "x.png")
    return folder


@pytest.fixture(scope="module")
def straight(pictures, vae, tmp_path_factory):
    """The path of the file that nothing interrupted."""
    out = tmp_path_factory.mktemp("straight") / "out.hdf5"
    encode(pictures, out, vae=vae, **SMALL)
    return out


# -------------------------------------------------------------------------------------------------- what is written


def test_halving_is_the_mean_of_four_and_the_rest_is_cut():
    levels = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    image = Image.fromarray(levels)
    assert np.array_equal(np.asarray(centre_crop(image, 32)), levels[:, 16:48])
    means = levels.reshape(8, 4, 16, 4, 3).mean(axis=(1, 3))[:, 4:12]
    assert abs(np.asarray(centre_crop(image, 8)) - means).max() <= 2  # two halvings, each rounded both ways


@pytest.mark.parametrize(("width", "height", "resized"), [(31, 50, (16, 26)), (40, 25, (26, 16)), (5, 4, (20, 16))])
def test_what_is_less_than_twice_the_size_is_resized_bicubic(width, height, resized):
    image = random_image(0, width, height)
    whole = np.asarray(image.resize(resized, Image.Resampling.BICUBIC))
    top, left = (resized[1] - 16) // 2, (resized[0] - 16) // 2
    assert np.array_equal(np.asarray(centre_crop(image, 16)), whole[top : top + 16, left : left + 16])


def test_the_file_holds_the_autoencoders_moments(tmp_path, pictures, vae):
    done = encode(pictures, tmp_path / "new" / "out.hdf5", vae=vae, **SMALL)
    assert done == (tmp_path / "new" / "out.hdf5", 7, (4, 8, 8), 2, 0.18215, vae, (), ())
    assert done.configuration()["data"].keys() == {"kind", "path", "vae"}  # the scale is the default
    found = read_arrays(done.path)
    assert (found["amount"], found["latent_size"], found["written"]) == (7, 8, 7)
    assert found["labels"].tolist() == [0, 0, 0, 1, 1, 1, 1]
    order = ["a/0", "a/2", "a/deep/1", "c/0", "c/2", "c/3", "c/deep/1"]
    squares = [np.asarray(centre_crop(Image.open(pictures / f"{name}.png"), 16)) for name in order]
    x = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2) / 255 * 2 - 1
    with torch.no_grad():
        posterior = AutoencoderKL.from_pretrained(vae, low_cpu_mem_usage=False).encode(x).latent_dist
    expected = torch.cat([posterior.mean, posterior.std], dim=1).numpy()
    np.testing.assert_allclose(found["latents"], expected, rtol=1e-4, atol=1e-4)
    moments, labels = LatentMoments(done.path, **FORM).read_range(0, 7)
    assert np.array_equal(moments.numpy(), found["latents"])
    assert labels.tolist() == found["labels"].tolist()
    assert sorted(file.name for file in done.path.parent.iterdir()) == ["out.hdf5"]


def test_mirror_images_follow_their_images(tmp_path, pictures, vae, straight):
    write_pictures(tmp_path / "mirrored", mirrored=True)
    encode(tmp_path / "mirrored", tmp_path / "mirrored.hdf5", vae=vae, **SMALL)
    both = read_arrays(encode(pictures, tmp_path / "both.hdf5", vae=vae, flip=True, **SMALL).path)
    plain, mirrored = read_arrays(straight), read_arrays(tmp_path / "mirrored.hdf5")
    assert both["labels"].tolist() == np.repeat(plain["labels"], 2).tolist()
    assert both["amount"] == 14
    np.testing.assert_allclose(both["latents"][::2], plain["latents"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(both["latents"][1::2], mirrored["latents"], rtol=1e-4, atol=1e-4)


def test_images_without_classes_and_bfloat16(tmp_path, pictures, vae, straight):
    shutil.copytree(pictures / "a", tmp_path / "flat", ignore=shutil.ignore_patterns("deep"))
    done = encode(tmp_path / "flat", tmp_path / "out.hdf5", vae=vae, precision="bf16", **SMALL)
    assert (done.rows, done.num_classes) == (2, 0)
    rounded, exact = read_arrays(done.path)["latents"], read_arrays(straight)["latents"][:2]
    assert rounded.dtype == np.float32
    error = abs(rounded - exact).max() / exact.std()
    assert 1e-4 < error < 0.1


def test_readers_in_processes_of_their_own_change_nothing(tmp_path, pictures, vae, straight):
    before = torch.get_rng_state()
    encode(pictures, tmp_path / "out.hdf5", vae=vae, **{**SMALL, "workers": 2})
    assert (tmp_path / "out.hdf5").read_bytes() == straight.read_bytes()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("spread", "own", "scale"), [(5.0, 0.25, 0.25), (1.0, 0.18215, None), (5.0, None, None)])
def test_the_scale_is_the_autoencoders_if_it_fits(tmp_path, pictures, caplog, spread, own, scale):
    vae = write_vae(tmp_path / "vae", spread=spread, scaling_factor=own)
    done = encode(pictures, tmp_path / "out.hdf5", vae=vae, **SMALL)
    mean, std = np.split(read_arrays(done.path)["latents"].astype(np.float64), 2, axis=1)
    found = np.sqrt(mean.var() + np.square(std).mean())
    assert done.scale == pytest.approx(scale or 1 / found, rel=1e-2)
    assert done.configuration()["data"]["latent_scale"] == done.scale
    assert (f"own scale {own} gives latents of standard deviation" in caplog.text) == bool(own and not scale)


def test_an_autoencoder_with_a_shift(tmp_path, pictures, vae, straight):
    """SD3's and FLUX's latents are (z - shift) · scale."""
    shifted = write_vae(tmp_path / "vae", shift_factor=0.25)
    done = encode(pictures, tmp_path / "out.hdf5", vae=shifted, **SMALL)
    found, plain = read_arrays(done.path)["latents"], read_arrays(straight)["latents"]
    np.testing.assert_allclose(found[:, :4], plain[:, :4] - 0.25, rtol=1e-5, atol=1e-5)
    assert np.array_equal(found[:, 4:], plain[:, 4:])
    latents = torch.from_numpy(found[:, :4]) * done.scale
    images, expected = (
        vae_decoder(name, done.scale, torch.device("cpu"))(latents + added * done.scale)
        for name, added in ((shifted, 0.0), (vae, 0.25))
    )
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"holds latents made with shift 0\.0, and this command has 0\.25"):
        encode(pictures, straight, vae=shifted, **SMALL)


def _write_config(path, lines, steps):
    """Of a tiny run on what was encoded, with the lines that the command printed; its last step writes samples."""
    settings = yaml.safe_load(tiny_config("run", batch_size=4, total_steps=steps).to_yaml())
    given = yaml.safe_load("\n".join(lines))
    settings["model"] |= given["model"]
    settings["data"] = given["data"] | {"workers": 0}
    settings["output"]["sample_every"] = steps
    Path(path).write_text(yaml.safe_dump(settings))


def test_from_images_to_a_decoded_run_by_the_command(tmp_path, pictures, vae, capsys, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["encode", str(pictures), "out.hdf5", "--vae", vae, "--size", "16", "--workers", "0", "--device", "cpu"]
    for said in ("", "out.hdf5 is complete already"):
        assert main(command) == 0
        first, *lines = capsys.readouterr().out.splitlines()
        left_out, *others = caplog.messages
        assert left_out.endswith(f"are left out of the image folder {pictures}: 1 .txt")
        assert others == ([left_out, said] if said else [])
    assert first == "# 7 latents (4, 8, 8) of 2 classes: out.hdf5"
    assert lines[0] == "model: {input_size: 8, in_channels: 4, num_classes: 2}"
    _write_config("config.yaml", lines, steps=2)
    assert TrainConfig.from_yaml("config.yaml").data.vae == vae
    assert main(["train", "config.yaml"]) == 0
    assert Image.open("run/samples/step-00000002.png").size == (5 * 34, 2 * 34)
    moments = torch.from_numpy(read_arrays("out.hdf5")["latents"])
    images = vae_decoder(vae, 0.18215, torch.device("cpu"))(moments[:, :4] * 0.18215)
    with torch.no_grad():
        expected = AutoencoderKL.from_pretrained(vae, low_cpu_mem_usage=False).decode(moments[:, :4]).sample
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)


def test_images_of_a_height_and_a_width(tmp_path, pictures, vae, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["encode", str(pictures), "out.hdf5", "--vae", vae, "--workers", "0", "--device", "cpu", "--size"]
    assert main([*command, "16,24"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "# 7 latents (4, 8, 12) of 2 classes: out.hdf5"
    assert lines[:2] == ["model:", "  input_size: [8, 12]"]
    found = read_arrays("out.hdf5")
    assert found["latent_size"].tolist() == [8, 12]
    image = np.asarray(centre_crop(Image.open(pictures / "a" / "0.png"), (16, 24)))
    with torch.no_grad():
        x = torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255 * 2 - 1
        mean = AutoencoderKL.from_pretrained(vae, low_cpu_mem_usage=False).encode(x).latent_dist.mean
    np.testing.assert_allclose(found["latents"][:1, :4], mean, rtol=1e-4, atol=1e-4)
    assert main([*command, "24,16"]) == 2
    assert "made with size [16, 24], and this command has [24, 16]" in capsys.readouterr().err
    _write_config("config.yaml", lines, steps=1)
    assert main(["train", "config.yaml"]) == 0
    assert Image.open("run/samples/step-00000001.png").size == (5 * 26, 2 * 18)  # decoded, with a border


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--size": 0}, ["--size 0 is not possible", "at least 1"]),
        ({"--size": "16,0"}, ["--size [16, 0] is not possible", "at least 1"]),
        ({"--size": "16,16,16"}, ["--size 16,16,16 is not a size; give a whole number, or height,width such as"]),
        ({"--size": "16x24"}, ["--size 16x24 is not a size; give"]),
        ({"--size": "16,17"}, ["size=[16, 17] is not possible with this autoencoder", "a multiple of 2"]),
        ({"--size": 17}, ["size=17 is not possible with this autoencoder", "a multiple of 2"]),
        ({"--batch": 0}, ["batch=0 is not possible", "at least 1"]),
        ({"--workers": -1}, ["workers=-1 is not possible", "at least 0"]),
        ({"--device": "gpu"}, ["device='gpu' is not known"]),
        ({"--vae": "empty"}, ["soflow: vae='empty' cannot be read", "give a name or a folder that can"]),
        ({"--vae": "grey"}, ["vae='grey' takes images of 1 channels", "RGB"]),
        ({"--vae": "broken"}, ["the latents of the image", "0.png with precision='fp32' are not finite"]),
        ({"images": "nowhere"}, ["the image folder nowhere does not exist"]),
        ({"images": "empty"}, ["the image folder empty holds no images (.bmp, "]),
        ({"images": "partly"}, ["1 of the 2 class folders in partly hold no images (b); remove them, or put"]),
        ({"out": "empty"}, ["empty is a folder", "such as empty/latents.hdf5"]),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, pictures, vae, capsys, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    shutil.copytree(pictures / "a", "partly/a")
    Path("partly/b").mkdir()
    write_vae(Path("grey"), in_channels=1)
    write_vae(Path("broken"), spread=float("nan"))
    given = {"--vae": vae, "--size": 16, "--workers": 0, "--device": "cpu", **changes}
    names = [str(given.pop("images", pictures)), given.pop("out", "out.hdf5")]
    assert main(["encode", *names, *(str(part) for option in given.items() for part in option)]) == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith("soflow: ")
    for word in words:
        assert word in sentence
    assert not Path("out.hdf5").exists()


def test_an_unknown_precision_is_refused(tmp_path, pictures, vae):
    with pytest.raises(ValueError, match="precision='fp16' is not known; choose one of bf16, tf32, fp32"):
        encode(pictures, tmp_path / "out.hdf5", vae=vae, precision="fp16", **SMALL)
