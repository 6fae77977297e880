"""Weights to start from: a published checkpoint, a file of another training, or a run of this library."""

import logging
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import accumulate
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from soflow_fast import checkpoint, distributed, flow_weights
from soflow_fast.objectives.base import is_objective
from soflow_fast.positions import are_of_one_grid

_log = logging.getLogger(__name__)

# Under which names trainings keep weights beside other things; the averages first, as they are the better ones.
_USUAL = ("ema", "ema_state_dict", "ema_model", "model_ema", "state_dict_ema")
_USUAL += ("model", "model_state_dict", "state_dict", "network", "net")

# How many names of weights that are left out are told.
_TOLD = 3

# Before the names of a network's weights in an objective.
_PREFIX = "network."

_OF_OTHER_TRAININGS = ", or set initial_weights_form (sit, repa, meanflow, imf) if it is of one of those"


def load_weights(model: nn.Module, path: str | Path, keep: Sequence[str] = (), form: str = "own") -> str:
    """Copies the weights of :func:`read_weights` into a model, on whichever device it is; says what they are."""
    weights, origin = read_weights(model, path, keep, form)
    model.load_state_dict(weights)
    return origin


def read_weights(
    model: nn.Module, path: str | Path, keep: Sequence[str] = (), form: str = "own"
) -> tuple[dict[str, Tensor], str]:
    """Weights that fit a model, on the host; a file is mapped into memory where its form allows that.

    The model's own are what ``keep`` names, and a fixed ``pos_embed`` of another grid: it is a function of that. Which
    weights are not used, and which of the model's stay, is logged, in the first process.

    Args:
        model: an objective such as :class:`~soflow_fast.SoFlow`, or a network.
        path: of a ``.safetensors`` file, of a file written by torch.save, or of the folder of a run or of one of its
            checkpoints, whose averages are taken. A file of torch.save holds a state_dict, or several and other things
            by name (also the state of a TrainStep); the averages are taken, if there are any, and what they leave out,
            such as buffers, from the others. Objects of Python code in it are refused, not run. The state_dict may be
            of an objective or of a network, with a prefix that a wrapper put before every name. What an objective
            has beside its network, such as a projection for a term of its loss, is left out where the model does not
            have it.
        keep: parts of the network that stay as they are, such as ``y_embedder`` or ``blocks.3``, whatever the weights
            have there.
        form: ``own``: of this network; ``sit``, ``repa``, ``meanflow`` or ``imf``: of those trainings' transformers,
            see :mod:`soflow_fast.flow_weights`.

    Returns:
        ``(weights, origin)``: by the model's names, and what was taken, in words.

    Raises:
        ValueError: for a path where nothing is, what holds no weights, a part to keep that the model does not have,
            weights of another model and ones that are not finite; the message names the first that does not fit.
    """
    state = model.state_dict()
    own = state.keys()
    kept = {name for part in keep for name in _names_of_part(part, own)}
    left_out = list(keep)
    if any(part.removeprefix(_PREFIX) == "final_layer" for part in keep):  # and with it what it predicts
        left_out.append("prediction")
        kept |= {name for name in own if _is_of(name, left_out)}
    path = locate(path)
    parts, origin = _read(path)
    weights: dict[str, Tensor] = {}
    for part in reversed([_renamed(part, own) for part in parts]):  # averages may be of parameters alone
        weights = {name: value for name, value in weights.items() if name in own} | part
    if is_objective(model) and any(name.startswith(_PREFIX) for name in weights):
        weights = {name: value for name, value in weights.items() if name in own or name.startswith(_PREFIX)}
    used = {id(value) for name, value in weights.items() if form == "own" or not _is_beside(name)}
    if form != "own":
        weights = flow_weights.converted(weights, form, model)
        origin = f"{origin}, converted from {form}"
    tables = (name for name in own & weights.keys() if _is_fixed(model, name))
    fixed = {name for name in tables if not are_of_one_grid(state[name], weights[name])}
    weights = {name: value for name, value in weights.items() if not _is_of(name, left_out)}
    # of weights of classes there is none
    kept |= {name for name in own - weights.keys() if name.split(".")[-1] == "null_condition"}
    frozen = _left_out_of(path, own, kept)
    checkpoint.require_frozen(model, frozen, path)
    kept |= frozen.keys()
    weights |= {name: state[name] for name in kept | fixed}
    # "the averages are" would not fit the sentence
    remedies = {} if form != "own" else dict.fromkeys(("final_layer.linear", "s_embedder"), _OF_OTHER_TRAININGS)
    remedies["least_time"] = (
        ", or its model.prediction, or leave out what differs by initial_weights_except: [final_layer]"
    )
    remedies["y_embedder"] = ", or leave it out by initial_weights_except: [y_embedder]"
    checkpoint.require_fit(model, weights, f"the checkpoint {path}" if path.is_dir() else origin, remedies)
    for name, value in weights.items():
        if value.is_floating_point() and not value.is_meta and not torch.isfinite(value).all():
            raise ValueError(
                f"{origin} has in {name} values that are not finite; give weights of before they were lost"
            )
    # without counters, see _renamed
    unused = [name for name, x in parts[0].items() if id(x) not in used and (x.dim() or "." in name)]
    _tell(origin, unused, len(parts[0]), kept | fixed, len(own))
    unchanged = [*keep, *sorted(name.removeprefix("network.") for name in fixed - kept)]
    return weights, origin + (f"; kept as initialised: {', '.join(unchanged)}" if unchanged else "")


def _left_out_of(path: Path, own: Set[str], kept: Set[str]) -> dict[str, str]:
    """The hashes of what a checkpoint leaves out, by the names of a model, without what that keeps anyway."""
    found = checkpoint.left_out(path) if path.is_dir() else {}
    named = {name if name in own else name.removeprefix(_PREFIX): value for name, value in found.items()}
    return {name: value for name, value in named.items() if name not in kept}


def _is_beside(name: str) -> bool:
    return name.removeprefix(_PREFIX).startswith(flow_weights.BESIDE)


def _tell(origin: str, unused: Sequence[str], read: int, kept: Set[str], own: int) -> None:
    """Logs which of the weights that were read are not used, which is a warning, and which of the model's stay."""
    if distributed.rank() != 0 or not (unused or kept):
        return
    told = [f"{len(unused)} of the {read} weights there are not used ({_first_of(unused)})"] if unused else []
    told += [f"{len(kept)} of the model's {own} stay as they are ({_first_of(sorted(kept))})"] if kept else []
    _log.log(logging.WARNING if unused else logging.INFO, "%s: %s", origin, ", and ".join(told))


def _first_of(names: Sequence[str]) -> str:
    return ", ".join([*names[:_TOLD], *(["..."] if len(names) > _TOLD else [])])


def locate(path: str | Path) -> Path:
    """The file itself, or the folder of a run's newest checkpoint; ValueError if there is none."""
    path = Path(path)
    if not path.exists():
        raise ValueError(
            f"the weights {path} do not exist; give a .safetensors file, one of torch.save, or the folder of a run"
        )
    if not path.is_dir() or path in checkpoint.committed(path.parent):
        return path
    found = checkpoint.committed(path / checkpoint.CHECKPOINTS)
    if not found:
        raise ValueError(f"the folder {path} holds no checkpoint of a run; give one that does, or a file of weights")
    return found[-1]


def _read(path: Path) -> tuple[list[Mapping[str, Tensor]], str]:
    """The weights as they are named at ``path``, then those that fill in what they leave out; and what was taken."""
    if path.is_dir():
        return [checkpoint.load_averages(path)], f"the averages of {path}"
    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            with torch.serialization.safe_globals([Namespace]):  # the arguments of the script, beside the weights
                found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except Exception as error:
        cause = " ".join(str(error).split()).split(". ")[0] or type(error).__name__
        raise ValueError(
            f"the weights {path} cannot be read ({cause}); give a .safetensors file, or one that torch.save wrote of "
            "tensors and numbers alone"
        ) from None
    if _is_state_dict(found):
        return [found], str(path)
    found = _with_averages_of_step(found)
    parts = {name: part for name, part in found.items() if _is_state_dict(part)} if isinstance(found, Mapping) else {}
    names = [name for name in _USUAL if name in parts] or list(parts)
    if not names or (len(names) > 1 and names[0] not in _USUAL):
        raise ValueError(
            f"the file {path} holds {'weights under ' + ', '.join(map(str, names)) if names else 'no weights'}; give "
            "one with a state_dict, alone or under a usual name such as ema or model"
        )
    return [parts[name] for name in names], f"{names[0]!r} of {path}"


def _with_averages_of_step(found: object) -> object:
    """With the averages in the state of a :class:`~soflow_fast.TrainStep`, where there is one, beside the weights."""
    step = found.get("step") if isinstance(found, Mapping) else None
    averages = step.get("averages") if isinstance(step, Mapping) else None
    return {"ema": averages[0]["weights"], **found} if averages else found


def _is_of(name: str, parts: Iterable[str]) -> bool:
    """Whether a name is, or begins with, one of these dotted ones, with the objective's prefix or without."""
    return any(f"{name.removeprefix('network.')}.".startswith(f"{part.removeprefix('network.')}.") for part in parts)


def _names_of_part(part: str, own: Set[str]) -> list[str]:
    names = [name for name in own if _is_of(name, [part])]
    if not names:
        known = dict.fromkeys(name.removeprefix("network.").split(".")[0] for name in own)
        raise ValueError(
            f"initial_weights_except has {part!r}, which this network does not have; choose of {', '.join(known)}, or "
            "of their parts"
        )
    return names


def _is_fixed(model: nn.Module, name: str) -> bool:
    """Whether it is a table of positions that is not trained."""
    return name.split(".")[-1] == "pos_embed" and not any(
        p.requires_grad for trained, p in model.named_parameters() if trained == name
    )


def _is_state_dict(value: object) -> bool:
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(name, str) and isinstance(part, Tensor) for name, part in value.items())


def _renamed(weights: Mapping[str, Tensor], own: Set[str]) -> dict[str, Tensor]:
    """By the names of which most are the model's: without a prefix that all of them have, or with the objective's.

    Counters of torch's ``AveragedModel`` and the like are left out.
    """
    weights = {name: value for name, value in weights.items() if value.dim() or "." in name or name in own}
    prefixes = ["", *accumulate(f"{part}." for part in next(iter(weights), "").split(".")[:-1])]
    forms = []
    for prefix in prefixes:
        if all(name.startswith(prefix) for name in weights):
            form = {name.removeprefix(prefix): value for name, value in weights.items()}
            forms += [form, {_PREFIX + name: value for name, value in form.items()}]
            # of an objective with more in it, for a network
            inside = {name: value for name, value in form.items() if name.startswith(_PREFIX)}
            forms.append({name.removeprefix(_PREFIX): value for name, value in inside.items()})
    return max(forms, key=lambda form: len(form.keys() & own))
