"""What an interrupted run leaves behind, and what going on makes of it."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from foreign_networks import UNet
from runs import (
    Blobs,
    KilledError,
    StopError,
    assert_bitwise_equal,
    files,
    final,
    soflow,
    stop_at,
    tiny_config,
    write_config,
)

from soflow_fast import DiT, Trainer, differencing, grids, posthoc, trainer
from soflow_fast.config import EMAConfig, EvaluationConfig, OutputConfig, SoFlowConfig


def _snapshots(run_dir):
    return sorted({snapshot.step for snapshot in posthoc.snapshots(run_dir)})


# ------------------------------------------------------------------------------------------- the same object again


def test_a_trainer_interrupted_before_a_checkpoint_does_not_train_on(tmp_path, monkeypatch):
    net = DiT(8, 4, 1, 16, 1, 2, num_classes=10)
    run = Trainer(tiny_config(tmp_path, output=OutputConfig(sample_every=0)), model=net)
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(StopError):
            run.fit()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=r"interrupted after step 3, and run_dir=.* has no checkpoint .*; make a new"):
        run.fit()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_trainer_refused_before_its_first_step_may_be_asked_again(tmp_path):
    config = tiny_config(tmp_path)
    run = Trainer(config)
    (tmp_path / "checkpoints" / "step-00000002").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000002" / "COMMITTED").touch()
    with pytest.raises(ValueError, match=r"holds a run without its config\.yaml"):
        run.fit()
    shutil.rmtree(tmp_path / "checkpoints")
    run.fit()
    assert final(tmp_path).step == 6


# --------------------------------------------------------------------------------------------------- the snapshots


def _averaged(run_dir, every=1, **changes):
    return tiny_config(run_dir, ema=EMAConfig(posthoc=(0.05, 0.1), snapshot_every=every), **changes)


def test_snapshots_of_an_abandoned_training_are_removed(tmp_path, capsys):
    Trainer(_averaged(tmp_path)).fit()
    assert _snapshots(tmp_path) == [1, 2, 3, 4, 5, 6]
    for step in (4, 6):
        shutil.rmtree(tmp_path / "checkpoints" / f"step-{step:08d}")
    capsys.readouterr()
    with pytest.raises(ValueError, match="holds a run with seed=0"):
        Trainer(_averaged(tmp_path, every=4, seed=1)).fit()
    assert _snapshots(tmp_path) == [1, 2, 3, 4, 5, 6]
    Trainer(_averaged(tmp_path, every=4, seed=1), accept_changes=True).fit()
    assert "removed the snapshots of steps beyond that: 3, 4, 5, 6" in capsys.readouterr().err
    assert _snapshots(tmp_path) == [1, 2, 4, 6]
    Trainer(_averaged(tmp_path, every=4, seed=1)).fit()
    assert "removed" not in capsys.readouterr().err


def test_a_kill_in_their_removal_leaves_whole_ones(tmp_path, monkeypatch):
    Trainer(_averaged(tmp_path)).fit()
    with monkeypatch.context() as patch:
        patch.setattr(posthoc.shutil, "rmtree", lambda path, **options: options or (_ for _ in ()).throw(KilledError()))
        with pytest.raises(KilledError):
            posthoc.remove_after(tmp_path, 4)
    assert len(_snapshots(tmp_path)) == 5
    assert len(posthoc.remove_after(tmp_path, 4)) == 1
    assert _snapshots(tmp_path) == [1, 2, 3, 4]
    assert len(list((tmp_path / "ema").iterdir())) == 4


# ----------------------------------------------------------------------------- validation, sample grids and scores


def test_a_failing_grid_costs_itself_and_not_the_run(tmp_path, monkeypatch, caplog):
    run = Trainer(tiny_config(tmp_path, output=OutputConfig(sample_every=4)))
    weight = run.model.network.final_layer.linear.weight
    own = []

    def decode(samples):
        own.append(weight)
        raise RuntimeError("out of memory")

    run._decode = decode
    run.fit()
    assert "the sample grid at step 4 failed, and training goes on: out of memory" in caplog.text
    assert len(own) == 1
    Trainer(tiny_config(tmp_path / "alone")).fit()
    assert torch.equal(final(tmp_path).model["network.final_layer.linear.weight"], weight)
    assert torch.equal(final(tmp_path / "alone").model["network.final_layer.linear.weight"], weight)
    assert not list((tmp_path / "samples").glob("*"))


def _scored(run_dir, name="evaluation/frechet_all"):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if name in line]


def _validations(run_dir):
    return [line for line in (run_dir / "metrics.jsonl").read_text().splitlines() if "validation/" in line]


@pytest.mark.parametrize("step", [3, 6])
@pytest.mark.parametrize("before", ["Validation", "Grids", "Scoring"])
def test_what_a_kill_after_the_checkpoint_prevented_is_made_first(tmp_path, monkeypatch, before, step):
    output = OutputConfig(log_every=2, sample_every=3, checkpoint_every=3, validate_every=3)
    config = tiny_config(tmp_path / "run", output=output, evaluation=EvaluationConfig(every=3, samples=20))
    config = replace(config, data=replace(config.data, validation="held_out", validation_samples=40))
    Trainer(replace(config, run_dir=str(tmp_path / "straight"))).fit()
    call = getattr(trainer, before).__call__

    def killed(self, at, *arguments):
        if at == step:
            raise KilledError
        call(self, at, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(getattr(trainer, before), "__call__", killed)
        with pytest.raises(KilledError):
            Trainer(config).fit()
    assert _scored(tmp_path / "run") == [3][: step // 3 - 1]
    Trainer(config).fit()
    assert _scored(tmp_path / "run") == _scored(tmp_path / "run", "validation/loss") == [3, 6]
    assert files(tmp_path / "run" / "samples") == files(tmp_path / "straight" / "samples")
    scores = [
        [line for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines() if "ation/" in line]
        for run in ("run", "straight")
    ]
    assert scores[0] == scores[1]
    with monkeypatch.context() as patch:
        for name in ("Validation", "Grids", "Scoring"):
            patch.setattr(getattr(trainer, name), "__call__", lambda *_: 1 / 0)
        Trainer(config).fit()  # nothing is missing


class _Branching(UNet):
    """Cannot be captured."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(channels=1)

    def forward(self, x, t, s, labels=None):
        return super().forward(x, t, s, labels) if t.max() <= 2 else x


def test_a_validation_that_comes_late_warns_as_any_other(tmp_path, monkeypatch, caplog):
    """Of a network that takes two forwards, once, though each of its batches is of a copy of the objective."""
    output = OutputConfig(log_every=2, sample_every=0, checkpoint_every=3, validate_every=3)
    config = tiny_config(tmp_path / "run", output=output, soflow=SoFlowConfig(guidance_scale=1.0, label_drop=0.0))
    config = replace(config, data=replace(config.data, validation="held_out", validation_samples=40))
    captures, captured = [], differencing._captured
    monkeypatch.setattr(differencing, "_captured", lambda *inputs: captures.append(1) or captured(*inputs))

    def warnings_of(config):
        caplog.clear(), captures.clear()
        Trainer(config, model=_Branching()).fit()
        return [record.getMessage() for record in caplog.records if "takes two forwards" in record.getMessage()]

    wanted = warnings_of(replace(config, run_dir=str(tmp_path / "straight")))
    assert (len(wanted), len(captures)) == (1, 1)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Validation, "__call__", lambda *_: (_ for _ in ()).throw(KilledError()))
        with pytest.raises(KilledError):
            warnings_of(config)
    assert warnings_of(config) == wanted
    assert len(captures) == 3  # of the training, and of two sizes of batches of the validation
    assert_bitwise_equal(final(tmp_path / "run"), final(tmp_path / "straight"))
    assert _validations(tmp_path / "run") == _validations(tmp_path / "straight")


def test_a_half_written_grid_is_none(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, output=OutputConfig(sample_every=6))
    save = grids.save_samples

    def killed(*arguments):
        save(*arguments)
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(grids, "save_samples", killed)
        with pytest.raises(KilledError):
            Trainer(config, dataset=Blobs()).fit()
    Trainer(config, dataset=Blobs()).fit()
    assert [file.name for file in (tmp_path / "samples").iterdir()] == ["step-00000006.png"]


def test_several_processes_make_what_is_missing_of_a_finished_run(tmp_path):
    config = tiny_config(tmp_path / "run")
    Trainer(config).fit()
    missing = ["--output.sample_every=6", "--evaluation.every=6"]  # as if a kill had come before them
    missing += ["--output.validate_every=6", "--data.validation=held_out", "--data.validation_samples=3"]
    result = soflow("train", str(write_config(tmp_path / "config.yaml", config)), *missing, processes=2)
    assert result.returncode == 0, result.stderr
    assert _scored(tmp_path / "run") == _scored(tmp_path / "run", "validation/loss") == [6]
    assert [file.name for file in (tmp_path / "run" / "samples").iterdir()] == ["step-00000006.png"]
