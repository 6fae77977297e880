"""What a run would be, without running it: resolved configuration, choices, sizes, FLOPs and memory."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from soflow_fast import build, checkpoint, memory, run_folder
from soflow_fast.conditions import null_condition
from soflow_fast.config import TrainConfig
from soflow_fast.data.checks import described
from soflow_fast.export import use_torch
from soflow_fast.fingerprint import fingerprint
from soflow_fast.frozen import sizes
from soflow_fast.paths import row_order
from soflow_fast.records import of_given
from soflow_fast.run_optimizer import RunOptimizer
from soflow_fast.trainer import Trainer
from soflow_fast.validation import describe_validation
from soflow_fast.weights import read_weights


class Plan(NamedTuple):
    """Of a run.

    Attributes:
        choices: by name, what the configuration leaves to the machine. parameters: weights, the fixed position
            embedding included. trained: how many of these are. flops: floating point operations of one training step,
            matrix products and attention, forward and backward; None of a network of the user's that fails on tensors
            without storage. bytes: of a process's memory, estimated by :func:`~soflow_fast.memory.step_bytes`. done:
            steps of the run in the folder.
        changes: with which that would go on, see :func:`~soflow_fast.run_folder.changes`. data: how many samples, of
            how many classes. validation: of how many samples and how often there is one, or None.
    """

    choices: dict[str, object]
    parameters: int
    trained: int
    flops: int | None
    bytes: int
    done: int
    changes: list[dict[str, object]]
    data: str
    validation: str | None


def plan(config: TrainConfig, accept_changes: bool = False) -> Plan:
    """What training would choose, and the size of one of its steps, counted on tensors without storage.

    Raises:
        ValueError: where training would: for a configuration that is impossible on this machine, does not fit the data,
            or is another than that of the run in its folder.
    """
    # The run's own trainer is asked, of a network of one block: only memory depends on how many there are.
    is_dit, is_imported = config.model.is_dit, config.model.is_imported or config.has_imported_objective
    one_block = {"depth": 1} if is_dit else {"depth": 1, "head_depth": 1} if config.model.is_mit else {"num_blocks": 1}
    if is_imported or config.optimizer.is_imported:  # which may look for blocks by their numbers
        one_block = {}
    trainer = Trainer(replace(config, model=replace(config.model, **one_block)))
    all_blocks = {name: getattr(config.model, name) for name in one_block}
    resolved = replace(trainer.config, model=replace(trainer.config.model, **all_blocks))
    told = resolved.model.num_classes, null_condition(trainer.model.network)
    data = fingerprint(trainer.dataset, *told)
    found = checkpoint.committed(trainer.checkpoints)
    precision, device, impl = trainer.step.precision, trainer.processes.device, trainer.model.impl
    plain = {"impl": "torch", **({"attention": "sdpa"} if is_dit else {})}
    counted = replace(config, model=replace(config.model, **plain))
    objects = of_given(resolved, trainer.model)
    size_of_data = described(trainer.dataset, *told)
    with torch.device("meta"):
        if is_imported:
            model, counted = use_torch(trainer.model.to("meta")), trainer.config
        else:
            model = build.build_model(counted)
        with torch.device("cpu"):  # of a learning rate in a tensor
            made = RunOptimizer(build.build_optimizer(counted, model), model, config.optimizer).made
        try:
            flops = _count_step(model, counted) * config.optimizer.accumulation
        except Exception:
            if not is_imported:
                raise
            flops = None
    recorded = replace(resolved, compute=config.compute)
    changes = run_folder.changes(trainer.run_dir, recorded, data, accept_changes, made, objects)
    if config.initial_weights is not None and not found:
        read_weights(model, config.initial_weights, config.initial_weights_except, config.initial_weights_form)
    rows = (trainer.rows.stop - trainer.rows.start) // config.optimizer.accumulation
    recompute, needed, trainer.on_device = memory.choose(config, model, trainer.dataset, device, rows, precision)
    trained, parameters = sizes(model)
    return Plan(
        choices={**trainer.choices(), "impl": impl, **({"recompute": recompute} if is_dit else {})},
        parameters=parameters,
        trained=trained,
        flops=flops,
        bytes=needed,
        done=checkpoint.step_of(found[-1]) if found else 0,
        changes=changes,
        data=size_of_data,
        validation=None if trainer.validation is None else describe_validation(config, trainer.validation),
    )


def describe(config: TrainConfig, accept_changes: bool = False) -> str:
    """The resolved configuration as YAML and the plan, for people."""
    found = plan(config, accept_changes)
    flops = "not known: this network cannot be called on torch's meta device"
    if found.flops is not None:
        flops = f"{found.flops / 1e12:,.4g} T ({found.flops / config.batch_size / 1e9:,.4g} G per image)"
    kept = ", kept for the backward" if config.model.is_dit else "; not what is kept for the backward"
    is_few = 2 * found.trained < found.parameters
    few = f", of which {found.trained / 1e6:,.3g} M are trained" if is_few else ""
    lines = {
        **found.choices,
        "data set": found.data,
        **({} if found.validation is None else {"validation": found.validation}),
        "parameters": f"{found.parameters / 1e6:,.1f} M{few}",
        "FLOPs per step": flops,
        "memory, estimated": f"{found.bytes / 2**30:,.2f} GiB (weights, gradients, optimizer, EMA{kept})",
    }
    if found.done:
        lines["goes on after step"] = f"{found.done:,}"
    for change in found.changes:
        lines[f"change of {change['key']}"] = f"from {change['before']} to {change['after']}"
    return "\n".join([config.to_yaml(), *(f"{name:<24}{value}" for name, value in lines.items())])


def _count_step(model: nn.Module, config: TrainConfig) -> int:
    """FLOPs of one micro-batch."""
    batch = config.batch_size // config.optimizer.accumulation
    order, n_velocity = row_order(batch, model.velocity_share)
    labels = torch.zeros(batch, dtype=torch.int64) if config.model.num_classes else None
    if (null := null_condition(model.network)) is not None:
        labels = null.detach().expand(batch, *null.shape)
    samples = torch.zeros(batch, *build.sample_shape(config))
    if n_velocity < batch:
        model.prepare(samples[n_velocity:], labels)  # is no part of a step
    with FlopCounterMode(display=False) as counter:
        step = torch.zeros((), dtype=torch.int64)
        out = model.loss_of_rows(samples, labels, torch.tensor(order), n_velocity, step.float(), config.seed, step)
        out.loss.backward()
    return counter.get_total_flops()
