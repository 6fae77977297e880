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
TABLE = TESTS / "aot_table.json"


def _run(*arguments: str, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def table(rows: list[dict]) -> dict[tuple, dict]:
    """The rows by kernel, case and architecture."""
    keyed = {(row["kernel"], row["case"], row["arch"]): row for row in rows}
    assert len(keyed) == len(rows)
    return keyed


def regressions(now: dict[tuple, dict], committed: dict[tuple, dict]) -> list[str]:
    """Spills, what a kernel needs more of than committed, and narrower accesses, in words; of what a row has."""
    return [
        f"{key}: {column} is {row[column]}, allowed {allowed}"
        for key, row in now.items()
        for column in ("stack", "registers", "shared", "instructions", "bytes_moved")
        if row[column] is not None and row[column] > (allowed := committed[key][column])
    ] + [
        f"{key}: widest_access is {row['widest_access']}, committed {committed[key]['widest_access']}"
        for key, row in now.items()
        if row["widest_access"] is not None and row["widest_access"] < committed[key]["widest_access"]
    ]


@pytest.mark.slow
def test_no_kernel_spills_or_needs_more_than_committed(tmp_path):
    """All in bfloat16 for sm_90; one of each kernel in float32, and for the other architectures.

    The table is rewritten by ``python -m soflow_fast.kernels._aot --write tests/aot_table.json``.
    """
    printed = _run("-m", "soflow_fast.kernels._aot", "--brief", "--write", "table.json", cwd=tmp_path)
    assert " 0 refused" in printed
    now, committed = (table(json.loads(path.read_text())) for path in (tmp_path / "table.json", TABLE))
    half = [{key for key in table if key[2] == 90 and not key[1].endswith("fp32")} for table in (now, committed)]
    assert half[0] == half[1] == {key for key, row in now.items() if row["instructions"] is not None}
    assert now.keys() <= committed.keys()
    assert {(kernel, arch) for kernel, _, arch in now} == {(kernel, arch) for kernel, _, arch in committed}
    assert regressions(now, committed) == []
    assert {arch for *_, arch in committed} == {80, 90, 100}


# To start a process takes longer than most of them.
TOGETHER = (
    "one_binary_for_every_batch",
    "one_binary_for_every_number_of_tokens",
    "kernels_compile_whichever_gradients_arrive",
    "program_ids_are_widened_before_they_are_multiplied",
    "a_spill_is_refused",
    "too_many_registers_are_refused",
    "narrow_accesses_are_refused",
    "a_register_used_too_early_is_refused",
    "products_into_tensor_memory_are_not_pipelined",
    "bytes_are_those_of_the_tensors",
    "the_update_moves_no_more_bytes_than_committed",
)
ALONE = (
    "a_block_launches_and_moves_no_more_than_committed",
    "flash_attention_leaves_one_gradient",
    "float8_guidance_rounds_where_rows_are_made",
    "the_step_of_two_processes_is_written",
)


def _failed(*checks: str, cwd: Path) -> dict[str, str]:
    """How, by name."""
    return json.loads(_run(str(TESTS / "offline_checks.py"), *checks, cwd=cwd).splitlines()[-1])


@pytest.fixture(scope="module")
def failed_together(tmp_path_factory):
    return _failed(*TOGETHER, cwd=tmp_path_factory.mktemp("together"))


@pytest.mark.parametrize("check", TOGETHER)
def test_offline(check, failed_together):
    assert check not in failed_together, failed_together[check]


@pytest.mark.slow
@pytest.mark.parametrize("check", ALONE)
def test_offline_by_inductor(check, tmp_path):
    assert _failed(check, cwd=tmp_path) == {}
