"""The difference of every torch operator that a network may be made of, in forms that do not cancel.

A rule receives an operator's output, its arguments and their differences (None where an argument does not change), and
returns the difference of the output (computational divided differencing, Reps & Rall 2003). With ``tangent`` products
of two differences are dropped, which is the exact directional derivative. Rules compute in float32, or in float64 for
float64, and round once, to the dtype of the output; products are in the dtype of their operands, or autocast's.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from soflow_fast.kernels import reference_difference as reference

aten = torch.ops.aten

#: ``rule(operator, out, arguments, differences, tangent, **keywords)``; the operator is the overload that was called.
Rule = Callable[..., Any]

# The largest head dim that the fused kernel of attention's difference takes in every dtype.
_FUSED_HEAD_DIM = 80

#: The rule of each operator, by its overload packet such as ``torch.ops.aten.silu``; others can be added.
RULES: dict[Any, Rule] = {}


def rule_for(*operators) -> Callable[[Rule], Rule]:
    """Registers the decorated function as the rule of these operators."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, rule))
        return rule

    return register


def _wide(*tensors) -> list[Tensor]:
    """Half-precision tensors in float32; whatever else as it is."""
    half = (torch.float16, torch.bfloat16)
    return [x.float() if isinstance(x, Tensor) and x.dtype in half else x for x in tensors]


def _refuse(operator, why: str) -> None:
    raise ValueError(f"the operator {operator} {why}")


def _like(difference: Tensor, out: Tensor) -> Tensor:
    return difference.to(out.dtype).expand(out.shape)


# ------------------------------------------------------------------------------------- moving and adding numbers


@rule_for(
    *(aten.reshape, aten.permute, aten.transpose, aten.t, aten.unsqueeze, aten.squeeze, aten.expand, aten.repeat),
    *(aten.repeat_interleave, aten.split, aten.split_with_sizes, aten.unbind, aten.slice, aten.select, aten.diagonal),
    *(aten.index_select, aten.index, aten.gather, aten.flip, aten.roll, aten.rot90, aten.unfold, aten.im2col),
    *(aten.clone, aten.detach, aten._to_copy, aten.neg, aten.sum, aten.mean, aten.cumsum, aten.tril, aten.triu),
    *(aten.avg_pool2d, aten.adaptive_avg_pool2d, aten.pixel_shuffle, aten.pixel_unshuffle),
    *(aten.upsample_nearest2d, aten._upsample_nearest_exact2d, aten.upsample_bilinear2d, aten.upsample_bicubic2d),
)
def _of_the_first(operator, out, arguments, differences, tangent, **keywords):
    """Operators that are linear in their first argument, the only one that changes."""
    if any(d is not None for d in differences[1:]):
        _refuse(operator, "has a rule only for a change of its first argument")
    return operator(differences[0], *arguments[1:], **keywords)


@rule_for(aten.pad)
def _pad(operator, out, arguments, differences, tangent):
    """Of a constant, which stays, zeros."""
    return operator(differences[0], *arguments[1:3])


@rule_for(aten.masked_fill)
def _masked_fill(operator, out, arguments, differences, tangent):
    return differences[0].masked_fill(arguments[1], 0)


@rule_for(aten.where)
def _where(operator, out, arguments, differences, tangent):
    a, b = (0.0 if d is None else d for d in differences[1:])
    return _like(torch.where(arguments[0], a, b), out)


@rule_for(aten.cat, aten.stack)
def _cat(operator, out, arguments, differences, tangent):
    parts = [torch.zeros_like(x) if d is None else d for x, d in zip(arguments[0], differences[0], strict=True)]
    return operator(parts, *arguments[1:])


@rule_for(aten.add, aten.sub, aten.rsub)
def _add(operator, out, arguments, differences, tangent, alpha=1):
    if operator.overloadpacket is aten.rsub:
        weights = (-alpha, 1)
    else:
        weights = (1, alpha if operator.overloadpacket is aten.add else -alpha)
    terms = [d if w == 1 else w * d for w, d in zip(weights, _wide(*differences), strict=False) if d is not None]
    return _like(sum(terms[1:], terms[0]), out)


@rule_for(aten.native_dropout)
def _dropout(operator, out, arguments, differences, tangent):
    _, p, train = arguments
    if not train or p == 0:
        return differences[0], None
    return differences[0] * out[1] * (0.0 if p == 1 else 1 / (1 - p)), None


# ----------------------------------------------------------------------------------------------- products


def _bilinear(product: Callable, x, y, dx, dy, tangent: bool):
    """``dx·y + (x+dx)·dy``; the difference of a product that is linear in either factor."""
    if dy is None:
        return product(dx, y)
    if dx is None:
        return product(x, dy)
    return product(dx, y) + product(x if tangent else x + dx, dy)


@rule_for(aten.mul)
def _mul(operator, out, arguments, differences, tangent):
    return _like(_bilinear(torch.mul, *_wide(*arguments), *_wide(*_two(differences)), tangent), out)


@rule_for(aten.addcmul)
def _addcmul(operator, out, arguments, differences, tangent, value=1):
    (_, x, y), (d, dx, dy) = _wide(*arguments), _wide(*differences)
    change = 0 if dx is None and dy is None else value * _bilinear(torch.mul, x, y, dx, dy, tangent)
    return _like(change if d is None else d + change, out)


@rule_for(aten.mm, aten.bmm, aten.matmul)
def _matmul(operator, out, arguments, differences, tangent):
    return _bilinear(operator, *arguments, *differences, tangent)


@rule_for(aten.addmm, aten.baddbmm)
def _addmm(operator, out, arguments, differences, tangent, beta=1, alpha=1):
    (_, x, y), (d, dx, dy) = arguments, differences
    change = 0 if dx is None and dy is None else alpha * _bilinear(torch.matmul, x, y, dx, dy, tangent)
    return _like(change if d is None else beta * d + change, out)


@rule_for(aten.einsum)
def _einsum(operator, out, arguments, differences, tangent, **keywords):
    equation, operands = arguments
    if len(operands) > 2:
        _refuse(operator, "has a rule for at most two operands")
    if len(operands) == 1:
        return operator(equation, differences[1], **keywords)
    return _bilinear(lambda x, y: operator(equation, [x, y]), *operands, *differences[1], tangent)


@rule_for(aten.linear, *(getattr(aten, f"conv{n}") for n in ("1d", "2d", "3d", "_transpose1d", "_transpose2d")))
def _linear(operator, out, arguments, differences, tangent):
    """A layer's product, which only its bias leaves unchanged."""
    if any(d is not None for d in differences[2:]):
        _refuse(operator, "has no rule for a bias that changes")
    rest = arguments[3:]

    def product(x, weight):
        return operator(x, weight) if operator.overloadpacket is aten.linear else operator(x, weight, None, *rest)

    return _bilinear(product, *arguments[:2], *differences[:2], tangent)


def _two(differences: Sequence) -> tuple:
    return (*differences, None)[:2]


@rule_for(aten.div)
def _div(operator, out, arguments, differences, tangent):
    """``(dx − (x/y) dy)/(y+dy)``."""
    (x, y), (dx, dy) = _wide(*arguments), _wide(*_two(differences))
    if dy is None:
        return _like(dx / y, out)
    change = -(x / y) * dy
    return _like((change if dx is None else dx + change) / (y if tangent else y + dy), out)


@rule_for(aten.reciprocal)
def _reciprocal(operator, out, arguments, differences, tangent):
    x, d = _wide(arguments[0], differences[0])
    return _like(-d / (x * (x if tangent else x + d)), out)


# ----------------------------------------------------------------------------- functions of every number alone


def _of_a_number(rule: Callable[[Tensor, Tensor, bool], Tensor]) -> Rule:
    """A rule from ``f(x+d) − f(x)`` as a function of x, d and tangent."""

    def apply(operator, out, arguments, differences, tangent, **keywords):
        return _like(rule(*_wide(arguments[0], differences[0]), tangent), out)

    return apply


def _root_difference(x: Tensor, d: Tensor, tangent: bool) -> Tensor:
    root = torch.sqrt(x)
    return d / (2 * root if tangent else root + torch.sqrt(x + d))


def _rsqrt_difference(x: Tensor, d: Tensor, tangent: bool) -> Tensor:
    root, moved = torch.sqrt(x), torch.sqrt(x if tangent else x + d)
    return -d / (root * moved * (root + moved))


def _sin_difference(x: Tensor, d: Tensor, tangent: bool) -> Tensor:
    return torch.cos(x) * d if tangent else 2 * torch.cos(x + d / 2) * torch.sin(d / 2)


def _cos_difference(x: Tensor, d: Tensor, tangent: bool) -> Tensor:
    return -torch.sin(x) * d if tangent else -2 * torch.sin(x + d / 2) * torch.sin(d / 2)


def _tanh_difference(x: Tensor, d: Tensor, tangent: bool) -> Tensor:
    tanh = torch.tanh(x)
    if tangent:
        return d * (1 - tanh * tanh)
    return reference.tanh_difference(torch.tanh(x + d), tanh, d)


def _square_difference(x: Tensor, d: Tensor, tangent: bool) -> Tensor:
    return d * (2 * x if tangent else 2 * x + d)


RULES |= {
    aten.sqrt: _of_a_number(_root_difference),
    aten.rsqrt: _of_a_number(_rsqrt_difference),
    aten.sin: _of_a_number(_sin_difference),
    aten.cos: _of_a_number(_cos_difference),
    aten.tanh: _of_a_number(_tanh_difference),
    aten.sigmoid: _of_a_number(lambda x, d, tangent: _tanh_difference(x / 2, d / 2, tangent) / 2),
    aten.exp: _of_a_number(lambda x, d, tangent: torch.exp(x) * (d if tangent else reference.expm1(d))),
    aten.log: _of_a_number(lambda x, d, tangent: d / x if tangent else torch.log1p(d / x)),
    aten.silu: _of_a_number(lambda x, d, tangent: reference.silu_difference(x, d, tangent=tangent)),
    aten.square: _of_a_number(_square_difference),
}


@rule_for(
    *(aten.relu, aten.leaky_relu, aten.elu, aten.celu, aten.selu, aten.softplus, aten.mish, aten.hardswish, aten.erf),
    *(
        aten.hardtanh,
        aten.relu6,
        aten.abs,
        aten.clamp,
        aten.clamp_min,
        aten.clamp_max,
        aten.log1p,
        aten.expm1,
        aten.atan,
    ),
    *(aten.log_sigmoid, aten.maximum, aten.minimum, aten.atan2, aten.log2, aten.exp2),
)
def _in_float64(operator, out, arguments, differences, tangent, **keywords):
    """Of functions of numbers without a form of their own: float64 has the digits that a subtraction loses."""
    values = [x.double() if isinstance(x, Tensor) else x for x in arguments]
    moving = [i for i, d in enumerate(differences) if d is not None]

    def function(*moved):
        full = list(values)
        for i, x in zip(moving, moved, strict=True):
            full[i] = x
        return operator(*full, **keywords)

    d = tuple(differences[i].double() for i in moving)
    if tangent:
        return torch.func.jvp(function, tuple(values[i] for i in moving), d)[1].to(out.dtype)
    return (
        function(*(values[i] + step for i, step in zip(moving, d, strict=True)))
        - function(*(values[i] for i in moving))
    ).to(out.dtype)


@rule_for(aten.pow)
def _pow(operator, out, arguments, differences, tangent):
    (x, exponent), d = arguments, differences[0]
    if isinstance(exponent, (int, float)) and exponent in (2, 0.5, -0.5):
        rule = {2: _square_difference, 0.5: _root_difference, -0.5: _rsqrt_difference}[exponent]
        return _like(rule(*_wide(x, d), tangent), out)
    return _in_float64(operator, out, arguments, differences, tangent)


@rule_for(aten.gelu)
def _gelu(operator, out, arguments, differences, tangent, approximate="none"):
    if approximate == "tanh":
        return _like(reference.gelu_difference(*_wide(arguments[0], differences[0]), tangent=tangent), out)
    return _in_float64(operator, out, arguments, differences, tangent)


# ------------------------------------------------------------------------------- norms, softmax and attention


def _normalized(x: Tensor, d: Tensor, weight: Tensor | None, eps: float, tangent: bool) -> Tensor:
    _, dn = reference.normalized_difference(x, d, eps=eps, tangent=tangent)
    return dn if weight is None else dn * weight


def _centred(x: Tensor, dims=-1) -> Tensor:
    return x - x.mean(dims, keepdim=True)


def _weights_that_stay(operator, differences: Sequence) -> None:
    if any(d is not None for d in differences[1:]):
        _refuse(operator, "has no rule for a weight or bias that changes")


@rule_for(aten.layer_norm)
def _layer_norm(operator, out, arguments, differences, tangent):
    _weights_that_stay(operator, differences)
    x, shape, weight, _, eps, *_ = (*arguments, None, None, 1e-5)[:5]
    k = len(shape)
    x, d = (_centred(y.flatten(-k)) for y in _wide(x, differences[0]))
    change = _normalized(x, d, None if weight is None else weight.flatten(), eps, tangent)
    return _like(change.view(out.shape), out)


@rule_for(aten.rms_norm)
def _rms_norm(operator, out, arguments, differences, tangent):
    _weights_that_stay(operator, differences)
    x, shape, weight, eps = (*arguments, None, None)[:4]
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    k = len(shape)
    x, d = (y.flatten(-k) for y in _wide(x, differences[0]))
    change = _normalized(x, d, None if weight is None else weight.flatten(), eps, tangent)
    return _like(change.view(out.shape), out)


@rule_for(aten.group_norm)
def _group_norm(operator, out, arguments, differences, tangent):
    _weights_that_stay(operator, differences)
    x, groups, weight, _, eps = (*arguments, None, None, 1e-5)[:5]
    grouped = [_centred(y.unflatten(1, (groups, -1)).flatten(2)) for y in _wide(x, differences[0])]
    change = _normalized(*grouped, None, eps, tangent).view(out.shape)
    if weight is not None:
        change = change * weight.view(-1, *[1] * (out.ndim - 2))
    return _like(change, out)


@rule_for(aten.linalg_vector_norm)
def _norm(operator, out, arguments, differences, tangent, **keywords):
    """``(Σ 2xd + d²)/(|x+d| + |x|)`` of the Euclidean norm."""
    order, dims, keep = (*arguments[1:], *(2, None, False)[len(arguments) - 1 :])
    if order != 2:
        _refuse(operator, "has a rule only for the Euclidean norm")
    x, d = _wide(arguments[0], differences[0])
    dims = tuple(range(x.ndim)) if dims is None else dims
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=keep)
    moved = norm if tangent else torch.linalg.vector_norm(x + d, dim=dims, keepdim=keep)
    return _like(_square_difference(x, d, tangent).sum(dims, keep) / (norm + moved), out)


@rule_for(aten.softmax)
def _softmax(operator, out, arguments, differences, tangent, **keywords):
    """``P(E−Z)/(1+Z)`` with ``E = expm1(d)``, ``Z = Σ P E``."""
    dim = arguments[1]
    p, d = _wide(out, differences[0])
    d = d - d.mean(dim, keepdim=True)  # softmax does not see it, and it would cancel only approximately
    e = d if tangent else reference.expm1(d)
    z = (p * e).sum(dim, keepdim=True)
    return _like(p * (e - z) / (1 if tangent else 1 + z), out)


@rule_for(aten.scaled_dot_product_attention)
def _attention(operator, out, arguments, differences, tangent, ops=reference, scale=None, **options):
    mask, dropout, causal = (*arguments[3:], *(None, 0.0, False)[len(arguments) - 3 :])
    if mask is not None or dropout or causal or any(options.values()):
        _refuse(operator, "has a rule only without mask, dropout and groups of heads")
    primal = [x.to(out.dtype) for x in arguments[:3]]
    pairs = zip(primal, differences, strict=False)
    changes = [torch.zeros_like(x) if d is None else d.to(out.dtype) for x, d in pairs]
    h = out.shape[-1]
    if scale is not None:  # the formula has 1/√h
        primal[0], changes[0] = (x * (scale * math.sqrt(h)) for x in (primal[0], changes[0]))
    if out.ndim != 4 or h > _FUSED_HEAD_DIM:
        ops = reference
    return ops.attention_difference(*primal, *changes, out, tangent=tangent).to(out.dtype)
