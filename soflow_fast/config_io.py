"""Reading a configuration: YAML, ``--name value`` overrides, and one sentence for every mistake."""

import difflib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from soflow_fast.interop import PUBLIC
from soflow_fast.require import require


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number too, as YAML 1.2 has it and PyYAML does not."""


class _Dumper(yaml.SafeDumper):
    """Puts texts that the loader would take for numbers in quotes."""


_FLOAT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, [*"-+0123456789"])

# Lists as [1, 2], not a line for each of what may be hundreds of numbers.
_Dumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)

# How like a known key an unknown one must be for the known one to be suggested, 1 for the same.
_LIKE = 0.6


def as_path(value: Any) -> Any:
    """Expands ``~`` in a path; other values unchanged."""
    return os.path.expanduser(value) if isinstance(value, (str, os.PathLike)) else value


@dataclass
class Section:
    """Base of the config dataclasses: every value must fit its annotation, and numbers must be finite.

    A subclass names its ``section`` of the file, with the dot.
    """

    section = ""

    def __init_subclass__(cls, section: str = ""):
        cls.section = section

    def __setattr__(self, name: str, value: Any):
        if name not in self.__dataclass_fields__:
            near = _nearest(name, set(self.__dataclass_fields__))
            remedy = f"the nearest is {near!r}" if near else f"there are {', '.join(self.__dataclass_fields__)}"
            raise AttributeError(f"{type(self).__name__} has no {name!r}; {remedy}")
        super().__setattr__(name, value)

    def checked(self) -> "Section":
        """A copy, checked as when it was made: its values may have been set since."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: value.checked() for k, value in values.items() if isinstance(value, Section)})

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if is_dataclass(f.type):
                require(
                    isinstance(value, f.type),
                    f"{f.name} is a {type(value).__name__} and must be a {f.type.__name__}; nested mappings are for "
                    f"{type(self).__name__}.from_dict",
                )
                continue
            require(
                _fits(value, f.type),
                f"{self.section}{f.name}={value!r} does not fit; it must be: {_expected(f.type)}",
            )
            if isinstance(value, list):
                setattr(self, f.name, tuple(value))  # the same as what a file gives


def parse(cls: type, raw: dict, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Constructor arguments of a config class from a nested mapping and command line arguments.

    Raises:
        ValueError: for an unknown key (with the nearest one) and a value of another type.
    """
    from jsonargparse import ArgumentError, ArgumentParser  # slow to import, and only files and command lines need it

    known = leaves(cls)
    _require_known(flatten(raw, whole=mappings(cls)), set(known))
    require_known_overrides(cls, overrides)
    raw, overrides, taken = _take_mappings(raw, overrides, mappings(cls))
    raw, overrides = _with_whole_numbers(raw, overrides, known)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls)
    try:
        namespace = parser.parse_object(raw)
        if overrides:
            namespace = parser.parse_args(list(overrides), namespace=namespace)
    except ArgumentError as error:
        raise ValueError(_one_sentence(cls, str(error))) from None
    for name, annotation in known.items():
        if type(None) not in get_args(annotation):
            value = taken.get(name, namespace[name])
            require(value is not None, f"{name} has no value; give one, or leave the key out")
    built = parser.instantiate(namespace)
    for name, value in taken.items():
        section, _, key = name.rpartition(".")
        if section:
            value, key = replace(built[section], **{key: value}), section
        built[key] = value
    return {f.name: built[f.name] for f in fields(cls)}


def _take_mappings(raw: dict, overrides: Sequence[str], names: set[str]) -> tuple[dict, list[str], dict[str, Any]]:
    """The mapping and arguments without the values of these dotted names, and those; a parser would read texts anew."""
    raw = {section: dict(values) if isinstance(values, dict) else values for section, values in raw.items()}
    taken, rest, arguments = {}, [], iter(overrides)
    for name in names:
        section, _, key = name.rpartition(".")
        values = raw.get(section) if section else raw
        if isinstance(values, dict) and key in values:
            taken[name] = values.pop(key)
    for argument in arguments:
        path, equals, text = argument.removeprefix("--").partition("=")
        name = next((name for name in names if f"{path}.".startswith(f"{name}.")), None)
        if name is None or not argument.startswith("--"):
            rest.append(argument)
            continue
        text = text if equals else next(arguments, "--")
        require(equals == "=" or not text.startswith("--"), f"{argument} has no value; give one")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError:
            value = text
        key = path[len(name) + 1 :]
        require("." not in key, f"{argument} is not possible; give all of --{name}.{key.partition('.')[0]}")
        if key:
            before = taken.get(name, {})
            require(
                isinstance(before, dict), f"{name}={before!r} does not fit; it must be a mapping of names to values"
            )
            value = {**before, key: value}
        taken[name] = value
    return raw, rest, taken


def _with_whole_numbers(raw: dict, overrides: Sequence[str], known: dict[str, Any]) -> tuple[dict, list[str]]:
    """The mapping and arguments with 400000 for 4e5, which is a float, where a whole number is wanted."""

    def whole(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: whole(f"{name}.{key}", part) for key, part in value.items()}
        annotation = known.get(name)
        if int not in (annotation, *get_args(annotation)):
            return value
        if isinstance(value, str):
            return str(int(float(value))) if _FLOAT.match(value) and float(value).is_integer() else value
        return int(value) if isinstance(value, float) and value.is_integer() else value

    arguments, name = [], ""
    for argument in overrides:
        if argument.startswith("--"):
            name, equals, text = argument[2:].partition("=")
            argument = f"--{name}={whole(name, text)}" if equals else argument
        elif name:
            argument, name = whole(name, argument), ""
        arguments.append(argument)
    return {name: whole(name, value) for name, value in raw.items()}, arguments


def require_known_overrides(cls: type, overrides: Sequence[str]) -> None:
    """ValueError for a ``--name`` that a config class does not have, with the nearest one."""
    given = [arg[2:].split("=")[0] for arg in overrides if arg.startswith("--")]
    inside = tuple(f"{name}." for name in mappings(cls))  # --model.init_args.width 64
    _require_known({name: None for name in given if not name.startswith(inside)}, set(leaves(cls)))


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file; ValueError if it is missing, empty, malformed or not a mapping."""
    what = f"is a folder; give a YAML file, such as {path / 'config.yaml'}"
    require(not path.is_dir(), f"the config file {path} {what}")
    require(path.is_file(), f"the config file {path} does not exist; give the path of a YAML file")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(
            f"the config file {path} is not valid YAML{where}: {getattr(error, 'problem', error)}"
        ) from None
    except UnicodeDecodeError:
        raise ValueError(f"the config file {path} is not a text file; give the path of a YAML file") from None
    require(raw is not None, f"the config file {path} is empty; it needs at least one 'key: value'")
    require(isinstance(raw, dict), f"the config file {path} holds a {type(raw).__name__}; it needs 'key: value' lines")
    return raw


def leaves(cls: type, prefix: str = "") -> dict[str, Any]:
    """Dotted name to annotation of every value of a config class."""
    found = {}
    for f in fields(cls):
        if is_dataclass(f.type):
            found.update(leaves(f.type, f"{prefix}{f.name}."))
        else:
            found[prefix + f.name] = f.type
    return found


def mappings(cls: type) -> set[str]:
    """The dotted names of those values of a config class that are mappings themselves, with keys of the user's."""
    return {name for name, annotation in leaves(cls).items() if get_origin(annotation) is dict}


def flatten(nested: dict, prefix: str = "", whole: set[str] = frozenset()) -> dict[str, Any]:
    """Dotted name to value of a nested mapping, but of those of these dotted names, which are values."""
    found = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value and name not in whole:
            found.update(flatten(value, f"{name}.", whole))
        else:
            found[name] = value
    return found


def _require_known(given: dict[str, Any], known: set[str]) -> None:
    sections = {name.rsplit(".", 1)[0] for name in known if "." in name}
    for name, value in given.items():
        if name in sections:
            require(value == {}, f"{name}={value!r} is not a section; write {name}: followed by indented keys")
        elif name not in known:
            near = _nearest(name, known)
            remedy = f"the nearest is {near!r}" if near else "soflow train FILE --dry-run shows all that there are"
            raise ValueError(f"unknown key {name!r}; {remedy}")


def _nearest(name: str, known: set[str]) -> str | None:
    """The known name most like this one, by its last part or its initials in the same section, else anywhere.

    Or what a published key means; None where nothing is like it.
    """
    if name in PUBLIC:
        return PUBLIC[name][0]
    section, _, last = name.rpartition(".")

    def likeness(candidate: str) -> float:
        own_section, _, own = candidate.rpartition(".")
        if last == "".join(word[0] for word in own.split("_")):  # lr, wd
            return 1.0
        pairs = [(last, own)] if section == own_section else [(last, own), (name, candidate)]
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    for candidates in ([one for one in sorted(known) if one.rpartition(".")[0] == section], sorted(known)):
        near = max(candidates, key=likeness, default=None)
        if near is not None and likeness(near) >= _LIKE:
            return near
    return None


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of an annotation; whole numbers are floats too, and lists are tuples."""
    origin, choices = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return any(_fits(value, choice) for choice in choices)
    if origin is Literal:
        return value in choices
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            return False
        if choices[-1] is ...:
            choices = choices[:1] * len(value)
        return len(value) == len(choices) and all(map(_fits, value, choices))
    if annotation in (int, float):
        numbers = (int, float) if annotation is float else int
        return isinstance(value, numbers) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, annotation)


def _one_sentence(cls: type, message: str) -> str:
    """jsonargparse's message about one key, on one line and without Python's type syntax."""
    message = re.sub(r"<class '(\w+)'>", r"\1", message)
    found = re.search(r'Parser key "([^"]+)":\s*(.*)', message, re.DOTALL)
    if found is None:
        return " ".join(message.split())
    name, rest = found.groups()
    value = re.search(r"(?:Got|Given) value: (.*)", rest)
    return f"{name}={value.group(1) if value else '?'} does not fit; it must be: {_expected(leaves(cls).get(name))}"


def _expected(annotation: Any) -> str:
    """An annotation in YAML's words."""
    words = {bool: "true or false", type(None): "null", float: "a finite number", int: "a whole number"}
    words |= {str: "text", ...: "..."}
    if annotation in words:
        return words[annotation]
    if get_origin(annotation) is dict:
        return "a mapping of names to values"
    if get_origin(annotation) is Literal:
        return " or ".join(map(str, get_args(annotation)))
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(_expected(choice) for choice in get_args(annotation))
    if get_origin(annotation) is tuple:
        return f"[{', '.join(_expected(choice) for choice in get_args(annotation))}]"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def dump_yaml(nested: dict) -> str:
    """The text of a YAML file; keys keep their order."""
    return yaml.dump(nested, Dumper=_Dumper, sort_keys=False)


def lists(value: Any) -> Any:
    """A nested mapping with lists in place of tuples, as YAML has them."""
    if isinstance(value, dict):
        return {key: lists(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
