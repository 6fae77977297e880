"""A set of parameters and its gradients, for the tests that compare optimizers with torch's."""

from functools import partial

import torch
from op_checks import DEVICE
from torch import nn

from soflow_fast.optim import AdamW, RAdam

SHAPES = ((3, 5), (1024,), (1,), (70, 61))  # below, at and above one block, and not a multiple of 16 bytes

_DEFAULTS = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.0}

#: Each optimizer and torch's, over parameters; both with the same defaults.
PAIRS = {
    "adamw": (partial(AdamW, lr=1e-2), partial(torch.optim.AdamW, **_DEFAULTS)),
    "radam": (partial(RAdam, lr=1e-2), partial(torch.optim.RAdam, **_DEFAULTS, decoupled_weight_decay=True)),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(torch.randn(shape, generator=generator) for shape in SHAPES)
        self.to(DEVICE)


def gradients(step, scale=1.0):
    generator = torch.Generator().manual_seed(100 + step)
    return [scale * torch.randn(shape, generator=generator).to(DEVICE) for shape in SHAPES]


def give(net, values):
    for p, g in zip(net.weights, values, strict=True):
        p.grad = g.to(p.dtype, copy=True)


def assert_equal(ours, theirs, rtol=2e-6, atol=1e-7):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def same_weights(net, plain):
    assert_equal([p.detach() for p in net.weights], [p.detach() for p in plain.weights])
