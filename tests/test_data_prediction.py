"""Networks whose last layer predicts the data: ``F = (x − G)/max(t, 0.05)``, and its difference."""

import logging
import re

import pytest
import torch
from runs import tiny_config

from soflow_fast import EMA, DiT, FlowMatching, MeanFlow, SoFlow, Trainer, TrainStep, UNet, load_run, load_weights
from soflow_fast.config import ModelConfig, TrainConfig
from soflow_fast.layers import DataPrediction
from soflow_fast.optim import AdamW
from soflow_fast.weights import read_weights

SIZES = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 32, "depth": 2, "num_heads": 2}


def _net(dtype=torch.float64, **changes) -> DiT:
    """With nothing at zero that training moves away from it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net = DiT(**{**SIZES, "num_classes": 10, "prediction": "data", **changes})
        for parameter in net.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
    return net.to(dtype)


def _inputs(dtype=torch.float64) -> tuple[torch.Tensor, ...]:
    """``(x, t, s, labels, dx)``; a quarter of the times lies around the least one."""
    generator = torch.Generator().manual_seed(1)
    x, dx = (torch.randn(32, 1, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.rand(32, generator=generator, dtype=torch.float64)
    t[:8] = torch.linspace(0.045, 0.055, 8)
    return x.to(dtype), t.to(dtype), (0.3 * t).to(dtype), torch.arange(32) % 11, dx.to(dtype)


def test_the_solution_at_time_zero_is_the_prediction():
    net, plain = _net(), _net(prediction="velocity")
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if k != "prediction.least_time"})
    x, t, _, labels, _ = _inputs()
    zero, late = torch.zeros_like(t), t > 0.05
    images = SoFlow(net).solution(x, t, zero, labels)
    data = plain(x, t, zero, labels)
    torch.testing.assert_close(images[late], data[late])
    share = (t / 0.05).view(-1, 1, 1, 1)
    torch.testing.assert_close(images[~late], (x + share * (data - x))[~late])


@pytest.mark.parametrize("share", [1e-1, 1e-3, 1e-6])
def test_the_difference_is_that_of_two_forwards(share):
    net = _net()
    x, t, s, labels, dx = _inputs()
    F, dF = net.forward_difference(x, t, s, labels, share * dx, -share * t)
    torch.testing.assert_close(F, net(x, t, s, labels))
    moved = net(x + share * dx, t - share * t, s, labels)
    torch.testing.assert_close(dF, moved - F.detach(), rtol=1e-6, atol=1e-11)


@pytest.mark.parametrize("share", [1e-2, 1e-6])
def test_float32_loses_nothing_at_small_steps(share):
    """Two forwards in float32 would err by their rounding over the step, about 0.1 of dF at 1e-6."""
    x, t, s, labels, dx = _inputs()
    _, exact = _net().forward_difference(x, t, s, labels, share * dx, -share * t)
    low = (z.float() for z in (x, t, s))
    _, dF = _net(torch.float32).forward_difference(*low, labels, (share * dx).float(), (-share * t).float())
    assert (dF - exact).norm() / exact.norm() < 1e-5


def test_the_tangent_is_the_derivative():
    net = _net()
    x, t, s, labels, dx = _inputs()
    F, tangent = net.forward_difference(x, t, s, labels, dx, -t, mode="tangent")
    primal, derivative = net.jvp(x, t, s, labels, dx, -t)
    torch.testing.assert_close(F, primal)
    torch.testing.assert_close(tangent, derivative)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_outputs_have_the_dtype_of_x(dtype):
    x, t, s, labels, dx = _inputs(torch.float32)
    net, given = _net(torch.float32), (x.to(dtype), t, s, labels)
    outputs = [net(*given), *net.forward_difference(*given, dx.to(dtype), -t)]
    outputs += net.forward_difference(*given, dx.to(dtype), -t, mode="tangent")
    assert [out.dtype for out in outputs] == [dtype] * 5


def test_some_rows_alone_carry_a_difference():
    net = _net()
    x, t, s, labels, dx = _inputs()
    _, dF = net.forward_difference(x, t, s, labels, 1e-3 * dx, -1e-3 * t)
    rows = slice(4, 12)
    _, some = net.forward_difference(x, t, s, labels, 1e-3 * dx[rows], -1e-3 * t[rows], rows=rows)
    torch.testing.assert_close(some, dF[rows])


def test_the_unets_difference_is_derived(caplog):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net = UNet(8, 1, 10, model_channels=8, channel_mult=(1,), num_blocks=1, dropout=0.0, prediction="data")
    net = net.double()
    x, t, s, labels, dx = _inputs()
    model = SoFlow(net)
    with caplog.at_level(logging.WARNING):
        model.prepare(x, labels)
    assert not caplog.messages  # of a way out
    F, dF = model.forward_difference(x, t, s, labels, 1e-6 * dx, -1e-6 * t, rows=slice(None), mode="difference")
    torch.testing.assert_close(dF, net(x + 1e-6 * dx, t - 1e-6 * t, s, labels) - F.detach(), rtol=1e-6, atol=1e-11)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_on_it(precision):
    net = _net(torch.float32)
    model = SoFlow(net, velocity_share=0.5)
    step = TrainStep(model, optimizer=AdamW(model.parameters(), lr=1e-3), total_steps=10, precision=precision)
    x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    before = net.x_embedder.proj.weight.detach().clone()
    stats = step(x, torch.arange(8))
    assert stats.finite
    assert not torch.equal(net.x_embedder.proj.weight, before)
    assert net.prediction.least_time == torch.tensor(0.05)  # no copy of lower precision


def test_a_run_of_it(tmp_path):
    config = tiny_config(tmp_path / "run", model=ModelConfig(**SIZES, num_classes=10, prediction="data"))
    Trainer(config).fit()
    again, model, steps = load_run(tmp_path / "run", "cpu")
    assert (again.model.prediction, steps) == ("data", 6)
    assert isinstance(model.network.prediction, DataPrediction)
    other = tiny_config(tmp_path / "run", model=ModelConfig(**SIZES, num_classes=10))
    with pytest.raises(ValueError, match=r"model\.prediction"):
        Trainer(other).fit()
    velocity, data = _net(torch.float32, prediction="velocity"), _net(torch.float32)
    assert load_weights(data, tmp_path / "run").startswith("the averages of")
    for net, path in ((velocity, tmp_path / "run"), (data, tmp_path / "velocity.pt")):
        torch.save(velocity.state_dict(), tmp_path / "velocity.pt")
        with pytest.raises(ValueError, match=r"prediction\.least_time is .*; choose .* or its model\.prediction, or l"):
            read_weights(net, path)
        weights, origin = read_weights(net, path, keep=["final_layer"])
        assert weights.keys() == net.state_dict().keys()
        assert origin.endswith("kept as initialised: final_layer")
    averages = next((tmp_path / "run" / "checkpoints").iterdir()) / "ema.safetensors"
    assert load_weights(SoFlow(data), averages) == str(averages)
    SoFlow(data).load_state_dict(EMA(SoFlow(data)).state_dict())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: _net(prediction="x"), "prediction='x' is not known; choose one of velocity, data"),
        (lambda: SoFlow(_net(), path="trig"), "prediction='data' is for path='linear' and parameterization='euler'"),
        (lambda: SoFlow(_net(), parameterization="trig"), "and these are 'linear' and 'trig'"),
        (lambda: MeanFlow(_net(), path="trig"), "and these are 'trig' and 'euler'; choose prediction='velocity'"),
        (lambda: FlowMatching(_net(), path="trig"), "and these are 'trig' and 'euler'"),
        (lambda: read_weights(_net(), _saved(), form="sit"), "predict a velocity, and this one predicts the data"),
        (
            lambda: TrainConfig.from_dict({"model": {"preset": "my.Net", "prediction": "data"}}),
            "model.prediction='data' does nothing with model.preset='my.Net'; give it in model.init_args",
        ),
    ],
)
def test_what_cannot_be(tmp_path, monkeypatch, make, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(words)):
        make()


def _saved() -> str:
    torch.save(_net(torch.float32, prediction="velocity").state_dict(), "sit.pt")
    return "sit.pt"
