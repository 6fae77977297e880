"""Training in two processes, by the real command line on the digits: the numbers of one process."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from fast_step_runs import make_model, make_step, training_batch
from runs import soflow, tiny_config, write_config

from soflow_fast import Trainer, checkpoint, distributed, posthoc
from soflow_fast.config import DataConfig, EMAConfig, OptimizerConfig, OutputConfig

STEPS = 20


def _config(folder, given, **changes):
    """With all that a second process could do otherwise: given weights, a schedule, validation, snapshots, grids."""
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=5, schedule="cosine", **changes)
    output = OutputConfig(log_every=10, sample_every=10, checkpoint_every=10, validate_every=20)
    ema = EMAConfig(posthoc=(0.05, 0.1), snapshot_every=10)
    data = DataConfig(kind="digits", workers=0, validation="held_out", validation_samples=45)
    config = tiny_config(folder, total_steps=STEPS, output=output, ema=ema, data=data, optimizer=optimizer)
    return replace(config, initial_weights=str(given))


def _train(folder, given, processes, *overrides):
    path = write_config(folder.with_suffix(".yaml"), _config(folder, given))
    return soflow("train", str(path), *overrides, processes=processes)


def _trained(folder, given, processes):
    result = _train(folder, given, processes)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"done: {folder / 'checkpoints' / f'step-{STEPS:08d}'}\n"  # the first process alone
    return result.stderr


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A run whose weights the others start from."""
    folder = tmp_path_factory.mktemp("given") / "run"
    Trainer(tiny_config(folder, total_steps=2)).fit()
    return folder


@pytest.fixture(scope="module")
def one(given, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    Trainer(_config(folder, given)).fit()
    return folder


@pytest.fixture(scope="module")
def two(given, tmp_path_factory):
    """The first process fails to write its grids, and does not keep the other waiting."""
    folder = tmp_path_factory.mktemp("two") / "run"
    folder.mkdir()
    (folder / "samples").write_text("no folder can be made here")
    said = _trained(folder, given, 2)
    for once in ("initial weights: the averages of", "the sample grid at step 10 failed, and training goes on"):
        assert said.count(once) == 1
    return folder


def _stopped_half_way(folder, copy):
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "checkpoints" / f"step-{STEPS:08d}")
    return copy


def _without_key_bias(bias):
    """Without its middle third, whose true gradient is zero: Adam makes steps of its rounding errors."""
    query, _, value = bias.chunk(3)
    return torch.cat([query, value])


def _assert_same_run(folder, other):
    """Weights and averages are equal to 3e-5, metrics to 1e-6.

    A sum in another order rounds otherwise, and where a gradient is small Adam makes steps of that.
    """
    ours, theirs = (checkpoint.load(run / "checkpoints" / f"step-{STEPS:08d}") for run in (folder, other))
    for a, b in ((ours.model, theirs.model), (ours.ema, theirs.ema), (ours.posthoc, theirs.posthoc)):
        assert a.keys() == b.keys()
        for name in a:
            x, y = (
                _without_key_bias(weights[name]) if name.endswith("qkv.bias") else weights[name] for weights in (a, b)
            )
            assert (x - y).norm() <= 3e-5 * y.norm(), name
    assert (ours.step, ours.ema_updates) == (theirs.step, theirs.ema_updates)
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (folder, other)]
    assert [(line["step"], "validation/loss" in line) for line in lines[0]] == [(10, False), (20, False), (20, True)]
    for a, b in zip(*lines, strict=True):
        assert a.keys() == b.keys()
        for name in b.keys() - {"images_per_second"}:
            values = [line[name] if isinstance(line[name], list) else [line[name]] for line in (a, b)]
            for x, y in zip(*values, strict=True):
                assert x == (y if y is None else pytest.approx(y, rel=1e-6))


def test_two_processes_train_as_one(one, two):
    _assert_same_run(two, one)


def test_only_the_first_process_writes(two):
    assert len(list(two.glob("events.*"))) == 1
    assert [path.name for path in checkpoint.committed(two / "checkpoints")] == [
        f"step-{step:08d}" for step in (10, 20)
    ]
    assert [(one.step, one.std, one.updates) for one in posthoc.snapshots(two)] == [
        (step, std, step) for step in (10, 20) for std in (0.05, 0.1)
    ]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(request, tmp_path, given, one, before, after):
    stopped = _stopped_half_way(request.getfixturevalue({1: "one", 2: "two"}[before]), tmp_path / "run")
    _trained(stopped, given, after)
    _assert_same_run(stopped, one)


def test_what_every_process_refuses(tmp_path, given):
    result = _train(tmp_path / "run", given, 2, "--batch_size", "17")
    assert result.returncode == 1  # torchrun's own
    refused = [line for line in result.stderr.splitlines() if line.startswith("soflow: process ")]
    assert refused
    sentence = "batch_size=17 cannot be shared equally by 2 processes; choose a multiple of 2"
    assert all(sentence in line for line in refused)
    assert not (tmp_path / "run").exists()


def test_a_run_that_only_the_first_process_can_check_is_refused_once(given, two):
    result = _train(two, given, 2, "--seed", "1")
    assert result.returncode == 1
    refused = [line for line in result.stderr.splitlines() if line.startswith("soflow: ")]
    assert len(refused) == 1
    assert "process 0 of 2: " in refused[0]
    assert "holds a run with seed=0, and this one has 1" in refused[0]
    assert not re.search(r"^\S*(OtherProcess|LostProcess|Runtime)Error", result.stderr, re.MULTILINE)


# ------------------------------------------------------------------------------------------- in this process alone


def test_a_process_alone_has_all_rows_and_sums_nothing():
    alone = distributed.join(torch.device("cpu"))
    assert (alone.rank, alone.world_size, alone.rows(12)) == (0, 1, slice(0, 12))
    values = torch.tensor([1.0, 2.0])
    assert alone.sum(values) is values
    assert alone.minimum(values) is values
    assert alone.of_first(lambda: 3) == 3
    assert distributed.whose() == ""


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize(
    ("device", "local_rank", "words"),
    [
        ("cuda:1", "0", "device='cuda:1' is one GPU and there are 4 processes; set device=cuda"),
        ("cuda", "2", "process 2 of this machine has no GPU: 2 are visible; start 2 processes"),
        ("cuda", None, "LOCAL_RANK is not set"),
    ],
)
def test_gpus_that_cannot_be(monkeypatch, two_gpus, device, local_rank, words):
    if local_rank is None:
        monkeypatch.delenv("LOCAL_RANK", raising=False)
    else:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(ValueError, match=words):
        distributed.join(torch.device(device))


def test_a_checkpoint_that_this_process_does_not_see(tmp_path, monkeypatch):
    run = Trainer(tiny_config(tmp_path))
    monkeypatch.setattr(run.processes, "of_first", lambda work: tmp_path / "checkpoints" / "step-00000002")
    with pytest.raises(ValueError, match=r"process 0 does not see the checkpoint .* a file system that all processes"):
        run.fit()


def test_micro_batches_of_two_processes(given, one, tmp_path):
    """The rows of one process in two micro-batches are those of two processes."""
    Trainer(_config(tmp_path, given, accumulation=2)).fit()
    _assert_same_run(tmp_path, one)


def test_batches_of_processes_that_would_hold_other_numbers_of_velocity_rows():
    step, _ = make_step(make_model(torch.float32))
    step.world_size = 2
    x0, labels = training_batch(0, torch.float32)
    with pytest.raises(ValueError, match="batches of 6 rows do not all hold the same number of velocity rows"):
        step(x0[:6], labels[:6])
