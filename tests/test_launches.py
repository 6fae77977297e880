"""The search among launches: what it tries, that it keeps to what is exact, and where it stops."""

import importlib
import json

import pytest
import torch

from soflow_fast.kernels import _adaln_backward, activation_difference, adaln, fused
from soflow_fast.kernels._launch import Launch

OP = "silu_difference"


@pytest.fixture
def launches():
    return importlib.import_module("launches")


@pytest.fixture
def entry(launches):
    return launches.Entry(activation_difference, "_BLOCK")


def test_neighbours(launches, entry):
    assert entry.neighbours(1024) == [2048, 512]
    assert launches.Entry(_adaln_backward, "_TOKENS").neighbours((64, 32, 16)) == [(128, 64, 32), (32, 16, 8)]
    assert entry.neighbours(Launch(num_warps=32, max_registers=64)) == [
        Launch(num_warps=32, num_stages=2),
        Launch(num_warps=16),
    ]
    square = next(one for one in launches.ENTRIES if one.name == "_self_attention_backward._HALF")
    assert all(value.queries == value.keys for value in square.neighbours(square.committed))


def test_every_entry_decides_about_a_launch(launches, monkeypatch):
    monkeypatch.setattr(launches, "DTYPE", torch.bfloat16)  # as on a GPU
    cases = launches.by_size()
    for one in launches.ENTRIES:
        found = next(launches.decided(one, cases, every_case=False, max_rows=None), None)
        assert found is not None, one.name
        kernels = launches.changed_kernels(one, one.neighbours(one.committed)[0], found, None)
        assert 1 <= len(kernels) <= 3, one.name
    (forward,) = (case for case in fused.cases() if (case.op, case.name) == ("gated_residual_layernorm", "B/4"))
    tokens = launches.Entry(adaln, "_TOKENS")
    assert launches.changed_kernels(tokens, 4, forward, None) == {"_adaln_forward_kernel"}
    assert launches.changed_kernels(tokens, tokens.committed, forward, None) == set()


def test_an_entry_is_timed_as_committed_and_otherwise(launches, entry, monkeypatch, tmp_path):
    monkeypatch.setattr(launches, "ENTRIES", (entry,))
    path = tmp_path / "launches.json"
    report = launches.measure(OP, every_case=False, smoke=True, minutes=9, path=path, resume=False)
    assert [(row["value"], row["committed"]) for row in report["rows"]] == [
        ("1024", True),
        ("2048", False),
        ("512", False),
    ]
    assert all(row["ms"] > 0 and row["kernels"] == ["_activation_difference_kernel"] for row in report["rows"])
    assert "3 tried, 0 refused" in launches.table(report)
    assert json.loads(path.read_text()) == report
    assert activation_difference._BLOCK == 1024


def test_what_is_timed_is_one_op(launches, monkeypatch):
    """The kernels that the entry changes, as often as the op launches them forward and backward."""
    (case,) = (one for one in fused.cases() if (one.op, one.name) == ("gated_residual_layernorm", "B/4"))
    runs = []
    monkeypatch.setattr(launches.Record, "run", lambda record: runs.append(record.kernel.__name__))
    kernels = {"_adaln_forward_kernel", "_adaln_backward_kernel"}
    entry = launches.Entry(launches._rows, "_MAX_STRIPS")
    launches.timed(entry, 3, case, kernels, list, lambda replay: runs.clear() or replay(), 1)
    assert sorted(runs) == sorted(kernels)


def test_what_is_timed_has_the_grid_of_its_value(launches, entry, monkeypatch):
    case, runs = next(case for case in fused.cases() if case.op == OP), []
    monkeypatch.setattr(launches.Record, "run", lambda record: runs.append(record.grid()[0]))
    for value in (512, 1024):
        kernels = {"_activation_difference_kernel"}
        launches.timed(entry, value, case, kernels, list, lambda replay: runs.pop() and replay(), 1)
    assert runs[0] > runs[1]


def test_what_is_not_exact_is_not_timed(launches, entry, monkeypatch):
    monkeypatch.setattr(launches, "ENTRIES", (entry,))
    monkeypatch.setattr(launches, "make_check", lambda *_: lambda: ["dg: off"] * (activation_difference._BLOCK == 512))
    report = launches.measure(OP, every_case=False, smoke=True, minutes=9, path=None, resume=False)
    assert [row.get("refused") for row in report["rows"]] == [None, None, "ValueError: not exact: dg: off"]


def test_the_search_goes_on_from_what_is_faster_by_more_than_the_spread(launches, entry, monkeypatch):
    milliseconds = {1024: 10.0, 2048: 8.0, 4096: 7.0, 8192: 6.9, 512: 12.0}

    def timed(entry, value, *_):
        return launches.Timing(milliseconds[value], milliseconds[value] - 0.5, milliseconds[value] + 0.5, 10)

    monkeypatch.setattr(launches, "timed", timed)
    monkeypatch.setattr(launches, "make_check", lambda *_: None)
    case = next(case for case in fused.cases() if case.op == OP)
    rows = list(launches.search(entry, case, None, None, climbs=3))
    assert [row["value"] for row in rows] == ["1024", "2048", "512", "4096", "8192"]
    (found,) = launches.best(rows)
    assert (found["fastest"], found["tried"], found["times"]) == ("8192", 5, pytest.approx(10 / 6.9))
