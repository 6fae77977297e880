"""The optimizer in a run: learning rates, draws, its state, and how one of the user's was made."""

import inspect
import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from soflow_fast.optim import OnePass

# Of a group, what is no hyper-parameter; and what may depend on the machine.
_PARAMETERS, _OF_THE_MACHINE = ("params", "param_names"), ("capturable", "foreach", "fused", "differentiable")


class RunOptimizer:
    """An optimizer as a run sets, saves and restores it.

    Args:
        optimizer: over parameters of the model. model: that it trains. lr: of the configuration, with which it was
            made.

    Attributes:
        made: how one of the user's was made: its class, and of each group the names of the parameters and the values
            that are plain, ``lr`` as its ratio to the configuration's. None of one of this library's, of which the
            configuration says it.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, lr: float):
        self.optimizer, self.made = optimizer, None
        self._ratios = [float(group["lr"]) / lr for group in optimizer.param_groups]
        if isinstance(optimizer, OnePass):
            return
        names, groups = {id(p): name for name, p in model.named_parameters()}, []
        for group, ratio in zip(optimizer.param_groups, self._ratios, strict=True):
            values = {k: v for k, v in group.items() if k not in (*_PARAMETERS, *_OF_THE_MACHINE) and _is_plain(v)}
            parameters = [names.get(id(p), "not of the model") for p in group["params"]]
            groups.append({"parameters": parameters, "values": {**values, "lr": ratio}})
        self.made = {"class": f"{type(optimizer).__module__}.{type(optimizer).__qualname__}", "groups": groups}

    def set_rate(self, lr: float) -> None:
        """Sets the learning rate; of a group that was made with another one, in its ratio to it."""
        for group, ratio in zip(self.optimizer.param_groups, self._ratios, strict=True):
            if torch.is_tensor(group["lr"]):  # which a CUDA graph may hold
                group["lr"].fill_(lr * ratio)
            else:
                group["lr"] = lr * ratio

    def state_dict(self) -> dict:
        """For a checkpoint: the optimizer's, and how it was made."""
        return {**self.optimizer.state_dict(), "made": self.made}

    def changes(self, state: dict) -> list[dict[str, object]]:
        """How the optimizer of a state was made otherwise than this: key, before, after.

        A single one of the key ``optimizer`` means that there is nothing to go on from.
        """
        before, after = state.get("made"), self.made
        if _parameters(before) != _parameters(after):
            other = " in another order" if _named(before) == _named(after) else ""
            return [{"key": "optimizer", "before": _named(before), "after": f"{_named(after)}{other}, begun anew"}]
        found = []
        for number, (old, new) in enumerate(zip(_values(before), _values(after), strict=True)):
            for key in sorted(old.keys() | new.keys()):
                if old.get(key) != new.get(key):
                    key_of_group = f"optimizer group {number} {key}"
                    found.append({"key": key_of_group, "before": old.get(key), "after": new.get(key)})
        return found

    def load_state_dict(self, state: dict) -> None:
        """Goes on from :meth:`state_dict`, unless :meth:`changes` says that there is nothing to go on from.

        What an optimizer of the user's changes in its groups by itself is part of its state; what it was made with
        otherwise than before is as it is now.
        """
        before, after = state.get("made"), self.made
        if _parameters(before) != _parameters(after):
            return
        state = {name: state[name] for name in ("state", "param_groups")}
        fresh = [dict(group) for group in self.optimizer.param_groups]
        if after is None:  # the configuration's hyper-parameters, which may have changed
            state["param_groups"] = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict(state)
        for group, own, old, new in zip(
            self.optimizer.param_groups, fresh, _values(before), _values(after), strict=after is not None
        ):
            kept = [key for key in (*_OF_THE_MACHINE, "lr") if key in own]
            kept += [key for key, value in new.items() if old.get(key) != value]
            group |= {key: own[key] for key in kept}

    @contextmanager
    def draws(self, seed: int, step: int, rank: int) -> Iterator[None]:
        """Within it what a network draws by itself, as dropout does, depends on (seed, step, process) alone.

        And what the optimizer draws on (seed, step), so that all processes update alike.
        """
        device = self.optimizer.param_groups[0]["params"][0].device

        def begin(*keys: int) -> None:
            seeds = np.random.SeedSequence((seed, step, *keys))
            torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))

        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            begin(rank)
            before_update = self.optimizer.register_step_pre_hook(lambda *_: begin())
            try:
                yield
            finally:
                before_update.remove()

    def require_storable(self) -> None:
        """ValueError, with its place, for a state that a checkpoint would not give back; after the first step."""
        state = self.optimizer.state_dict()
        parts = [(f"state of parameter {i}, {key!r}", x) for i, one in state["state"].items() for key, x in one.items()]
        parts += [(f"group {i}, {key!r}", x) for i, one in enumerate(state["param_groups"]) for key, x in one.items()]
        for where, value in parts:
            if not torch.is_tensor(value) and not _is_plain(value) and not _comes_back(value):
                raise ValueError(
                    f"the optimizer {type(self.optimizer).__name__} has a {type(value).__name__} in its {where}, which "
                    "a checkpoint does not give back; keep tensors, numbers, texts, lists and dicts there"
                )


def require_optimizer(optimizer: Any, model: nn.Module, made: str) -> None:
    """ValueError for what is no optimizer of all that is trained of a model, or one that calls the loss again.

    Args:
        made: how the sentence begins, such as ``optimizer.name='my.Muon' makes``.
    """
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"{made} an object of class {name}; make a torch.optim.Optimizer")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(f"{made} a {name}, whose step calls the loss again; make one that does without a closure")
    taken = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for key, p in model.named_parameters():
        if p.requires_grad and id(p) not in taken:
            raise ValueError(
                f"{made} a {name} without the parameter {key}; give it that too, or set requires_grad_(False) on what "
                "is not to be trained"
            )


def _parameters(made: dict | None) -> tuple | None:
    return None if made is None else (made["class"], [group["parameters"] for group in made["groups"]])


def _values(made: dict | None) -> list[dict]:
    return [] if made is None else [group["values"] for group in made["groups"]]


def _named(made: dict | None) -> str:
    if made is None:
        return "one of the library's"
    return f"{made['class']} of {[len(group['parameters']) for group in made['groups']]} parameters"


def _comes_back(value: Any) -> bool:
    file = io.BytesIO()
    with suppress(UnpicklingError, AttributeError, TypeError, RuntimeError):
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
        return True
    return False


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)
