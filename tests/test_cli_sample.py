"""``soflow sample``: what it draws, the forms and names of what it writes, and what it refuses to overwrite."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from runs import refused, tiny_config

from soflow_fast import Trainer, capture, commands
from soflow_fast.checkpoint import load_averages
from soflow_fast.cli import main
from soflow_fast.images import save_npz
from soflow_fast.trainer import load_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on the digits."""
    folder = tmp_path_factory.mktemp("run")
    Trainer(tiny_config(folder)).fit()
    return folder


def test_sample(run, tmp_path, capsys):
    assert (
        main(["sample", str(run), "--count", "10", "--steps", "2", "--labels", "3,7", "--out", str(tmp_path / "x")])
        == 0
    )
    assert "10 samples in 2 step(s), " in capsys.readouterr().out
    assert Image.open(tmp_path / "x.png").size == (5 * 34, 2 * 34)
    for number, seed in enumerate("00112"):
        assert main(["sample", str(run), "--count", "10", "--seed", seed, "--out", str(tmp_path / str(number))]) == 0
    pictures = [(tmp_path / f"{number}.png").read_bytes() for number in range(5)]
    assert pictures[0] == pictures[1] != pictures[2] == pictures[3]
    assert len(set(pictures)) == 3


def test_the_forms_of_samples_hold_the_same(run, tmp_path, capsys):
    """A grid, files of their own, and ADM's arrays."""
    shown, files, arrays = tmp_path / "shown", tmp_path / "files", tmp_path / "arrays.npz"
    for form, out in (("grid", shown), ("folder", files), ("npz", arrays)):
        assert main(["sample", str(run), "--count", "12", "--format", form, "--out", str(out)]) == 0
        assert str(out) in capsys.readouterr().out
    single = np.stack([np.asarray(Image.open(files / f"{i:06d}.png")) for i in range(12)])
    assert len(list(files.iterdir())) == 12
    with np.load(arrays) as read:
        assert (read["arr_0"].dtype, read["arr_0"].shape) == (np.uint8, (12, 8, 8, 1))
        np.testing.assert_array_equal(read["arr_0"][..., 0], single)
        assert read["arr_1"].tolist() == [*range(10), 0, 1]
    cells = np.asarray(Image.open(tmp_path / "shown.png")).reshape(3, 34, 5, 34)[:, 1:-1:4, :, 1:-1:4]
    np.testing.assert_array_equal(cells.transpose(0, 2, 1, 3).reshape(15, 8, 8)[:12], single)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["arrays.npz", "files", "shown.png"]
    for form, taken in (("grid", f"{shown}.png"), ("folder", files), ("folder", arrays), ("npz", arrays)):
        said = refused(capsys, "sample", run, "--count", 2, "--format", form, "--out", taken)
        assert f"{taken} exists already; choose another by --out, or remove it" in said
    assert len(list(files.iterdir())) == 12
    for form, out in (("npz", ".."), ("grid", "."), ("grid", "/"), ("folder", ".")):
        said = refused(capsys, "sample", run, "--format", form, "--out", out)
        assert f"--out '{out}' is no name of a file or folder" in said


@pytest.mark.parametrize(
    ("out", "written"), [("a", "a.png"), ("a.png", "a.png"), ("my.samples.v1", "my.samples.v1.png"), (".b", ".b.png")]
)
def test_a_grid_is_called_as_asked(run, tmp_path, out, written):
    assert main(["sample", str(run), "--count", "2", "--out", str(tmp_path / "new" / out)]) == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == [written]


@pytest.mark.parametrize(("form", "suffix", "own"), [("grid", ".jpg", ".png"), ("npz", ".PNG", ".npz")])
def test_files_of_another_suffix_are_refused(run, tmp_path, capsys, form, suffix, own):
    said = refused(capsys, "sample", run, "--format", form, "--out", tmp_path / f"x{suffix}")
    assert f"x{suffix}' ends in {suffix}, and what is written is {own}; give that\n" in said


def test_what_is_drawn_otherwise_is_called_otherwise(run, tmp_path, capsys, monkeypatch):
    """And what would be called alike is refused, as it is the same."""
    monkeypatch.setattr(commands, "load_run", lambda *args, **options: (*load_run(*args, **options)[:2], 7))
    options = ["", "--steps 2", "--seed 1", "--labels 3", "--labels 3,5", "--count 9", "--precision bf16"]
    options += ["--seed 1 --labels 1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9,0,1,2,3,4,5", "--no-renoise"]
    for given in options:
        assert main(["sample", str(run), "--count", "8", *given.split()]) == 0
        assert "exists already" in refused(capsys, "sample", run, "--count", 8, *given.split())
    assert sorted(path.name for path in (run / "samples").glob("step-00000007-*")) == [
        "step-00000007-1-step-8-samples-labels-3-5.png",
        "step-00000007-1-step-8-samples-labels-3.png",
        "step-00000007-1-step-8-samples-precision-bf16.png",
        "step-00000007-1-step-8-samples-renoise-false.png",
        "step-00000007-1-step-8-samples-seed-1-labels-1-2-3-4-5-6-7-8-9-1-2-3-4-5-6-7-8-b1826a.png",
        "step-00000007-1-step-8-samples-seed-1.png",
        "step-00000007-1-step-8-samples.png",
        "step-00000007-1-step-9-samples.png",
        "step-00000007-2-step-8-samples.png",
    ]


def test_arrays_are_written_as_a_whole_or_not_at_all(tmp_path):
    def parts():
        yield torch.zeros(2, 3, 8, 8)
        raise OSError("the disk is full")

    (tmp_path / "x.npz").write_bytes(b"earlier")
    with pytest.raises(OSError, match="full"):
        save_npz(parts(), 4, None, tmp_path / "x.npz")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x.npz", b"earlier")]


def test_a_folder_of_samples_is_whole_or_not_there(run, tmp_path, monkeypatch, capsys):
    def interrupted(parts, folder):
        folder.mkdir()
        (folder / "000000.png").touch()
        raise KeyboardInterrupt

    command = ["sample", str(run), "--count", "3", "--format", "folder", "--out", str(tmp_path / "files")]
    with monkeypatch.context() as patched:
        patched.setattr(commands, "save_folder", interrupted)
        assert main(command) == 130
    assert "goes on" not in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main(command) == 0
    assert len(list((tmp_path / "files").iterdir())) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["files"]


def test_an_older_checkpoint(run, tmp_path, capsys):
    pictures = []
    for step in (4, 6):
        assert main(["sample", str(run), "--count", "10", "--step", str(step)]) == 0
        pictures.append((run / "samples" / f"step-{step:08d}-1-step-10-samples.png").read_bytes())
        _, model, loaded = load_run(run, "cpu", step=step)
        averages = load_averages(run / "checkpoints" / f"step-{step:08d}")
        assert loaded == step
        assert all(torch.equal(value, averages[name]) for name, value in model.state_dict().items())
    assert main(["sample", str(run), "--count", "10", "--out", str(tmp_path / "newest")]) == 0
    assert pictures[0] != pictures[1] == (tmp_path / "newest.png").read_bytes()
    assert main(["eval", str(run), "--count", "66", "--step", "4"]) == 0
    assert json.loads((run / "evaluation" / "step-00000004-1-step-66-samples.json").read_text())["step"] == 4
    capsys.readouterr()
    for command in ("sample", "eval"):
        assert "has no checkpoint of step 5; choose one of 2, 4, 6\n" in refused(capsys, command, run, "--step", 5)


def test_several_steps_add_noise_again_or_do_not(run, tmp_path):
    """SoFlow does unless it is told not to; one step is the same."""
    pictures = []
    for steps in ("1", "2"):
        for options in ([], ["--renoise"], ["--no-renoise"]):
            out = tmp_path / f"{steps}{''.join(options)}"
            assert main(["sample", str(run), "--count", "10", "--steps", steps, *options, "--out", str(out)]) == 0
            pictures.append(out.with_suffix(".png").read_bytes())
    assert pictures[0] == pictures[1] == pictures[2]
    assert pictures[3] == pictures[4] != pictures[5]


def test_compiled_samples_are_the_same(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(capture._OPTIONS, True, {"backend": "aot_eager"})  # without the minutes of generating C++
    for name in ("compile", "no-compile"):
        out = ["--out", str(tmp_path / name), "--count", "10", f"--{name}", "--precision", "fp32"]
        assert main(["sample", str(run), *out]) == 0
        printed = capsys.readouterr().out
        assert " images/s in fp32" in printed
        assert ("s of compiling not counted" in printed) == (name == "compile")
    ours, theirs = (np.asarray(Image.open(tmp_path / f"{name}.png"), int) for name in ("compile", "no-compile"))
    assert abs(ours - theirs).max() <= 1
