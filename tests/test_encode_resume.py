"""``soflow encode``: a kill at any instant loses nothing, and what cannot be gone on with is refused."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from encode_runs import FORM, SMALL, count_written, read_arrays, write_pictures, write_vae
from PIL import Image

from soflow_fast import encode as encoding
from soflow_fast.cli import main
from soflow_fast.data import LatentMoments, writer
from soflow_fast.encode import encode


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder)
    return folder


@pytest.fixture(scope="module")
def straight(pictures, vae, tmp_path_factory):
    """The bytes of the file that nothing interrupted."""
    out = tmp_path_factory.mktemp("straight") / "out.hdf5"
    encode(pictures, out, vae=vae, **SMALL)
    return out.read_bytes()


@pytest.fixture(autouse=True)
def flush_always(monkeypatch):
    monkeypatch.setattr(writer, "_FLUSH_SECONDS", 0.0)


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
        counts.append(count_written(out) if partial.exists() else None)
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
    assert count_written(out) == 4
    with pytest.raises(ValueError, match=r"says written=4 and holds 7; it is incomplete"):
        LatentMoments(tmp_path / "out.hdf5.partial", **FORM)
    encode(pictures, out, vae=vae, **SMALL)
    assert out.read_bytes() == straight


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("remedy", ["repair", "remove"])
def test_an_image_that_cannot_be_read_costs_nothing_that_is_written(tmp_path, vae, remedy, workers):
    folder, out = tmp_path / "pictures", tmp_path / "out.hdf5"
    options = {"vae": vae, **SMALL, "workers": workers}
    write_pictures(folder)
    bad = folder / "c" / "2.png"  # number 4
    good = bad.read_bytes()
    bad.write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match=rf"the image {re.escape(str(bad))} cannot be read .*; repair or remove it"):
        encode(folder, out, **options)
    assert count_written(out) == 4
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
        with pytest.raises(ValueError, match="batch=2 does not fit the memory of cpu; with a smaller one"):
            encode(pictures, tmp_path / "out.hdf5", vae=vae, **SMALL)
    assert count_written(tmp_path / "out.hdf5") == 2
    encode(pictures, tmp_path / "out.hdf5", vae=vae, **{**SMALL, "batch": 1})
    (tmp_path / "straight.hdf5").write_bytes(straight)
    found, expected = read_arrays(tmp_path / "out.hdf5"), read_arrays(tmp_path / "straight.hdf5")
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
    assert count_written(out) == 4
    assert main(command) == 0
    assert out.read_bytes() == straight


@pytest.fixture
def stopped(tmp_path, vae):
    """A folder of images, and the file of four of them."""
    write_pictures(tmp_path / "pictures")
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
    (pictures / "a").rename(pictures / "d")  # the classes are others
    refused("give the same images, or")
    (pictures / "d").rename(pictures / "a")
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
