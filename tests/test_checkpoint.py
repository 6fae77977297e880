"""Checkpoints: exact, committed or not there at all, whatever instant the process dies at."""

import errno
import json
import os
import re
import shutil
from functools import partial

import pytest
import torch
from runs import killed
from safetensors import SafetensorError
from torch import nn

from soflow_fast import checkpoint
from soflow_fast.checkpoint import State


def _state(step: int) -> State:
    values = torch.arange(6.0).view(2, 3) + step
    optimizer = {
        "state": {0: {"step": torch.tensor(float(step)), "exp_avg": values / 7}},
        "param_groups": [{"lr": 0.1}],
    }
    averages = {"ema": {"network.w": values.T}, "posthoc": {"0.1/network.w": values + 1}}
    return State(step, {"network.w": values}, **averages, optimizer=optimizer, ema_updates=step - 1, skipped_steps=2)


def _assert_equal(read: State, written: State) -> None:
    assert (read.step, read.ema_updates, read.skipped_steps) == (
        written.step,
        written.ema_updates,
        written.skipped_steps,
    )
    assert torch.equal(read.model["network.w"], written.model["network.w"])
    assert torch.equal(read.ema["network.w"], written.ema["network.w"])
    assert torch.equal(read.posthoc["0.1/network.w"], written.posthoc["0.1/network.w"])
    ours, theirs = read.optimizer["state"][0], written.optimizer["state"][0]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert read.optimizer["param_groups"] == written.optimizer["param_groups"]


def test_what_is_written_is_read_and_the_newest_stay(tmp_path):
    for step in (1, 20, 300):
        path = checkpoint.save(tmp_path, _state(step), keep=2)
        assert path.name == f"step-{step:08d}"
    assert [path.name for path in checkpoint.committed(tmp_path)] == ["step-00000020", "step-00000300"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-00000020", "step-00000300"]
    for path in checkpoint.committed(tmp_path):
        _assert_equal(checkpoint.load(path), _state(int(path.name[5:])))


def test_those_of_every_so_many_steps_stay(tmp_path):
    for step in (5, 10, 12, 15, 20):
        path = checkpoint.save(tmp_path, _state(step), keep=1, keep_every=10)
    assert [checkpoint.step_of(path) for path in checkpoint.committed(tmp_path)] == [10, 20]
    checkpoint.save(tmp_path, _state(21), keep=1)  # also where that is no longer asked for
    (path / "KEEP").unlink()
    checkpoint.save(tmp_path, _state(22), keep=1)
    assert [checkpoint.step_of(path) for path in checkpoint.committed(tmp_path)] == [10, 22]


def test_what_others_keep_among_the_checkpoints_stays(tmp_path):
    first = checkpoint.save(tmp_path, _state(1), keep=1)
    shutil.copytree(first, tmp_path / "step-00000001-best")
    (tmp_path / "step-00000001.zip").write_bytes(b"packed")
    (tmp_path / "step-00000002").write_bytes(b"a file")
    others = {"step-00000001-best", "step-00000001.zip", "step-00000002"}
    newest = checkpoint.save(tmp_path, _state(100_000_000), keep=1)
    assert checkpoint.committed(tmp_path) == [newest]
    assert {entry.name for entry in tmp_path.iterdir()} == others | {"step-100000000"}


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    paths = [checkpoint.save(tmp_path, _state(step), keep=2) for step in (99_999_999, 100_000_000)]
    assert checkpoint.committed(tmp_path) == paths


def test_without_its_marker_a_checkpoint_does_not_count(tmp_path):
    checkpoint.save(tmp_path, _state(1), keep=2)
    newer = checkpoint.save(tmp_path, _state(2), keep=2)
    (newer / "COMMITTED").unlink()
    assert [path.name for path in checkpoint.committed(tmp_path)] == ["step-00000001"]
    checkpoint.save(tmp_path, _state(2), keep=2)
    _assert_equal(checkpoint.load(checkpoint.committed(tmp_path)[-1]), _state(2))


# Everything that changes what is on the disk.
_DANGEROUS = [
    (os, "fsync"),
    (os, "rename"),
    (os, "unlink"),
    (os, "rmdir"),
    (os, "mkdir"),
    (shutil, "rmtree"),
    (json, "dumps"),
]


def test_a_kill_before_any_change_of_the_disk_leaves_the_last_or_the_new_checkpoint(tmp_path, monkeypatch):
    survivors = set()
    for calls in range(100):
        folder = tmp_path / str(calls)
        checkpoint.save(folder, _state(1), keep=1)
        was_killed = killed(monkeypatch, calls, _DANGEROUS, partial(checkpoint.save, folder, _state(2), 1))
        newest = checkpoint.load(checkpoint.committed(folder)[-1])
        _assert_equal(newest, _state(newest.step))
        survivors.add(newest.step)
        checkpoint.save(folder, _state(3), keep=1)
        assert [entry.name for entry in folder.iterdir()] == ["step-00000003"]
        if not was_killed:
            break
    assert calls > 10
    assert survivors == {1, 2}


def test_what_another_process_has_open_costs_no_new_checkpoint(tmp_path, monkeypatch, caplog):
    """As NFS refuses to remove a folder then."""
    rmtree, held = shutil.rmtree, True

    def refuses(path, **options):
        if held:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", refuses)
    for step in (1, 2, 3, 3):  # the last in the place of one that cannot be removed either
        checkpoint.save(tmp_path, _state(step), keep=1)
        assert [checkpoint.step_of(path) for path in checkpoint.committed(tmp_path)] == [step]
    assert not any((path / "COMMITTED").exists() for path in tmp_path.glob(".writing-*"))
    assert "cannot be removed yet, the next checkpoint tries again: [Errno" in caplog.text
    checkpoint.add_score(tmp_path / "step-00000003", 1.0, {}, keep=1)
    held = False
    checkpoint.save(tmp_path, _state(4), keep=1)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]  # the best stays


def test_an_old_one_that_may_not_be_removed_stays_whole(tmp_path, monkeypatch, caplog):
    first = checkpoint.save(tmp_path, _state(1), keep=1)

    def refuses(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuses)
        newest = checkpoint.save(tmp_path, _state(2), keep=1)
    assert checkpoint.committed(tmp_path) == [first, newest]
    assert f"the old checkpoint {first} cannot be removed, and training goes on: [Errno" in caplog.text


def test_what_replaces_a_file_is_on_the_disk_before_it_does(tmp_path, monkeypatch):
    """After a power loss a rename may be on the disk without the content."""
    done = []
    flush, replace = checkpoint.flush, os.replace
    monkeypatch.setattr(checkpoint, "flush", lambda path: (done.append(path.name), flush(path)))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append("rename"), replace(old, new)))
    checkpoint.replace_text(tmp_path / "run" / "config.yaml", "seed: 1\n")
    assert done == [".writing-config.yaml", "rename", "run"]
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_record_on_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "data.json").write_text("before")
    monkeypatch.setattr(checkpoint.Path, "write_text", full)
    with pytest.raises(OSError, match=rf"data\.json cannot be written to {tmp_path} .*make room and give the same"):
        checkpoint.replace_text(tmp_path / "data.json", "after")
    assert (tmp_path / "data.json").read_text() == "before"


_FILES = ["model.safetensors", "ema.safetensors", "posthoc.safetensors", "optimizer.pt", "state.json"]


@pytest.mark.parametrize("name", _FILES)
@pytest.mark.parametrize("damage", ["cut", "gone", "other"])
def test_damage_is_refused(tmp_path, name, damage):
    path = checkpoint.save(tmp_path, _state(1), keep=1)
    raw = (path / name).read_bytes()
    if damage == "cut":
        (path / name).write_bytes(raw[:-1])
    elif damage == "gone":
        (path / name).unlink()
    else:
        (path / name).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    left = {"cut": len(raw) - 1, "gone": 0}.get(damage)
    what = "other bytes than were written" if left is None else f"{left} of {len(raw)} bytes"
    with pytest.raises(ValueError, match=rf"damaged \({name} has {what}\)"):
        checkpoint.load(path)
    if name in ("model.safetensors", "ema.safetensors"):
        with pytest.raises(ValueError, match=rf"damaged \({name} has {what}\)"):
            checkpoint.load_averages(path)


@pytest.mark.parametrize("marker", ["", "[1]", "\0"])
def test_a_damaged_marker_is_refused(tmp_path, marker):
    path = checkpoint.save(tmp_path, _state(1), keep=1)
    (path / "COMMITTED").write_text(marker)
    with pytest.raises(ValueError, match=r"damaged \(COMMITTED is not what was written\)"):
        checkpoint.load(path)


def test_an_error_of_the_device_is_told_as_that(tmp_path, monkeypatch):
    def fails(*_):
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(torch.AcceleratorError):
        checkpoint.save(tmp_path, _state(2), keep=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError("No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch, error):
    first = checkpoint.save(tmp_path, _state(1), keep=1)

    def full(*_):
        raise error

    monkeypatch.setattr(torch, "save", full)
    sentence = rf"step 2 cannot be written to .* \({error}\), where \d+ MiB are free; if that is too little, make room"
    with pytest.raises(OSError, match=sentence):
        checkpoint.save(tmp_path, _state(2), keep=1)
    assert list(tmp_path.iterdir()) == [first]
    _assert_equal(checkpoint.load(first), _state(1))


def test_what_cannot_be_serialised_is_not_told_as_a_full_disk(tmp_path, monkeypatch):
    """Of which safetensors has one class of errors."""

    def refuses(tensors, path):
        raise SafetensorError("Error while serializing: invalid offset")

    monkeypatch.setattr(checkpoint, "save_file", refuses)
    with pytest.raises(OSError, match="cannot be written") as found:
        checkpoint.save(tmp_path, _state(2), keep=1)
    assert re.sub(r"\d+ MiB", "n MiB", str(found.value)) == (
        f"the checkpoint of step 2 cannot be written to {tmp_path} (Error while serializing: invalid offset), where "
        "n MiB are free; if that is too little, make room, and the run goes on from the checkpoint before"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"weight": torch.zeros(3, 2)}, "bias is missing there and (3,) in this model"),
        ({"weight": torch.zeros(3, 4), "bias": torch.zeros(3)}, "weight is (3, 4) there and (3, 2) in this model"),
        (
            {"weight": torch.zeros(3, 2), "bias": torch.zeros(3), "x": torch.zeros(1)},
            "x is (1,) there and missing in this",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing(tmp_path, weights, words):
    model = nn.Linear(2, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="of another model") as error:
        checkpoint.load_weights(model, weights, tmp_path)
    assert words in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
