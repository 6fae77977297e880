"""The learning rate of each step: its values, and that a run has them and goes on with them exactly."""

import json
import math
import re
from dataclasses import replace

import pytest
from runs import StopError, assert_bitwise_equal, final, stop_at, tiny_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from soflow_fast import TrainConfig, Trainer, trainer
from soflow_fast.config import OptimizerConfig


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {0: 1, 99: 1}),
        ({"warmup_steps": 4}, {0: 0.25, 1: 0.5, 3: 1, 4: 1, 99: 1}),
        ({"schedule": "linear"}, {0: 1, 50: 0.5, 99: 0.01}),
        ({"schedule": "linear", "warmup_steps": 20, "final_share": 0.1}, {0: 0.05, 19: 1, 20: 1, 60: 0.55, 92: 0.19}),
        ({"schedule": "linear", "warmup_steps": 20, "decay_start": 80}, {0: 0.05, 20: 1, 80: 1, 90: 0.5, 99: 0.05}),
        ({"schedule": "linear", "final_share": 1.0}, {0: 1, 99: 1}),
        ({"schedule": "cosine"}, {0: 1, 25: (1 + math.sqrt(0.5)) / 2, 50: 0.5, 75: (1 - math.sqrt(0.5)) / 2}),
        ({"schedule": "cosine", "warmup_steps": 50, "final_share": 0.5}, {24: 0.5, 50: 1, 75: 0.75}),
        ({"schedule": "inverse_sqrt", "decay_start": 16}, {0: 1, 16: 1, 25: 0.8, 64: 0.5}),
        ({"schedule": "inverse_sqrt", "warmup_steps": 9}, {2: 1 / 3, 8: 1, 9: 1, 36: 0.5}),
    ],
    ids=str,
)
def test_values(values, expected):
    optimizer = OptimizerConfig(learning_rate=2e-4, **values)
    assert {k: optimizer.learning_rate_at(k, 100) / 2e-4 for k in expected} == pytest.approx(expected, rel=1e-12)
    rates = [optimizer.learning_rate_at(k, 100) for k in range(100)]
    assert 0 < min(rates) <= max(rates) == 2e-4


def test_by_default_it_is_the_number_itself():
    optimizer = OptimizerConfig(learning_rate=0.1)
    assert {optimizer.learning_rate_at(k, 10**6) for k in (0, 1, 7, 10**6 - 1)} == {0.1}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"schedule": "step"}, ["optimizer.schedule=step", "constant or linear or cosine or inverse_sqrt"]),
        ({"warmup_steps": -1}, ["optimizer.warmup_steps=-1", "at least 0"]),
        ({"schedule": "linear", "final_share": 1.5}, ["optimizer.final_share=1.5", "[0, 1]"]),
        ({"decay_start": 5}, ["optimizer.decay_start=5 does nothing", "schedule='constant'", "leave it out"]),
        ({"final_share": 0.1}, ["optimizer.final_share=0.1 does nothing", "schedule='constant'"]),
        ({"schedule": "inverse_sqrt", "decay_start": 5, "final_share": 0.1}, ["final_share=0.1 does nothing"]),
        ({"schedule": "cosine", "warmup_steps": 9, "decay_start": 5}, ["decay_start=5", "optimizer.warmup_steps=9"]),
        ({"schedule": "inverse_sqrt"}, ["schedule='inverse_sqrt'", "set optimizer.decay_start"]),
        ({"schedule": "cosine", "warmup_steps": 70}, ["optimizer.warmup_steps=70", "total_steps=70", "choose fewer"]),
        ({"schedule": "linear", "decay_start": 70}, ["optimizer.decay_start=70", "total_steps=70"]),
    ],
)
def test_mistakes_are_one_sentence(values, words):
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        TrainConfig.from_dict({"total_steps": 70, "optimizer": values})
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def _config(folder, **changes):
    return tiny_config(
        folder, optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2, schedule="cosine"), **changes
    )


RATES = [1e-3 * share for share in (0.5, 1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2)]


def test_every_step_has_its_rate_and_the_metrics_that_of_the_last(tmp_path, monkeypatch):
    seen = []

    class Recorded(trainer.TrainStep):
        def __call__(self, *args):
            seen.append([group["lr"] for group in self.optimizer.param_groups])
            return super().__call__(*args)

    monkeypatch.setattr(trainer, "TrainStep", Recorded)
    Trainer(_config(tmp_path)).fit()
    assert seen == [[pytest.approx(rate)] for rate in RATES]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] for line in lines] == pytest.approx(RATES[1::2])
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("learning_rate")
    assert [(event.step, event.value) for event in events] == [
        (step, pytest.approx(RATES[step - 1])) for step in (2, 4, 6)
    ]


@pytest.mark.parametrize("step", [2, 6])
def test_a_stopped_run_goes_on_exactly(tmp_path, monkeypatch, step):
    """In the warm-up, before any checkpoint, and in the fall."""
    Trainer(_config(tmp_path / "straight")).fit()
    stopped = _config(tmp_path / "stopped")
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(StopError):
            Trainer(stopped).fit()
    Trainer(stopped).fit()
    assert_bitwise_equal(final(tmp_path / "straight"), final(tmp_path / "stopped"))
    Trainer(tiny_config(tmp_path / "constant")).fit()
    with pytest.raises(AssertionError):
        assert_bitwise_equal(final(tmp_path / "straight"), final(tmp_path / "constant"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"warmup_steps": 3}, "optimizer.warmup_steps=2, and this one has 3"),
        ({"schedule": "linear"}, "optimizer.schedule='cosine', and this one has 'linear'"),
        ({"final_share": 0.5}, "optimizer.final_share=0.0, and this one has 0.5"),
        ({"decay_start": 4}, "optimizer.decay_start=None, and this one has 4"),
        ({"name": "radam"}, "optimizer.name='adamw', and this one has 'radam'"),
    ],
)
def test_another_schedule_or_optimizer_is_another_run(tmp_path, change, words):
    config = _config(tmp_path, total_steps=5)
    Trainer(config).fit()
    with pytest.raises(ValueError, match=re.escape(words)):
        Trainer(replace(config, optimizer=replace(config.optimizer, **change))).fit()
