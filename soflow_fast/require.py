"""Checks of values: each that fails is a ValueError of one sentence."""

import importlib.util
import reprlib
from typing import Any

# Of packages that are imported by another name than their own.
_MODULES = {"scikit-learn": "sklearn", "torch-fidelity": "torch_fidelity"}


# Characters of a value that a sentence can hold as it is.
_SHORT = 200

_brief = reprlib.Repr()
_brief.maxlist = _brief.maxtuple = _brief.maxdict = 8
_brief.maxstring = _brief.maxother = _SHORT


def brief(value: Any) -> str:
    """A value for a sentence, as repr has it; of long ones the beginning."""
    text = repr(value)
    return text if len(text) <= _SHORT else _brief.repr(value)


def brief_difference(first: Any, second: Any) -> tuple[str, str]:
    """Two values that differ, for a sentence; of long ones of the same length or keys what differs."""
    if len(repr(first)) + len(repr(second)) <= 2 * _SHORT or type(first) is not type(second):
        return brief(first), brief(second)
    if isinstance(first, dict):
        names = [name for name in {**first, **second} if (name, first.get(name)) not in second.items()]
        return tuple(brief({name: value[name] for name in names if name in value}) for value in (first, second))
    if isinstance(first, (list, tuple)) and len(first) == len(second):
        place = next(i for i, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1])
        return tuple(f"{brief(value[place])} in place {place + 1} of {len(value)}" for value in (first, second))
    return brief(first), brief(second)


def require(condition: bool, sentence: str) -> None:
    """ValueError with that sentence unless the condition holds."""
    if not condition:
        raise ValueError(sentence)


def require_range(name: str, value: float, low: float, high: float) -> None:
    """ValueError unless ``low <= value <= high``."""
    require(low <= value <= high, f"{name}={value} is outside [{low}, {high}]; choose a value in it")


def require_count(name: str, value: int, least: int = 1, most: int = 2**31 - 1) -> None:
    """ValueError unless a value is in that range."""
    require(value >= least, f"{name}={value} is not possible; it must be at least {least}")
    require(value <= most, f"{name}={value} is not possible; it must be at most {most}")


def require_package(package: str, user: str, extra: str, otherwise: str = "") -> None:
    """ValueError unless a package is installed.

    Args:
        user: what needs it. extra: of soflow-fast, that installs it. otherwise: what else can be done.
    """
    require(
        importlib.util.find_spec(_MODULES.get(package, package)) is not None,
        f"{user} needs the package {package}, which is not installed; run pip install 'soflow-fast[{extra}]'"
        f"{otherwise}",
    )
