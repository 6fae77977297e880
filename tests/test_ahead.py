"""Rows compiled ahead: their code is found when their turn comes."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import _ahead
import opaque_draws
import pytest
import torch
from _ahead import compile_ahead, compile_row
from _rows import ROWS, Workload

from soflow_fast import DiT

WORKLOAD = Workload("small", 4, "cpu")


class _Scaled(DiT):
    """One product by a channel, in place of blocks that take a minute to compile."""

    def forward(self, x, t, s, labels):
        return x * self.pos_embed.mean() + self.x_embedder.proj.bias[:4, None, None] * t[:, None, None, None]


ROW = replace(ROWS["flow-matching"], dit=_Scaled)

_TURN = """
from _ahead import shared_traces
from _rows import build
from test_ahead import ROW, WORKLOAD, _cached
with shared_traces():
    build(ROW, WORKLOAD)(*WORKLOAD.data())
print(_cached())
"""


def _cached() -> dict[str, int]:
    counted = torch._dynamo.utils.counters
    return {name: n for kind in ("inductor", "aot_autograd") for name, n in counted[kind].items() if "_cache_" in name}


@pytest.mark.slow
def test_a_row_finds_its_code(tmp_path, monkeypatch):
    """Forward and backward, and what both were traced to, in another process."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with opaque_draws.traced():  # as in the other
        compile_row(ROW, WORKLOAD)
    assert _cached() == {"fxgraph_cache_miss": 2, "autograd_cache_miss": 1, "autograd_cache_saved": 1}
    path = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    said = subprocess.run(
        [sys.executable, "-c", _TURN],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    ).stdout
    assert said == "{'fxgraph_cache_hit': 2, 'autograd_cache_hit': 1}\n"


def test_what_is_compiled_ahead(tmp_path, monkeypatch):
    """Once, each compiled row by its name in a process of its own; not one that is not compiled, or not on a CPU."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    script = tmp_path / "script.py"
    script.write_text("import sys, pathlib; pathlib.Path(__file__).with_suffix('.txt').write_text(str(sys.argv[1:]))")
    monkeypatch.setattr(_ahead, "__file__", str(script))
    rows = {name: ROWS[name] for name in ("soflow/public", "soflow/fast", "flow-matching")}
    assert list(compile_ahead(rows, WORKLOAD, jobs=1, seconds=600)) == ["flow-matching"]
    assert script.with_suffix(".txt").read_text() == str(["flow-matching", json.dumps(asdict(WORKLOAD))])
    script.write_text("raise SystemExit('it is in the cache')")
    assert list(compile_ahead(rows, WORKLOAD, jobs=1, seconds=600)) == ["flow-matching"]
    assert list(compile_ahead(rows, replace(WORKLOAD, batch=8), jobs=1, seconds=600)) == []


def test_a_row_that_fails_or_takes_too_long_is_left_out(capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    row = {"flow-matching": ROWS["flow-matching"]}
    assert compile_ahead(row, Workload("small", 4, "cpu", attention="none"), jobs=2, seconds=120) == {}
    assert "flow-matching: not compiled ahead, ValueError: attention='none'" in capfd.readouterr().err
    assert compile_ahead(row, WORKLOAD, jobs=2, seconds=0.5) == {}
    assert "flow-matching: not compiled ahead, the time was over" in capfd.readouterr().err
