"""Rows compiled ahead: their code is found when their turn comes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from _ahead import compile_ahead
from _rows import ROWS, Workload

_TURN = """
import torch
from _rows import ROWS, Workload, build
workload = Workload("small", 4, "cpu")
build(ROWS["flow-matching"], workload)(*workload.data())
print(dict(torch._dynamo.utils.counters["inductor"]))
"""


@pytest.mark.slow
def test_a_row_finds_its_code(tmp_path, monkeypatch):
    """Forward and backward; what fails is told and left out."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    rows = {"flow-matching": ROWS["flow-matching"], "soflow/public": ROWS["soflow/public"]}
    assert list(compile_ahead(rows, Workload("small", 4, "cpu"), jobs=1, seconds=600)) == ["flow-matching"]
    folder = Path(__file__).parents[1] / "benchmarks"
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    said = subprocess.run(
        [sys.executable, "-c", _TURN],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    ).stdout
    assert "'fxgraph_cache_hit': 2" in said
    assert "cache_miss" not in said


def test_a_row_that_fails_or_takes_too_long_is_left_out(capfd):
    row = {"flow-matching": ROWS["flow-matching"]}
    assert compile_ahead(row, Workload("small", 4, "cpu", attention="none"), jobs=2, seconds=120) == {}
    assert "flow-matching: not compiled ahead, ValueError: attention='none'" in capfd.readouterr().err
    assert compile_ahead(row, Workload("small", 4, "cpu"), jobs=2, seconds=0.5) == {}
    assert "flow-matching: not compiled ahead, the time was over" in capfd.readouterr().err
