"""Checkpoints that survive a kill at any instant.

A checkpoint is a folder ``step-00001000`` with the weights and their averages (safetensors, the keys of the published
checkpoints), the optimizer and the rest of the state. It is written under a temporary name, flushed to the disk and
renamed, and it counts only while its marker ``COMMITTED`` exists, which is removed before anything else of it is. The
marker has the size and the SHA-256 of each file. What cannot be removed is a warning: the new checkpoint is whole.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.serialization import default_restore_location

from soflow_fast.frozen import Frozen, first_of
from soflow_fast.positions import are_of_one_grid

_log = logging.getLogger(__name__)

#: The folder of a run that holds its checkpoints.
CHECKPOINTS = "checkpoints"

_MARKER = "COMMITTED"
_STAYS = "KEEP"
_SCORE = "SCORE"
_FROZEN = "frozen.json"
_WRITING = ".writing-"


class State(NamedTuple):
    """What a run needs to go on.

    Attributes:
        step: steps done. model, ema: weights by name. posthoc: the further averages, as ``<std>/<name>``.
        optimizer: its state_dict. ema_updates: behind the averages. skipped_steps: steps left out because of a value
            that was not finite. frozen: of what is not trained and is in neither of the two, by name, the
            :func:`soflow_fast.frozen.hashes_of`.
    """

    step: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    posthoc: dict[str, Tensor]
    optimizer: dict
    ema_updates: int
    skipped_steps: int
    frozen: dict[str, str] = {}  # noqa: RUF012


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def committed(folder: Path) -> list[Path]:
    """The checkpoints that count, oldest first; folders of other names, such as copies, are not looked at."""
    return sorted((path for path in step_folders(folder) if (path / _MARKER).is_file()), key=step_of)


def save(folder: Path, state: State, keep: int, keep_every: int = 0) -> Path:
    """Writes a checkpoint, then removes all but the newest ``keep``, those marked to stay and the best; returns its
    path.

    Those of every ``keep_every``-th step, 0 for none, are marked by an empty file ``KEEP``, as a user may mark others.
    The best is the one of the lowest score among those that :func:`add_score` gave one.

    Raises:
        OSError: where it cannot be written; the ones before stay, and nothing of it does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _clear(folder)
    final = path_of(folder, state.step)
    temporary = _aside(final)
    temporary.mkdir()
    what = f"the checkpoint of step {state.step}"
    try:
        with writing(what, folder, "make room, and the run goes on from the checkpoint before"):
            _write(temporary, state, bool(keep_every) and state.step % keep_every == 0)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _set_aside(final)
    os.rename(temporary, final)
    flush(folder)
    _prune(folder, keep)
    return final


def _write(temporary: Path, state: State, stays: bool) -> None:
    save_file(on_host(state.model), temporary / "model.safetensors")
    save_file(on_host(state.ema), temporary / "ema.safetensors")
    if state.posthoc:
        save_file(on_host(state.posthoc), temporary / "posthoc.safetensors")
    torch.save(state.optimizer, temporary / "optimizer.pt")
    if state.frozen:
        (temporary / _FROZEN).write_text(json.dumps(state.frozen))
    if stays:
        (temporary / _STAYS).touch()
    rest = {"step": state.step, "ema_updates": state.ema_updates, "skipped_steps": state.skipped_steps}
    (temporary / "state.json").write_text(json.dumps(rest))
    files = {}
    for file in sorted(temporary.iterdir()):
        files[file.name] = {"bytes": file.stat().st_size, "sha256": _digest(file)}
        flush(file)
    (temporary / _MARKER).write_text(json.dumps(files))
    flush(temporary / _MARKER)
    flush(temporary)


def add_score(path: Path, score: float, of: dict, keep: int) -> None:
    """Gives a checkpoint a score, of which the lowest is the best; then removes others as :func:`save` does.

    It is in the checkpoint's file ``SCORE``: the former best needs no change, whenever this is killed.

    Args:
        of: how it was scored; only scores of the same kind as the newest one's compete.
    """
    with replaced(path / _SCORE) as temporary:
        temporary.write_text(json.dumps({"score": score, "of": of}) + "\n")
    _prune(path.parent, keep)


def score_of(path: Path) -> tuple[float, dict] | None:
    """The score of a checkpoint and how it was scored, if it was."""
    try:
        found = json.loads((path / _SCORE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # others may pass, and the best must not be removed for them
        return None
    return found["score"], found["of"]


def best(folder: Path) -> Path | None:
    """The checkpoint of the lowest score among those scored as the newest one; of equal ones the oldest; or None."""
    scores = {path: score for path in committed(folder) if (score := score_of(path)) is not None}
    of = next((score[1] for score in reversed(scores.values())), None)
    return min((path for path in scores if scores[path][1] == of), key=lambda path: scores[path][0], default=None)


def load(path: Path, device: torch.device | str = "cpu") -> State:
    """Reads a checkpoint.

    Raises:
        ValueError: if it is damaged.
    """
    _require_whole(path)
    rest = json.loads((path / "state.json").read_text())
    posthoc = path / "posthoc.safetensors"
    return State(
        step=rest["step"],
        model=load_file(path / "model.safetensors", str(device)),
        ema=load_file(path / "ema.safetensors", str(device)),
        posthoc=load_file(posthoc, str(device)) if posthoc.is_file() else {},
        optimizer=torch.load(path / "optimizer.pt", map_location=_from_device_to(device), weights_only=True),
        ema_updates=rest["ema_updates"],
        skipped_steps=rest["skipped_steps"],
        frozen=left_out(path),
    )


def left_out(path: Path) -> dict[str, str]:
    """The :func:`soflow_fast.frozen.hashes_of` of the weights that a checkpoint leaves out."""
    return json.loads((path / _FROZEN).read_text()) if (path / _FROZEN).is_file() else {}


def load_averages(path: Path) -> dict[str, Tensor]:
    """The averaged weights of a checkpoint, and what has no average as it is, on the host, but for what is
    :func:`left_out`; ValueError if damaged.
    """
    _require_whole(path, ("model.safetensors", "ema.safetensors"))
    return {**load_file(path / "model.safetensors"), **load_file(path / "ema.safetensors")}


def load_weights(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Copies weights read from the checkpoint ``path`` into a model, which keeps its own of what that leaves out;
    ValueError as :func:`require_fit`.
    """
    require_fit(model, weights, f"the checkpoint {path}", without=left_out(path))
    model.load_state_dict(weights, strict=False)


def require_frozen(model: nn.Module, left_out: Mapping[str, str], path: Path) -> None:
    """ValueError where a model's own weights are others than those that the checkpoint ``path`` leaves out."""
    other = Frozen(model, saved=True).others(left_out)
    if other:
        raise ValueError(
            f"the checkpoint {path} was trained on other frozen weights, which it leaves out (output.save_frozen): "
            f"{first_of(other)}; build the network with those"
        )


def require_fit(
    model: nn.Module,
    weights: dict[str, Tensor],
    origin: str,
    remedies: Mapping[str, str] | None = None,
    without: Collection[str] = (),
) -> None:
    """ValueError if weights of that origin are of another model; it names the first that does not fit.

    Args:
        remedies: by parts of names, what else to do about these. without: names that the weights leave out.
    """
    own = model.state_dict()
    for name in sorted((own.keys() - set(without)) | weights.keys()):
        ours, theirs = (tuple(state[name].shape) if name in state else None for state in (own, weights))
        if ours == theirs and name.endswith("pos_embed") and not are_of_one_grid(own[name], weights[name]):
            raise ValueError(
                f"{origin} is of a model of another input_size: {name} is the table of another grid of as many tokens; "
                "choose the size it was trained with, or start a run with it as initial_weights"
            )
        if ours != theirs:
            remedy = next((text for part, text in (remedies or {}).items() if part in name), "")
            raise ValueError(
                f"{origin} is of another model: {name} is "
                f"{'missing' if theirs is None else theirs} there and {'missing' if ours is None else ours} in this "
                f"model; choose the model it was trained with{remedy}"
            )


def replace_text(file: Path, text: str) -> None:
    """Replaces a file's text as :func:`replaced` does; OSError, as of :func:`writing`, if it cannot be written."""
    with writing(file.name, file.parent, "make room and give the same command again"), replaced(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder, of the same suffix, whose file takes the place of the other at the
    end.

    It is on the disk before it is renamed: a power loss, too, leaves the file before or the new one, not an empty one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_WRITING}{path.name}")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(what: str, folder: Path, remedy: str) -> Iterator[None]:
    """A failure to write within it is one sentence: torch and safetensors raise errors of their own.

    These are of a full disk as of what cannot be serialised, and only their text may tell which.

    Args:
        what: is written. folder: where. remedy: where there is too little room.

    Raises:
        OSError: that ``what`` cannot be written, with the cause, the room that there is and the remedy.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.AcceleratorError):  # of a step before, noticed here
            raise
        free = shutil.disk_usage(folder).free
        raise OSError(
            f"{what} cannot be written to {folder} ({' '.join(str(error).split())}), where {free >> 20} MiB are free; "
            f"if that is too little, {remedy}"
        ) from error


def flush(path: Path) -> None:
    """Asks the system to have a file or folder on the disk before it goes on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _from_device_to(device: torch.device | str) -> Callable:
    """What lay on a device goes to this one; what lay on the host, such as a count that is read there, stays."""
    return lambda storage, place: storage if place == "cpu" else default_restore_location(storage, str(device))


def _require_whole(path: Path, read: Sequence[str] | None = None) -> None:
    """ValueError if a file has another size, or one of those that are to be read (by default all) other bytes."""

    def damaged(what: str) -> ValueError:
        return ValueError(
            f"the checkpoint {path} is damaged ({what}); restore it, or remove its folder to go on from the one before"
        )

    try:
        files = dict(json.loads((path / _MARKER).read_text()))
    except (ValueError, TypeError):
        raise damaged(f"{_MARKER} is not what was written") from None
    for name, wanted in files.items():
        found = (path / name).stat().st_size if (path / name).is_file() else 0
        if found != wanted["bytes"]:
            raise damaged(f"{name} has {found} of {wanted['bytes']} bytes")
        if (read is None or name in read) and wanted["sha256"] != _digest(path / name):
            raise damaged(f"{name} has other bytes than were written")


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while part := content.read(1 << 24):
            digest.update(part)
    return digest.hexdigest()


def step_folders(folder: Path) -> list[Path]:
    """The folders of :func:`path_of`, whether they count or not."""
    return [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir()]


def step_of(path: Path) -> int:
    """Of a folder of :func:`path_of`."""
    return int(path.name.removeprefix("step-"))


def on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, as safetensors takes them: no two in one memory, as tied parameters are."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _prune(folder: Path, keep: int) -> None:
    whole = committed(folder)
    kept = [*whole[-keep:], *(path for path in whole if (path / _STAYS).exists()), best(folder)]
    for old in step_folders(folder):
        if old not in kept:
            _set_aside(old)
    _clear(folder)


def _set_aside(path: Path) -> None:
    """Takes from a checkpoint first its marker, then its name: what cannot be removed of it never counts."""
    if path.exists():
        try:
            (path / _MARKER).unlink(missing_ok=True)
            os.rename(path, _aside(path))
        except OSError as error:
            _log.warning("the old checkpoint %s cannot be removed, and training goes on: %s", path, error)


def _clear(folder: Path) -> None:
    """Removes what was set aside or not finished; NFS, for one, refuses while another process has a file of it open."""
    for left in folder.glob(f"{_WRITING}*"):
        try:
            shutil.rmtree(left)
        except OSError as error:
            _log.warning("%s cannot be removed yet, the next checkpoint tries again: %s", left, error)


def _aside(path: Path) -> Path:
    """A new name beside a checkpoint, for what is being written or removed."""
    return path.with_name(f"{_WRITING}{path.name}-{uuid.uuid4().hex[:8]}")
