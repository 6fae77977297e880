"""Weights of other trainings' transformers of the same blocks, as those of a :class:`~soflow_fast.DiT` or, the last
form, of a :class:`~soflow_fast.MiT`.

``meanflow``, as github.com/zhuyu-cs/MeanFlow trains it in PyTorch, knows both times: ``F(x, t, s, y)`` is its average
velocity, and only names differ. ``sit`` (arXiv 2401.08740) and ``repa`` (REPA's, arXiv 2410.06940) are of flow
matching; they predict the velocity and know one time, and F is, at every s, their velocity at x and t:

* The second time's embedding begins at 0: the last layer of ``s_embedder`` is 0, and the one before it as drawn.
* SiT's time is 1−t, and its velocity points to the data. That time's features are those of t turned and mirrored,
  ``cos ω(1−t) = cos ω·cos ωt + sin ω·sin ωt`` and ``sin ω(1−t) = sin ω·cos ωt − cos ω·sin ωt``, which the first layer
  of ``t_embedder`` takes in; the last layer changes its sign.

Outputs that are not used ("sigma") and REPA's projectors are left out.

``imf`` is improved MeanFlow's (arXiv 2512.02012), by the names that the PyTorch branch of github.com/Lyy-iiis/imeanflow
converts its weights to: every linear layer and table is inside of another, of the JAX code from which they come.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from soflow_fast import paths
from soflow_fast.dit import DiT
from soflow_fast.kernels.reference import frequencies
from soflow_fast.layers import SINUSOID_WIDTH
from soflow_fast.mit import MiT
from soflow_fast.objectives.base import is_objective

FORMS = ("sit", "repa", "meanflow", "imf")

# What improved MeanFlow's layers are called inside of others.
_INSIDE = ("._flax_linear", "._flax_embedding")

#: How the names begin of what such a training has beside its transformer.
BESIDE = "projectors."


def converted(weights: Mapping[str, Tensor], form: str, model: nn.Module) -> dict[str, Tensor]:
    """The weights by the names and in the shapes of a model.

    Args:
        weights: by the names of the model, as far as it has them. form: one of FORMS.
        model: a DiT (of ``imf`` a MiT), or an objective over one; it has the s_embedder that is drawn.

    Raises:
        ValueError: for a form that is not known, another network, and weights that are of this library.
    """
    net = model.network if is_objective(model) else model
    if form not in FORMS:
        raise ValueError(f"initial_weights_form={form!r} is not known; choose one of {', '.join(FORMS)}, or own")
    wanted = MiT if form == "imf" else DiT
    if not isinstance(net, wanted):
        raise ValueError(
            f"initial_weights_form={form!r} is of transformers, and this network is a {type(net).__name__}; choose a "
            f"{wanted.__name__} preset"
        )
    if net.prediction is not None:
        raise ValueError(
            f"initial_weights_form={form!r} is of networks that predict a velocity, and this one predicts the data; "
            "choose model.prediction=velocity"
        )
    prefix = "" if net is model else "network."
    found = {name.removeprefix(prefix): value for name, value in weights.items()}
    found = {name: value for name, value in found.items() if not name.startswith(BESIDE)}
    if form == "imf":
        return {prefix + _name_in_mit(name): value for name, value in found.items() if _is_of_head(name, net)}
    if any(name.startswith("s_embedder.") for name in found):
        raise ValueError(
            f"initial_weights_form={form!r} is of another training's weights, and these have an s_embedder, as this "
            "library's have; leave the form out"
        )
    scale = 1 / paths.velocity_scale(getattr(model, "parameterization", "euler"))
    first, last = "t_embedder.mlp.0.weight", ("final_layer.linear.weight", "final_layer.linear.bias")
    if form == "sit":
        scale = -scale
        if first in found:
            found[first] = _reversed_time(found[first])
    for name in last:
        if name in found:
            found[name] = scale * _without_sigma(found[name], net.patch_size**2, net.in_channels)
    if form == "meanflow":
        return {prefix + name.replace("r_embedder", "s_embedder"): value for name, value in found.items()}
    for name, value in net.s_embedder.state_dict().items():
        found[f"s_embedder.{name}"] = torch.zeros_like(value) if name.startswith("mlp.2.") else value
    return {prefix + name: value for name, value in found.items()}


def _name_in_mit(name: str) -> str:
    for inside in _INSIDE:
        name = name.replace(inside, "")
    return f"{name.removesuffix('_scale')}_gate" if name.endswith("_scale") else name  # of a later version


def _is_of_head(name: str, net: MiT) -> bool:
    """Whether a network has it; the velocity's last layer is published with weights without the rest of that head."""
    return net.has_velocity_head or not name.startswith(("v_heads.", "v_final_layer."))


def _reversed_time(weight: Tensor) -> Tensor:
    """(D, width) of a layer on the features of 1−t, as of one on those of t."""
    omega = frequencies(SINUSOID_WIDTH, torch.empty(0, dtype=torch.float64))
    cos, sin = omega.cos(), omega.sin()
    of_cos, of_sin = weight.double().chunk(2, 1)
    return torch.cat([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], 1).to(weight.dtype)


def _without_sigma(rows: Tensor, positions: int, channels: int) -> Tensor:
    """Of (p·p·2C, ...) those of the first C channels; the channel is the fastest."""
    if len(rows) != 2 * positions * channels:
        return rows
    return rows.unflatten(0, (positions, 2 * channels))[:, :channels].flatten(0, 1)
