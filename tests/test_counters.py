"""No deterministic counter of the training step is worse than the committed one.

The file is rewritten by ``python benchmarks/counters.py --write benchmarks/counters.json``; ``--check`` recounts all of
it, of which the work and what is saved for the backward are recounted here for a few networks only.
"""

import json
import math

import counters
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from soflow_fast import memory
from soflow_fast.dit import PRESETS

COMMITTED = json.loads(counters.COUNTERS.read_text())
SAVED = "saved_bytes_per_element_block"


def _forward_flops(preset: str) -> int:
    """The products of one forward of a sample of 4x32x32, from the layers' sizes."""
    patch, width, depth, _ = PRESETS[preset]
    tokens, pixels = (32 // patch) ** 2, 4 * patch**2
    block = tokens * 24 * width**2 + 4 * tokens**2 * width  # qkv, projection and MLP of ratio 4; attention
    modulation = 2 * width * (6 * depth + 2) * width
    times = 2 * 2 * (256 * width + width**2)
    return depth * block + modulation + times + 2 * (2 * tokens * pixels * width)


def test_the_committed_table_is_complete():
    assert COMMITTED.keys() == set(counters.PRESETS)
    for preset, row in COMMITTED.items():
        assert row["network_calls"] == 2, preset
        assert row["forwards"] == pytest.approx(4.4, rel=0.01), preset
        assert row["flops_per_sample"] == pytest.approx(row["forwards"] * _forward_flops(preset), rel=1e-4), preset
        assert row["graph_breaks"] == row["hidden_tensors"] == 0, preset
        assert row["compilations"] == 1, preset


@pytest.mark.parametrize("preset", counters.PRESETS)
def test_what_a_block_saves(preset):
    """36 bytes of activations (GELU's input and output 8 each, q, k, v 6, seven of 2), a float32 of attention per head
    and four of the LayerNorms per token, the modulation, and the block's part of the stacked modulation weights."""
    patch, width, _, heads = PRESETS[preset]
    tokens = (32 // patch) ** 2
    expected = 36 + 4 * heads / width + 4 * 4 / width + 2 * 6 / tokens + 2 * 6 * width / (counters.BATCH * tokens)
    row = COMMITTED[preset]
    assert row[SAVED] == pytest.approx(expected, abs=1e-3)
    assert row[f"{SAVED}_elementwise"] == pytest.approx(expected - 8, abs=1e-3)  # the GELU's output
    assert row[f"{SAVED}_fp32_residual"] == pytest.approx(expected + 4, abs=1e-3)  # the stream, twice


def test_work_of_a_step():
    preset = "DiT-B/4"
    now = counters.work(preset)
    assert counters.worse(preset, now) == []
    assert now["flops_per_sample"] == pytest.approx(now["forwards"] * _forward_flops(preset), rel=1e-4)


@pytest.mark.parametrize("preset", ["DiT-B/4", "DiT-XL/2"])
def test_parameters(preset):
    assert counters.worse(preset, {"parameters": counters.parameters(preset)}) == []


def test_fused_ops_count_what_the_plain_ones_do():
    """Custom operators count no FLOPs unless they say how many."""
    preset = "DiT-S/2"  # of which no two sizes are equal
    assert counters.work(preset, impl="torch", depth=2) == counters.work(preset, depth=2)


def test_the_difference_forward_costs_what_two_forwards_cost():
    preset = "DiT-B/2"
    plain = counters.work(preset, impl="torch", quotient="two_forwards")
    assert plain["network_calls"] == 3
    assert COMMITTED[preset]["flops_per_sample"] <= 1.02 * plain["flops_per_sample"]


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "form"), [("DiT-B/4", ""), ("DiT-XL/2", "_elementwise"), ("DiT-S/4", "_block")])
def test_saved_for_the_backward(preset, form):
    now = counters.saved_bytes_per_element_block(preset, **counters.SAVED[form])
    assert counters.worse(preset, {SAVED + form: now}) == []


def test_estimated_memory_is_from_the_counters():
    """Rounded up over the presets."""
    for form, estimate in memory._SAVED_BYTES.items():
        name = SAVED if form == "none" else f"{SAVED}_{form}"
        assert estimate == math.ceil(max(row[name] for row in COMMITTED.values())), form


def test_dispatch():
    now = {
        "operators_per_block": counters.operators_per_block("DiT-B/4"),
        "hidden_tensors": counters.hidden_tensors("DiT-B/4"),
        "graph_breaks": counters.graph_breaks(),
        "compilations": counters.compilations(),
    }
    assert counters.worse("DiT-B/4", now) == []


class _Hides(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.kept = [x]
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.kept[0]


def test_a_tensor_kept_in_an_attribute_is_found():
    class Hiding(counters.SoFlow):
        def loss_of_rows(self, *arguments, **keywords):
            out = super().loss_of_rows(*arguments, **keywords)
            return out._replace(loss=_Hides.apply(out.loss))

    assert counters.hidden_tensors("DiT-S/4", objective=Hiding) == 1


def test_worse_is_said_in_words():
    row = COMMITTED["DiT-S/4"]
    assert counters.worse("DiT-S/4", row) == []
    assert counters.worse("DiT-S/4", {"forwards": row["forwards"] - 1}) == []
    assert counters.worse("DiT-S/4", {"network_calls": 3, "graph_breaks": 1}) == [
        "DiT-S/4: network_calls is 3, committed 2",
        "DiT-S/4: graph_breaks is 1, committed 0",
    ]


def test_reading_a_value_on_the_host_would_raise():
    """So that a step that was counted synchronises nowhere."""

    class Reads(counters.TrainStep):
        def __call__(self, *batch):
            return super().__call__(*batch).loss.item()

    with FakeTensorMode():
        step = counters.fake_step("DiT-S/4", step=Reads, depth=1)
        batch = counters.fake_batch(step.model.network)
        with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
            step(*batch)
