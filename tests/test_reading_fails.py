"""Data that cannot be read end a run with a checkpoint of the steps before, and going on from it is exact."""

import os
import signal
import time
from dataclasses import replace
from multiprocessing import active_children

import pytest
import torch
from runs import Blobs, KilledError, assert_bitwise_equal, final, tiny_config

from soflow_fast import Trainer, checkpoint, trainer
from soflow_fast.config import DataConfig, EMAConfig, OutputConfig
from soflow_fast.data.order import batch_indices

_FAILED_STEP = 5  # from 0


class _Failing(Blobs):
    """An item of one batch raises, which none of the batches before has."""

    error = OSError("Input/output error")

    def __init__(self, **arguments):
        super().__init__(n=256, **arguments)
        before = {i for step in range(_FAILED_STEP) for i in batch_indices(256, 16, step, seed=0)}
        self.bad = next(i for i in batch_indices(256, 16, _FAILED_STEP, seed=0) if i not in before)

    def __getitem__(self, index):
        if index == self.bad and self.error is not None:
            raise self.error
        return super().__getitem__(index)


def _config(folder, workers=0, **changes):
    """Without a checkpoint before the last step."""
    output = OutputConfig(log_every=4, sample_every=0, checkpoint_every=0)
    data = DataConfig(kind="digits", workers=workers, on_device=False)
    changes = {"total_steps": 8, "ema": EMAConfig(posthoc=(0.05, 0.1), snapshot_every=2), "output": output, **changes}
    return tiny_config(folder, data=data, **changes)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [OSError("Input/output error"), ValueError("a broken image"), KeyError("label")])
def test_an_item_that_cannot_be_read_costs_no_step(tmp_path, monkeypatch, capsys, workers, error):
    monkeypatch.setattr(_Failing, "error", error)
    with pytest.raises(type(error), match=str(error)):
        Trainer(_config(tmp_path / "run", workers), dataset=_Failing()).fit()
    (saved,) = checkpoint.committed(tmp_path / "run" / "checkpoints")
    assert checkpoint.step_of(saved) == _FAILED_STEP
    sentence = f"the data of step 6 cannot be read; step 5 is saved: {saved}; the same command goes on"
    assert sentence in capsys.readouterr().err
    with pytest.raises(type(error)):  # before the first step of this one
        Trainer(_config(tmp_path / "run", workers), dataset=_Failing()).fit()
    monkeypatch.setattr(_Failing, "error", None)
    for folder in ("run", "straight"):
        Trainer(_config(tmp_path / folder, workers), dataset=_Failing()).fit()
    assert_bitwise_equal(final(tmp_path / "run", 8), final(tmp_path / "straight", 8))


def test_a_reader_that_is_killed_in_a_step_costs_no_step(tmp_path, monkeypatch):
    original, calls = trainer.TrainStep.__call__, 0

    def call(self, *args):
        nonlocal calls
        calls += 1
        if calls == 3:
            for reader in active_children():
                os.kill(reader.pid, signal.SIGKILL)
            time.sleep(0.5)  # in which torch would raise
        return original(self, *args)

    config = _config(tmp_path / "run", workers=2, total_steps=20)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.TrainStep, "__call__", call)
        with pytest.raises(RuntimeError, match=r"DataLoader worker .* exited unexpectedly"):
            Trainer(config).fit()
    (saved,) = checkpoint.committed(tmp_path / "run" / "checkpoints")
    assert 3 <= checkpoint.step_of(saved) < 20
    for folder in ("run", "straight"):
        Trainer(replace(config, run_dir=str(tmp_path / folder))).fit()
    assert_bitwise_equal(final(tmp_path / "run", 20), final(tmp_path / "straight", 20))


def test_what_may_not_be_saved_is_not(tmp_path, monkeypatch, caplog):
    """The error stays that of the data."""

    class NotFinite(_Failing):
        def __getitem__(self, index):
            x, label = super().__getitem__(index)
            return x * torch.nan, label

    rarely = {"output": OutputConfig(log_every=100, sample_every=0, checkpoint_every=0), "ema": EMAConfig()}
    with pytest.raises(OSError, match="Input/output error"):
        Trainer(_config(tmp_path, **rarely), dataset=NotFinite()).fit()
    assert checkpoint.committed(tmp_path / "checkpoints") == []
    assert "the data of step 6 cannot be read, and step 5 is not saved: the loss or the gradient" in caplog.text


def test_a_kill_while_reading_saves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(_Failing, "error", KilledError())
    with pytest.raises(KilledError):
        Trainer(_config(tmp_path), dataset=_Failing()).fit()
    assert checkpoint.committed(tmp_path / "checkpoints") == []
