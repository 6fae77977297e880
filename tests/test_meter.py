"""The means of a run's metrics: of every step that counts, for two launches a step."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from soflow_fast.distributed import Processes
from soflow_fast.logs import Meter
from soflow_fast.objectives.base import LossOutput
from soflow_fast.step import StepStats


def _stats(step: int, finite: bool = True, loss: float | None = None, rows: dict[str, int] | None = None) -> StepStats:
    generator = torch.Generator().manual_seed(step)

    def rand(*shape):
        return torch.rand(shape, generator=generator) if finite else torch.full(shape, torch.nan)

    rows = {"velocity": 12, "consistency": 4} if rows is None else rows
    parts = {name: LossOutput(rand(), rand(n), rand(n), rand(n)) for name, n in rows.items()}
    loss = rand() if loss is None else torch.tensor(loss)
    return StepStats(loss, rand(), {**parts, "robust": rand()}, torch.tensor(finite))


@pytest.fixture
def meter():
    return Meter(Processes(0, 1, torch.device("cpu")))


def _means(stats: list[StepStats], name: str) -> tuple[float, float, list[float]]:
    mse, weight, t = (torch.cat([getattr(s.parts[name], x) for s in stats]) for x in ("mse", "weight", "t"))
    bins = [mse[(t >= i / 10) & (t < (i + 1) / 10)].mean().item() for i in range(10)]
    return mse.mean().item(), (mse * weight).mean().item(), bins


@pytest.mark.parametrize("steps", [1, 64, 150])
def test_means_are_of_all_rows_of_the_steps_that_count(meter, steps):
    left_out = {70: {"finite": False}, 71: {"finite": False}, 130: {"loss": float("inf")}}
    for step in range(1, steps + 1):
        meter.update(step, _stats(step, **left_out.get(step, {})))
    counted = [_stats(step) for step in range(1, steps + 1) if step not in left_out]
    assert meter.skipped() == ((3, 70) if steps == 150 else (0, 0))
    values = meter.read()
    expected = {
        "loss": torch.stack([s.loss for s in counted]).mean().item(),
        "grad_norm": torch.stack([s.grad_norm for s in counted]).mean().item(),
        "robust/loss": torch.stack([s.parts["robust"] for s in counted]).mean().item(),
    }
    for name in ("velocity", "consistency"):
        mse, weighted, bins = _means(counted, name)
        expected |= {f"{name}/mse": mse, f"{name}/weighted": weighted}
        if steps > 1:  # every bin has rows
            assert values[f"{name}/mse_by_time"] == pytest.approx(bins, rel=1e-5)
    assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_each_reading_starts_afresh_and_the_first_left_out_stays(meter):
    meter.update(1, _stats(1))
    first = meter.read()["velocity/mse"]
    assert meter.read() == {}
    meter.update(2, _stats(2, finite=False))
    assert meter.read() == {}
    meter.update(3, _stats(3, finite=False))
    meter.update(4, _stats(1))
    assert meter.skipped() == (2, 2)
    assert meter.read()["velocity/mse"] == pytest.approx(first)


def test_parts_may_change_from_step_to_step(meter):
    """As in a batch without rows of one of them."""
    several = [_stats(1), _stats(2, rows={"velocity": 16}), _stats(3), _stats(4)]
    for step, stats in enumerate(several, 1):
        meter.update(step, stats)
    values = meter.read()
    assert values["velocity/mse"] == pytest.approx(_means(several, "velocity")[0])
    assert values["consistency/mse"] == pytest.approx(_means([several[0], *several[2:]], "consistency")[0])


def test_what_is_kept_is_a_copy(meter):
    """A captured step writes the next one's values into the same tensors."""
    stats = _stats(1)
    meter.update(1, stats)
    expected = stats.loss.item()
    for x in (stats.loss, *stats.parts["velocity"][1:]):
        x.fill_(torch.nan)
    assert meter.read()["loss"] == pytest.approx(expected)


def test_a_step_costs_two_launches(meter):
    """A cast and a copy; views are free."""
    launched = []

    class Launches(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if not torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd"):
                launched.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    meter.update(1, _stats(1))
    stats = _stats(2)
    with Launches():
        meter.update(2, stats)
    assert [name for name in launched if name not in ("view", "detach")] == ["_to_copy", "cat"]


def test_a_step_that_was_not_finite_in_any_process_counts():
    """Here the loss of step 5 was not, in the other that of step 7; asked for once, however many steps there were."""
    asked = []

    class OneOfTwo(Processes):
        def minimum(self, values):
            asked.append(len(values))
            there = torch.ones_like(values)
            there[6] = 0
            return torch.minimum(values, there)

    meter = Meter(OneOfTwo(0, 1, torch.device("cpu")), skipped=1)
    for step in range(1, 101):
        meter.update(step, _stats(step, **({"loss": float("inf")} if step == 5 else {})))
    assert meter.skipped() == meter.skipped() == (3, 5)
    assert asked == [100]
