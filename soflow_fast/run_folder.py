"""The records of a run in its folder: its configuration, its data, and which changes to them it went on with."""

import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal, TextIO

from torch import nn

from soflow_fast import build, checkpoint, fingerprint, given, posthoc, records, run_optimizer
from soflow_fast.checkpoint import CHECKPOINTS
from soflow_fast.config import TrainConfig
from soflow_fast.frozen import Frozen, first_of
from soflow_fast.logs import METRICS_NAME
from soflow_fast.require import brief_difference

_log = logging.getLogger(__name__)

CONFIG_NAME = "config.yaml"
DATA_NAME = "data.json"
OPTIMIZER_NAME = "optimizer.json"
GIVEN_NAME = "given.json"
CHANGES_NAME = "changes.jsonl"
LOCK_NAME = ".lock"

# The locks that are held here. A process forked from this one, such as a reader of the data, has the open files too and
# would hold the locks for as long as it lives.
_held: set[TextIO] = set()


def _let_go() -> None:
    for file in _held:
        file.close()
    _held.clear()


os.register_at_fork(after_in_child=_let_go)

#: What makes a run go on with other values.
ACCEPT = "--accept-changes (in Python, Trainer(..., accept_changes=True))"


def changes(
    run_dir: Path,
    config: TrainConfig,
    data: dict[str, object],
    accept: bool,
    made: dict,
    objects: dict | None,
) -> list[dict[str, object]]:
    """How a configuration and data differ from those of the run in the folder, if there is one: key, before, after.

    Args:
        data: their :func:`~soflow_fast.fingerprint.fingerprint`. accept: whether they may differ where that changes the
            weights. made: how the optimizer was made. objects: :func:`~soflow_fast.records.of_given` of the run.

    Raises:
        ValueError: where they may not, for a folder that is a file, and for a run without one of its records.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"run_dir={str(run_dir)!r} is a file; choose a folder")
    written = (run_dir / METRICS_NAME, run_dir / posthoc.FOLDER)
    if not (checkpoint.committed(run_dir / CHECKPOINTS) or any(path.exists() for path in written)):
        return []
    for name in (CONFIG_NAME, DATA_NAME, OPTIMIZER_NAME, GIVEN_NAME):
        there = (run_dir / name).exists()
        if there and _text(run_dir / name) is None:
            raise ValueError(
                f"run_dir={str(run_dir)!r} holds a run whose {name} is empty: it was lost, as in a power loss; put a "
                f"copy of it back, or choose another run_dir with initial_weights={str(run_dir)!r} to train its "
                "weights on"
            )
        if not there and name != GIVEN_NAME:
            raise ValueError(
                f"run_dir={str(run_dir)!r} holds a run without its {name}; put that back, or choose another folder"
            )
    theirs, before = TrainConfig.from_yaml(run_dir / CONFIG_NAME), _read_json(run_dir / DATA_NAME)
    if config.compute.precision == "auto":  # of a dry run, perhaps on another machine than the run's
        config = replace(config, compute=replace(config.compute, precision=theirs.compute.precision))
    if not accept:
        require_same(run_dir, config, theirs, f"use that value, choose another run_dir, or go on with {ACCEPT}")
    found = [
        {"key": name, "before": theirs.flat()[name], "after": config.flat()[name]}
        for name in config.differences(theirs)
    ]
    found += records.changes_of_given(_read_json(run_dir / GIVEN_NAME), objects)
    found += run_optimizer.changes(_read_json(run_dir / OPTIMIZER_NAME), made)
    for change in () if accept else found:
        was, now = brief_difference(change["before"], change["after"])
        raise ValueError(
            f"run_dir={str(run_dir)!r} holds a run with {change['key']} {was}, and this one has {now}; "
            f"make it as it was, choose another run_dir, or go on with {ACCEPT}"
        )
    sentence = fingerprint.difference(before, data)
    if sentence is None:
        return found
    if not accept:
        raise ValueError(
            f"run_dir={str(run_dir)!r} holds a run of other data: {sentence}; put the data back as they were, choose "
            f"another run_dir, or go on with {ACCEPT}"
        )
    return [*found, {"key": "data", "before": before, "after": data}]


def changes_of_frozen(run_dir: Path, path: Path | None, frozen: Frozen, accept: bool) -> list[dict[str, object]]:
    """The change of weights that the checkpoint, if any, leaves out and that are others now; ValueError where that is
    not accepted.
    """
    other = [] if path is None else frozen.others(checkpoint.left_out(path))
    if other and not accept:
        raise ValueError(
            f"run_dir={str(run_dir)!r} holds a run over other frozen weights, which its checkpoints leave out "
            f"(output.save_frozen): {first_of(other)}; build the network with those, choose another run_dir, or go on "
            f"with {ACCEPT}"
        )
    return [{"key": "frozen weights", "before": first_of(other), "after": "others"}] if other else []


def require_same(run_dir: Path, config: TrainConfig, theirs: TrainConfig, remedy: str) -> None:
    """ValueError if the configuration of the run in that folder, ``theirs``, would have other weights."""
    for name in config.differences(theirs):
        was, now = brief_difference(theirs.flat()[name], config.flat()[name])
        raise ValueError(f"run_dir={str(run_dir)!r} holds a run with {name}={was}, and this one has {now}; {remedy}")


def require_usable(state: checkpoint.State, config: TrainConfig, path: Path, trained: Iterable[str]) -> None:
    """ValueError where a run cannot go on from the state at ``path`` with a configuration and the names of what is
    trained, though changes of them are accepted.
    """
    if state.step > config.total_steps:
        raise ValueError(
            f"total_steps={config.total_steps} is less than the {state.step} steps that the run has done; choose at "
            f"least {state.step}, or remove {path} and those after that step"
        )
    saved = {name.split("/")[0] for name in state.posthoc}
    for std in config.ema.posthoc:
        if str(std) not in saved:
            raise ValueError(
                f"ema.posthoc has {std}, which the run has not averaged from its beginning; leave it out, or choose "
                "another run_dir"
            )
        for name in trained:
            if f"{std}/{name}" not in state.posthoc:
                raise ValueError(
                    f"ema.posthoc has {std}, and {name} was not trained, so not averaged, from the run's beginning; "
                    "leave ema.posthoc out, set requires_grad_(False) on it, or choose another run_dir"
                )


def load_run(
    run_dir: str | Path,
    device: str = "auto",
    *,
    model: nn.Module | None = None,
    ema_std: float | None = None,
    step: int | Literal["best"] | None = None,
) -> tuple[TrainConfig, nn.Module, int]:
    """The configuration of a run, its model with the averaged weights of a checkpoint, and the step.

    Args:
        run_dir: of the run. device: for the model.
        model: the network or objective of a run that was given one as an object; it takes the weights.
        ema_std: takes in place of those averages, and at the step of the newest snapshot, the ones of this relative
            standard deviation, see :func:`soflow_fast.posthoc.reconstruct`.
        step: of the checkpoint, or with ``ema_std`` of the snapshots; by default the newest; ``best`` for the one that
            ``output.keep_best`` keeps.

    Raises:
        ValueError: if there is no such run, no checkpoint in it or none of that step, the run was of another model, or
            it has no snapshots from which these averages can be had.
    """
    run_dir = Path(run_dir)
    if not (run_dir / CONFIG_NAME).is_file():
        raise ValueError(f"{run_dir} is not a run: it holds no {CONFIG_NAME}; give the run_dir of a training run")
    config = replace(TrainConfig.from_yaml(run_dir / CONFIG_NAME), device=device)
    with_model, model = given.with_given(config, model)
    require_same(run_dir, with_model, config, "give the model that it was trained with")
    found = checkpoint.committed(run_dir / CHECKPOINTS)
    if not found:
        raise ValueError(f"the run {run_dir} has no checkpoint yet; let it train to its first one")
    if step == "best":
        best = checkpoint.best(run_dir / CHECKPOINTS)
        if best is None:
            raise ValueError(
                f"the run {run_dir} has no best checkpoint, as none has a score; train it with output.keep_best and "
                "evaluation.every, or give a step"
            )
        step = checkpoint.step_of(best)
        if ema_std is not None and step not in {snapshot.step for snapshot in posthoc.snapshots(run_dir)}:
            raise ValueError(
                f"the best checkpoint of the run {run_dir} is of step {step}, at which there is no snapshot of the "
                "other averages; give a step that has one, or no ema_std"
            )
    path = next((path for path in found if checkpoint.step_of(path) == step), found[-1])
    if ema_std is None and step not in (None, checkpoint.step_of(path)):
        steps = ", ".join(str(checkpoint.step_of(path)) for path in found)
        raise ValueError(f"the run {run_dir} has no checkpoint of step {step}; choose one of {steps}")
    model = build.build_model(build.runnable(config), model).to(build.resolve_device(device)).eval()
    taken, at = checkpoint.load_averages(path), checkpoint.step_of(path)
    if ema_std is not None:
        average = posthoc.reconstruct(run_dir, ema_std, step)
        taken, at = {**taken, **average.weights}, average.step
        _log.warning(
            "the average of std %s at step %d is a sum of %d snapshots; its profile is off by %.2g",
            ema_std,
            at,
            average.snapshots,
            average.residual,
        )
    checkpoint.require_frozen(model, checkpoint.left_out(path), path)
    checkpoint.load_weights(model, taken, path)
    return config, model, at


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Makes the folder; within it nobody else trains there, in this process neither. Where files cannot be locked,
    nothing is known.

    Raises:
        ValueError: if somebody trains there.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK_NAME).open("a+") as file:
        try:
            # It is of this open file, not of the process as lockf's, and ends with it, however the process ends.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise ValueError(
                f"run_dir={str(run_dir)!r} is being trained in by {file.read() or 'another process'}; wait for its "
                "end, stop it, or choose another run_dir"
            ) from None
        except OSError:
            pass
        file.truncate(0)
        print(f"process {os.getpid()} of {socket.gethostname()}", end="", file=file, flush=True)
        _held.add(file)
        try:
            yield
        finally:
            _held.discard(file)


def claim(
    run_dir: Path,
    config: TrainConfig,
    data: dict[str, object],
    changed: list[dict[str, object]],
    step: int,
    made: dict,
    objects: dict | None,
) -> None:
    """Makes the folder that of a run: writes its records, and what changed after a step."""
    history = _text(run_dir / CHANGES_NAME) or ""
    lines = [json.dumps({"step": step, **change}) for change in changed]
    new = [line for line in lines if line not in history.splitlines()]  # a kill may have come before the records below
    if new:
        checkpoint.replace_text(run_dir / CHANGES_NAME, history + "".join(f"{line}\n" for line in new))
    for name, record in ((DATA_NAME, data), (OPTIMIZER_NAME, made), (GIVEN_NAME, objects)):
        if _read_json(run_dir / name) != record:
            checkpoint.replace_text(run_dir / name, json.dumps(record, indent=1) + "\n")
    checkpoint.replace_text(run_dir / CONFIG_NAME, config.to_yaml())


def _read_json(file: Path) -> dict[str, object] | None:
    text = _text(file)
    return None if text is None else json.loads(text)


def _text(file: Path) -> str | None:
    """Of a record; None where it is not there, or was lost: empty, or of zeros, as a power loss may leave it."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return text if text.strip("\0 \n") else None
