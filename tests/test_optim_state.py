"""The state of the one-pass optimizers as it is loaded, laid out in memory and counted."""

from copy import deepcopy

import pytest
import torch
from op_checks import DEVICE
from optim_runs import PAIRS, Net, assert_equal, give, gradients, same_weights
from torch import nn

from soflow_fast.ema import EMA
from soflow_fast.optim import AdamW
from soflow_fast.precision import ComputeCopy

FORMATS = torch.contiguous_format, torch.channels_last


def _convolution(form=torch.contiguous_format):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Conv2d(3, 5, 3, bias=False).to(DEVICE, memory_format=form)


def _give(module, step, form=None):
    """A gradient that is the same in every memory format; by default in the parameter's."""
    gradient = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(step)).to(DEVICE)
    if form is None:
        module.weight.grad = torch.empty_like(module.weight).copy_(gradient)
    else:
        module.weight.grad = gradient.to(memory_format=form)


def _steps(module, optimizer, steps, **averages):
    for step in steps:
        _give(module, step)
        optimizer.update(**averages)
    return module.weight.detach().contiguous()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_moments_go_to_a_model_in_another_memory_format(impl):
    first = _convolution()
    optimizer = AdamW(first.parameters(), lr=1e-2, impl=impl)
    _steps(first, optimizer, range(2))
    moved, results = (first.state_dict(), optimizer.state_dict()), []
    for form in FORMATS:
        module = _convolution(form)
        resumed = AdamW(module.parameters(), lr=1e-2, impl=impl)
        module.load_state_dict(moved[0])
        resumed.load_state_dict(deepcopy(moved[1]))
        results.append(_steps(module, resumed, (2, 3)))
    assert_equal(results[:1], results[1:])


def test_torchs_fused_update_gets_gradients_and_moments_in_the_parameters_format():
    results = []
    for form in FORMATS:
        module = _convolution()
        optimizer = AdamW(module.parameters(), lr=1e-2, impl="torch")
        for step in range(2):
            _give(module, step, form)
            optimizer.step()
        module.to(memory_format=form)
        results.append(_steps(module, optimizer, (2, 3)))
    assert_equal(results[:1], results[1:])


@pytest.mark.parametrize(
    ("made", "what"),
    [(lambda net: {"ema": EMA(net, 0.9)}, "an average"), (lambda net: {"copy": ComputeCopy(net)}, "a compute copy")],
)
def test_what_was_made_before_the_memory_format_is_refused(made, what):
    module = _convolution()
    before, optimizer = made(module), AdamW(module.parameters(), lr=1e-2, impl="triton")
    _steps(module, optimizer, [0], **before)
    module.to(memory_format=torch.channels_last)
    optimizer = AdamW(module.parameters(), lr=1e-2, impl="triton")
    weights = module.weight.detach().clone()
    with pytest.raises(ValueError, match=rf"{what} of strides \(27, 9, 3, 1\) for a .* \(27, 1, 9, 3\); call model.to"):
        _steps(module, optimizer, [1], **before)
    assert torch.equal(module.weight, weights)
    _steps(module, optimizer, [1], **made(module))


def test_moments_of_another_memory_format_are_refused_in_the_middle():
    module = _convolution()
    optimizer = AdamW(module.parameters(), lr=1e-2, impl="triton")
    _steps(module, optimizer, range(2))
    module.to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"got a moment of strides \(27, 9, 3, 1\) for a parameter"):
        _steps(module, optimizer, [2])


def test_an_average_that_starts_anywhere_is_refused():
    module = _convolution()
    ema = EMA(module, 0.9)
    ema.averages["weight"] = torch.zeros(1 + module.weight.numel(), device=DEVICE)[1:].view_as(module.weight)
    with pytest.raises(ValueError, match="got an average that does not start at 16 bytes; use impl='torch'"):
        _steps(module, AdamW(module.parameters(), impl="triton"), [0], ema=ema)


def test_a_parameter_without_an_average_is_refused():
    module = nn.Linear(3, 2, device=DEVICE)
    module.bias.requires_grad_(False)
    ema = EMA(module)
    module.bias.requires_grad_(True)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"no average of a parameter of shape \(2,\) that is updated; make"):
        AdamW(module.parameters(), impl="triton").update(ema=ema)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("name", PAIRS)
def test_every_parameter_counts_its_own_steps(name, impl):
    """Of one that is trained since later the bias is corrected as if nothing had been before."""
    net, plain = Net(), Net()
    our_class, their_class = PAIRS[name]
    theirs = their_class(plain.parameters())
    for step in range(7):
        give(plain, gradients(step))
        if step < 4:
            plain.weights[1].grad = None
        theirs.step()
    ours = our_class(net.parameters(), impl=impl)
    for step in range(4):
        give(net, gradients(step))
        net.weights[1].grad = None
        ours.update()
    saved = deepcopy(ours.state_dict())
    ours = our_class(net.parameters(), impl=impl)
    ours.load_state_dict(deepcopy(saved))
    for step in range(4, 7):
        give(net, gradients(step))
        ours.update()
    same_weights(net, plain)
    assert [float(ours.state[p]["step"]) for p in net.weights] == [7, 3, 7, 7]
    ours.load_state_dict(saved)
    assert [float(ours.state[p].get("step", 0)) for p in net.weights] == [4, 0, 4, 4]


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_state_of_other_shapes_is_refused(impl):
    """Which torch takes, and the update would write beyond it."""
    net, other = Net(), Net()
    give(other, gradients(0))
    theirs = AdamW(other.weights[:2], lr=1e-2, impl=impl)
    theirs.update()
    ours = AdamW(net.weights[1:3], lr=1e-2, impl=impl)
    with pytest.raises(ValueError, match=r"exp_avg of shape \(3, 5\) for a parameter of shape \(1024,\); give that of"):
        ours.load_state_dict(theirs.state_dict())
    assert not ours.state
