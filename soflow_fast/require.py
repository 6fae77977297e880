"""Checks of values: each that fails is a ValueError of one sentence."""

import importlib.util
import reprlib
from typing import Any

# Of packages that are imported by another name than their own.
_MODULES = {"scikit-learn": "sklearn", "torch-fidelity": "torch_fidelity"}


_brief = reprlib.Repr()
_brief.maxlist = _brief.maxtuple = 8
_brief.maxstring = _brief.maxother = 1000


def brief(value: Any) -> str:
    """A value for a sentence, as repr has it; of long lists the first eight."""
    return _brief.repr(value)


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
