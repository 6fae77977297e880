"""The checkpoint of the lowest Fréchet distance stays, whenever the run is stopped, killed and gone on with."""

import json
import math
import os
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image
from runs import Blobs, KilledError, StopError, killed, stop_at, tiny_config
from test_checkpoint import _DANGEROUS, _state

from soflow_fast import Trainer, checkpoint, cli, scoring
from soflow_fast.config import EvaluationConfig, OutputConfig
from soflow_fast.trainer import load_run

FOLDER = "checkpoints"


def _config(run_dir, every=1, keep=1, **output):
    """Six steps, each with a checkpoint."""
    output = OutputConfig(sample_every=0, checkpoint_every=1, keep_checkpoints=keep, keep_best=True, **output)
    return tiny_config(run_dir, output=output, evaluation=EvaluationConfig(every=every, samples=20, batch_size=8))


@pytest.fixture
def distances(monkeypatch):
    """Gives the evaluations of steps 1, 2, .. these distances; None fails, and an exception is raised."""

    def give(*values, name="frechet_all"):
        left = iter(values)

        def evaluate(*_, **__):
            value = next(left)
            if isinstance(value, BaseException):
                raise value
            return {name: value, "recognised": 1.0}

        monkeypatch.setattr(scoring, "evaluate", evaluate)

    return give


def _kept(run_dir):
    """The steps of the checkpoints, and the best one's."""
    best = checkpoint.best(run_dir / FOLDER)
    steps = [checkpoint.step_of(path) for path in checkpoint.committed(run_dir / FOLDER)]
    return steps, None if best is None else checkpoint.step_of(best)


@pytest.mark.parametrize(
    ("values", "options", "kept"),
    [
        ((5.0, 3.0, 4.0, 6.0, 3.5, 3.25), {}, ([2, 6], 2)),
        ((5.0, 3.0, 4.0, 6.0, 2.0, 2.5), {}, ([5, 6], 5)),  # and no longer 2
        ((5.0, 3.0, 4.0, 6.0, 2.0, 1.0), {}, ([6], 6)),
        ((3.0, 3.0, 3.0, 3.0, 3.0, 3.0), {}, ([1, 6], 1)),
        ((5.0, 3.0, 4.0, 6.0, 2.0, 2.5), {"keep_every": 2}, ([2, 4, 5, 6], 5)),
        ((5.0, 3.0, 4.0, 6.0, 2.0, 2.5), {"keep": 3}, ([4, 5, 6], 5)),
        ((1.0, 3.0, 4.0), {"every": 2}, ([2, 6], 2)),
        ((math.nan, 3.0, math.inf, OSError("full"), math.nan, 4.0), {}, ([2, 6], 2)),
        ((math.nan, OSError("full"), math.nan, math.nan, math.nan, math.nan), {}, ([6], None)),
    ],
)
def test_the_best_stays_and_the_former_best_does_not(tmp_path, distances, values, options, kept):
    distances(*values, name="frechet" if options else "frechet_all")
    Trainer(_config(tmp_path, **options)).fit()
    assert _kept(tmp_path) == kept


def test_scores_of_another_kind_mark_nothing(tmp_path, distances):
    distances(*6 * [1.0], name="memorisation")
    Trainer(_config(tmp_path)).fit()
    assert _kept(tmp_path) == ([6], None)


def test_the_best_survives_a_stop_and_the_end_of_the_rule(tmp_path, monkeypatch, distances):
    distances(3.0, 2.0, 4.0, 5.0)
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(StopError):
            Trainer(_config(tmp_path)).fit()
    assert _kept(tmp_path) == ([2, 4], 2)
    distances(2.5)
    Trainer(replace(_config(tmp_path), total_steps=5), accept_changes=True).fit()
    assert _kept(tmp_path) == ([2, 5], 2)
    without = _config(tmp_path)
    distances(2.0)
    Trainer(replace(without, output=replace(without.output, keep_best=False)), accept_changes=True).fit()
    assert _kept(tmp_path) == ([2, 6], 2)
    (tmp_path / FOLDER / "step-00000002" / "SCORE").unlink()
    distances(9.0)
    Trainer(replace(without, total_steps=7, output=replace(without.output, keep_best=False)), accept_changes=True).fit()
    assert _kept(tmp_path) == ([7], None)


def _steps_scored(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "evaluation/frechet_all" in line]


def test_a_kill_in_an_evaluation_costs_nothing(tmp_path, distances):
    distances(5.0, 4.0, KilledError())
    with pytest.raises(KilledError):
        Trainer(_config(tmp_path)).fit()
    assert _kept(tmp_path) == ([2, 3], 2)
    distances(3.5, 4.5, 4.5, KilledError())
    with pytest.raises(KilledError):
        Trainer(_config(tmp_path)).fit()
    assert _kept(tmp_path) == ([3, 6], 3)
    distances(3.0)
    Trainer(_config(tmp_path)).fit()  # which has no step left to do
    assert _kept(tmp_path) == ([6], 6)
    assert _steps_scored(tmp_path) == [1, 2, 3, 4, 5, 6]
    distances()
    Trainer(_config(tmp_path)).fit()


def test_a_score_that_cannot_be_kept_is_among_the_metrics(tmp_path, monkeypatch, distances, caplog):
    distances(5.0, 4.0, 3.0, 4.0, 4.0, 4.0)
    add_score, left = checkpoint.add_score, [None, OSError("the disk is full")]

    def add(*arguments):
        if left and isinstance(error := left.pop(0), OSError):
            raise error
        add_score(*arguments)

    monkeypatch.setattr(checkpoint, "add_score", add)
    Trainer(_config(tmp_path)).fit()
    assert "the score of step 2 could not be kept, and training goes on: the disk is full" in caplog.text
    assert _steps_scored(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert _kept(tmp_path) == ([3, 6], 3)


def test_scores_by_other_settings_do_not_compete(tmp_path, distances):
    distances(1.0, 2.0)
    Trainer(replace(_config(tmp_path), total_steps=2)).fit()
    assert _kept(tmp_path) == ([1, 2], 1)
    distances(5.0, 4.0, 6.0, 6.0)
    config = _config(tmp_path)
    config = replace(config, evaluation=replace(config.evaluation, samples=30))
    Trainer(config, accept_changes=True).fit()
    assert _kept(tmp_path) == ([4, 6], 4)


def test_an_error_that_may_pass_removes_nothing(tmp_path, monkeypatch):
    checkpoint.add_score(checkpoint.save(tmp_path, _state(1), keep=1), 2.0, {}, keep=1)
    monkeypatch.setattr(checkpoint.Path, "read_text", lambda *_: (_ for _ in ()).throw(OSError("stale file handle")))
    with pytest.raises(OSError, match="stale"):
        checkpoint.save(tmp_path, _state(2), keep=1)
    assert [checkpoint.step_of(path) for path in checkpoint.committed(tmp_path)] == [1, 2]


def test_the_best_cannot_be_kept_without_scores(tmp_path):
    config = _config(tmp_path)
    with pytest.raises(ValueError, match=r"output\.keep_best=True keeps the best by its score, and there are none"):
        Trainer(replace(config, data=replace(config.data, kind="given")), dataset=Blobs())


def test_a_kill_before_any_change_of_the_disk_loses_neither_the_best_nor_the_newest(tmp_path, monkeypatch):
    def scores(folder):
        found = {checkpoint.step_of(path): checkpoint.score_of(path) for path in checkpoint.committed(folder)}
        return {step: score and score[0] for step, score in found.items()}

    found, begun = [], tmp_path / "begun"
    checkpoint.add_score(checkpoint.save(begun, _state(1), keep=1), 2.0, {}, keep=1)
    checkpoint.save(begun, _state(2), keep=1)
    for calls in range(100):
        folder = tmp_path / str(calls)
        shutil.copytree(begun, folder)
        better = partial(checkpoint.add_score, checkpoint.path_of(folder, 2), 1.5, {}, keep=1)
        was_killed = killed(monkeypatch, calls, [*_DANGEROUS, (os, "replace")], better)
        left = scores(folder)
        assert left in ({1: 2.0, 2: None}, {1: 2.0, 2: 1.5}, {2: 1.5})
        assert all(checkpoint.load(path).step for path in checkpoint.committed(folder))
        found.append(left)
        better()
        assert scores(folder) == {2: 1.5}
        assert [entry.name for entry in folder.iterdir()] == ["step-00000002"]
        if not was_killed:
            break
    assert len({str(left) for left in found}) == 3


@pytest.mark.parametrize("text", ["", "high", "nan"])
def test_what_is_no_score_is_none(tmp_path, text):
    path = checkpoint.save(tmp_path, _state(1), keep=1)
    (path / "SCORE").write_text(text)
    assert checkpoint.score_of(path) is None
    assert checkpoint.best(tmp_path) is None


@pytest.mark.parametrize(("every", "saved"), [(0, 2), (3, 2), (1, 2), (2, 0), (0, 0)])
def test_every_evaluated_step_must_have_a_checkpoint(tmp_path, every, saved):
    output, evaluation = OutputConfig(checkpoint_every=saved, keep_best=True), EvaluationConfig(every=every)
    with pytest.raises(ValueError, match=r"output\.keep_best=True needs a checkpoint of every") as error:
        tiny_config(tmp_path, output=output, evaluation=evaluation)
    assert f"evaluation.every={every} must be a multiple of output.checkpoint_every={saved}, and" in str(error.value)


def test_the_best_is_loaded_sampled_and_scored_by_that_name(tmp_path, distances, capsys):
    distances(5.0, 3.0, 4.0, 6.0, 3.5, 3.25)
    Trainer(_config(tmp_path)).fit()
    capsys.readouterr()
    _, model, step = load_run(tmp_path, "cpu", step="best")
    averages = checkpoint.load_averages(tmp_path / FOLDER / "step-00000002")
    assert step == 2
    assert all(torch.equal(value, averages[name]) for name, value in model.state_dict().items())
    assert cli.main(["sample", str(tmp_path), "--count", "10", "--step", "best"]) == 0
    assert Image.open(tmp_path / "samples" / "step-00000002-1-step-10-samples.png").size == (8 * 34, 2 * 34)
    assert cli.main(["eval", str(tmp_path), "--step", "best"]) == 0
    assert (tmp_path / "evaluation" / "step-00000002-1-step-20-samples.json").is_file()
    (tmp_path / FOLDER / "step-00000002" / "SCORE").unlink()
    (tmp_path / FOLDER / "step-00000006" / "SCORE").unlink()
    capsys.readouterr()
    assert cli.main(["sample", str(tmp_path), "--step", "best"]) == 2
    assert "has no best checkpoint, as none has a score; train it with output.keep_best" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["sample", str(tmp_path), "--step", "last"])
    assert "'last' is neither a step, such as 50000, nor best" in capsys.readouterr().err
