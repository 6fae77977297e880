"""Networks and data sets that a configuration names by their import path, ``package.module.Class``."""

import pkgutil
from inspect import signature
from typing import Any

import yaml


def is_import_path(name: str) -> bool:
    """Whether a name is one of those, and not of this package's own presets and kinds of data."""
    return "." in name


def check_arguments(setting: str, name: str, arguments: dict[str, Any]) -> None:
    """ValueError for arguments that no import path takes, or that a YAML file cannot hold.

    Args:
        setting: the section, with its dot. name: the preset or kind.
    """
    if arguments and not is_import_path(name):
        raise ValueError(
            f"{setting}init_args={arguments!r} does nothing with {name!r}; it is for classes named as "
            "package.module.Class; leave it out"
        )
    try:
        same = yaml.safe_load(yaml.safe_dump(arguments)) == arguments
    except yaml.YAMLError:
        same = False
    if not same:
        raise ValueError(
            f"{setting}init_args={arguments!r} cannot be written to a YAML file as it is; use numbers, texts, lists "
            "and mappings"
        )


def build_imported(setting: str, path: str, arguments: dict[str, Any]) -> Any:
    """What the class or function at an import path returns for keyword arguments.

    Modules are looked for where Python looks, and by the command ``soflow`` in the current folder too. This runs
    whatever the path names: a configuration, also that of a run, is to be trusted like a program.

    Args:
        setting: the name of the value, such as ``model.preset``.

    Raises:
        ValueError: if it cannot be imported or does not take the arguments; its own errors pass through.
    """
    try:
        made_by = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{setting}={path!r} cannot be imported ({type(error).__name__}: {error}); give package.module.Class of a "
            "package that is installed or lies in the current folder or on PYTHONPATH"
        ) from error
    if not callable(made_by):
        raise ValueError(f"{setting}={path!r} is a {type(made_by).__name__}; give a class or a function")
    section = setting.partition(".")[0]
    try:
        signature(made_by).bind(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{section}.init_args={arguments!r} does not fit {path}: {error}") from None
    return made_by(**arguments)
