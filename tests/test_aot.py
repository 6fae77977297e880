"""Offline compilation: every kernel for three GPU architectures, compared with the committed table.

Triton compiles only in a process that was started without its interpreter, so each test starts one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def _run(*arguments: str, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def _rows(path: Path) -> dict[tuple, dict]:
    rows = json.loads(path.read_text())
    table = {(row["kernel"], row["case"], row["arch"]): row for row in rows}
    assert len(table) == len(rows)
    return table


@pytest.mark.slow
def test_no_kernel_spills_or_needs_more_registers_than_committed(tmp_path):
    """The table is rewritten by ``python -m soflow_fast.kernels._aot --write tests/aot_table.json``."""
    printed = _run("-m", "soflow_fast.kernels._aot", "--write", "table.json", cwd=tmp_path)
    assert " 0 refused" in printed
    now, committed = _rows(tmp_path / "table.json"), _rows(TESTS / "aot_table.json")
    assert now.keys() == committed.keys()
    for key, row in now.items():
        assert row["stack"] == 0, key
        assert row["registers"] <= committed[key]["registers"], key
        assert row["shared"] <= committed[key]["shared"], key
        assert row["bytes_moved"] <= committed[key]["bytes_moved"], key
    assert {arch for *_, arch in committed} == {80, 90, 100}


@pytest.mark.parametrize(
    "check",
    [
        "one_binary_for_every_batch",
        "one_binary_for_every_number_of_tokens",
        "program_ids_are_widened_before_they_are_multiplied",
        "a_spill_is_refused",
        "too_many_registers_are_refused",
        "bytes_are_those_of_the_tensors",
    ],
)
def test_offline(check, tmp_path):
    _run(str(TESTS / "offline_checks.py"), check, cwd=tmp_path)
