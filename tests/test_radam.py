"""RAdam: equal to torch's in float64, before and after its steps are rectified; its runs go on exactly."""

import math
from dataclasses import replace
from decimal import Decimal, localcontext

import pytest
import torch
import triton
import triton.language as tl
from op_checks import DEVICE
from optim_runs import Net, assert_equal, give, gradients
from runs import StopError, assert_bitwise_equal, final, stop_at, tiny_config

from soflow_fast import Trainer
from soflow_fast.config import GIVEN, OptimizerConfig
from soflow_fast.config_optimizer import OPTIMIZER_NAMES
from soflow_fast.ema import EMA
from soflow_fast.kernels import optimizer as kernel
from soflow_fast.kernels._launch import Launch, launch
from soflow_fast.optim import OPTIMIZERS, RAdam
from soflow_fast.precision import ComputeCopy

STEPS = 16

average_length, rectified = kernel.average_length, kernel._rectified


def _theirs(net, **options):
    return torch.optim.RAdam(net.parameters(), decoupled_weight_decay=True, foreach=False, **options)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(
    ("options", "grad_clip"),
    [
        ({"betas": (0.9, 0.99)}, None),
        ({"betas": (0.9, 0.99), "weight_decay": 0.1, "eps": 0.1}, None),
        ({"betas": (0.9, 0.999), "weight_decay": 0.1, "eps": 1e-3}, 0.5),
        ({"betas": (0.0, 0.7)}, None),  # rectified from the eighth step
        ({"betas": (0.5, 0.6)}, None),  # never, and 0 divides where the factor is computed all the same
    ],
    ids=str,
)
def test_equals_torch_in_float64_and_ema(impl, options, grad_clip):
    options = {"lr": 1e-2, **options}
    net, plain = Net(), Net().double()
    ema, copy = EMA(net, 0.9), ComputeCopy(net)
    optimizer, reference = RAdam(net.parameters(), impl=impl, **options), _theirs(plain, **options)
    averages = [p.detach().clone() for p in plain.weights]
    for step in range(STEPS):
        give(net, gradients(step))
        give(plain, gradients(step))
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients(step)))
        if grad_clip is not None:
            for p in plain.weights:
                p.grad *= min(1.0, grad_clip / (norm + 1e-6))
        assert optimizer.update(ema=ema, copy=copy, grad_clip=grad_clip)[0].item() == pytest.approx(norm, rel=1e-6)
        reference.step()
        decay = min(0.9, (1 + step) / (10 + step))
        averages = [decay * a + (1 - decay) * p.detach() for a, p in zip(averages, plain.weights, strict=True)]
        # one rounding of a parameter in each step
        rounding = {"rtol": 6e-8 * (step + 2), "atol": 1e-7}
        assert_equal([p.detach().double() for p in net.weights], [p.detach() for p in plain.weights], **rounding)
    assert_equal([average.double() for average in ema.averages.values()], averages, rtol=2e-6, atol=2e-7)
    for name in ("exp_avg", "exp_avg_sq", "step"):
        ours, theirs = ([state[name].double() for state in one.state.values()] for one in (optimizer, reference))
        assert_equal(ours, theirs, atol=5e-7)
    for p, c in zip(net.weights, copy.copies.values(), strict=True):
        assert (c.float() - p.detach()).abs().max() <= 2**-7 * p.detach().abs().max()


def test_parameters_in_float64():
    net, plain = Net().double(), Net().double()
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    optimizer, reference = RAdam(net.parameters(), impl="torch", **options), _theirs(plain, **options)
    for step in range(STEPS):
        for module, one in ((net, optimizer), (plain, reference)):
            give(module, gradients(step))
            one.step()
    assert_equal([p.detach() for p in net.weights], [p.detach() for p in plain.weights], rtol=1e-13, atol=1e-14)


@triton.jit
def _factor_kernel(steps_ptr, lengths_ptr, factors_ptr, log_beta2: tl.float32, N: tl.constexpr):
    """What the optimizer's kernel computes of a step: ρ, and the factor r, or 1e30 where there is none."""
    i = tl.arange(0, N)
    step = tl.load(steps_ptr + i)
    length, _ = average_length(step, log_beta2)
    tl.store(lengths_ptr + i, length)
    one = step * 0 + 1
    scalars = rectified((one, one, one, one, one, one, one, one), step, log_beta2)
    tl.store(factors_ptr + i, scalars[5])


def _expected(k, beta2):
    """ρ, and r or 0, of a step."""
    with localcontext() as context:
        context.prec = 60
        beta2 = Decimal(beta2)
        limit = 2 / (1 - beta2) - 1
        length = limit - 2 * k * beta2**k / (1 - beta2**k)
        if length <= 5:
            return float(length), 0.0
        square = (length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)
        return float(length), float(square.sqrt())


@pytest.mark.filterwarnings("ignore:overflow encountered")  # in a series beyond where it is used
@pytest.mark.parametrize("beta2", [0.0, 0.3, 0.6, 0.7, 0.9, 0.95, 0.99, 0.999, 0.9999, 0.999999])
def test_the_factor_is_accurate_at_every_step(beta2):
    """Where ρ is a small difference of large numbers, and where β₂ᵏ is nothing any more."""
    steps = [*range(1, 57), 100, 300, 1000, 3000, 10**4, 10**5, 10**6, 10**7]
    on_device = torch.tensor(steps, dtype=torch.float32, device=DEVICE)
    lengths, factors = torch.empty_like(on_device), torch.empty_like(on_device)
    log_beta2 = math.log(max(beta2, 1e-38))
    launch(_factor_kernel, lambda: (1,), on_device, lengths, factors, log_beta2, N=len(steps), config=Launch())
    for k, length, factor in zip(steps, lengths.tolist(), factors.tolist(), strict=True):
        rho, r = _expected(k, beta2)
        assert length == pytest.approx(rho, rel=2e-6), k
        assert (factor if r else 1 / factor) == pytest.approx(r, rel=5e-6, abs=1e-29), k


def test_a_state_whose_decay_is_part_of_the_gradient_is_refused():
    net, plain = Net(), Net()
    ours, theirs = RAdam(net.parameters()), torch.optim.RAdam(plain.parameters(), lr=0.5, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"weight_decay=0.1 .* torch.optim.RAdam\(decoupled_weight_decay=True\)"):
        ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 1e-4
    theirs.param_groups[0]["weight_decay"] = 0.0  # no decay is the same in both
    ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict()["param_groups"][0]["decoupled_weight_decay"]


def test_every_name_of_the_configuration_is_an_optimizer():
    assert (*OPTIMIZERS, GIVEN) == OPTIMIZER_NAMES


def test_a_stopped_run_goes_on_exactly(tmp_path, monkeypatch):
    """From a checkpoint before the first rectified step, the sixth."""
    optimizer = OptimizerConfig(name="radam", learning_rate=1e-2, weight_decay=0.1)
    straight = tiny_config(tmp_path / "straight", total_steps=8, optimizer=optimizer)
    run = Trainer(straight)
    assert type(run.optimizer) is RAdam
    assert run.optimizer.param_groups[0]["weight_decay"] == 0.1
    run.fit()
    stopped = replace(straight, run_dir=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        with pytest.raises(StopError):
            Trainer(stopped).fit()
    Trainer(stopped).fit()
    assert_bitwise_equal(final(tmp_path / "straight", 8), final(tmp_path / "stopped", 8))
    adamw = replace(straight, run_dir=str(tmp_path / "adamw"), optimizer=replace(optimizer, name="adamw"))
    Trainer(adamw).fit()
    with pytest.raises(AssertionError):
        assert_bitwise_equal(final(tmp_path / "straight", 8), final(tmp_path / "adamw", 8))
