"""A small model and its training, for the tests that compare ways of running the step."""

import torch

from soflow_fast import DiT, SoFlow
from soflow_fast.ema import EMA
from soflow_fast.optim import AdamW
from soflow_fast.step import TrainStep

BATCH, STEPS = 16, 12


def make_model(dtype, objective=SoFlow, depth=2, **network):
    torch.manual_seed(0)
    net = DiT(8, 2, 1, 32, depth, 2, num_classes=10, impl="torch", attention="math", **network)
    for p in net.parameters():
        if p.requires_grad and (p == 0).all():
            torch.nn.init.normal_(p, std=0.05)
    return objective(net.to(dtype))


def make_step(model, **options):
    ema = EMA(model, 0.99)
    optimizer = AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3, impl="torch")
    return TrainStep(model, optimizer=optimizer, ema=ema, total_steps=STEPS, **{"seed": 3, **options}), ema


def training_batch(k, dtype):
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(BATCH, 1, 8, 8, generator=generator)
    return x.to(dtype), torch.randint(10, (BATCH,), generator=generator)


def train(dtype, steps=STEPS, objective=SoFlow, network=None, **options):
    """Losses, and the model, of a few steps."""
    model = make_model(dtype, objective, **(network or {}))
    step, _ = make_step(model, **options)
    losses = [step(*training_batch(k, dtype)).loss.item() for k in range(steps)]
    return losses, model


def distances(model, other):
    """``‖p − p'‖/‖p'‖`` by parameter; the key third of the qkv bias, whose true gradient is zero, left out."""
    out = {}
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        p, q = p.detach(), q.detach()
        if name.endswith("qkv.bias"):
            d = p.numel() // 3
            p, q = (torch.cat([x[:d], x[2 * d :]]) for x in (p, q))
        out[name] = ((p - q).norm() / q.norm()).item()
    return out
