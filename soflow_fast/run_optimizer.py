"""The optimizer in a run: learning rates, draws, its state, and how one of the user's was made."""

import copy
import inspect
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import PickleError
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from soflow_fast.config_optimizer import OptimizerConfig
from soflow_fast.optim import OPTIMIZERS, OnePass, require_all
from soflow_fast.records import class_of, differences, plain_values

# Of a group, what is no hyper-parameter; and what may depend on the machine.
_PARAMETERS, _OF_THE_MACHINE = ("params", "param_names"), ("capturable", "foreach", "fused", "differentiable")


class RunOptimizer:
    """An optimizer as a run sets, saves and restores it.

    Args:
        optimizer: over parameters of the model. model: that it trains. config: of the run, by whose learning rate it
            was made.

    Attributes:
        of_user: whether it is one of the user's.
        made: how it was made: its class, and of each group the names of the parameters and the plain values, ``lr`` as
            its ratio to the configuration's; of the library's its name, without values, as the configuration has them.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, config: OptimizerConfig):
        self.optimizer, self.of_user = optimizer, config.name not in OPTIMIZERS
        self._device, self._fresh = next(model.parameters()).device, copy.deepcopy(optimizer.state_dict())
        self._ratios = [float(group["lr"]) / config.learning_rate for group in optimizer.param_groups]
        names, groups = {id(p): name for name, p in model.named_parameters()}, []
        for group, ratio in zip(optimizer.param_groups, self._ratios, strict=True):
            values = plain_values({k: v for k, v in group.items() if k not in (*_PARAMETERS, *_OF_THE_MACHINE)})
            parameters = [names.get(id(p), "not of the model") for p in group["params"]]
            values = {**values, "lr": float(f"{ratio:.6g}")} if self.of_user else {}
            groups.append({"parameters": parameters, "values": values})
        self.made = {"class": class_of(optimizer) if self.of_user else config.name, "groups": groups}

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

    def load_state_dict(self, state: dict) -> None:
        """Goes on from :meth:`state_dict`.

        The library's goes on by the names of the parameters: those that are trained since begin with moments of zero
        and a step count of their own, by which their bias is corrected. One of the user's begins anew where the state
        is of another class or of other parameters, as does each after one of the other kind. What one of the user's
        changes in its groups by itself is part of its state; what it was made with otherwise than before is as it is
        now.
        """
        before, after = state["made"], self.made
        if not self.of_user and before["class"] in OPTIMIZERS:
            self.optimizer.load_state_dict(self._by_name(state))
            return
        fresh = [dict(group) for group in self.optimizer.param_groups]
        if _parameters(before) != _parameters(after):
            self.optimizer.load_state_dict(copy.deepcopy(self._fresh))  # it may have stepped already
            for group, own in zip(self.optimizer.param_groups, fresh, strict=True):
                group["lr"] = own["lr"]
            return
        state = {name: value for name, value in state.items() if name != "made"}
        of_now = []
        for own, old, new in zip(fresh, _values(before), _values(after), strict=True):
            keys = [key for key in (*_OF_THE_MACHINE, "lr") if key in own]
            of_now.append(keys + [key for key, value in new.items() if old.get(key) != value])
        if {"state", "param_groups"} <= state.keys():
            saved = [
                group | {key: own[key] for key in keys}  # by which torch decides where a state has to lie
                for group, own, keys in zip(state["param_groups"], fresh, of_now, strict=True)
            ]
            self.optimizer.load_state_dict({**state, "param_groups": saved})
            self._restore_dtypes(state)
        else:  # of a form of its own, such as that of several optimizers in one
            self.optimizer.load_state_dict(state)
        for group, own, keys in zip(self.optimizer.param_groups, fresh, of_now, strict=True):
            for key, value in own.items():
                if key in keys:
                    group[key] = value
                elif torch.is_tensor(value):
                    group[key] = group[key].to(value.device)

    def _by_name(self, state: dict) -> dict:
        """The state of one of the library's for the parameters of now, with the hyper-parameters of now."""
        groups = self.optimizer.state_dict()["param_groups"]
        before, names = (made["groups"][0]["parameters"] for made in (state["made"], self.made))
        saved = [state["state"].get(number) for number in state["param_groups"][0]["params"]]
        found = {name: one for name, one in zip(before, saved, strict=True) if one is not None}
        kept = {number: found[name] for number, name in zip(groups[0]["params"], names, strict=True) if name in found}
        return {"state": kept, "param_groups": groups}

    def _restore_dtypes(self, state: dict) -> None:
        """Puts the state of each parameter back into its own dtypes, where torch gave it the parameter's."""
        if isinstance(self.optimizer, OnePass):  # of which all are float32, and stay in the tensors that a table has
            return
        for group, saved in zip(self.optimizer.param_groups, state["param_groups"], strict=True):
            for p, number in zip(group["params"], saved["params"], strict=True):
                own = self.optimizer.state[p] if number in state["state"] else {}
                for key, value in own.items():
                    own[key] = tree_map(
                        lambda now, before: before.to(now.device) if torch.is_tensor(now) else now,
                        value,
                        state["state"][number][key],
                    )

    @contextmanager
    def draws(self, seed: int, step: int, rank: int, world_size: int) -> Iterator[None]:
        """Within it what a network draws by itself, as dropout does, depends on (seed, step, process) alone.

        And what an optimizer of the user's draws on (seed, step), so that all processes update alike.
        """

        def begin(*keys: int) -> None:
            seeds = np.random.SeedSequence((seed, step, *keys))
            torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))

        def begin_update(*_) -> None:  # whose classes may call each other's step
            nonlocal updating
            if not updating:
                begin(0, 1)  # of no process: a 0 at the end would be none
            updating = True

        updating = not self.of_user or world_size == 1
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            begin(rank)
            before_update = None if updating else self.optimizer.register_step_pre_hook(begin_update)
            try:
                yield
            finally:
                if before_update is not None:
                    before_update.remove()

    def require_storable(self) -> None:
        """ValueError for a state that a checkpoint would not give back; to be asked after the first step."""
        state = tree_map_only(Tensor, lambda value: value.new_empty(0), self.state_dict())
        name, remedy = type(self.optimizer).__name__, "keep tensors, numbers, lists and dicts in it"
        file = io.BytesIO()
        try:
            torch.save(state, file)
            file.seek(0)
            torch.load(file, weights_only=True)
        except (PickleError, AttributeError, TypeError, RuntimeError) as error:
            found = re.search(r"GLOBAL (\S+)", str(error))
            what = found.group(1) if found else " ".join(str(error).split())
            raise ValueError(
                f"a checkpoint does not give back the state of the optimizer {name} ({what}); {remedy}"
            ) from None
        held = tree_leaves(list(vars(self.optimizer).values()))
        inner = {id(one): one for one in held if isinstance(one, Optimizer)}.values()
        if sum(_tensors(one.state) for one in inner) > _tensors(state):
            raise ValueError(
                f"state_dict() of the optimizer {name} leaves out a state of those in it, "
                f"{', '.join(type(one).__name__ for one in inner)}; have it return all, and load_state_dict take them"
            )
        if any(isinstance(value, str) for value in tree_leaves(state.get("state"))):
            raise ValueError(f"the state of the optimizer {name} holds a text, which torch does not load; {remedy}")


def changes(before: dict, after: dict) -> list[dict[str, object]]:
    """How two optimizers were made otherwise, see :attr:`RunOptimizer.made`: key, before, after."""
    names = [[name for group in made["groups"] for name in group["parameters"]] for made in (before, after)]
    found = []
    if set(names[0]) != set(names[1]):
        were, are = _among(*names), _among(*reversed(names))
        found.append({"key": "trained parameters", "before": were, "after": are})
    if before["class"] in OPTIMIZERS or after["class"] in OPTIMIZERS:  # of which the configuration says the rest
        return found
    if _parameters(before) != _parameters(after):
        other = " in another order" if not found and _named(before) == _named(after) else ""
        change = {"key": "optimizer", "before": _named(before), "after": f"{_named(after)}{other}, begun anew"}
        return [*found, change]
    for number, (old, new) in enumerate(zip(_values(before), _values(after), strict=True)):
        found += differences(f"optimizer group {number}", old, new)
    return found


def require_optimizer(optimizer: Any, model: nn.Module, made: str) -> None:
    """ValueError for what is no optimizer of all that is trained of a model, or one that calls the loss again.

    Args:
        made: how the sentence begins, such as ``optimizer.name='my.Muon' makes``.
    """
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"{made} an object of class {name}; make a torch.optim.Optimizer")
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise ValueError(f"{made} a {name} whose __init__ does not call that of torch.optim.Optimizer; have it do so")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(f"{made} a {name}, whose step calls the loss again; make one that does without a closure")
    for group in optimizer.param_groups:
        lr = group.get("lr")
        if not isinstance(lr, (int, float)) and not (torch.is_tensor(lr) and lr.numel() == 1):
            raise ValueError(
                f"{made} a {name} with lr={lr!r} in a group, which the run sets; make it with the number given"
            )
    require_all(optimizer, model, f"{made} a {name}")


def _parameters(made: dict) -> tuple[str, list[list[str]]]:
    return made["class"], [group["parameters"] for group in made["groups"]]


def _values(made: dict) -> list[dict]:
    return [group["values"] for group in made["groups"]]


def _named(made: dict) -> str:
    return f"{made['class']} of {[len(group['parameters']) for group in made['groups']]} parameters"


def _among(names: list[str], others: list[str]) -> str:
    """How many names these are, and what tells them from the others."""
    word, apart = "with", [name for name in names if name not in others]
    if not apart:
        word, apart = "without", [name for name in others if name not in names]
    return f"{len(names)} {word} {apart[0]}" + (f" and {len(apart) - 1} more" if apart[1:] else "")


def _tensors(state: Any) -> int:
    return sum(torch.is_tensor(leaf) for leaf in tree_leaves(state))
