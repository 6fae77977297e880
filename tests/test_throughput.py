"""The throughput benchmark: what it writes, resumes, refuses and leaves out. No time is judged."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import _rows
import pytest
import throughput
from _check import Truth
from _race import (
    ROUNDS,
    Track,
    count_flops,
    flops_per_sample,
    spared_forwards,
)
from _rows import ROWS, Workload

ROOT = Path(__file__).parents[1]
PUBLIC_SOURCE = ROOT / "tests" / "public_source"
REQUIRED = {"ms_per_step", "images_per_s", "ratio_to_public", "flops_per_sample", "peak_memory_bytes"}
EAGER = ["soflow/public", "meanflow/published"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(_rows, "SMALL", {"patch_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 1})


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.json"


def _run(*arguments) -> int:
    return throughput.main([*map(str, arguments), "--model", "small", "--batch", "4", "--seconds", "0.01"])


# --------------------------------------------------------------------------------------------------- the command


def test_command_in_a_process_of_its_own(tmp_path):
    """The real small DiT; one row runs here, the others say why they do not."""
    command = [sys.executable, str(ROOT / "benchmarks/throughput.py"), "--model", "small", "--batch", "4"]
    command += [
        "--seconds",
        "0.01",
        "--rows",
        "soflow/public",
        "soflow/fast",
        "meanflow/jvp-flash",
        "--json",
        "out.json",
    ]
    done = subprocess.run([*command, "--plot", "out.png"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert list(report["rows"]) == ["soflow/public", "soflow/fast", "meanflow/jvp-flash"]
    if report["same"]["device"] == "cpu":
        assert "no GPU" in report["title"]
        assert report["rows"]["soflow/fast"]["skipped"] == ROWS["soflow/fast"].no_cpu
        assert "soflow/fast: not timed" in done.stdout
    assert report["rows"]["soflow/public"].keys() >= REQUIRED
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_report_has_every_value(out):
    assert _run("--rows", *EAGER, "--json", out) == 0
    report = json.loads(out.read_text())
    assert {"hardware", "versions", "commit"} <= report["same"].keys()
    assert report["same"]["versions"]["torch"]
    public, published = (report["rows"][name] for name in EAGER)
    for row in (public, published):
        assert row.keys() >= REQUIRED
        assert 0 < row["ms_quartiles"][0] <= row["ms_per_step"] <= row["ms_quartiles"][1] <= row["ms_p99"]
        assert row["images_per_s"] == pytest.approx(4000 / row["ms_per_step"])
        assert row["ratio_to_public"] == pytest.approx(public["ms_per_step"] / row["ms_per_step"])
        assert row["tflops"] == pytest.approx(row["flops_per_sample"] * row["images_per_s"] / 1e12)
        assert row["steps"] >= ROUNDS
        assert row["state_bytes"] < row["peak_memory_bytes"]
        assert max(row["loss_error"], row["gradient_error"]) < 0.1
        assert row["group"] == 1
    assert published["flops_per_sample"] > public["flops_per_sample"]


def test_flops_are_those_of_the_forwards():
    """The published SoFlow is 4.5 forwards a sample, but for the products a backward leaves out at the input."""
    row, workload = ROWS["soflow/public"], Workload("small", 8, "cpu")
    D, N, blocks, patch = 32, 16, 2, 8 * 8 * 4
    tokens = N * (4 * patch * D + blocks * (2 * 12 * D * D + 4 * N * D))
    conditioning = 2 * (2 * (256 * D + D * D) + blocks * 6 * D * D + 2 * D * D)
    counted = flops_per_sample(row, workload)
    inputs = 2 * (N * patch * D + 2 * 256 * D)  # no gradient reaches the patches and the sinusoids
    assert counted == 4.5 * (tokens + conditioning) - inputs


@pytest.mark.parametrize("name", [*EAGER, "soflow/merged-compile", "meanflow/strong", "flow-matching"])
def test_flops_are_those_of_the_whole_batch(name):
    """Of which rows that drop their label are spared the guidance, but not in public code."""
    workload = Workload("small", 96, "cpu")
    of_step, _, model = count_flops(ROWS[name], workload, 96)
    assert flops_per_sample(ROWS[name], workload) == pytest.approx(of_step / 96, rel=1e-6)
    spared = spared_forwards(model, 96)
    assert spared == (6 + 2 * 1 if "/" in name and name not in EAGER else 0)


def test_a_resumed_run_leaves_out_what_it_has(out, monkeypatch):
    assert _run("--rows", EAGER[0], "--json", out) == 0
    before = json.loads(out.read_text())["rows"][EAGER[0]]
    begun, prepare = [], Track.prepare

    def recording(self, row):
        begun.append(row)
        return prepare(self, row)

    monkeypatch.setattr(Track, "prepare", recording)
    assert _run("--rows", *EAGER, "--json", out, "--resume") == 0
    assert begun == [ROWS[EAGER[1]]]
    rows = json.loads(out.read_text())["rows"]
    assert rows[EAGER[0]] == before
    assert [row["group"] for row in rows.values()] == [1, 2]
    assert rows[EAGER[1]]["ratio_to_public"] == pytest.approx(before["ms_per_step"] / rows[EAGER[1]]["ms_per_step"])


def test_no_row_is_begun_without_time(out, capsys):
    assert _run("--rows", *EAGER, "--json", out, "--limit", 1) == 0
    assert json.loads(out.read_text())["rows"] == {}
    assert "soflow/public, meanflow/published; run again with --resume" in capsys.readouterr().out


def test_public_source_is_a_row_and_has_a_ratio(out, capsys):
    assert _run("--rows", "soflow/public", "--public-source", PUBLIC_SOURCE, "--json", out) == 0
    report = json.loads(out.read_text())
    public, source = (report["rows"][name] for name in ("soflow/public", "soflow/public-source"))
    ratio = source["ms_per_step"] / public["ms_per_step"]
    assert report["ratio_of_public_to_public_source"] == pytest.approx(ratio)
    assert "as fast as soflow/public-source" in capsys.readouterr().out
    assert source["flops_per_sample"] == public["flops_per_sample"]


# ------------------------------------------------------------------------------------------------ what goes wrong


def test_a_row_that_is_not_right_is_not_timed(out, monkeypatch, capsys):
    monkeypatch.setitem(ROWS, EAGER[0], replace(ROWS[EAGER[0]], settings={"quotient": "two_forwards", "p": 0.5}))
    plain = Truth.compute
    monkeypatch.setattr(Truth, "compute", lambda self, row: plain(self, replace(row, settings={})))
    assert _run("--rows", *EAGER, "--json", out) == 1
    rows = json.loads(out.read_text())["rows"]
    assert "ms_per_step" not in rows[EAGER[0]]
    assert rows[EAGER[0]]["failed"]
    assert "its check failed" in rows[EAGER[0]]["skipped"]
    assert "ms_per_step" in rows[EAGER[1]]
    assert "soflow/public: not timed, its check failed" in capsys.readouterr().out


def test_a_row_that_breaks_costs_no_other(out, monkeypatch):
    class Breaks(ROWS[EAGER[0]].objective):
        def loss_of_rows(self, *arguments, **keywords):
            raise RuntimeError("planted")

    monkeypatch.setitem(ROWS, EAGER[0], replace(ROWS[EAGER[0]], objective=Breaks))
    assert _run("--rows", *EAGER, "--json", out) == 1
    rows = json.loads(out.read_text())["rows"]
    assert rows[EAGER[0]] == {"skipped": "RuntimeError: planted", "failed": True}
    assert "ms_per_step" in rows[EAGER[1]]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--rows", "soflow/slow"], "no row is called 'soflow/slow'; choose from table"),
        (["--batch", "6"], "batch=6 is not a multiple of 4"),
        (["--model", "DiT-B/3"], "DiT-B/3"),
        (["--resume"], "--resume needs --json"),
        (["--seconds", "0"], "--seconds 0 is not positive"),
        (["--json", "missing/out.json"], "the folder of missing/out.json does not exist"),
        (["--public-source", "missing"], "missing holds no models.py"),
    ],
)
def test_bad_input_is_told_in_a_sentence(arguments, told, capsys):
    try:
        code = throughput.main(arguments)
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is no result of this benchmark"),
        ('{"same": {"model": "small"}, "rows": {}}', "batch None there, 4 here"),
    ],
)
def test_rows_of_another_run_are_not_resumed(out, content, told, capsys):
    out.write_text(content)
    assert _run("--rows", EAGER[0], "--json", out, "--resume") == 2
    assert told in capsys.readouterr().err
    assert out.read_text() == content


def test_rows_compiled_ahead_alone(out, monkeypatch, capsys):
    monkeypatch.setattr(throughput, "compile_ahead", lambda rows, *_: dict.fromkeys(rows, 1.0))
    assert _run("--rows", EAGER[0], "--json", out, "--jobs", "2", "--only-ahead") == 0
    assert capsys.readouterr().out == f"compiled: {EAGER[0]}\n"
    assert not out.exists()
    with pytest.raises(SystemExit, match="2"):
        _run("--only-ahead", "--jobs", "0")
    assert "--jobs is 0; give 1 or more" in capsys.readouterr().err
