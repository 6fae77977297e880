"""Small training runs that several tests share."""

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image

from soflow_fast import checkpoint, trainer
from soflow_fast.build import sample_shape
from soflow_fast.cli import main
from soflow_fast.config import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    SoFlowConfig,
    TrainConfig,
)
from soflow_fast.evaluate import digit_scores
from soflow_fast.images import balanced_labels
from soflow_fast.sample import Sampler
from soflow_fast.size import height_and_width


def tiny_config(run_dir, **changes) -> TrainConfig:
    """A DiT of 16 channels and one block on the digits: a step takes milliseconds."""
    config = TrainConfig(
        run_dir=str(run_dir),
        batch_size=16,
        total_steps=6,
        device="cpu",
        model=ModelConfig(
            input_size=8, in_channels=1, num_classes=10, patch_size=4, hidden_size=16, depth=1, num_heads=2
        ),
        data=DataConfig(kind="digits", workers=0),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        soflow=SoFlowConfig(guidance_scale=2.0),
        output=OutputConfig(log_every=2, sample_every=0, sample_shape=(2, 5), checkpoint_every=2),
        evaluation=EvaluationConfig(samples=20, batch_size=8),
    )
    return replace(config, **changes)


def write_config(path: Path, config: TrainConfig) -> Path:
    path.write_text(config.to_yaml())
    return path


def soflow(*args: str, environment: dict[str, str] | None = None, processes: int = 1) -> subprocess.CompletedProcess:
    """The command in a process of its own, or in several started by torchrun, without Triton's interpreter."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else []), "-m", "soflow_fast.cli", *args],
        capture_output=True,
        text=True,
        env={**inherited, "OMP_NUM_THREADS": "1", **(environment or {})},
        timeout=300,
    )


def refused(capsys, *args) -> str:
    """The sentence with which a command line is refused."""
    assert main([str(arg) for arg in args]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("soflow: ")
    assert printed.err.count("\n") == 1
    assert "Traceback" not in printed.err
    return printed.err


def scores_of_digits(config: TrainConfig) -> dict[str, float]:
    """Trains on the digits, and scores 2,000 one-step samples of the averages."""
    run = trainer.Trainer(config)
    run.fit()
    labels = balanced_labels(2000, 10)
    with run.ema.applied():
        parts = Sampler(run.model, sample_shape(config), batch=1000).draw(labels, 2000)
        return digit_scores(torch.cat(list(parts)), labels)


def write_latents(path: Path, n=40, channels=4, size=8, classes=10, **changes) -> Path:
    """An HDF5 file of the published form with made-up, unscaled latents; an array given as None is left out."""
    generator = np.random.default_rng(0)
    mean = 5.5 * generator.standard_normal((n, channels, *height_and_width(size)))
    std = generator.uniform(0.01, 0.1, mean.shape)
    arrays = {
        "latents": np.concatenate([mean, std], axis=1).astype(np.float32),
        "labels": np.arange(n) % classes,
        "amount": np.int64(n),
        "latent_size": np.int64(size),
        **changes,
    }
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            if array is not None:
                file[name] = array
    return path


def write_images(folder: Path, n=30, size=(8, 8)) -> np.ndarray:
    """(n, *size, 3) random bytes, and two class folders of them as PNG."""
    levels = np.random.default_rng(0).integers(0, 256, (n, *size, 3), dtype=np.uint8)
    for number, image in enumerate(levels):
        (folder / f"class{number % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"class{number % 2}" / f"{number}.png")
    return levels


def pixel_features(levels: np.ndarray) -> np.ndarray:
    """(n, 3·H·W) float64 in [-1, 1] of images (n, H, W, 3) of bytes, channel by channel."""
    return levels.transpose(0, 3, 1, 2).reshape(len(levels), -1) / 127.5 - 1


def write_statistics(file: Path, features: np.ndarray, dtype=np.float64, **changes) -> Path:
    """A ``.npz`` file of the published form for features (n, F); an array given as None is left out."""
    arrays = {"mu": features.mean(axis=0).astype(dtype), "sigma": np.cov(features.T).astype(dtype), **changes}
    np.savez(file, **{name: array for name, array in arrays.items() if array is not None})
    return file


class Blobs(torch.utils.data.Dataset):
    """A user's own data set: (sample, label) by index."""

    def __init__(self, n=64, shape=(1, 8, 8), classes=10):
        self.samples = torch.randn(n, *shape, generator=torch.Generator().manual_seed(5))
        self.classes = classes

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index], index % self.classes


class Augmented(Blobs):
    """Items draw from every global generator."""

    def __getitem__(self, index):
        x, label = super().__getitem__(index)
        return x + torch.randn(x.shape) + np.random.rand() + random.random(), label


def final(run_dir, step=6):
    """The checkpoint of a step."""
    return checkpoint.load(run_dir / "checkpoints" / f"step-{step:08d}")


def files(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder, by its path from there."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def assert_bitwise_equal(first, second):
    for ours, theirs in ((first.model, second.model), (first.ema, second.ema), (first.posthoc, second.posthoc)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    states = first.optimizer["state"], second.optimizer["state"]
    assert all(torch.equal(states[0][i][key], states[1][i][key]) for i in states[0] for key in states[0][i])
    assert (first.step, first.ema_updates, first.skipped_steps) == (
        second.step,
        second.ema_updates,
        second.skipped_steps,
    )


class StopError(Exception):
    """Of :func:`stop_at`."""


def stop_at(monkeypatch, step):
    """Makes the training step fail when it is called for the given time."""
    original, calls = trainer.TrainStep.__call__, 0

    def call(self, *args):
        nonlocal calls
        calls += 1
        if calls == step:
            raise StopError
        return original(self, *args)

    monkeypatch.setattr(trainer.TrainStep, "__call__", call)


class KilledError(BaseException):
    """Of :func:`killed`; stands for SIGKILL."""


def killed(monkeypatch, after, functions, run):
    """Whether a run is killed, where it would call one of these functions, ``(owner, name)``, after so many calls."""
    left = after

    def dying(original):
        def call(*args, **kwargs):
            nonlocal left
            if left == 0:
                raise KilledError
            left -= 1
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for owner, name in functions:
            patch.setattr(owner, name, dying(getattr(owner, name)))
        try:
            run()
        except KilledError:
            return True
    return False
