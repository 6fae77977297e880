"""Sampling in one and several steps against the procedure written out here."""

import math
from types import SimpleNamespace

import pytest
import torch

from soflow_fast import DiT, SoFlow
from soflow_fast.kernels.reference import Stream, normal
from soflow_fast.sample import sample


class Recorder:
    """A model whose solution is a known function of everything it is given."""

    def __init__(self, path):
        self.path, self.calls = path, []

    def solution(self, x, t, s, labels):
        self.calls.append(SimpleNamespace(x=x, t=t, s=s, labels=labels))
        return 0.5 * x + t.view(-1, 1, 1, 1).to(x.dtype)


NOISE = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("path", ["linear", "trig"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_every_step_jumps_to_data_from_the_next_noise_level(path, steps):
    model, labels = Recorder(path), torch.tensor([1, 2, 0])
    out = sample(model, NOISE, labels, steps, seed=2**35, first_row=10)
    x0 = None
    for i in range(steps):
        t = 1 - i / steps
        if i == 0:
            x = NOISE
        else:
            fresh = normal(torch.tensor([10, 11, 12]), 8, seed=2**35, step=i, stream=Stream.RENOISE)
            keep, add = (1 - t, t) if path == "linear" else (math.cos(math.pi * t / 2), math.sin(math.pi * t / 2))
            x = keep * x0 + add * fresh.double().view(3, 2, 2, 2)
        call = model.calls[i]
        torch.testing.assert_close(call.x, x, rtol=0, atol=1e-14)
        torch.testing.assert_close(call.t, torch.full((3,), t, dtype=torch.float64), rtol=0, atol=1e-15)
        assert not call.s.any()
        assert torch.equal(call.labels, labels)
        x0 = 0.5 * x + t
    assert len(model.calls) == steps
    torch.testing.assert_close(out, x0, rtol=0, atol=1e-14)


def test_one_step_of_soflow_is_its_solution_from_noise():
    net = DiT(8, 4, 2, 16, 1, 2, num_classes=3)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    model, labels = SoFlow(net), torch.tensor([0, 1, 2])
    noise = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    out = model.sample(noise, labels)
    assert not out.requires_grad
    expected = noise - net(noise, torch.ones(3), torch.zeros(3), labels)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        model.sample(noise), noise - net(noise, torch.ones(3), torch.zeros(3)), rtol=0, atol=1e-6
    )


def test_samples_do_not_depend_on_how_rows_are_split():
    whole = sample(Recorder("linear"), NOISE, None, 3, seed=4)
    parts = [sample(Recorder("linear"), NOISE[i : i + 1], None, 3, seed=4, first_row=i) for i in range(3)]
    assert torch.equal(torch.cat(parts), whole)


def test_a_generator_draws_the_seed():
    def run(seed):
        return sample(Recorder("linear"), NOISE, None, 2, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_keep_the_dtype_of_the_noise_and_times_are_at_least_float32(dtype):
    model = Recorder("trig")
    assert sample(model, NOISE.to(dtype), None, 2).dtype == dtype
    assert all(call.t.dtype == torch.float32 for call in model.calls)


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps(steps):
    with pytest.raises(ValueError, match=f"steps={steps} is not a number of sampling steps; it must be at least 1"):
        sample(Recorder("linear"), NOISE, None, steps)
