"""The difference of every torch operator that a network may be made of, in forms that do not cancel.

A rule receives an operator's output, its arguments and their differences (None where an argument does not change), and
returns the difference of the output (computational divided differencing, Reps & Rall 2003). With ``tangent`` products
of two differences are dropped, which is the exact directional derivative. Rules compute in float32, or in float64 for
float64, and round once, to the dtype of the output; products are in the dtype of their operands, or autocast's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

#: ``rule(operator, out, arguments, differences, tangent, **keywords)``; the operator is the overload that was called.
Rule = Callable[..., Any]

#: The rule of each operator, by its overload packet such as ``torch.ops.aten.silu``; others can be added.
RULES: dict[Any, Rule] = {}


def rule_for(*operators) -> Callable[[Rule], Rule]:
    """Registers the decorated function as the rule of these operators."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, rule))
        return rule

    return register


def without_half(*tensors) -> list:
    """Half-precision tensors in float32; whatever else as it is."""
    half = (torch.float16, torch.bfloat16)
    return [x.float() if isinstance(x, Tensor) and x.dtype in half else x for x in tensors]


class NoRuleError(ValueError):
    """An operator, as it is called, has no rule.

    Attributes:
        operator: the overload. refused: whether it has a rule, which refuses how it is called. calls: the nodes of the
            calls that are refused, once they are known.
    """

    def __init__(self, message: str, operator, refused: bool = False):
        super().__init__(message)
        self.operator, self.refused, self.calls = operator, refused, []


def refuse(operator, why: str) -> None:
    """NoRuleError that names the operator: what torch defines it by may have rules."""
    raise NoRuleError(f"the operator {operator} {why}", operator, refused=True)


def like(difference: Tensor, out: Tensor) -> Tensor:
    """In the shape and dtype of an output."""
    return difference.to(out.dtype).expand(out.shape)


_FFT = [
    getattr(aten, f"fft_{inverse}{real}fft{n}") for inverse in ("", "i") for real in ("", "r") for n in ("", "2", "n")
]

# What writes numbers into others, and which argument they are.
_WRITTEN = {
    **dict.fromkeys((aten.slice_scatter, aten.select_scatter, aten.diagonal_scatter), 1),
    aten.index_put: 2,
    **dict.fromkeys((aten.index_add, aten.scatter, aten.scatter_add), 3),
}


def value_of(operator) -> Callable:
    """The operator; of a few what computes the same, with derivatives and with the casts that autocast makes necessary.

    A graph is captured without autocast and keeps no casts but :data:`CAST`. Fourier transforms have no half precision,
    and what is written into a tensor takes its dtype.
    """
    packet = operator.overloadpacket
    if packet is aten.copy:
        return _copied
    if packet is CAST:
        return _cast
    if packet in _FFT:

        def transform(x: Tensor, *rest, **keywords):
            return operator(*without_half(x), *rest, **keywords)

        return transform
    if packet in _WRITTEN:

        def write(*arguments, **keywords):
            cast, i = list(arguments), _WRITTEN[packet]
            if isinstance(cast[i], Tensor):
                cast[i] = cast[i].to(cast[0].dtype)
            return operator(*cast, **keywords)

        return write
    return operator


@torch.library.custom_op("soflow_fast::cast", mutates_args=())
def _cast_of_a_graph(x: Tensor, dtype: torch.dtype, follows: bool) -> Tensor:
    return x.to(dtype, copy=True)


@_cast_of_a_graph.register_fake
def _(x: Tensor, dtype: torch.dtype, follows: bool) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


#: A cast that stays in a captured graph: to a dtype, or ``follows``, to autocast's where that is on.
CAST = torch.ops.soflow_fast.cast


def _cast(x: Tensor, dtype: torch.dtype, follows: bool) -> Tensor:
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind) if follows and torch.is_autocast_enabled(kind) else dtype)


def _copied(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return source.to(x.dtype).expand(x.shape).clone()


# ------------------------------------------------------------------------------------- moving and adding numbers


@rule_for(
    *(aten.reshape, aten.permute, aten.transpose, aten.t, aten.unsqueeze, aten.squeeze, aten.expand, aten.repeat),
    *(aten.repeat_interleave, aten.split, aten.split_with_sizes, aten.unbind, aten.slice, aten.select, aten.diagonal),
    *(aten.index_select, aten.index, aten.gather, aten.flip, aten.roll, aten.rot90, aten.unfold, aten.im2col),
    *(aten.clone, aten.detach, aten.alias, aten._to_copy, aten.neg, aten.sum, aten.mean, aten.cumsum, aten.tril),
    *(aten.triu, aten.view_as_real, aten.avg_pool1d, aten.avg_pool3d, aten.upsample_linear1d),
    *(aten.avg_pool2d, aten.adaptive_avg_pool2d, aten.pixel_shuffle, aten.pixel_unshuffle),
    *(aten.upsample_nearest2d, aten._upsample_nearest_exact2d, aten.upsample_bilinear2d, aten.upsample_bicubic2d),
    *(aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa, aten.grid_sampler),
    *(aten._conj, aten.fft_fftshift, aten.fft_ifftshift, *_FFT),
)
def _of_the_first(operator, out, arguments, differences, tangent, **keywords):
    """Operators that are linear in their first argument, the only one that changes."""
    if any(d is not None for d in differences[1:]):
        refuse(operator, "has a rule only for a change of its first argument")
    return value_of(operator)(differences[0], *arguments[1:], **keywords)


@rule_for(aten.view_as_complex)
def _view_as_complex(operator, out, arguments, differences, tangent):
    """Also of a difference that is expanded where its value is not."""
    return operator(differences[0].contiguous())


@rule_for(CAST, aten.type_as)
def _cast_difference(operator, out, arguments, differences, tangent):
    return torch.zeros_like(out) if differences[0] is None else like(differences[0], out)


@rule_for(aten.complex)
def _complex(operator, out, arguments, differences, tangent):
    return operator(*(torch.zeros_like(x) if d is None else d for x, d in zip(arguments, differences, strict=True)))


@rule_for(aten.pad, aten.constant_pad_nd)
def _pad(operator, out, arguments, differences, tangent):
    """Of a constant, which stays, zeros."""
    return operator(differences[0], *arguments[1 : 3 if operator.overloadpacket is aten.pad else 2])


@rule_for(aten.masked_fill)
def _masked_fill(operator, out, arguments, differences, tangent):
    d, _, d_value = (0.0 if d is None else d for d in differences)
    return like(torch.where(arguments[1], d_value, d), out)


@rule_for(aten.where)
def _where(operator, out, arguments, differences, tangent):
    a, b = (0.0 if d is None else d for d in differences[1:])
    return like(torch.where(arguments[0], a, b), out)


@rule_for(aten.cat, aten.stack)
def _cat(operator, out, arguments, differences, tangent):
    parts = [torch.zeros_like(x) if d is None else d for x, d in zip(arguments[0], differences[0], strict=True)]
    return operator(parts, *arguments[1:])


@rule_for(*_WRITTEN)
def _write(operator, out, arguments, differences, tangent, **keywords):
    """Linear in both the old numbers and the new: what stays counts as a change of 0."""
    if "reduce" in operator._overloadname:
        refuse(operator, "has no rule for reduce")
    changes = list(arguments)
    for i in (0, _WRITTEN[operator.overloadpacket]):
        stays = torch.zeros_like(arguments[i]) if isinstance(arguments[i], Tensor) else 0
        changes[i] = stays if differences[i] is None else differences[i]
    return value_of(operator)(*changes, **keywords)


@rule_for(aten.copy)
def _copy(operator, out, arguments, differences, tangent):
    return torch.zeros_like(out) if differences[1] is None else like(differences[1], out)


@rule_for(aten.add, aten.sub, aten.rsub)
def _add(operator, out, arguments, differences, tangent, alpha=1):
    alpha = arguments[2] if len(arguments) > 2 else alpha
    if operator.overloadpacket is aten.rsub:
        weights = (-alpha, 1)
    else:
        weights = (1, alpha if operator.overloadpacket is aten.add else -alpha)
    changes = zip(weights, without_half(*differences[:2]), strict=False)
    terms = [d if w == 1 else w * d for w, d in changes if d is not None]
    return like(sum(terms[1:], terms[0]), out)


@rule_for(aten.native_dropout)
def _dropout(operator, out, arguments, differences, tangent):
    _, p, train = arguments
    if not train or p == 0:
        return differences[0], None
    return differences[0] * out[1] * (0.0 if p == 1 else 1 / (1 - p)), None


# ----------------------------------------------------------------------------------------------- products


def bilinear(product: Callable, x, y, dx, dy, tangent: bool):
    """``dx·y + (x+dx)·dy``; the difference of a product that is linear in either factor."""
    if dy is None:
        return product(dx, y)
    if dx is None:
        return product(x, dy)
    return product(dx, y) + product(x if tangent else x + dx, dy)


@rule_for(aten.mul)
def _mul(operator, out, arguments, differences, tangent):
    return like(bilinear(torch.mul, *without_half(*arguments), *without_half(*_two(differences)), tangent), out)


@rule_for(aten.addcmul)
def _addcmul(operator, out, arguments, differences, tangent, value=1):
    (_, x, y), (d, dx, dy) = without_half(*arguments), without_half(*differences)
    change = 0 if dx is None and dy is None else value * bilinear(torch.mul, x, y, dx, dy, tangent)
    return like(change if d is None else d + change, out)


@rule_for(aten.mm, aten.bmm, aten.matmul)
def _matmul(operator, out, arguments, differences, tangent):
    return bilinear(operator, *arguments, *differences, tangent)


@rule_for(aten.addmm, aten.baddbmm)
def _addmm(operator, out, arguments, differences, tangent, beta=1, alpha=1):
    (_, x, y), (d, dx, dy) = arguments, differences
    change = 0 if dx is None and dy is None else alpha * bilinear(torch.matmul, x, y, dx, dy, tangent)
    return like(change if d is None else beta * d + change, out)


@rule_for(aten.einsum)
def _einsum(operator, out, arguments, differences, tangent, **keywords):
    """The change of every operand with those before it moved and those after it as they were."""
    equation, operands = arguments
    terms, before = [], []
    for i, (x, d) in enumerate(zip(operands, differences[1], strict=True)):
        if d is not None:
            terms.append(operator(equation, [*before, d, *operands[i + 1 :]]))
        before.append(x if tangent or d is None else x + d)
    return sum(terms[1:], terms[0])


_CONVOLUTIONS = [getattr(aten, f"conv{kind}{n}d") for kind in ("", "_transpose") for n in (1, 2, 3)]


@rule_for(aten.linear, aten.bilinear, *_CONVOLUTIONS)
def _layer(operator, out, arguments, differences, tangent):
    """A layer's product, of its input or inputs with its weight, and its bias."""
    n = 3 if operator.overloadpacket is aten.bilinear else 2
    factors, terms = list(arguments[:n]), []
    for i, d in enumerate(differences[:n]):
        if d is not None:
            terms.append(operator(*factors[:i], d, *factors[i + 1 :], None, *arguments[n + 1 :]))
            factors[i] = factors[i] if tangent else factors[i] + d
    for d in differences[n : n + 1]:
        if d is not None:  # of every channel
            terms.append(d.view(-1, *[1] * (factors[-1].ndim - n)))
    return like(sum(terms[1:], terms[0]), out)


def _two(differences: Sequence) -> tuple:
    return (*differences, None)[:2]


@rule_for(aten.lerp)
def _lerp(operator, out, arguments, differences, tangent):
    """Of ``x + w(y−x)``."""
    (x, y, weight), (dx, dy, d_weight) = without_half(*arguments), without_half(*differences)
    terms = [w * d for w, d in ((1 - weight, dx), (weight, dy)) if d is not None]
    if d_weight is not None:
        moved = [] if tangent else [sign * d for sign, d in ((1, dy), (-1, dx)) if d is not None]
        terms.append(d_weight * sum(moved, y - x))
    return like(sum(terms[1:], terms[0]), out)


@rule_for(aten.div)
def _div(operator, out, arguments, differences, tangent, rounding_mode=None):
    """``(dx − (x/y) dy)/(y+dy)``; where rounding leaves nothing of ``y+dy``, the moved quotient counts as 0.

    There y has moved to the eps that keeps 0/0 at 0, as of linear attention a query may that has no positive part.
    """
    if rounding_mode is not None:
        refuse(operator, f"has no rule for rounding_mode={rounding_mode!r}")
    (x, y), (dx, dy) = without_half(*arguments), without_half(*_two(differences))
    if dy is None:
        return like(dx / y, out)
    quotient, moved = x / y, y if tangent else y + dy
    change = -quotient * dy
    if dx is None:
        return like(change / moved, out)
    change = (dx + change) / moved
    if not tangent:
        change = torch.where(moved.abs() <= 2 * torch.finfo(differences[1].dtype).eps * y.abs(), -quotient, change)
    return like(change, out)


@rule_for(aten.reciprocal)
def _reciprocal(operator, out, arguments, differences, tangent):
    x, d = without_half(arguments[0], differences[0])
    return like(-d / (x * (x if tangent else x + d)), out)
