"""What a run would be, without running it: resolved configuration, sizes, FLOPs and memory."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from soflow_fast import build
from soflow_fast.attention import resolve_attention
from soflow_fast.config import TrainConfig
from soflow_fast.kernels import resolve_impl
from soflow_fast.paths import row_order

# Bytes per trained weight: itself, its gradient, two moments of AdamW and its average, all float32.
_BYTES_PER_WEIGHT = 5 * 4


class Plan(NamedTuple):
    """Sizes of a run.

    Attributes:
        parameters: weights, the fixed position embedding included. flops: floating point operations of one training
            step, matrix products and attention, forward and backward. state_bytes: weights, gradients, optimizer and
            averages. saved_bytes: what one micro-batch keeps for its backward.
    """

    parameters: int
    flops: int
    state_bytes: int
    saved_bytes: int


def plan(config: TrainConfig) -> Plan:
    """Counts one training step on tensors without storage; nothing is computed.

    Raises:
        ValueError: for a configuration that is impossible on this machine.
    """
    build.resolve_device(config.device)
    resolve_impl(config.model.impl)
    counted = replace(config, model=replace(config.model, impl="torch", attention="sdpa"))
    with torch.device("meta"):
        model = build.build_model(counted)
        resolve_attention(config.model.attention, model.network.hidden_size // model.network.num_heads)
        flops, saved = _count_step(model, counted)
    return Plan(
        parameters=sum(p.numel() for p in model.parameters()),
        flops=flops * config.optimizer.accumulation,
        state_bytes=sum(p.numel() for p in model.parameters() if p.requires_grad) * _BYTES_PER_WEIGHT,
        saved_bytes=saved,
    )


def describe(config: TrainConfig) -> str:
    """The resolved configuration as YAML and the plan, for people."""
    sizes = plan(config)
    per_image = sizes.flops / config.batch_size
    return "\n".join(
        [
            config.to_yaml(),
            f"device                  {build.resolve_device(config.device)}",
            f"implementation          {resolve_impl(config.model.impl)}",
            f"parameters              {sizes.parameters / 1e6:,.1f} M",
            f"FLOPs per step          {sizes.flops / 1e12:,.4g} T ({per_image / 1e9:,.4g} G per image)",
            f"memory, estimated       {(sizes.state_bytes + sizes.saved_bytes) / 2**30:,.2f} GiB "
            f"({sizes.state_bytes / 2**30:,.2f} weights, gradients, AdamW, EMA; "
            f"{sizes.saved_bytes / 2**30:,.2f} kept for the backward, float32, without flash attention)",
        ]
    )


def _count_step(model: nn.Module, config: TrainConfig) -> tuple[int, int]:
    """FLOPs and bytes saved for the backward, of one micro-batch."""
    batch = config.batch_size // config.optimizer.accumulation
    order, n_velocity = row_order(batch, model.velocity_share)
    labels = torch.zeros(batch, dtype=torch.int64) if config.model.num_classes else None
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        samples = torch.zeros(batch, *build.sample_shape(config))
        step = torch.zeros((), dtype=torch.int64)
        out = model.loss_of_rows(samples, labels, torch.tensor(order), n_velocity, step.float(), config.seed, step)
        out.loss.backward()
    return counter.get_total_flops(), sum(saved.values())
