"""The whole step and the update alone, for pytest-benchmark: ``pytest benchmarks/step.py``.

Grouped like the kernels: plain PyTorch and ours in one group, so that their ratio is visible. On a GPU DiT-B/4 at batch
256 and real times; without one a small network, Triton's interpreter for the fused update, one round and times that
only say that it runs. Times include the launches, and no time fails a run.
"""

from dataclasses import replace

import _interpreter  # noqa: F401
import pytest
import torch
from step_forms import DEVICE, FORMS, batch, build, timed_step
from torch import nn

from soflow_fast.config import ModelConfig, TrainConfig
from soflow_fast.demo import demo_config
from soflow_fast.ema import EMA
from soflow_fast.optim import AdamW
from soflow_fast.precision import ComputeCopy

GPU = DEVICE == "cuda"
ROUNDS = {"rounds": 20 if GPU else 1, "warmup_rounds": 5 if GPU else 1}


def _config() -> TrainConfig:
    if GPU:
        return TrainConfig(device=DEVICE, model=ModelConfig(preset="DiT-B/4"))
    digits = demo_config("unused", device=DEVICE)
    digits.batch_size = 16
    return digits


@pytest.mark.parametrize("form", FORMS)
def test_step(benchmark, form):
    """A step; the loss of every form is that of the plain one, see ``step_forms.py``."""
    config, chosen = _config(), FORMS[form]
    if chosen.compile and not GPU:  # only the plumbing is tried, and generating C++ would take most of the time
        chosen = replace(chosen, compile="aot_eager")
    step, data = build(chosen, config), batch(config)
    benchmark.group = f"step {config.model.preset if GPU else 'digits'}"
    benchmark.pedantic(timed_step, (step, data), **ROUNDS)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_update(benchmark, impl):
    """AdamW, gradient norm, average and bfloat16 copy of all weights of a network."""
    width = 4096 if GPU else 32
    net = nn.Sequential(*(nn.Linear(width, width) for _ in range(8))).to(DEVICE)
    optimizer, ema, copy = AdamW(net.parameters(), impl=impl), EMA(net), ComputeCopy(net)
    for p in net.parameters():
        p.grad = torch.ones_like(p)

    def update():
        optimizer.prepare()
        optimizer.update(ema=ema, copy=copy)
        if GPU:
            torch.cuda.synchronize()

    benchmark.group = "update"
    benchmark.extra_info["parameters"] = sum(p.numel() for p in net.parameters())
    benchmark.pedantic(update, **ROUNDS)
