"""A run that is told to stop saves a checkpoint first, and going on from it is exact."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from runs import assert_bitwise_equal, final, tiny_config, write_config

from soflow_fast import Trainer, checkpoint, trainer
from soflow_fast.cli import main
from soflow_fast.config import DataConfig, OutputConfig
from soflow_fast.data import batches
from soflow_fast.data.order import batch_indices
from soflow_fast.stopping import StoppedBySignal, StopSignal


def _config(folder, **changes):
    """Without a checkpoint before the last step."""
    return tiny_config(folder, output=OutputConfig(log_every=2, sample_every=3, checkpoint_every=0), **changes)


def _signalled(monkeypatch, step, number):
    """Sends this process a signal in its training step number ``step``."""
    original, calls = trainer.TrainStep.__call__, 0

    def call(self, *args):
        nonlocal calls
        calls += 1
        if calls == step:
            os.kill(os.getpid(), number)
        return original(self, *args)

    monkeypatch.setattr(trainer.TrainStep, "__call__", call)


@pytest.fixture
def handled():
    """The signals that a handler of the user's gets."""
    seen = []
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
    before = {number: signal.signal(number, lambda n, _: seen.append(n)) for number in numbers}
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_the_run_with_a_checkpoint_and_it_goes_on_exactly(tmp_path, monkeypatch, capsys, handled, number):
    Trainer(_config(tmp_path / "straight")).fit()
    config = _config(tmp_path / "stopped")
    with monkeypatch.context() as patch:
        _signalled(patch, 3, number)
        with pytest.raises((StoppedBySignal, KeyboardInterrupt)) as stopped:
            Trainer(config).fit()
    assert getattr(stopped.value, "code", 130) == 128 + number
    (saved,) = checkpoint.committed(tmp_path / "stopped" / "checkpoints")
    assert saved.name == "step-00000003"
    assert not (tmp_path / "stopped" / "samples").exists()  # no time is spent on them
    sentence = f"stopped by {number.name} after step 3: {saved}; the same command goes on from it"
    assert sentence in capsys.readouterr().err
    assert handled == []
    os.kill(os.getpid(), number)
    assert handled == [number]  # by the user's own handler again
    Trainer(config).fit()
    assert_bitwise_equal(final(tmp_path / "straight"), final(tmp_path / "stopped"))


@pytest.fixture
def interruptible():
    """Ctrl-C as in a terminal: what is started in the background may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_interrupt_ends_at_once(tmp_path, monkeypatch, capfd, interruptible):
    _signalled(monkeypatch, 2, signal.SIGINT)
    _signalled(monkeypatch, 2, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        Trainer(_config(tmp_path)).fit()
    assert checkpoint.committed(tmp_path / "checkpoints") == []
    assert "Ctrl-C once more ends it at once" in capfd.readouterr().err


def test_a_terminal_that_is_gone_keeps_no_run_from_its_checkpoint(tmp_path, monkeypatch, handled):
    class Gone:
        def __getattr__(self, name):
            return getattr(sys.__stderr__, name)

        def write(self, _):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Gone())
    _signalled(monkeypatch, 3, signal.SIGHUP)
    with pytest.raises(StoppedBySignal):
        Trainer(_config(tmp_path)).fit()
    (saved,) = checkpoint.committed(tmp_path / "checkpoints")
    assert saved.name == "step-00000003"


def test_a_signal_that_is_ignored_stays_so(tmp_path, monkeypatch):
    """As nohup has SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _signalled(monkeypatch, 2, signal.SIGHUP)
    try:
        assert Trainer(_config(tmp_path)).fit().name == "step-00000006"
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_in_the_last_step_changes_nothing(tmp_path, monkeypatch, handled):
    _signalled(monkeypatch, 6, signal.SIGTERM)
    assert Trainer(_config(tmp_path)).fit().name == "step-00000006"


def test_the_handlers_are_put_back_after_an_error(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(trainer.TrainStep, "__call__", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Trainer(_config(tmp_path)).fit()
    assert signal.getsignal(signal.SIGTERM) is before


def test_in_another_thread_signals_stay_the_users(tmp_path):
    thread = threading.Thread(target=Trainer(_config(tmp_path)).fit)
    thread.start()
    thread.join()
    assert final(tmp_path).step == 6


def test_the_command_ends_with_the_code_of_the_signal(tmp_path, monkeypatch, capsys, interruptible):
    path = write_config(tmp_path / "config.yaml", _config(tmp_path / "run"))
    with monkeypatch.context() as patch:
        _signalled(patch, 2, signal.SIGTERM)
        assert main(["train", str(path)]) == 143
    assert "stopped by SIGTERM after step 2" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        _signalled(patch, 2, signal.SIGINT)
        assert main(["train", str(path)]) == 130
    assert "stopped by SIGINT after step 4" in capsys.readouterr().err
    assert main(["train", str(path)]) == 0


def test_a_signal_to_all_processes_of_the_job_leaves_the_readers_alive(tmp_path):
    data = DataConfig(kind="digits", workers=2, on_device=False)
    path = write_config(tmp_path / "config.yaml", replace(_config(tmp_path / "run", data=data), total_steps=10**6))
    process = subprocess.Popen(
        [sys.executable, "-m", "soflow_fast.cli", "train", str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 143, printed
    assert "stopped by SIGTERM after step" in printed
    assert "Traceback" not in printed
    assert len(checkpoint.committed(tmp_path / "run" / "checkpoints")) == 1


class _Clock:
    """Each look at it takes half a minute."""

    def __init__(self):
        self.seconds = 0

    def monotonic(self):
        self.seconds += 30
        return self.seconds


def test_a_checkpoint_is_written_once_so_many_minutes_have_passed(tmp_path, monkeypatch):
    Trainer(_config(tmp_path / "straight", total_steps=8)).fit()
    config = _config(tmp_path / "timed", total_steps=8)
    config = replace(config, output=replace(config.output, checkpoint_minutes=1, keep_checkpoints=9))
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "time", _Clock())
        _signalled(patch, 6, signal.SIGTERM)
        with pytest.raises(StoppedBySignal):
            Trainer(config).fit()
    folder = tmp_path / "timed" / "checkpoints"
    assert [checkpoint.step_of(path) for path in checkpoint.committed(folder)] == [2, 4, 6]
    Trainer(replace(config, output=replace(config.output, checkpoint_minutes=0))).fit()  # may change, as others do
    assert [checkpoint.step_of(path) for path in checkpoint.committed(folder)] == [2, 4, 6, 8]
    assert_bitwise_equal(final(tmp_path / "straight", 8), final(tmp_path / "timed", 8))


@pytest.mark.parametrize("number", [0, signal.SIGTERM])
@pytest.mark.parametrize("saves", [False, True])
def test_what_any_process_says_is_agreed(number, saves):
    class Two:
        world_size, largest_so_far = 2, 0

        def largest(self, here):
            self.largest_so_far = max(here, self.largest_so_far)
            return self.largest_so_far

    processes, other = Two(), StopSignal()
    other._number = number
    other.agreed(processes, 10, saves)
    assert StopSignal().agreed(processes, 10) == (number, saves)
    assert StopSignal().agreed(processes, 11) == (0, False)  # not asked


# Process 1 alone gets the signal, in its third step.
_ONE_OF_TWO = """
import os, signal, sys
from soflow_fast import distributed, trainer
from soflow_fast.cli import main
original, calls = trainer.TrainStep.__call__, 0
def call(self, *args):
    global calls
    calls += 1
    if calls == 3 and self.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return original(self, *args)
trainer.TrainStep.__call__ = call
code = main(["train", sys.argv[1]])
open(sys.argv[1] + "." + os.environ["RANK"], "w").write(str(code))
"""


def test_several_processes_stop_after_the_same_step(tmp_path):
    config = _config(tmp_path / "run", total_steps=20)
    config = replace(config, output=replace(config.output, log_every=100))
    path, script = write_config(tmp_path / "config.yaml", config), tmp_path / "script.py"
    script.write_text(_ONE_OF_TWO)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *torchrun, str(script), str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"config.yaml.{rank}").read_text() for rank in (0, 1)] == ["143", "143"]
    (saved,) = checkpoint.committed(tmp_path / "run" / "checkpoints")
    assert saved.name == "step-00000010"  # when they ask each other
    assert done.stderr.count("stopped by SIGTERM after step 10") == 1
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").open()] == [10]


class _Sleeper(torch.utils.data.Dataset):
    """Its second batch never comes."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        while index in batch_indices(4, 2, 1, seed=0):
            time.sleep(1)
        return torch.zeros(1, 2, 2), 0


def test_readers_that_still_read_end_with_the_run():
    """They do not get the signal by which the loader, or Python at its exit, would end them."""
    given = batches(_Sleeper(), batch=2, steps=range(2), seed=0, num_classes=1, workers=1, device=torch.device("cpu"))
    with StopSignal() as stop:
        steps = stop.shield_workers(given)
        next(steps)
        (reader,) = multiprocessing.active_children()
        steps.close()
    reader.join(30)
    assert not reader.is_alive()
