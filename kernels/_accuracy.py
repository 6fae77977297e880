"""How far a fused op is from the truth: one rule for the tests, the benchmark and the table of errors.

The reference in float64 is the truth. A fused op may be at most twice as far from it as the reference run in the same
low precision is, plus ``atol``: 1e-6 (float32) or 2^-9 (bfloat16, float16) of the largest value; twice that for the
gradients of the losses, which are rounded as they are kept in the forward, and again.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import fused, reference
from ._cases import as_tuple

_ATOL = {torch.float32: 1e-6, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-9}
_KEPT_ROUNDED = ("consistency_loss", "velocity_loss")


class Error(NamedTuple):
    """Of one output or gradient: the largest errors of the fused op and of the reference in the same low precision.

    Attributes:
        name: ``output 0``, ``gradient of x``. dtype: of the result. ours, plain: largest absolute errors.
        scale: largest absolute value of the truth. roundings: to the dtype, on the way to the result.
    """

    name: str
    dtype: torch.dtype
    ours: float
    plain: float
    scale: float
    roundings: int = 1

    @property
    def allowed(self) -> float:
        """The largest error of the fused op that the rule allows."""
        return 2 * self.plain + self.roundings * _ATOL[self.dtype] * self.scale

    @property
    def within(self) -> bool:
        """Whether the rule holds; never for NaN."""
        return self.ours <= self.allowed


def run(
    op: Callable,
    arguments: dict[str, Any],
    options: dict[str, Any],
    gradients: Sequence[str] = (),
    output_gradients: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """The outputs of an op and then the gradients of the named arguments.

    The gradients are those of the differentiable outputs weighted by ``output_gradients``, by default repeatable noise.
    """
    arguments = {k: v.detach() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    for name in gradients:
        arguments[name].requires_grad_()
    outputs = as_tuple(op(**arguments, **options))
    results = [o.detach() for o in outputs]
    if gradients:
        differentiable = [o for o in outputs if o.requires_grad]
        if output_gradients is None:
            generator = torch.Generator(outputs[0].device).manual_seed(1)
            output_gradients = [torch.randn(o.shape, generator=generator, device=o.device) for o in differentiable]
        inputs = [arguments[name] for name in gradients]
        results += torch.autograd.grad(
            differentiable, inputs, [_moved(g, o) for g, o in zip(output_gradients, differentiable, strict=True)]
        )
    return results


def truth(
    name: str, arguments: dict[str, Any], options: dict[str, Any], gradients: Sequence[str] = (), **kwargs
) -> list[Tensor]:
    """What :func:`run` gives for the reference op ``name`` in float64."""
    wide, wide_options = ({k: _in_float64(v) for k, v in values.items()} for values in (arguments, options))
    return run(getattr(reference, name), wide, wide_options, gradients, **kwargs)


def compare(
    op: str, ours: list[Tensor], plain: list[Tensor], exact: list[Tensor], gradients: Sequence[str] = ()
) -> list[Error]:
    """The errors of two results of :func:`run`, of the op of that name, against the truth."""
    names = [f"output {i}" for i in range(len(exact) - len(gradients))] + [f"gradient of {g}" for g in gradients]
    rows = []
    for name, o, p, t in zip(names, ours, plain, exact, strict=True):
        assert (o.shape, o.dtype) == (p.shape, p.dtype), (name, o.shape, o.dtype, p.shape, p.dtype)
        roundings = 1 + (op in _KEPT_ROUNDED and name.startswith("gradient") and o.dtype != torch.float32)
        rows.append(Error(name, o.dtype, _largest(o - t), _largest(p - t), _largest(t), roundings))
    return rows


def errors(
    name: str, arguments: dict[str, Any], options: dict[str, Any], gradients: Sequence[str] = (), **kwargs
) -> list[Error]:
    """The errors of every output and gradient of the fused op ``name``; arguments as :func:`run` takes them."""
    inputs = (arguments, options, gradients)
    ours, plain = (run(getattr(module, name), *inputs, **kwargs) for module in (fused, reference))
    return compare(name, ours, plain, truth(name, *inputs, **kwargs), gradients)


def _in_float64(value: Any) -> Any:
    """A floating-point tensor, or the name of such a dtype, in float64; anything else as it is."""
    if isinstance(value, torch.dtype):
        return torch.float64
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _moved(g: Tensor, like: Tensor) -> Tensor:
    """On the device and in the dtype of the other, with the strides that it has, which ``to`` would make dense."""
    whole = g.as_strided((g.untyped_storage().nbytes() // g.element_size(),), (1,), 0)
    return whole.to(like).as_strided(g.shape, g.stride(), g.storage_offset())


def _largest(x: Tensor) -> float:
    return x.abs().max().item()
