"""``soflow tune``: forms of a step measured side by side, and what is taken of them."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from runs import soflow, tiny_config, write_config

from soflow_fast import DiT, TrainConfig, tune
from soflow_fast.cli import main
from soflow_fast.config import DataConfig, ModelConfig
from soflow_fast.tune import Measured


def small(run_dir="runs/tune", **model) -> TrainConfig:
    config = tiny_config(run_dir)
    return replace(config, model=replace(config.model, depth=2, **{"recompute": "block", **model}))


class Ends:
    """A data set that ends the process, as a kernel that reads outside of its tensors may."""

    def __init__(self):
        os._exit(7)


def dit() -> DiT:
    print("made: a DiT")
    return DiT(8, 4, 1, 16, 1, 2, num_classes=10)


def _measured(ms: float, gradient: float = 1.0, **values) -> Measured:
    chosen = {"model.attention": "sdpa", "model.recompute": "none"}
    chosen |= {f"model.{name}": value for name, value in values.items()}
    missing = {name: None if name in ("sdpa", "triton", "math") else "is not there" for name in tune.BACKENDS}
    return Measured(
        [ms * share for share in (0.99, 1, 1, 1.01)], None, 1.0, chosen, {"w": np.array([gradient])}, "", missing
    )


PLAIN = {"compute.compile": False, "model.impl": "torch", "model.attention": "sdpa"}


def _tuned(monkeypatch, answers: dict, tried=("attention", "recompute"), plain=1.0) -> tuple[dict, list[str], list]:
    """What tune takes where a form's measurement is ``answers[attention, recompute]``; its lines; the forms asked.

    plain: the gradient of plain torch.
    """
    asked, lines = [], []

    def measured(config, values, seconds):
        if seconds is None:
            assert PLAIN.items() <= values.items()
            return _measured(1.0, plain)
        now = tune.with_values(config, values).model
        asked.append((now.attention, now.recompute))
        return answers[asked[-1]]

    monkeypatch.setattr(tune, "_measured", measured)
    return tune.tune(small(recompute="auto"), tried, say=lines.append), lines, asked


def test_each_choice_is_tried_with_the_best_of_those_before(monkeypatch):
    answers = {
        ("auto", "auto"): _measured(10),
        ("triton", "auto"): _measured(8, attention="triton"),
        ("math", "auto"): _measured(9, attention="math"),
        ("triton", "elementwise"): _measured(9, attention="triton", recompute="elementwise"),
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
        ("triton", "auto"): _measured(8, gradient, attention="triton"),
        ("math", "auto"): _measured(9, attention="math"),
    }
    chosen, lines, _ = _tuned(monkeypatch, answers, tried=("attention",))
    assert chosen == {"model.attention": "math"}
    assert [line.split("=")[1].split()[0] for line in lines if "its gradient is wrong" in line] == ["triton"]


def test_a_configuration_whose_own_gradient_is_wrong_is_not_what_others_are_compared_with(monkeypatch):
    answers = {
        ("auto", "auto"): _measured(10, 2.0),
        ("triton", "auto"): _measured(12, attention="triton"),
        ("math", "auto"): _measured(8, 2.0, attention="math"),
    }
    chosen, lines, _ = _tuned(monkeypatch, answers, tried=("attention",))
    assert chosen == {"model.attention": "triton"}
    assert ["wrong" in line for line in lines if " ms " in line] == [True, False, True]


def test_a_form_that_ran_as_another_is_not_taken(monkeypatch):
    answers = {("auto", "auto"): _measured(10), ("triton", "auto"): _measured(5), ("math", "auto"): _measured(5)}
    chosen, lines, _ = _tuned(monkeypatch, answers, tried=("attention",))
    assert chosen == {}
    assert sum("it ran as sdpa" in line for line in lines) == 2


def test_what_is_within_the_noise_is_not_taken(monkeypatch):
    answers = {
        ("auto", "auto"): _measured(10),
        ("triton", "auto"): _measured(9.99, attention="triton"),
        ("math", "auto"): _measured(20, attention="math"),
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
    assert tune.measure(small(), None).ms == []


def test_the_sampled_gradient_reaches_every_column():
    """Where a stride would pass over the ends of XL/2's heads; and a value that is not finite shows wherever it is."""
    gradient = torch.randn(1152, 1152, generator=torch.Generator().manual_seed(0))
    wrong = gradient.clone().unflatten(1, (16, 72))
    wrong[:, :, 64:] = 0
    assert tune._difference({"w": tune._some(wrong)}, {"w": tune._some(gradient)}) == pytest.approx(1 / 3, rel=0.1)
    gradient[7, 1151] = torch.inf
    assert np.isnan(tune._difference({"w": tune._some(gradient)}, {"w": tune._some(wrong)}))


def test_a_network_of_the_users_has_no_choice_of_attention(capfd, tmp_path):
    """Also where it is a DiT; and what it prints is not in the configuration that the command prints."""
    model = ModelConfig(preset=f"{__name__}.dit", input_size=8, in_channels=1, num_classes=10)
    config = write_config(tmp_path / "own.yaml", replace(small(), model=model))
    assert main(["tune", str(config), "--seconds", "0.01"]) == 2
    told = capfd.readouterr()
    assert "nothing to try of attention, recompute" in told.err
    assert "choose --try impl,compile" in told.err
    assert told.out == ""


def test_ctrl_c_of_the_command_alone_ends_both(tmp_path):
    path = write_config(tmp_path / "small.yaml", small())
    command = [sys.executable, "-m", "soflow_fast.cli", "tune", str(path), "--seconds", "600"]
    process = subprocess.Popen(
        command,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which what runs behind nohup ignores
    )
    try:
        wait_for(lambda: len(_of_session(process.pid)) > 2)  # itself, the form, and what tracks resources for it
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        wait_for(lambda: not _of_session(process.pid))
    finally:
        for pid in _of_session(process.pid):
            os.kill(pid, signal.SIGKILL)


def _of_session(session: int) -> list[int]:
    """The processes of a session that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(of) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


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
