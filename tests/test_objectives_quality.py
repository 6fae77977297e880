"""The comparison of the objectives: what it refuses before it trains."""

import json

import objectives_quality
import prediction_quality
import pytest


def _refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        objectives_quality.main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_runs_of_other_settings_are_not_mixed(tmp_path, capsys):
    saved = tmp_path / "out.json"
    before = json.dumps({"steps": 600, "samples": 5000, "runs": []})
    saved.write_text(before)
    same = ["--steps", 600, "--samples", 5000, "--json", saved]
    for name, value, other in (("steps", 500, 600), ("samples", 4000, 5000)):
        message = (
            f"--{name} {value} is not that of the runs in {saved}, {other}; give --{name} {other}, or another --json"
        )
        assert message in _refused(capsys, *same, f"--{name}", value)
    assert "--seeds 0 makes no run; give at least 1" in _refused(capsys, "--seeds", 0)
    assert saved.read_text() == before


def test_predictions_are_compared_on_networks_of_one_size(tmp_path, capsys):
    saved = tmp_path / "out.json"
    arguments = ["--steps", "2", "--samples", "20", "--seeds", "1", "--json", str(saved)]
    objectives_quality.main(arguments, prediction_quality.METHODS)
    report = json.loads(saved.read_text())
    assert report["summary"].keys() == prediction_quality.METHODS.keys()
    cost = [row["flops_per_sample"] for row in report["summary"].values()]
    assert (cost[0], cost[2]) == (cost[1], cost[3])
    assert "data, patches of 8×8" in capsys.readouterr().out
