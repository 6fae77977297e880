"""The kernel benchmark reports no time of an op that is wrong, and loses no row to one that fails; the error table."""

import importlib.util
from pathlib import Path

import pytest

from soflow_fast.kernels import fused, reference

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
OP = "silu_difference"


@pytest.fixture
def load(monkeypatch):
    """Imports a script of benchmarks/ by its path: kernels.py shares its name with the folder of kernels."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def benchmark_module(load):
    return load("kernels")


def _report(module):
    return module.measure(module.selected(smoke=True, only=OP), max_rows=1)


def test_reports_every_provider(benchmark_module):
    report = _report(benchmark_module)
    assert [row["provider"] for row in report["rows"]] == ["eager", "compiled", "ours"]
    for row in report["rows"]:
        assert 0 < row["ms_low"] <= row["ms"] <= row["ms_high"]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["ms"] / 1e6)
        assert row["percent_of_copy"] == pytest.approx(100 * row["gb_per_s"] / report["copy_gb_per_s"])
    assert "1 compared" in benchmark_module.table(report)
    assert not report["refused"]


def test_refuses_an_op_that_is_not_exact(benchmark_module, monkeypatch):
    right = fused.silu_difference
    monkeypatch.setattr(fused, OP, lambda u, du, tangent=False: 1.001 * right(u, du, tangent=tangent))
    report = _report(benchmark_module)
    assert not report["rows"]
    assert [refused["what"] for refused in report["refused"]] == ["not exact"]
    assert "1 refused" in benchmark_module.table(report)


def test_what_there_was_no_time_for_is_listed(benchmark_module):
    report = benchmark_module.measure(benchmark_module.selected(smoke=True, only=OP), max_rows=1, minutes=0)
    assert (report["rows"], report["refused"]) == ([], [])
    assert [one.split()[0] for one in report["left_out"]] == [OP]


def test_a_provider_that_fails_costs_only_its_row(benchmark_module, monkeypatch):
    right = reference.silu_difference

    def fails_when_compiled(u, du, tangent=False):
        if benchmark_module.torch.compiler.is_compiling():
            raise RuntimeError("planted")
        return right(u, du, tangent=tangent)

    monkeypatch.setattr(reference, OP, fails_when_compiled)
    report = _report(benchmark_module)
    assert [row["provider"] for row in report["rows"]] == ["eager", "ours"]
    assert [refused["what"] for refused in report["refused"]] == ["compiled"]
    assert "0 compared" not in benchmark_module.table(report)


def test_the_table_of_errors_tells_the_forms_apart(load):
    """The fused op and the reference are as exact as the dtype; two evaluations subtracted are far from that."""
    errors = load("errors")
    case = errors.cases(only=OP)[0]
    (wide,), (half,) = errors.measure(case, "float32"), errors.measure(case, "float16")
    assert max(wide["fused"], wide["reference"]) < 1e-6
    assert max(half["fused"], half["reference"]) < 2e-3
    assert wide["plain"] > 30 * wide["fused"]
    assert half["plain"] > 0.1
    assert "2 results, 0 outside" in errors.table([wide, half])
