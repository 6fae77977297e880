"""Every row of the throughput benchmark computes the loss and gradient of the plain objective; no timing.

Without a GPU the low precision is real but for TF32, and fused kernels are replaced by plain torch: that the step with
them computes the same is for test_fast_step.py.
"""

from dataclasses import replace
from pathlib import Path

import _rows
import pytest
import torch
from _baselines import AllRowsMeanFlow, Fp32PairSoFlow, LoopEMA, ScaledAdamW, ScaledLossSoFlow, SixCalls
from _check import CHECKED_STEP, Truth
from _public_source import public_source_row
from _rows import ABLATIONS, LADDER, ROWS, Workload, build, selected

from soflow_fast import DiT, paths
from soflow_fast.objectives.flow_matching import FlowMatching
from soflow_fast.objectives.meanflow import MeanFlow

PUBLIC_SOURCE = Path(__file__).parent / "public_source"
BATCH = 8

RUNNABLE = {name: row for name, row in ROWS.items() if name != "meanflow/jvp-flash"}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(_rows, "SMALL", {"patch_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 1})
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def truths():
    """The plain objectives, computed once for each workload."""
    known = {}
    return lambda workload: known.setdefault(workload, Truth(workload))


def _errors(row, workload, truth) -> dict[str, float]:
    step, data = build(row, workload), workload.data()
    for _ in range(CHECKED_STEP + 1):
        stats = step(*data)
    return truth.errors(row, step, stats)


# ----------------------------------------------------------------------------------------------- float64, by class


def _in_float64(objective, row, **settings) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of an objective on the row's network, all in float64, in the row's own way of calling it."""
    workload = Workload("small", BATCH, "cpu")
    options = {name: value for name, value in row.network.items() if not isinstance(value, torch.dtype)}
    net = workload.network(row.dit, impl="torch", **options).double()
    model = objective(net, **workload.recipe(objective), **settings)
    x0, labels = workload.data()
    order, n_velocity = paths.row_order(BATCH, model.velocity_share, 0)
    order = torch.tensor(order)
    out = model.loss_of_rows(x0.double()[order], labels[order], order, n_velocity, 1.0, 3, 5)
    out.loss.backward()
    scale = getattr(model, "scale", 1.0)
    return out.loss / scale, {name: p.grad / scale for name, p in model.named_parameters() if p.requires_grad}


def _plain(row):
    """The plain objective: two forwards, or torch.func.jvp on the rows with r < t."""
    plain = replace(row, dit=DiT, network={"attention": "math"})
    if issubclass(row.objective, MeanFlow):
        return _in_float64(MeanFlow, plain, derivative="jvp")
    if issubclass(row.objective, FlowMatching):
        return _in_float64(FlowMatching, plain)
    gap = {"gap_end": row.settings["gap_end"]} if "gap_end" in row.settings else {}
    return _in_float64(SixCalls, plain, quotient="two_forwards", **gap)


def _distance(ours: dict, expected: dict) -> float:
    squares = [((ours[name] - expected[name]).square().sum(), expected[name].square().sum()) for name in expected]
    error, size = (sum(part) for part in zip(*squares, strict=True))
    return (error / size).sqrt().item()


@pytest.mark.parametrize("name", [name for name in RUNNABLE if name != "meanflow/finite-difference"])
def test_row_is_the_plain_objective_in_float64(name):
    row = ROWS[name]
    loss, gradients = _in_float64(row.objective, row, **row.settings)
    plain_loss, plain_gradients = _plain(row)
    assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-9)
    assert _distance(gradients, plain_gradients) < 1e-8


def test_finite_difference_is_within_its_stated_error_and_of_first_order():
    row = ROWS["meanflow/finite-difference"]
    h = row.settings["difference_step"]
    _, plain = _plain(row)
    errors = []
    for step in (h, h / 2, h / 4):
        _, gradients = _in_float64(row.objective, row, **{**row.settings, "difference_step": step})
        errors.append(_distance(gradients, plain))
    assert 1e-6 < errors[0] < row.tolerance
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


# ----------------------------------------------------------------------------------------- as the benchmark builds it


@pytest.mark.parametrize("half", [False, True], ids=["float32", "low precision"])
@pytest.mark.parametrize("name", RUNNABLE)
def test_row_passes_its_check(name, half, truths):
    workload = Workload("small", BATCH, "cpu", compile=False, half=half)
    errors = _errors(ROWS[name], workload, truths(workload))
    assert max(errors.values()) <= ROWS[name].tolerance * (1 if half else 0.1)


@pytest.mark.parametrize(
    "name",
    [
        "soflow/public-fp16-compile",
        "soflow/public-bf16-fp32pair-compile",
        "soflow/derived",
        "meanflow/compiled",
        "meanflow/strong",
    ],
)
def test_row_is_traced_as_one_graph(name, monkeypatch):
    """Without generating code; for the rows whose form is their own, of one block, by which tracing goes."""
    monkeypatch.setattr(_rows, "SMALL", {**_rows.SMALL, "depth": 1})
    workload = Workload("small", BATCH, "cpu", compile="aot_eager", half=True)
    assert max(_errors(ROWS[name], workload, Truth(workload)).values()) <= ROWS[name].tolerance


@pytest.mark.parametrize("name", [name for name in {**LADDER, **ABLATIONS} if name not in ROWS])
def test_ladder_and_ablations_pass_their_check(name, truths):
    workload = Workload("small", BATCH, "cpu", compile=False, half=True)
    row = {**LADDER, **ABLATIONS}[name]
    assert max(_errors(row, workload, truths(workload)).values()) <= row.tolerance


def test_low_precision_shows_where_it_should(truths):
    """Two forwards in bfloat16 at the published gap are what the check is there to refuse."""
    workload = Workload("small", BATCH, "cpu", compile=False, half=True)
    naive = replace(ROWS["soflow/public-bf16-r02-compile"], settings={"quotient": "two_forwards"})
    assert not _errors(naive, workload, truths(workload))["gradient_error"] <= naive.tolerance


class _NoDerivative(AllRowsMeanFlow):
    def with_derivative(self, *arguments):
        u, derivative = super().with_derivative(*arguments)
        return u, torch.zeros_like(derivative)


def test_check_refuses_a_wrong_derivative(monkeypatch):
    monkeypatch.setattr(_rows, "SMALL", {**_rows.SMALL, "depth": 8})
    workload = Workload("small", BATCH, "cpu", compile=False)
    wrong = replace(ROWS["meanflow/compiled"], objective=_NoDerivative)
    assert _errors(wrong, workload, Truth(workload))["gradient_error"] > 2 * wrong.tolerance


def test_pair_is_in_float32_and_the_rest_is_not():
    workload = Workload("small", BATCH, "cpu", compile=False, half=True)
    row, seen = ROWS["soflow/public-bf16-fp32pair-compile"], []
    assert row.objective is Fp32PairSoFlow
    step = build(row, workload)
    step.model.network.blocks[0].mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    step(*workload.data())
    assert seen.count(torch.float32) == 2
    assert seen.count(torch.bfloat16) == len(seen) - 2


# -------------------------------------------------------------------------------------------------- other baselines


def test_jvp_flash_says_what_it_lacks():
    with pytest.raises(ValueError, match="jvp-flash-attention is not installed"):
        build(ROWS["meanflow/jvp-flash"], Workload("small", 4, "cpu"))


def test_jvp_flash_does_not_have_every_head_dim(monkeypatch):
    monkeypatch.setattr(_rows, "SMALL", {"patch_size": 8, "hidden_size": 72, "depth": 1, "num_heads": 1})
    with pytest.raises(ValueError, match="this model 72"):
        build(ROWS["meanflow/jvp-flash"], Workload("small", 4, "cpu"))


def test_public_source_passes_its_check(truths):
    workload = Workload("small", BATCH, "cpu", compile=False)
    row = public_source_row(PUBLIC_SOURCE, "small")
    step, data = build(row, workload), workload.data()
    for _ in range(CHECKED_STEP):
        step(*data)
    with step.model.given_noise():
        stats = step(*data)
    assert max(truths(workload).errors(row, step, stats).values()) < 0.01


def test_public_source_of_another_size_is_refused():
    row = public_source_row(PUBLIC_SOURCE, "DiT-S/4")  # its models.py builds its largest model for an unknown name
    with pytest.raises(ValueError, match="published DiT-S-4 does not have the weights"):
        build(row, Workload("small", 4, "cpu", compile=False))


def test_loss_scale_is_halved_by_an_overflow_and_grows():
    net = DiT(8, 8, 1, 32, 1, 1, num_classes=4, impl="torch")
    model = ScaledLossSoFlow(net)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = ScaledAdamW(parameters, objective=model, growth=2, lr=0.1, impl="torch")
    before = [p.detach().clone() for p in parameters]

    def update(gradient: float) -> tuple[float, bool]:
        for p in parameters:
            p.grad = torch.full_like(p, gradient)
        _, finite = optimizer.update()
        return model.scale.item(), bool(finite)

    assert update(float("inf")) == (2.0**13, False)
    assert all(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))
    assert update(2.0**13) == (2.0**13, True)
    assert parameters[0].grad.flatten()[0] == 1
    assert update(2.0**13) == (2.0**14, True)
    assert not torch.equal(parameters[0], before[0])


def test_loop_ema_is_the_published_average():
    module = torch.nn.Linear(3, 2)
    ema, start = LoopEMA(module, decay=0.9), module.weight.detach().clone()
    with torch.no_grad():
        module.weight += 1
    ema.update()
    torch.testing.assert_close(ema.averages["weight"], 0.9 * start + 0.1 * module.weight)


def test_rows_are_selected_by_id_and_set():
    assert list(selected(["flow-matching", "ladder"]))[:2] == ["flow-matching", "soflow/public"]
    assert set(selected(["table"])) == set(ROWS)
    with pytest.raises(ValueError, match="no row is called 'soflow/slow'"):
        selected(["soflow/slow"])


def test_batch_is_a_multiple_of_4():
    with pytest.raises(ValueError, match="batch=6 is not a multiple of 4"):
        Workload("small", 6, "cpu")
