"""``soflow tune``: forms of a step measured side by side, and what is taken of them."""

import os
from dataclasses import replace

import numpy as np
import pytest
import yaml
from runs import soflow, tiny_config, write_config

from soflow_fast import TrainConfig, tune
from soflow_fast.cli import main
from soflow_fast.config import DataConfig
from soflow_fast.tune import Measured


def small(run_dir="runs/tune", **model) -> TrainConfig:
    config = tiny_config(run_dir)
    return replace(config, model=replace(config.model, depth=2, **{"recompute": "block", **model}))


class Ends:
    """A data set that ends the process, as a kernel that reads outside of its tensors may."""

    def __init__(self):
        os._exit(7)


def _measured(ms: float, gradient: float = 1.0, **values) -> Measured:
    chosen = {"model.attention": "sdpa", "model.recompute": "none", **values}
    missing = {name: None if name in ("sdpa", "triton", "math") else "is not there" for name in tune.BACKENDS}
    return Measured(
        [ms * share for share in (0.99, 1, 1, 1.01)], None, 1.0, chosen, {"w": np.array([gradient])}, "", missing
    )


def _tuned(monkeypatch, answers: dict, tried=("attention", "recompute")) -> tuple[dict, list[str], list[tuple]]:
    """What tune takes where a form's measurement is ``answers[attention, recompute]``; its lines; the forms asked."""
    asked, lines = [], []

    def measured(config, seconds):
        asked.append((config.model.attention, config.model.recompute))
        return answers[asked[-1]]

    monkeypatch.setattr(tune, "_measured", measured)
    return tune.tune(small(recompute="auto"), tried, say=lines.append), lines, asked


def test_each_choice_is_tried_with_the_best_of_those_before(monkeypatch):
    answers = {
        ("auto", "auto"): _measured(10),
        ("triton", "auto"): _measured(8),
        ("math", "auto"): _measured(9),
        ("triton", "elementwise"): _measured(9),
        ("triton", "block"): "out of GPU memory",
    }
    chosen, lines, asked = _tuned(monkeypatch, answers)
    assert chosen == {"model.attention": "triton"}
    assert asked == list(answers)
    assert any(line.startswith("model.attention=cudnn") and "is not there" in line for line in lines)
    assert any(line.startswith("model.recompute=block") and "out of GPU memory" in line for line in lines)
    assert any(line.startswith("model.attention=triton") and "1.250 times as fast" in line for line in lines)


@pytest.mark.parametrize("gradient", [1.5, float("nan")])
def test_a_form_with_another_gradient_is_not_taken(monkeypatch, gradient):
    answers = {
        ("auto", "auto"): _measured(10),
        ("triton", "auto"): _measured(8, gradient),
        ("math", "auto"): _measured(9),
    }
    chosen, lines, _ = _tuned(monkeypatch, answers, tried=("attention",))
    assert chosen == {"model.attention": "math"}
    assert [line.split("=")[1].split()[0] for line in lines if "its gradient is another" in line] == ["triton"]


def test_what_is_within_the_noise_is_not_taken(monkeypatch):
    answers = {
        ("auto", "auto"): _measured(10),
        ("triton", "auto"): _measured(9.99),
        ("math", "auto"): _measured(20),
    }
    assert _tuned(monkeypatch, answers, tried=("attention",))[0] == {}


def test_a_form_is_the_whole_step_and_its_gradient_reaches_every_matrix():
    found = {name: tune.measure(small(attention=name), seconds=0.01) for name in ("sdpa", "math")}
    gradients = [one.gradient for one in found.values()]
    assert found["math"].values["model.attention"] == "math"
    assert found["math"].values["model.recompute"] == "block"
    assert found["math"].missing["math"] is None
    assert all(g.any() for g in gradients[0].values())
    assert {f"network.blocks.{i}.attn.qkv.weight" for i in range(2)} <= gradients[0].keys()
    assert tune._difference(*gradients) < 1e-4
    wrong = {name: g * (-1 if "qkv" in name else 1) for name, g in gradients[0].items()}
    assert tune._difference(wrong, gradients[0]) == pytest.approx(2)
    assert len(found["sdpa"].ms) >= 5


def test_the_command_prints_a_configuration(tmp_path):
    path = write_config(tmp_path / "small.yaml", small(tmp_path / "run"))
    result = soflow("tune", path, "--seconds", "0.01", "--try", "recompute", "--batch_size", "32")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[1] for line in lines[1:4]] == ["as", "model.recompute=none", "model.recompute=elementwise"]
    chosen = yaml.safe_load(result.stdout)
    assert chosen is None or list(chosen) == ["model"]
    assert not (tmp_path / "run").exists()


def test_a_process_that_ends_is_one_line():
    config = replace(small(), data=DataConfig(kind=f"{__name__}.Ends"))
    with pytest.raises(ValueError, match="own step cannot be measured: its process ended with exit code 7"):
        tune.tune(config, ("attention",))


def test_where_nothing_can_be_tried_it_says_so(monkeypatch):
    with pytest.raises(ValueError, match="there is nothing to try of float8 with model"):
        _tuned(monkeypatch, {("auto", "auto"): _measured(10)}, tried=("float8",))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--try", "attention,width"], "--try attention,width has 'width'; choose of attention, recompute, impl"),
        (["--seconds", "0"], "--seconds 0.0 is no time to measure for"),
    ],
)
def test_bad_options_are_one_sentence(tmp_path, capsys, arguments, sentence):
    assert main(["tune", str(write_config(tmp_path / "small.yaml", small())), *arguments]) == 2
    assert sentence in capsys.readouterr().err
