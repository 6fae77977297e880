"""The throughput benchmark: what it writes, resumes, refuses and leaves out. No time is judged."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import _race
import _rows
import _table
import pytest
import throughput
import torch
from _check import Truth
from _race import ROUNDS, Contestant, NotRun, Track, count_flops, flops_per_sample, release, spared_forwards
from _rows import ROWS, Workload
from _table import Results

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


# ---------------------------------------------------------------------------------------- the order of what is run


class _Fake:
    """A track whose rows are names, and whose memory holds two of them."""

    workload, seconds = Workload("small", 4, "cpu"), 1.0

    def __init__(self, too_large=(), seen_to_fit=9):
        self.raced, self.alive, self.too_large, self.seen_to_fit = [], 0, too_large, seen_to_fit
        self.prepared = []

    def prepare(self, row):
        self.prepared.append(row.what)
        if self.alive == 2 or row.what in self.too_large:
            raise RuntimeError("cannot be captured") from torch.OutOfMemoryError("planted")
        self.alive += 1
        return Contestant(None, None, {"what": row.what}, 1.0)

    def has_room(self, contestants):
        return self.alive < self.seen_to_fit

    def race_seconds(self, contestants):
        return 0.0

    def race(self, contestants):
        self.raced.append([c.report["what"] for c in contestants])
        self.alive = 0
        for contestant in contestants:
            contestant.report["ms_per_step"] = 1.0


def _fake_run(names, track, limit=None, ahead=()) -> dict:
    rows = {name: replace(ROWS["flow-matching"], what=name) for name in names}
    results = Results({"same": {"batch": 4}}, None, resume=False, order=list(names))
    run = throughput.Run(rows, track, results, start=0.0, limit=limit, ahead=dict.fromkeys(ahead, 1.0))
    run()
    return {**results.rows, **dict.fromkeys(run.left, "left")}


def test_rows_that_do_not_fit_together_are_timed_in_groups():
    track = _Fake()
    rows = _fake_run("abcde", track)
    assert track.raced == [["a", "b"], ["c", "d"], ["e"]]
    assert [row["group"] for row in rows.values()] == [1, 1, 2, 2, 3]


def test_a_row_that_is_seen_not_to_fit_is_compiled_once():
    track = _Fake(seen_to_fit=2)
    _fake_run("abcde", track)
    assert track.raced == [["a", "b"], ["c", "d"], ["e"]]
    assert track.prepared == list("abcde")


def test_a_second_attempt_is_made_only_in_time(monkeypatch):
    track, ticks = _Fake(), iter([0.0] * 7 + [1e3] * 9)
    monkeypatch.setattr(throughput.time, "monotonic", lambda: next(ticks))
    rows = _fake_run("abcd", track, limit=500.0)
    assert track.prepared == list("abc")
    assert (rows["c"], rows["d"]) == ("left", "left")


@pytest.mark.parametrize(("model", "begun"), [("DiT-B/4", True), ("DiT-XL/2", False)])
def test_a_row_of_a_deep_model_needs_more_time(monkeypatch, model, begun):
    track = _Fake()
    track.workload = replace(track.workload, model=model)
    monkeypatch.setattr(throughput.time, "monotonic", lambda: 0.0)
    assert (_fake_run("a", track, limit=120.0)["a"] != "left") == begun


def test_rows_that_are_compiled_are_taken_first_and_whatever_the_others_need(monkeypatch):
    track = _Fake()
    _fake_run("ab", track, ahead="b")
    assert track.prepared == list("ba")
    track = _Fake()
    monkeypatch.setattr(throughput.time, "monotonic", lambda: 0.0)
    rows = _fake_run("abc", track, limit=60.0, ahead="ac")
    assert (track.prepared, rows["b"]) == (list("ac"), "left")


def test_a_row_too_large_for_the_memory_alone_is_skipped():
    track = _Fake(too_large="b")
    rows = _fake_run("abc", track)
    assert track.raced == [["a"], ["c"]]
    assert rows["b"] == {"skipped": "out of memory at batch 4", "failed": False}


def test_a_derived_difference_counts_the_work_of_the_one_by_hand():
    workload = Workload("small", 4, "cpu")
    derived, by_hand = (flops_per_sample(ROWS[f"soflow/{name}"], workload) for name in ("derived", "merged-compile"))
    assert 0.97 < derived / by_hand < 1.03


def test_rows_are_timed_in_turns():
    track, order = Track(Workload("small", 4, "cpu"), seconds=0.02), []
    labels = torch.zeros(4)

    def contestant(name: str, ms: float) -> Contestant:
        return Contestant(lambda *_: order.append(name), (labels, labels), {"flops_per_sample": 1}, ms)

    track.race([contestant("a", 1.0), contestant("b", 1.0), contestant("c", 0.5)])
    turns = [order[i : i + 8] for i in range(0, len(order), 8)]
    assert len(turns) == ROUNDS
    for turn in turns:
        runs = [name for i, name in enumerate(turn) if i == 0 or turn[i - 1] != name]
        assert sorted(runs) == ["a", "b", "c"]
        assert sorted(turn) == [*"aabbcccc"]
    assert len({tuple(turn) for turn in turns}) > 1


def test_a_row_that_breaks_while_it_is_timed_drops_out():
    track, labels, runs = Track(Workload("small", 4, "cpu"), seconds=0.01), torch.zeros(4), []

    def breaks(*_):
        runs.append(1)
        raise RuntimeError("planted")

    good, bad = (Contestant(step, (labels, labels), {"flops_per_sample": 1}, 1.0) for step in (lambda *_: None, breaks))
    track.race([bad, good])
    assert bad.report == {"skipped": "RuntimeError: planted", "failed": True}
    assert len(runs) == 1
    assert good.report["steps"] == ROUNDS


def test_an_interrupted_race_leaves_the_rows_that_have_had_a_turn(monkeypatch, out):
    track, labels = Track(Workload("small", 4, "cpu"), seconds=0.01), torch.zeros(4)
    results = Results({"same": {"batch": 4}}, out, resume=False, order=["a", "b"])
    run = throughput.Run({}, track, results, start=0.0, limit=None, ahead={})
    run._together = {
        name: Contestant(lambda *_: None, (labels, labels), {"flops_per_sample": 1}, 1.0) for name in ("a", "b")
    }
    turns, real = [], Track._turn

    def interrupted(self, contestant, steps):
        turns.append(contestant)
        if len(turns) == 2:
            raise KeyboardInterrupt
        real(self, contestant, steps)

    monkeypatch.setattr(Track, "_turn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run._race()
    ((_, row),) = json.loads(out.read_text())["rows"].items()
    assert (row["steps"], row["group"]) == (1, 1)
    assert row["ms_per_step"] == row["ms_p99"] > 0


def test_a_row_that_ends_the_process_twice_is_not_begun_again(out):
    track, left = _Fake(), []
    prepare, header = track.prepare, {"same": dict.fromkeys(_table._SAME, 4)}

    def ends_it(row):
        left.append(out.read_text())  # all that a killed process leaves
        return prepare(row)

    def run() -> dict:
        rows = {name: replace(ROWS["flow-matching"], what=name) for name in "ab"}
        results = Results(header, out, resume=True, order=list(rows))
        throughput.Run(rows, track, results, start=0.0, limit=None, ahead={})()
        return results.report

    track.prepare = ends_it
    assert run()["rows"].keys() == {"a", "b"}
    for again in (["a", "b"], ["b"]):
        out.write_text(left[0])
        left.clear()
        track.prepared.clear()
        report = run()
        assert track.prepared == again
    assert report["rows"]["a"]["failed"]
    assert "its process ended in it" in report["rows"]["a"]["skipped"]
    assert "running" not in json.loads(out.read_text())


def test_a_profiler_that_fails_costs_the_count_of_kernels_alone(monkeypatch, capsys):
    def fails(**_):
        raise RuntimeError("CUPTI_ERROR_NOT_INITIALIZED")

    monkeypatch.setattr(_race, "profile", fails)
    track = Track(Workload("small", 4, "cpu"), seconds=0.01)
    track.on_gpu = True
    assert track._kernels(Contestant(None, None, {}, 1.0)) is None
    assert "its kernels are not counted: CUPTI_ERROR" in capsys.readouterr().err


def test_memory_that_cannot_be_returned_ends_no_table(monkeypatch, capsys):
    def fails(error):
        def empty_cache():
            raise error

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)

    fails(RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED"))
    release()
    assert "memory is kept: captures_underway" in capsys.readouterr().err
    fails(torch.AcceleratorError("an illegal memory access was encountered"))
    with pytest.raises(torch.AcceleratorError):
        release()


def test_not_run_says_why():
    with pytest.raises(NotRun, match="its kernels are for GPUs"):
        Track(Workload("small", 4, "cpu"), seconds=0.1).prepare(ROWS["soflow/fast"])
