"""A benchmark that is stopped leaves a whole file of the pieces that it has measured, marked as partial."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import _pieces
import precision
import pytest
import sampling

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
OP = "silu_difference"


def _load(name: str):
    """A script of benchmarks/ by its path: kernels.py shares its name with the folder of kernels."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def reports(monkeypatch, tmp_path):
    """Runs a script whole and again, stopped at the second call of one of its functions; the two reports.

    Where it can, it goes on then, with what is left.
    """

    def reports(module, function: str, *arguments: str) -> tuple[dict, dict]:
        calls, real, path = [], getattr(module, function), tmp_path / "out.json"

        def stopping(*given, **options):
            calls.append(given)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return real(*given, **options)

        monkeypatch.setattr(sys, "argv", ["script", *arguments, "--json", str(path)])
        assert module.main() == 0
        whole = json.loads(path.read_text())
        path.unlink()
        monkeypatch.setattr(module, function, stopping)
        with pytest.raises(KeyboardInterrupt):
            module.main()
        part = json.loads(path.read_text())
        if "pieces" in whole:
            monkeypatch.setattr(sys, "argv", [*sys.argv, "--resume"])
            assert module.main() == 0
            then = json.loads(path.read_text())
            assert (len(calls), then["pieces"], "partial" in then) == (3, whole["pieces"], False)
            assert len(then["rows"]) == len(whole["rows"])
            assert then["rows"][: len(part["rows"])] == part["rows"]
        return whole, part

    return reports


def test_kernels(reports, monkeypatch):
    module = _load("kernels")
    (case,) = module.selected(True, OP)
    monkeypatch.setattr(module, "selected", lambda *_: [case, replace(case, name="another")])
    whole, part = reports(module, "make_check", "--smoke", "--only", OP)
    assert ("partial" in whole, part["partial"]) == (False, True)
    assert [row["provider"] for row in whole["rows"]] == 2 * [row["provider"] for row in part["rows"]]


def test_errors(reports, monkeypatch):
    module = _load("errors")
    monkeypatch.setattr(module, "DTYPES", {"float32": module.DTYPES["float32"]})
    whole, part = reports(module, "measure", "--only", OP)
    assert ("partial" in whole, part["partial"]) == (False, True)
    assert (len(whole["rows"]), part["rows"]) == (2, whole["rows"][:1])


def test_sampling(reports):
    few = ("--smoke", "--batches", "1", "2", "--precisions", "fp32", "--seconds", "0.01")
    whole, part = reports(sampling, "measure", *few)
    assert ("partial" in whole, part["partial"]) == (False, True)
    assert {row["batch"] for row in whole["rows"]} == {1, 2}
    assert {row["batch"] for row in part["rows"]} == {1}


def test_precision(reports, monkeypatch):
    monkeypatch.setattr(precision, "quotient_errors", lambda net, rows, wanted: {m.name: {"0.1": 0.5} for m in wanted})
    monkeypatch.setattr(precision, "digits_network", lambda device: None)
    whole, part = reports(precision, "quotient_errors", "--smoke", "--device", "cpu", "--weights", "random", "digits")
    assert ("partial" in whole, part["partial"]) == (False, True)
    assert (set(whole["relative_error"]), set(part["relative_error"])) == ({"random", "digits"}, {"random"})


def test_a_piece_that_costs_the_gpu_is_not_tried_again(monkeypatch, tmp_path):
    path, ran = tmp_path / "out.json", []

    def lost():
        ran.append("lost")
        monkeypatch.setattr(_pieces, "gpu_lost", lambda: True)
        raise RuntimeError("an illegal memory access was encountered")

    pieces = [("lost", lost), ("next", lambda: ran.append("next"))]
    with pytest.raises(SystemExit, match="lost has cost this process its GPU; --resume goes on"):
        _pieces.run_pieces(_pieces.begun(None), pieces, 1.0, path)
    monkeypatch.setattr(_pieces, "gpu_lost", lambda: False)
    report = _pieces.begun(path)
    _pieces.run_pieces(report, pieces, 1.0, path)
    assert ran == ["lost", "next"]
    assert [refused["piece"] for refused in report["refused"]] == ["lost"]
    assert "partial" not in json.loads(path.read_text())


def test_a_piece_that_ends_the_process_twice_is_not_tried_again(tmp_path):
    path, ran, left = tmp_path / "out.json", [], []
    pieces = [
        ("first", lambda: ran.append("first")),
        ("ends it", lambda: left.append(path.read_text())),  # all that a killed process leaves
        ("raises", lambda: ran.append("raises") or 1 / 0),
        ("last", lambda: ran.append("last")),
    ]
    _pieces.run_pieces(_pieces.begun(None), pieces, 1.0, path)
    assert ran == ["first", "raises", "last"]
    for _ in range(2):  # once may have been the machine's fault
        path.write_text(left[-1])
        report = _pieces.begun(path)
        _pieces.run_pieces(report, pieces, 1.0, path)
    assert ran == ["first", *["raises", "last"] * 3]
    assert len(left) == 2
    assert report["pieces"] == ["first", "ends it", "raises", "last"]
    assert [(one["piece"], one["why"][:17]) for one in report["refused"]] == [
        ("ends it", "it was interrupte"),
        ("raises", "ZeroDivisionError"),
    ]
    assert json.loads(path.read_text()).keys() == report.keys()


def test_a_piece_that_is_interrupted_is_tried_once_more(tmp_path):
    path, ran, report = tmp_path / "out.json", [], _pieces.begun(None)

    def interrupted():
        ran.append("long")
        report["rows"].append("half of them")
        raise KeyboardInterrupt

    pieces = [("long", interrupted), ("next", lambda: ran.append("next"))]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            _pieces.run_pieces(report, pieces, 1.0, path)
        report = _pieces.begun(path)
    _pieces.run_pieces(report, pieces, 1.0, path)
    assert ran == ["long", "long", "next"]
    assert report["refused"] == [{"piece": "long", "why": _pieces.GIVEN_UP}]
    assert report["rows"] == []
    assert _pieces.begun(path)["refused"] == report["refused"]
