"""What a run records of objects that are no part of its configuration: their classes and plain values."""

import json
from typing import Any

import torch
from torch import nn

from soflow_fast.config import GIVEN, TrainConfig

#: In place of a value that a record cannot hold.
NOT_PLAIN = object()

# Attributes of an objective that may change during a run: how it computes, and what concerns its samples alone.
_FREE = ("training", "impl", "needs_float32", "renoises", "sample_scale", "sample_interval")


def class_of(thing: object) -> str:
    """``module.qualname`` of its class."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def plain(value: Any) -> Any:
    """A value as JSON gives it back, or ``NOT_PLAIN``."""
    if torch.is_tensor(value) and value.numel() == 1:
        return value.item()
    if type(value) in (list, tuple):
        parts = [plain(part) for part in value]
        return NOT_PLAIN if any(part is NOT_PLAIN for part in parts) else parts
    return value if value is None or type(value) in (bool, int, float, str) else NOT_PLAIN


def plain_values(values: dict[str, Any]) -> dict[str, Any]:
    """Those of the values that a record can hold, as JSON gives them back."""
    found = {key: plain(value) for key, value in values.items()}
    return {key: value for key, value in found.items() if value is not NOT_PLAIN}


def differences(what: str, before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, object]]:
    """How two records of plain values differ: key, which begins with ``what``, before, after."""
    return [
        {"key": f"{what} {key}", "before": before.get(key), "after": after.get(key)}
        for key in sorted(before.keys() | after.keys())
        if json.dumps(before.get(key)) != json.dumps(after.get(key))  # a NaN is as it was
    ]


def of_given(config: TrainConfig, model: nn.Module) -> dict[str, dict[str, Any]] | None:
    """The record of a network and an objective given to the Trainer as objects, None where neither was.

    Of a network its class; of an objective whose values the configuration does not have, its class and its attributes
    that are numbers, texts, booleans, None or tuples of such, without those whose names begin with ``_``.

    Args:
        config: with what was given marked as such. model: the objective.
    """
    found = {}
    if config.model.preset == GIVEN:
        found["network"] = {"class": class_of(model.network)}
    if config.objective == GIVEN:
        own = {k: v for k, v in vars(model).items() if not k.startswith("_") and k not in _FREE}
        own = {key: value for key, value in own.items() if not isinstance(value, (list, torch.Tensor))}
        found["objective"] = {"class": class_of(model), **plain_values(own)}
    return found or None


def changes_of_given(before: dict | None, after: dict | None) -> list[dict[str, object]]:
    """How two records of :func:`of_given` differ, where both were given objects; else the configurations differ."""
    if before is None or after is None:
        return []
    both = before.keys() & after.keys()
    return [change for what in sorted(both) for change in differences(what, before[what], after[what])]
