"""What a configuration names by its import path, ``package.module.Class``: networks, objectives, data, optimizers."""

import importlib.util
import inspect
import json
import pkgutil
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

# Top-level names of what was imported, without those whose errors come by way of everything.
_PACKAGES: set[str] = set()
_EVERYWHERE = ("torch", "soflow_fast")


def is_import_path(name: str) -> bool:
    """Whether a name is one of those, and not of this package's own presets and kinds of data."""
    return "." in name


def check_arguments(setting: str, name: str, arguments: dict[str, Any]) -> None:
    """ValueError for arguments that no import path takes, or that YAML and JSON do not hold as they are.

    Args:
        setting: the name of the arguments, such as ``model.init_args``. name: the preset, kind or objective.
    """
    if arguments and not is_import_path(name):
        raise ValueError(
            f"{setting}={arguments!r} does nothing with {name!r}; it is for classes named as "
            "package.module.Class; leave it out"
        )
    try:
        same = json.loads(json.dumps(arguments)) == arguments
    except (TypeError, ValueError):
        same = False
    if not same:
        raise ValueError(
            f"{setting}={arguments!r} cannot be kept on record as it is; use numbers, texts, lists and "
            "mappings of names"
        )


def import_maker(setting: str, path: str, arguments: dict[str, Any], *first: Any) -> Callable[[], Any]:
    """The class or function at an import path, to be called; with the keyword arguments, and those first, already.

    Modules are looked for where Python looks, and by the command ``soflow`` in the current folder too. This runs
    whatever the path names: a configuration, also that of a run, is to be trusted like a program.

    Args:
        setting: the name of the value, such as ``model.preset``.

    Raises:
        ValueError: if it cannot be imported or does not take the arguments.
    """
    try:
        made_by = _resolve(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{setting}={path!r} cannot be imported ({type(error).__name__}: {error}); give package.module.Class of a "
            "package that is installed or lies in the current folder or on PYTHONPATH"
        ) from error
    _PACKAGES.update({path.partition(".")[0]}.difference(_EVERYWHERE))
    if not (inspect.isclass(made_by) or inspect.isroutine(made_by)):
        raise ValueError(f"{setting}={path!r} is a {type(made_by).__name__}; give a class or a function")
    try:
        inspect.signature(made_by).bind(*first, **arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{setting}={path!r} cannot be called with {arguments!r}: {error}") from None
    return partial(made_by, *first, **arguments)


class RemoteError(Exception):
    """What an error is raised from that came up in user code in another process: the text of its traceback there."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def of_imported_code(error: BaseException) -> bool:
    """Whether the traceback passes through user code, here or elsewhere, so that it is shown in full."""
    if isinstance(error.__cause__, RemoteError):
        return True
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_globals.get("__name__", "").partition(".")[0] in _PACKAGES for frame in frames)


def _resolve(path: str) -> Any:
    """As pkgutil.resolve_name, which hides why a module that there is cannot be imported."""
    try:
        return pkgutil.resolve_name(path)
    except AttributeError:
        parts = path.split(".")
        for end in range(1, len(parts)):
            name = ".".join(parts[:end])
            if importlib.util.find_spec(name) is None:
                break
            if not hasattr(importlib.import_module(name), "__path__"):  # with its own error
                break
        raise
