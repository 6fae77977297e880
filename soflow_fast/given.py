"""Checks of a network or objective given to the Trainer, whose own errors at the first step would say little."""

import copy
import logging

import torch
from torch import nn
from torch.utils.data import Dataset

from soflow_fast import build
from soflow_fast.conditions import OfItems, null_condition
from soflow_fast.config import TrainConfig
from soflow_fast.data.checks import is_first_process
from soflow_fast.dit import DiT
from soflow_fast.objectives.base import Objective
from soflow_fast.sample import evaluating
from soflow_fast.unet import UNet

_log = logging.getLogger(__name__)


def check(model: Objective, config: TrainConfig, dataset: Dataset) -> None:
    """ValueError for an objective that lacks a method, and a network that does not do what this package's need.

    A copy of the network is called on the CPU: a label without a row is an error there, and on a GPU the end of the
    process. What cannot be copied or called there is not looked at.
    """
    _require_methods(model, config)
    _require_trainable(model)
    net = model.network
    if type(model) not in build.OBJECTIVES.values() or isinstance(net, (DiT, UNet)):
        return
    if model.condition_dim or config.data.augment:  # it is told of more than the label
        return
    x, times = torch.zeros(1, *build.sample_shape(config)), (torch.ones(1), torch.full((1,), 0.5))
    num_classes = config.model.num_classes
    try:
        net = copy.deepcopy(net).cpu()
        null = null_condition(net)
        labels = OfItems(dataset, torch.zeros(1, dtype=torch.int64))[:] if null is not None else None
        if num_classes:
            labels = torch.zeros(1, dtype=torch.int64)
        found = _call(net, x, *times, labels)
    except Exception:
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
    """Puts an objective into training mode, with a warning, where its network is not: dropout would never act."""
    if model.network.training:
        return
    model.train()
    if is_first_process():
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
    name, trained = type(model.network).__name__, [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(f"the network {name} has no parameter with requires_grad, so that there is nothing to train")
    if other := {p.dtype for p in trained} - {torch.float32}:
        raise ValueError(
            f"the network {name} has parameters in {other.pop()}, and what is trained is float32; call .float() on it "
            "(compute.precision says in what it is computed)"
        )
    for key, value in model.state_dict().items():
        if not torch.is_tensor(value):
            raise ValueError(
                f"the state of the network {name} has at {key!r} a {type(value).__name__}, and a checkpoint holds "
                "tensors; have get_extra_state return one"
            )


def _call(net: nn.Module, *inputs: torch.Tensor | None) -> object:
    with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluating(net):
        return net(*inputs)
