"""What is given to the Trainer as an object: its place in the configuration, and checks of it.

Without them a network's or an objective's own errors at the first step would say little.
"""

import copy
import logging
import re
from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import nn
from torch.utils.data import Dataset

from soflow_fast import build, distributed
from soflow_fast.conditions import ItemConditions, null_condition, require_classes
from soflow_fast.config import GIVEN, OBJECTIVE_SECTIONS, ModelConfig, TrainConfig
from soflow_fast.dit import DiT
from soflow_fast.frozen import first_of
from soflow_fast.mit import MiT
from soflow_fast.objectives.base import Objective, is_objective
from soflow_fast.sample import evaluating
from soflow_fast.unet import UNet

_log = logging.getLogger(__name__)


def with_given(
    config: TrainConfig,
    model: nn.Module | None,
    dataset: Dataset | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    validation: Dataset | None = None,
) -> tuple[TrainConfig, nn.Module | None]:
    """The configuration with what was given as an object marked as such, and with its values; and the model given.

    That is also the one that the configuration names by its import path, made from the seed. The number of classes is
    the network's, unless the configuration has 0, which trains without labels. An objective of this package brings its
    section; of any other nothing is known.

    Raises:
        ValueError: for a network without ``num_classes`` or with others, and an import path of no network.
    """
    if not isinstance(config, TrainConfig):
        raise ValueError(
            f"config is a {type(config).__name__}; give a TrainConfig, such as TrainConfig.from_yaml(path) or "
            "TrainConfig.from_dict(mapping)"
        )
    config = config.checked()
    if model is not None and not isinstance(model, nn.Module):
        raise ValueError(f"model={model!r} is no torch.nn.Module; give an object, such as Net(), and not its class")
    model, preset = _uncompiled(model), GIVEN
    if model is None and config.model.is_imported:
        preset = config.model.preset
        model = build.imported("model.preset", preset, config.model.init_args, config.seed)
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"model.preset={preset!r} makes an object of class {type(model).__name__}; make a torch.nn.Module"
            )
        model = _uncompiled(model)
    if dataset is not None:
        config = replace(config, data=replace(config.data, kind=GIVEN, init_args={}))
    if validation is not None:
        config = replace(config, data=replace(config.data, validation=GIVEN))
    if optimizer is not None:
        if isinstance(optimizer, torch.optim.Optimizer) or not callable(optimizer):
            raise ValueError(
                f"optimizer is an object of class {type(optimizer).__name__}; give what makes one of the list of "
                "(name, parameter) and lr, such as torch.optim.SGD"
            )
        config = replace(config, optimizer=replace(config.optimizer, name=GIVEN, init_args={}))
    return (config if model is None else _with_values_of(config, model, preset)), model


def check(model: Objective, config: TrainConfig, dataset: Dataset) -> None:
    """ValueError for an objective that lacks a method, and a network that does not do what this package's need.

    A copy of the network is called on the CPU: a label without a row is an error there, and on a GPU the end of the
    process. What cannot be copied or called there is not looked at.
    """
    _require_methods(model, config)
    _require_trainable(model)
    net = model.network
    if type(model) not in build.OBJECTIVES.values() or isinstance(net, (DiT, MiT, UNet)):
        return
    if model.condition_dim or config.data.augment:  # it is told of more than the label
        return
    x, times = torch.zeros(1, *build.sample_shape(config)), (torch.ones(1), torch.full((1,), 0.5))
    num_classes = config.model.num_classes
    try:
        # a copy of what may be changed: parameters that are not trained may be many
        shared = {id(p): nn.Parameter(p.detach().cpu(), False) for p in net.parameters() if not p.requires_grad}
        net = copy.deepcopy(net, shared).cpu()
        null = null_condition(net)
        labels = ItemConditions(dataset, torch.zeros(1, dtype=torch.int64))[:] if null is not None else None
        if num_classes:
            labels = torch.zeros(1, dtype=torch.int64)
        found = _call(net, x, *times, labels)
    except Exception as error:
        _require_casts(model.network, error)
        return
    name = type(net).__name__
    if not torch.is_tensor(found) or found.shape != x.shape:
        what = f"a tensor of shape {tuple(found.shape)}" if torch.is_tensor(found) else f"a {type(found).__name__}"
        raise ValueError(
            f"the network {name} returns {what} for x of shape {tuple(x.shape)}; net(x, t, s, labels) must return one "
            "tensor of the shape of x"
        )
    if labels is None or not model.label_drop:
        return
    try:
        _call(net, x, *times, model.no_label(labels))
    except Exception as error:
        if null is not None:
            raise ValueError(
                f"the network {name} fails for its null_condition ({' '.join(str(error).split())}), and not for the "
                "condition of the data set's first item; choose another, or make room for it"
            ) from None
        raise ValueError(
            f"the network {name} fails for the label {num_classes}, its num_classes, which means 'no label' "
            f"({' '.join(str(error).split())}); give its embedding num_classes + 1 rows, or set label_drop=0 and "
            "guidance_scale=1"
        ) from None


def ensure_training_mode(model: Objective) -> None:
    """Puts an objective's network, and what is trained beside it, into training mode, with a warning, where the network
    is not: dropout would never act. What is not trained, such as a teacher, stays in its mode.
    """
    if model.network.training:
        return
    for part in model.children():
        if any(p.requires_grad for p in part.parameters()):
            part.train()
    if distributed.rank() == 0:
        _log.warning(
            "the network %s was given in eval mode, as from_pretrained returns it; it is put into training mode, in "
            "which dropout acts",
            type(model.network).__name__,
        )


def _require_methods(model: nn.Module, config: TrainConfig) -> None:
    samples = config.output.sample_every or config.evaluation.every
    unless = ", or set output.sample_every=0 and evaluation.every=0"
    for name, needed, otherwise in (("loss_of_rows", True, ""), ("solution", samples, unless)):
        if needed and getattr(type(model), name, None) is getattr(Objective, name):
            raise ValueError(
                f"the objective {type(model).__name__} has no {name}; implement it as "
                f"soflow_fast.objectives.base.Objective describes it{otherwise}"
            )


def _require_trainable(model: nn.Module) -> None:
    name, trained = type(model.network).__name__, {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError(f"the network {name} has no parameter with requires_grad, so that there is nothing to train")
    if other := {n: p.dtype for n, p in trained.items() if p.dtype != torch.float32}:
        remedy = "call .float() on it (compute.precision says in what it is computed)"
        if len(other) < len(list(model.parameters())):
            remedy = "set p.data = p.data.float() of those, or requires_grad_(False) where they are not to be trained"
        raise ValueError(
            f"the network {name} has parameters in {next(iter(other.values()))}, {first_of(list(other))}, and "
            f"what is trained is float32; {remedy}"
        )
    for key, value in model.state_dict().items():
        if not torch.is_tensor(value):
            raise ValueError(
                f"the state of the network {name} has at {key!r} a {type(value).__name__}, and a checkpoint holds "
                "tensors; have get_extra_state return one"
            )


def _require_casts(net: nn.Module, error: Exception) -> None:
    """ValueError for a network with parameters in low precision that fails as it takes x in float32 with them."""
    low = next((p.dtype for p in net.parameters() if p.dtype in (torch.bfloat16, torch.float16)), None)
    if low is not None and re.search("same dtype|should be the same|mixed dtype|expected scalar type", str(error)):
        raise ValueError(
            f"the network {type(net).__name__} has parameters in {low} and fails for x in float32 "
            f"({' '.join(str(error).split())}); have its forward cast x and the conditions, not the times, to {low}"
        ) from error


def _call(net: nn.Module, *inputs: torch.Tensor | None) -> object:
    with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluating(net):
        return net(*inputs)


def _uncompiled(model: nn.Module | None) -> nn.Module | None:
    """A network or objective without torch.compile's wrapper, whose name would be in the names of the weights."""
    found = getattr(model, "_orig_mod", model)
    network = build.network_of(found)
    if hasattr(network, "_orig_mod"):
        network = found.network = network._orig_mod
    elif found is model:
        return model
    _log.warning(
        "the network %s was given compiled, and is taken without that: training compiles all of the loss, see "
        "compute.compile",
        type(network).__name__,
    )
    return found


def _with_values_of(config: TrainConfig, model: nn.Module, preset: str) -> TrainConfig:
    network = build.network_of(model)
    num_classes, null = getattr(network, "num_classes", None), null_condition(network)
    if null is not None and not any(null is kept for kept in (*network.buffers(), *network.parameters())):
        raise ValueError(
            f"the network {type(network).__name__} has a null_condition of class {type(null).__name__} that is not "
            "saved with its weights; make it a buffer, or a parameter, of the shape and dtype of a sample's condition"
        )
    if null is not None and num_classes:
        raise ValueError(
            f"the network {type(network).__name__} has num_classes={num_classes} and a null_condition; set the first "
            "to None if it is told conditions, and the second if it is told classes"
        )
    require_classes(network)
    if null is not None or config.model.num_classes == 0:
        num_classes = 0
    elif config.model.num_classes not in (num_classes, ModelConfig.num_classes):  # the default says nothing
        raise ValueError(
            f"model.num_classes={config.model.num_classes} and the network {type(network).__name__} has {num_classes}; "
            "leave the first out, or make the network with as many"
        )
    arguments = {} if preset == GIVEN else config.model.init_args
    config = replace(config, model=replace(config.model, preset=preset, init_args=arguments, num_classes=num_classes))
    if not is_objective(model):
        return config
    name = next((name for name, objective in build.OBJECTIVES.items() if type(model) is objective), GIVEN)
    sections = {} if name == GIVEN else {name: _section_of(model, name)}
    return replace(config, objective=name, objective_args={}, **sections)


def _section_of(objective: nn.Module, name: str) -> object:
    """The section of the configuration that would build this objective."""
    values = {}
    for f in fields(OBJECTIVE_SECTIONS[name]):
        value = getattr(objective, f.name)
        values[f.name] = value[0] if f.type is float and isinstance(value, tuple) else value  # one for all its times
    return OBJECTIVE_SECTIONS[name](**values)
