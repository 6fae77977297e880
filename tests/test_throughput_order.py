"""Which rows of the throughput benchmark are run when, together, again and not at all. No time is judged."""

import json
from dataclasses import replace

import _race
import _rows
import _table
import pytest
import throughput
import torch
from _race import (
    ROUNDS,
    Contestant,
    NotRun,
    Track,
    flops_per_sample,
    out_of_memory,
    release,
)
from _rows import ROWS, Workload
from _table import Results


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(_rows, "SMALL", {"patch_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 1})


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.json"


class _Fake:
    """A track whose rows are names, and whose memory holds some of them."""

    workload, seconds = Workload("small", 4, "cpu"), 1.0

    def __init__(self, too_large=(), seen_to_fit=9, holds=2):
        self.raced, self.alive, self.too_large, self.seen_to_fit = [], 0, too_large, seen_to_fit
        self.prepared, self.holds = [], holds

    def prepare(self, row):
        self.prepared.append(row.what)
        if self.alive == self.holds or row.what in self.too_large:
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

    def count_kernels(self, contestants):
        for contestant in contestants:
            contestant.report["kernels_launched"] = 7


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


def test_rows_are_timed_before_too_many_could_be_lost():
    track = _Fake(holds=9)
    rows = _fake_run("abcdef", track)
    assert track.raced == [list("abcd"), list("ef")]
    assert rows["a"]["kernels_launched"] == 7


def test_a_profiler_that_ends_the_process_costs_no_time(out):
    track, results = _Fake(), Results({"same": {"batch": 4}}, out, resume=False, order=["a"])

    def ends_it(_):
        raise SystemExit(1)

    track.count_kernels = ends_it
    rows = {"a": replace(ROWS["flow-matching"], what="a")}
    with pytest.raises(SystemExit):
        throughput.Run(rows, track, results, start=0.0, limit=None, ahead={})()
    assert json.loads(out.read_text())["rows"]["a"]["ms_per_step"] == 1.0


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        torch.OutOfMemoryError("planted"),
    ],
)
def test_too_little_memory_is_seen_behind_other_errors(error):
    def fails():
        try:
            raise error
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    with pytest.raises(RuntimeError, match="capture") as raised:
        fails()
    assert out_of_memory(error)
    assert out_of_memory(raised.value)
    assert not out_of_memory(RuntimeError("an illegal memory access was encountered"))


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
