"""The records of a run in its folder: its configuration, what its data are, and whether both are still the same."""

import json
import os
from pathlib import Path

from soflow_fast import checkpoint, fingerprint, posthoc
from soflow_fast.checkpoint import CHECKPOINTS
from soflow_fast.config import TrainConfig
from soflow_fast.logs import METRICS_NAME

CONFIG_NAME = "config.yaml"
DATA_NAME = "data.json"


def read_config(run_dir: Path) -> TrainConfig:
    """The configuration of a run."""
    return TrainConfig.from_yaml(run_dir / CONFIG_NAME)


def require_same_run(run_dir: Path, config: TrainConfig, data: dict[str, object]) -> None:
    """ValueError if the folder holds a run of another configuration or of other data, or is a file.

    Args:
        data: their :func:`~soflow_fast.fingerprint.fingerprint`; a run that has none on record takes any.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"run_dir={str(run_dir)!r} is a file; choose a folder")
    written = (run_dir / METRICS_NAME, run_dir / posthoc.FOLDER)
    if not (checkpoint.committed(run_dir / CHECKPOINTS) or any(path.exists() for path in written)):
        return
    if not (run_dir / CONFIG_NAME).exists():
        raise ValueError(f"run_dir={str(run_dir)!r} holds a run without its {CONFIG_NAME}; choose another folder")
    theirs = read_config(run_dir)
    require_same(run_dir, config, theirs)
    changed = _changed_data(run_dir, config.data.path, data, theirs.data.path)
    if changed is not None:
        raise ValueError(
            f"run_dir={str(run_dir)!r} holds a run of other data: {changed}; put the data back as they were, or choose "
            "another run_dir"
        )


def require_same(run_dir: Path, config: TrainConfig, theirs: TrainConfig) -> None:
    """ValueError if the configuration of the run in that folder, ``theirs``, would have other weights."""
    name = config.first_difference(theirs)
    if name is not None:
        raise ValueError(
            f"run_dir={str(run_dir)!r} holds a run with {name}={theirs.flat()[name]!r}, and this one has "
            f"{config.flat()[name]!r}; use that value, or choose another run_dir"
        )


def claim(run_dir: Path, config: TrainConfig, data: dict[str, object]) -> None:
    """Makes the folder that of a run: writes its records."""
    run_dir.mkdir(parents=True, exist_ok=True)
    if _read_data(run_dir) != data:
        _replace(run_dir / DATA_NAME, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    _replace(run_dir / CONFIG_NAME, config.to_yaml())


def _changed_data(run_dir: Path, path: str | None, data: dict[str, object], their_path: str | None) -> str | None:
    before = _read_data(run_dir)
    if before is not None:
        return fingerprint.difference(before, data)
    if path == their_path:
        return None
    return f"they lie at {path} in place of {their_path}, and the run has no {DATA_NAME} that says what they were"


def _read_data(run_dir: Path) -> dict[str, object] | None:
    file = run_dir / DATA_NAME
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _replace(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.writing")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)
