"""The exponential moving average, against its recurrence in float64."""

import pytest
import torch
from torch import nn

from soflow_fast.ema import EMA


def _run(decay, warmup, steps, taken=()):
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    ema = EMA(module, decay, warmup)
    expected, k = {name: p.detach().double().clone() for name, p in module.named_parameters()}, 0
    for step in range(steps):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p))
        left_out = step in taken
        ema.update(torch.tensor(not left_out))
        if not left_out:
            weight = min(decay, (1 + k) / (10 + k)) if warmup else decay
            expected = {
                n: weight * expected[n] + (1 - weight) * p.detach().double() for n, p in module.named_parameters()
            }
            k += 1
    return ema, expected, k


@pytest.mark.parametrize(("decay", "warmup"), [(0.5, True), (0.999, True), (0.9, False)])
@pytest.mark.parametrize("taken", [(), (0, 3)])
def test_recurrence(decay, warmup, taken):
    ema, expected, updates = _run(decay, warmup, 12, taken)
    assert int(ema.updates) == updates
    for name, value in ema.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_a_decay_close_to_one_is_kept():
    ema = EMA(nn.Linear(3, 2), 1 - 1e-7, warmup=False)
    assert float(1 - ema.current_decay()) == pytest.approx(1e-7, rel=1e-6)


def test_state_is_restored():
    ema, _, _ = _run(0.9, True, 5)
    other = EMA(nn.Linear(3, 2), 0.9)
    other.load_state_dict(ema.state_dict(), int(ema.updates))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in ema.state_dict().items())
    assert torch.equal(ema.current_decay(), other.current_decay())


def test_a_state_without_an_average_is_refused_and_nothing_restored():
    ema = EMA(nn.Linear(3, 2))
    before = ema.averages["weight"].clone()
    with pytest.raises(ValueError, match="the averages to restore have none of bias, which is"):
        ema.load_state_dict({"weight": before + 1}, 5)
    assert torch.equal(ema.averages["weight"], before)
    assert ema.updates == 0


def test_fixed_parameters_are_part_of_the_state_and_never_averaged():
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    ema = EMA(module)
    assert ema.averages.keys() == {"weight"}
    assert torch.equal(ema.state_dict()["bias"], module.bias)


def test_fixed_parameters_are_the_modules_though_their_memory_changes():
    module = nn.Linear(3, 2)
    module.weight.requires_grad_(False)
    ema = EMA(module)
    module.double()
    with torch.no_grad():
        module.weight.fill_(7)
    assert torch.equal(ema.state_dict()["weight"], module.weight)


def _fail_while_averaged(ema, module):
    with ema.applied():
        assert not module.weight.any()
        raise KeyError


def test_applied_gives_the_weights_back_even_after_an_error():
    module = nn.Linear(3, 2)
    ema = EMA(module)
    own = module.weight.detach().clone()
    ema.averages["weight"].zero_()
    with pytest.raises(KeyError):
        _fail_while_averaged(ema, module)
    assert torch.equal(module.weight, own)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_decay_outside_its_range(decay):
    with pytest.raises(ValueError, match=r"ema decay=.* is outside \[0, 1\)"):
        EMA(nn.Linear(3, 2), decay)
