"""Planted regressions are caught: one more network call, a graph break, a compilation per step, a spill."""

import json

import counters
import pytest
import torch
from fast_step_runs import make_model, make_step, training_batch
from test_aot import TABLE, regressions, table

from soflow_fast import SoFlow
from soflow_fast.step import TrainStep


class _OneMoreCall(TrainStep):
    def __call__(self, x0, labels=None):
        t = torch.zeros(len(x0))
        with torch.no_grad():
            self.model.network(x0, t, t, labels)
        return super().__call__(x0, labels)


def test_one_more_network_call():
    now = counters.work("DiT-S/4", step=_OneMoreCall)
    found = counters.worse("DiT-S/4", now)
    assert "DiT-S/4: network_calls is 3, committed 2" in found
    assert any("flops_per_sample" in line for line in found)


class _Breaks(SoFlow):
    def loss_of_rows(self, *arguments, **keywords):
        torch._dynamo.graph_break()
        return super().loss_of_rows(*arguments, **keywords)


def test_a_graph_break():
    assert counters.worse("DiT-S/4", {"graph_breaks": counters.graph_breaks(_Breaks)}) != []
    step, _ = make_step(make_model(torch.float32, _Breaks), compile="eager")
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        step(*training_batch(0, torch.float32))


class _ChangesANumber(TrainStep):
    def __call__(self, x0, labels=None):
        self.model.eps *= 0.5
        return super().__call__(x0, labels)


def test_a_compilation_per_step():
    assert counters.worse("DiT-S/4", {"compilations": counters.compilations(_ChangesANumber)}) != []


@pytest.mark.parametrize("column", ["stack", "registers", "shared", "instructions", "widest_access", "bytes_moved"])
def test_a_spill_and_what_else_a_kernel_may_not_grow(column):
    rows = json.loads(TABLE.read_text())
    committed = table(rows)
    assert regressions(committed, committed) == []
    rows[7] = {**rows[7], column: rows[7][column] + (-8 if column == "widest_access" else 8)}
    (found,) = regressions(table(rows), committed)
    assert rows[7]["kernel"] in found
    assert column in found
