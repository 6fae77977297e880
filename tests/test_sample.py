"""Sampling in one and several steps against the procedure written out here."""

import gc
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from fast_step_runs import make_model

from soflow_fast import DiT, SoFlow
from soflow_fast.kernels.reference import Stream, normal
from soflow_fast.objectives.alphaflow import AlphaFlow
from soflow_fast.objectives.flow_matching import FlowMatching
from soflow_fast.objectives.meanflow import MeanFlow
from soflow_fast.objectives.scm import SCM
from soflow_fast.sample import Sampler, sample


class Recorder:
    """A model whose solution is a known function of everything it is given."""

    def __init__(self, path, renoises=True):
        self.path, self.renoises, self.calls = path, renoises, []

    def solution(self, x, t, s, labels):
        self.calls.append(SimpleNamespace(x=x, t=t, s=s, labels=labels))
        return 0.5 * x + t.view(-1, 1, 1, 1)


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


@pytest.mark.parametrize("steps", [1, 3])
def test_without_noise_in_between_it_goes_from_time_to_time(steps):
    model, x = Recorder("linear", renoises=False), NOISE
    out = sample(model, NOISE, None, steps)
    for i, call in enumerate(model.calls):
        torch.testing.assert_close(call.x, x, rtol=0, atol=1e-14)
        assert (call.t[0].item(), call.s[0].item()) == pytest.approx((1 - i / steps, 1 - (i + 1) / steps), abs=1e-15)
        x = 0.5 * x + 1 - i / steps
    assert len(model.calls) == steps
    torch.testing.assert_close(out, x, rtol=0, atol=1e-14)


def test_which_objectives_add_noise_in_between():
    net = DiT(8, 4, 2, 16, 1, 2, num_classes=3)
    assert [kind(net).renoises for kind in (SoFlow, SCM, MeanFlow, AlphaFlow, FlowMatching)] == 2 * [True] + 3 * [False]


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


def test_calls_without_a_seed_add_different_noise():
    first, second = (sample(Recorder("linear"), NOISE, None, 2) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_keep_the_dtype_of_the_noise_and_times_are_at_least_float32(dtype):
    model = Recorder("trig")
    assert sample(model, NOISE.to(dtype), None, 2).dtype == dtype
    assert all(call.t.dtype == torch.float32 for call in model.calls)


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps(steps):
    with pytest.raises(ValueError, match=f"steps={steps} is not a number of sampling steps; it must be at least 1"):
        sample(Recorder("linear"), NOISE, None, steps)


# ------------------------------------------------------------------------------------------------------ the sampler

SHAPE = (1, 8, 8)
LABELS = torch.arange(11) % 10


@pytest.fixture(scope="module")
def model():
    return make_model(torch.float32)


def _plain(model, steps, n=11):
    """What the sampler must give, in one batch of its own."""
    noise = normal(torch.arange(n), 64, seed=5, step=0, stream=Stream.RENOISE).view(n, *SHAPE)
    return sample(model, noise, LABELS[:n], steps, seed=5)


def _drawn(model, n=11, **options):
    return torch.cat(list(Sampler(model, SHAPE, **{"seed": 5, "batch": 4, **options}).draw(LABELS[:n], n)))


@pytest.mark.parametrize("steps", [1, 3])
def test_batches_of_one_size_give_any_number_of_samples(model, steps):
    whole = _plain(model, steps)
    for n in (1, 4, 11):
        torch.testing.assert_close(_drawn(model, n, steps=steps), whole[:n], rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_equals_eager_in_one_compilation(model, steps, precision):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    eager = _drawn(model, steps=steps, precision=precision)
    for _ in range(2):
        compiled = _drawn(model, steps=steps, precision=precision, compile="aot_eager")
        torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_samplers_of_many_seeds_share_their_code(model):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for seed in range(9):
        compiled, eager = (_drawn(model, 2, seed=seed, compile=how) for how in ("aot_eager", False))
        torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("how", [False, "aot_eager"])
def test_a_sampler_that_nobody_uses_is_freed_at_once(model, how):
    """With its copies of the weights; Python's collector of cycles may come late."""
    gc.disable()
    try:
        sampler = Sampler(model, SHAPE, batch=4, precision="bf16", compile=how)
        sampler(LABELS[:4])
        copies = weakref.ref(next(iter(sampler._copy.copies.values())))
        del sampler
        assert copies() is None
    finally:
        gc.enable()


class _Watching(torch.nn.Module):
    num_classes = 3

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.ones(())), set()

    def forward(self, x, t, s, labels):
        self.seen.add((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        return self.weight * x


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_products_of_fp32_are_not_rounded_to_tensorfloat32(precision):
    net = _Watching()
    Sampler(SoFlow(net), (1, 2, 2), batch=2, precision=precision)(None)
    assert net.seen == {(precision == "bf16",) * 2}


def test_bfloat16_follows_float32_and_the_weights(model):
    """The copies are of the weights at the time of drawing, such as the averages."""
    exact = _plain(model, 1)
    sampler = Sampler(model, SHAPE, seed=5, batch=4, precision="bf16")
    low = torch.cat(list(sampler.draw(LABELS, 11)))
    assert low.dtype == torch.float32
    assert 1e-4 < (low - exact).norm() / exact.norm() < 2e-2
    other = make_model(torch.float32)
    with torch.no_grad():
        other.network.final_layer.linear.weight.zero_()
        other.network.final_layer.linear.bias.zero_()
    sampler = Sampler(other, SHAPE, seed=5, batch=11, precision="bf16")
    zero = next(sampler.draw(LABELS, 11))
    final = other.network.final_layer.linear
    final.weight.data = model.network.final_layer.linear.weight.data
    final.bias.data = model.network.final_layer.linear.bias.data
    moved = next(sampler.draw(LABELS, 11))
    torch.testing.assert_close(
        zero, normal(torch.arange(11), 64, seed=5, step=0, stream=Stream.RENOISE).view(11, *SHAPE)
    )
    torch.testing.assert_close(moved, low, rtol=0, atol=1e-6)
    with torch.no_grad():
        final.weight.mul_(0)
        final.bias.mul_(0)
    torch.testing.assert_close(sampler(LABELS), zero, rtol=0, atol=1e-6)


def test_without_labels_and_for_any_network():
    class Halves(torch.nn.Module):
        num_classes = 3

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2, 2))

        def forward(self, x, t, s, labels):
            assert labels.tolist() == [3] * len(x)
            return 0.5 * x @ self.weight

    net = Halves()
    exact, low = (
        torch.cat(list(Sampler(SoFlow(net), (1, 2, 2), batch=2, precision=precision).draw(None, 3)))
        for precision in ("fp32", "bf16")
    )
    noise = normal(torch.arange(3), 4, seed=0, step=0, stream=Stream.RENOISE).view(3, 1, 2, 2)
    torch.testing.assert_close(exact, noise - 0.5 * noise.sum(-1, keepdim=True).expand_as(noise))
    assert 0 < (low - exact).abs().max() < 2e-2  # autocast


def test_labels_are_tensors(model):
    with pytest.raises(ValueError, match=r"labels=3 is no tensor; give \(B,\) int64"):
        model.sample(torch.zeros(2, 1, 8, 8), 3)


def test_sampler_refusals(model):
    with pytest.raises(ValueError, match=r"5 labels are more than the 4 samples of a batch; use draw\(\)"):
        Sampler(model, SHAPE, batch=4)(LABELS[:5])
    with pytest.raises(ValueError, match="precision='fp8' is not known; choose one of bf16, fp32"):
        Sampler(model, SHAPE, precision="fp8")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cuda_graph=True needs the model on a CUDA GPU; it is on cpu"):
            Sampler(model, SHAPE, cuda_graph=True)


def test_labels_of_several_numbers_are_padded_to_a_batch_too():
    model, labels = make_model(torch.float32, MeanFlow, condition_dim=3), torch.arange(7.0)
    labels = torch.stack([labels, labels / 7, 1 - labels / 7, torch.ones(7)], 1)
    whole = torch.cat(list(Sampler(model, SHAPE, batch=7).draw(labels, 7)))
    parts = list(Sampler(model, SHAPE, batch=4).draw(labels, 7))
    assert [len(part) for part in parts] == [4, 3]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cuda_graph_equals_eager_sampling(precision):
    model = make_model(torch.float32).cuda()
    eager = _drawn(model, steps=2, precision=precision, compile=False)
    for compile in (False, True):
        graph = _drawn(model, steps=2, precision=precision, compile=compile, cuda_graph=True)
        torch.testing.assert_close(graph, eager, rtol=0, atol=1e-5 if precision == "fp32" else 2e-2)
