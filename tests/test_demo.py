"""The digits demo: what it writes, and that a shortened training already learns the digits."""

import json
from dataclasses import replace

import pytest
from PIL import Image
from runs import scores_of_digits

from soflow_fast import demo
from soflow_fast.cli import main


def test_demo_writes_what_it_names(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "STEPS", 20)
    monkeypatch.setattr(demo, "SAMPLES", 200)
    run_dir = tmp_path / "demo"
    assert main(["demo", "--run-dir", str(run_dir), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    checkpoint = run_dir / "checkpoints" / "step-00000020"
    assert f"wrote {run_dir}/samples.png, losses.png, metrics.json and {checkpoint}" in printed
    metrics = json.loads((run_dir / "metrics.json").read_text())
    for steps in ("one_step", "two_steps"):
        assert metrics[steps].keys() == demo.AIMS.keys()
    assert f"{metrics['one_step']['frechet_all']:.3f}" in printed
    assert (metrics["samples"], metrics["steps"], metrics["checkpoint"]) == (200, 20, str(checkpoint))
    assert metrics["seconds"] >= metrics["seconds_training"] > 0
    for name in ("samples.png", "losses.png"):
        with Image.open(run_dir / name) as picture:
            assert min(picture.size) > 400
            assert len(set(picture.convert("L").tobytes())) > 20  # not blank


@pytest.mark.slow
def test_four_hundred_quarter_batches_learn_the_digits(tmp_path):
    config = replace(demo.demo_config(str(tmp_path), device="cpu"), total_steps=400, batch_size=64)
    scores = scores_of_digits(config)
    assert scores["frechet_all"] < 3.2
    assert scores["frechet_held_out"] < 3.8
    assert scores["recognised"] > 0.35  # 0.1 by chance
    assert scores["memorisation"] > 0.9
