"""``soflow encode``: what it writes, that a kill loses nothing, and what it refuses."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from autoencoders import write_vae
from diffusers import AutoencoderKL
from PIL import Image
from runs import tiny_config

from soflow_fast import encode as encoding
from soflow_fast.cli import main
from soflow_fast.config import TrainConfig
from soflow_fast.data import LatentMoments, writer
from soflow_fast.encode import centre_crop, encode
from soflow_fast.images import vae_decoder

FORM = {"channels": 4, "size": 8, "num_classes": 3, "scale": 0.18215}
SMALL = {"size": 16, "batch": 2, "device": "cpu", "workers": 0}


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(autouse=True)
def flush_always(monkeypatch):
    monkeypatch.setattr(writer, "_FLUSH_SECONDS", 0.0)


def _picture(number, width, height):
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _write_pictures(folder, counts=(3, 0, 4), mirrored=False):
    """Images of 16 pixels and more in class folders a, b, c; returns them in the order of their classes."""
    pictures = []
    for name, count in zip("abc", counts, strict=True):
        (folder / name / "deep").mkdir(parents=True)
        for number in range(count):
            picture = _picture(len(pictures), 16 + 3 * number, 20)
            pictures.append(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else picture)
            pictures[-1].save(folder / name / ("deep" if number == 1 else "") / f"{number}.png")
    return pictures


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    _write_pictures(folder)
    (folder / "a" / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def straight(pictures, vae, tmp_path_factory):
    """The bytes of the file that nothing interrupted."""
    out = tmp_path_factory.mktemp("straight") / "out.hdf5"
    encode(pictures, out, vae=vae, **SMALL)
    return out.read_bytes()


def _read(path):
    with h5py.File(path) as file:
        return {name: file[name][()] for name in file}


def _written(out):
    return int(_read(out.with_name(f"{out.name}.partial"))["written"])


# -------------------------------------------------------------------------------------------------- what is written


def test_halving_is_the_mean_of_four_and_the_rest_is_cut():
    levels = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    image = Image.fromarray(levels)
    assert np.array_equal(np.asarray(centre_crop(image, 32)), levels[:, 16:48])
    means = levels.reshape(8, 4, 16, 4, 3).mean(axis=(1, 3))[:, 4:12]
    assert abs(np.asarray(centre_crop(image, 8)) - means).max() <= 2  # two halvings, each rounded both ways


@pytest.mark.parametrize(("width", "height", "resized"), [(31, 50, (16, 26)), (40, 25, (26, 16)), (5, 4, (20, 16))])
def test_what_is_less_than_twice_the_size_is_resized_bicubic(width, height, resized):
    image = _picture(0, width, height)
    whole = np.asarray(image.resize(resized, Image.Resampling.BICUBIC))
    top, left = (resized[1] - 16) // 2, (resized[0] - 16) // 2
    assert np.array_equal(np.asarray(centre_crop(image, 16)), whole[top : top + 16, left : left + 16])


def test_the_file_holds_the_autoencoders_moments(tmp_path, pictures, vae):
    done = encode(pictures, tmp_path / "new" / "out.hdf5", vae=vae, **SMALL)
    assert done == (tmp_path / "new" / "out.hdf5", 7, (4, 8, 8), 3, 0.18215, vae)
    assert done.configuration()["data"].keys() == {"kind", "path", "vae"}  # the scale is the default
    found = _read(done.path)
    assert (found["amount"], found["latent_size"], found["written"]) == (7, 8, 7)
    assert found["labels"].tolist() == [0, 0, 0, 2, 2, 2, 2]
    order = ["a/0", "a/2", "a/deep/1", "c/0", "c/2", "c/3", "c/deep/1"]
    squares = [np.asarray(centre_crop(Image.open(pictures / f"{name}.png"), 16)) for name in order]
    x = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2) / 255 * 2 - 1
    with torch.no_grad():
        posterior = AutoencoderKL.from_pretrained(vae, low_cpu_mem_usage=False).encode(x).latent_dist
    expected = torch.cat([posterior.mean, posterior.std], dim=1).numpy()
    np.testing.assert_allclose(found["latents"], expected, rtol=1e-4, atol=1e-4)
    moments, labels = LatentMoments(done.path, **FORM).read(0, 7)
    assert np.array_equal(moments.numpy(), found["latents"])
    assert labels.tolist() == found["labels"].tolist()
    assert sorted(file.name for file in done.path.parent.iterdir()) == ["out.hdf5"]


def test_mirror_images_follow_their_images(tmp_path, pictures, vae, straight):
    _write_pictures(tmp_path / "mirrored", mirrored=True)
    encode(tmp_path / "mirrored", tmp_path / "mirrored.hdf5", vae=vae, **SMALL)
    both = _read(encode(pictures, tmp_path / "both.hdf5", vae=vae, flip=True, **SMALL).path)
    (tmp_path / "plain.hdf5").write_bytes(straight)
    plain, mirrored = _read(tmp_path / "plain.hdf5"), _read(tmp_path / "mirrored.hdf5")
    assert both["labels"].tolist() == np.repeat(plain["labels"], 2).tolist()
    assert both["amount"] == 14
    np.testing.assert_allclose(both["latents"][::2], plain["latents"], rtol=1e-4, atol=1e-4)
    # cutting an odd number of pixels leaves one more on the left: the mirror of the crop is the crop of the mirror
    even = [0, 1, 3, 4]  # only where that number is even
    np.testing.assert_allclose(both["latents"][1::2][even], mirrored["latents"][even], rtol=1e-4, atol=1e-4)


def test_images_without_classes_and_bfloat16(tmp_path, pictures, vae, straight):
    shutil.copytree(pictures / "a", tmp_path / "flat", ignore=shutil.ignore_patterns("deep"))
    done = encode(tmp_path / "flat", tmp_path / "out.hdf5", vae=vae, precision="bf16", **SMALL)
    assert (done.rows, done.num_classes) == (2, 0)
    (tmp_path / "plain.hdf5").write_bytes(straight)
    rounded, exact = _read(done.path)["latents"], _read(tmp_path / "plain.hdf5")["latents"][:2]
    assert rounded.dtype == np.float32
    error = abs(rounded - exact).max() / exact.std()
    assert 1e-4 < error < 0.1


def test_readers_in_processes_of_their_own_change_nothing(tmp_path, pictures, vae, straight):
    before = torch.get_rng_state()
    encode(pictures, tmp_path / "out.hdf5", vae=vae, **{**SMALL, "workers": 2})
    assert (tmp_path / "out.hdf5").read_bytes() == straight
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("spread", "own", "scale"), [(5.0, 0.25, 0.25), (1.0, 0.18215, None), (5.0, None, None)])
def test_the_scale_is_the_autoencoders_if_it_fits(tmp_path, pictures, caplog, spread, own, scale):
    vae = write_vae(tmp_path / "vae", spread=spread, scaling_factor=own)
    done = encode(pictures, tmp_path / "out.hdf5", vae=vae, **SMALL)
    mean, std = np.split(_read(done.path)["latents"].astype(np.float64), 2, axis=1)
    found = np.sqrt(mean.var() + np.square(std).mean())
    assert done.scale == pytest.approx(scale or 1 / found, rel=1e-2)
    assert done.configuration()["data"]["latent_scale"] == done.scale
    assert (f"own scale {own} gives latents of standard deviation" in caplog.text) == (scale is None)


def test_from_images_to_a_decoded_run_by_the_command(tmp_path, pictures, vae, capsys, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["encode", str(pictures), "out.hdf5", "--vae", vae, "--size", "16", "--workers", "0", "--device", "cpu"]
    for said in ("", "out.hdf5 is complete already"):
        assert main(command) == 0
        first, *lines = capsys.readouterr().out.splitlines()
        assert caplog.messages == [said] * bool(said)
    assert first == "7 latents (4, 8, 8) of 3 classes: out.hdf5; in the configuration:"
    assert lines[0] == "model: {input_size: 8, in_channels: 4, num_classes: 3}"
    settings = yaml.safe_load(tiny_config("run", batch_size=4, total_steps=2).to_yaml())
    given = yaml.safe_load("\n".join(lines))
    settings["model"] |= given["model"]
    settings["data"] = given["data"] | {"workers": 0}
    settings["output"]["sample_every"] = 2
    Path("config.yaml").write_text(yaml.safe_dump(settings))
    assert TrainConfig.from_yaml("config.yaml").data.vae == vae
    assert main(["train", "config.yaml"]) == 0
    assert Image.open("run/samples/step-00000002.png").size == (5 * 34, 2 * 34)
    moments = torch.from_numpy(_read("out.hdf5")["latents"])
    images = vae_decoder(vae, 0.18215, torch.device("cpu"))(moments[:, :4] * 0.18215)
    with torch.no_grad():
        expected = AutoencoderKL.from_pretrained(vae, low_cpu_mem_usage=False).decode(moments[:, :4]).sample
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------ going on


class _Killed(BaseException):
    """Stands for SIGKILL: from then on no call that changes the disk does anything."""


def _kill_at(monkeypatch, instant, power_too):
    """Ends the process at its call number ``instant`` that changes the disk; what is written then is written half.

    If the power goes too, moments that were not yet flushed are lost; their count, if it was written, is not.
    """
    calls, pwrite, unsafe = iter(range(10**9)), os.pwrite, []

    def dying(name, function):
        def call(*arguments):
            number = next(calls)
            if name == "pwrite":
                file, data, at = arguments
                unsafe.append((file, os.pread(file, len(data), at), at))
            if number == instant:
                if name == "pwrite":
                    pwrite(file, data[: len(data) // 2], at)
                for file, before, at in unsafe if power_too else ():
                    if len(before) > 8:
                        pwrite(file, before, at)
            if number >= instant:
                raise _Killed
            if name == "fsync":
                unsafe.clear()
            return function(*arguments)

        return call

    for name in ("pwrite", "fsync", "rename"):
        monkeypatch.setattr(os, name, dying(name, getattr(os, name)))


@pytest.mark.parametrize("power_too", [False, True])
def test_killed_at_any_instant_it_goes_on_to_the_same_bytes(tmp_path, pictures, vae, straight, monkeypatch, power_too):
    read, image = [], encoding.read_image
    monkeypatch.setattr(encoding, "read_image", lambda file, mode: read.append(file) or image(file, mode))
    counts = []
    for instant in range(100):
        out = tmp_path / str(instant) / "out.hdf5"
        with monkeypatch.context() as patch:
            _kill_at(patch, instant, power_too)
            try:
                encode(pictures, out, vae=vae, **SMALL)
                break
            except _Killed:
                pass
        if out.exists():
            assert out.read_bytes() == straight
        partial = out.with_name("out.hdf5.partial")
        counts.append(_written(out) if partial.exists() else None)
        partial.with_name("out.hdf5.partial.new").write_bytes(b"left by a kill while it was laid out")
        read.clear()
        encode(pictures, out, vae=vae, **SMALL)
        assert out.read_bytes() == straight
        if counts[-1] is not None:
            assert len(read) == 7 - counts[-1]  # nothing recorded is encoded again
    assert sorted({count for count in counts if count is not None}) == [0, 2, 4, 6, 7]
    assert instant == len(counts) == 3 + 4 * 3 + 2 + 3  # lay out, four batches, end, rename


def test_killed_for_real(tmp_path, pictures, vae, straight):
    out = tmp_path / "out.hdf5"
    script = f"""
import os, signal
from soflow_fast.data import writer
flush, times = writer.LatentsWriter._flush, iter(range(9))
def deadly(self):
    flush(self)
    if next(times) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
writer._FLUSH_SECONDS, writer.LatentsWriter._flush = 0, deadly
from soflow_fast.encode import encode
encode({str(pictures)!r}, {str(out)!r}, vae={vae!r}, **{SMALL!r})
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert not out.exists()
    assert _written(out) == 4
    with pytest.raises(ValueError, match=r"says written=4 and holds 7; it is incomplete"):
        LatentMoments(tmp_path / "out.hdf5.partial", **FORM)
    encode(pictures, out, vae=vae, **SMALL)
    assert out.read_bytes() == straight


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("remedy", ["repair", "remove"])
def test_an_image_that_cannot_be_read_costs_nothing_that_is_written(tmp_path, vae, remedy, workers):
    folder, out = tmp_path / "pictures", tmp_path / "out.hdf5"
    options = {"vae": vae, **SMALL, "workers": workers}
    _write_pictures(folder)
    bad = folder / "c" / "2.png"  # number 4
    good = bad.read_bytes()
    bad.write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match=rf"the image {re.escape(str(bad))} cannot be read .*; repair or remove it"):
        encode(folder, out, **options)
    assert _written(out) == 4
    if remedy == "repair":
        bad.write_bytes(good)
    else:
        bad.unlink()
        (folder / "c" / "9.png").write_bytes(good)
    encode(folder, out, **options)
    encode(folder, tmp_path / "straight.hdf5", **options)
    assert out.read_bytes() == (tmp_path / "straight.hdf5").read_bytes()


def test_a_batch_that_does_not_fit_costs_nothing_that_is_written(tmp_path, pictures, vae, straight, monkeypatch):
    launch, times = encoding._launch, iter(range(9))

    def full(*arguments):
        if next(times) == 2:
            raise torch.OutOfMemoryError
        return launch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "_launch", full)
        with pytest.raises(ValueError, match="--batch 2 does not fit the memory of cpu; with a smaller one"):
            encode(pictures, tmp_path / "out.hdf5", vae=vae, **SMALL)
    assert _written(tmp_path / "out.hdf5") == 2
    encode(pictures, tmp_path / "out.hdf5", vae=vae, **{**SMALL, "batch": 1})
    (tmp_path / "straight.hdf5").write_bytes(straight)
    found, expected = _read(tmp_path / "out.hdf5"), _read(tmp_path / "straight.hdf5")
    np.testing.assert_allclose(found["latents"], expected["latents"], rtol=1e-4, atol=1e-4)
    assert np.array_equal(found["labels"], expected["labels"])


def test_a_full_disk_costs_nothing_that_is_written(tmp_path, pictures, vae, straight, capsys, monkeypatch):
    out, pwrite, sizes = tmp_path / "out.hdf5", os.pwrite, []

    def full(file, data, at):
        sizes.append(len(data))
        if sizes[-1] > 8 and sum(size > 8 for size in sizes) == 3:  # the third batch; a count has 8 bytes
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(file, data, at)

    command = ["encode", str(pictures), str(out), "--vae", vae]
    command += [str(part) for name, value in SMALL.items() for part in (f"--{name}", value)]
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        assert main(command) == 2
    assert f"No space left on device: '{out}.partial'" in capsys.readouterr().err.splitlines()[-1]
    assert _written(out) == 4
    assert main(command) == 0
    assert out.read_bytes() == straight


@pytest.fixture
def stopped(tmp_path, vae):
    """A folder of images, and the file of four of them."""
    _write_pictures(tmp_path / "pictures")
    bad = tmp_path / "pictures" / "c" / "2.png"
    good = bad.read_bytes()
    bad.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read"):
        encode(tmp_path / "pictures", tmp_path / "out.hdf5", vae=vae, **SMALL)
    bad.write_bytes(good)
    return tmp_path / "pictures", tmp_path / "out.hdf5"


@pytest.mark.parametrize("complete", [False, True])
def test_other_arguments_and_other_images_are_refused(stopped, vae, tmp_path, complete):
    pictures, out = stopped
    path, remedy = out.with_name("out.hdf5.partial"), "remove it to begin again"
    if complete:
        encode(pictures, out, vae=vae, **SMALL)
        path, remedy = out, "choose another name, or remove it"
    before = path.read_bytes()

    def refused(words, **changes):
        with pytest.raises(ValueError, match=re.escape(words)) as error:
            encode(pictures, out, **{"vae": vae, **SMALL, **changes})
        assert str(error.value).startswith(f"{path} ")
        assert str(error.value).endswith(remedy)
        assert path.read_bytes() == before

    refused("holds latents made with size 16, and this command has 18; give the same, or", size=18)
    refused("holds latents made with flip False, and this command has True", flip=True)
    refused("holds latents made with precision fp32, and this command has bf16", precision="bf16")
    refused("holds latents made with autoencoder weights ", vae=write_vae(tmp_path / "other", seed=1))
    Image.new("RGB", (16, 16)).save(pictures / "a" / "1.png")
    refused(f"holds {7 if complete else 4} latents, and not of the images that come first in this command")
    (pictures / "a" / "1.png").unlink()
    kept = (pictures / "a" / "0.png").read_bytes()
    Image.new("RGB", (16, 16)).save(pictures / "a" / "0.png")  # another image of that name
    refused("give the same images, or")
    (pictures / "a" / "0.png").write_bytes(kept)
    (pictures / "a0").mkdir()  # another class: the labels after it are others
    refused("give the same images, or")
    (pictures / "a0").rmdir()
    shutil.copy(pictures / "c" / "0.png", pictures / "c" / "z.png")
    if complete:
        refused("holds latents of other images; choose")
    else:
        assert encode(pictures, out, vae=vae, **SMALL).rows == 8


@pytest.mark.parametrize("name", ["out.hdf5", "out.hdf5.partial"])
@pytest.mark.parametrize("content", [b"", b"text", "cut", "other"])
def test_files_that_are_not_its_own_are_refused_and_kept(stopped, vae, name, content):
    pictures, out = stopped
    path = out.with_name(name)
    if content == "other":
        with h5py.File(path, "w") as file:
            file["latents"] = np.zeros(3)
    else:
        path.write_bytes(out.with_name("out.hdf5.partial").read_bytes()[:-500] if content == "cut" else content)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"is there and is not a file of soflow encode, or a damaged one .*remove it"):
        encode(pictures, out, vae=vae, **SMALL)
    assert path.read_bytes() == before


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--size": 0}, ["--size 0 is not possible", "at least 1"]),
        ({"--size": 17}, ["--size 17 is not possible with this autoencoder", "a multiple of 2"]),
        ({"--batch": 0}, ["--batch 0", "at least 1"]),
        ({"--workers": -1}, ["--workers -1", "at least 0"]),
        ({"--device": "gpu"}, ["device='gpu' is not known"]),
        ({"--vae": "empty"}, ["--vae='empty' cannot be read", "give a name or a folder that can"]),
        ({"--vae": "grey"}, ["--vae grey takes images of 1 channels", "RGB"]),
        ({"--vae": "broken"}, ["the latents of the image", "0.png in --precision fp32 are not finite"]),
        ({"images": "nowhere"}, ["the image folder nowhere does not exist"]),
        ({"images": "empty"}, ["the image folder empty holds no images"]),
        ({"out": "empty"}, ["empty is a folder", "such as empty/latents.hdf5"]),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, pictures, vae, capsys, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
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
    with pytest.raises(ValueError, match="--precision fp16 is not known; choose one of bf16, tf32, fp32"):
        encode(pictures, tmp_path / "out.hdf5", vae=vae, precision="fp16", **SMALL)
