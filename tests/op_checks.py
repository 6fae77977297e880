"""What every fused op is checked for; each ``test_<op>.py`` calls these on its own shapes.

The reference in float64 is the truth. A fused op may be at most twice as far from it as the reference run in the same
low precision is, plus ``atol``: 1e-6 (float32) or 2^-9 (bfloat16, float16) of the largest value. Triton's interpreter
cuts float32 off where bfloat16 ends instead of rounding it: an error of up to 2^-8 where a stream is stored and again
where a result is, so there atol is 2^-7.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from soflow_fast.kernels import fused, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_ATOL = {torch.float32: 1e-6, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-9 if DEVICE == "cuda" else 2.0**-7}


def _tuple(outputs) -> tuple[Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)


def _cast(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in arguments.items()}


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """``torch.empty`` returns NaN inside the block, so that an element no kernel wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def run(
    op: Callable,
    arguments: dict[str, Any],
    options: dict[str, Any],
    gradients: tuple[str, ...] = (),
    output_gradients: tuple[Tensor, ...] | None = None,
) -> list[Tensor]:
    """The outputs of an op and then the gradients of the named arguments.

    The gradients are those of the differentiable outputs weighted by ``output_gradients``, by default repeatable noise.
    """
    arguments = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    for name in gradients:
        arguments[name].requires_grad_()
    outputs = _tuple(op(**arguments, **options))
    results = [o.detach() for o in outputs]
    if gradients:
        differentiable = [o for o in outputs if o.requires_grad]
        if output_gradients is None:
            generator = torch.Generator().manual_seed(1)
            output_gradients = [torch.randn(o.shape, generator=generator).to(o) for o in differentiable]
        inputs = [arguments[name] for name in gradients]
        results += torch.autograd.grad(
            differentiable, inputs, [g.to(o) for g, o in zip(output_gradients, differentiable, strict=True)]
        )
    return results


def errors(
    name: str, arguments: dict[str, Any], options: dict[str, Any], gradients: tuple[str, ...] = (), **kwargs
) -> list[tuple[float, float, float, torch.dtype]]:
    """Per output and gradient: the fused op's error, the low-precision reference's, the largest value, the dtype."""
    truth = run(getattr(reference, name), _cast(arguments, torch.float64), _wide_options(options), gradients, **kwargs)
    plain = run(getattr(reference, name), arguments, options, gradients, **kwargs)
    with poisoned_memory():
        ours = run(getattr(fused, name), arguments, options, gradients, **kwargs)
    rows = []
    for t, p, o in zip(truth, plain, ours, strict=True):
        assert o.shape == p.shape, (o.shape, p.shape)
        assert o.dtype == p.dtype, (o.dtype, p.dtype)
        rows.append(((o - t).abs().max().item(), (p - t).abs().max().item(), t.abs().max().item(), o.dtype))
    return rows


def _wide_options(options: dict[str, Any]) -> dict[str, Any]:
    return {k: torch.float64 if isinstance(v, torch.dtype) else v for k, v in options.items()}


def check_accuracy(
    name: str, arguments: dict[str, Any], options: dict[str, Any], gradients: tuple[str, ...] = (), **kwargs
):
    """Forward and every gradient against the float64 reference, by the rule of this module; NaN never passes."""
    for i, (ours, plain, scale, dtype) in enumerate(errors(name, arguments, options, gradients, **kwargs)):
        atol = _ATOL[dtype] * scale
        assert ours <= 2 * plain + atol, f"{name}, result {i}: error {ours:.3g}, reference {plain:.3g}, atol {atol:.3g}"


def check_repeatable(name: str, arguments: dict[str, Any], options: dict[str, Any], gradients: tuple[str, ...] = ()):
    """Two runs are bitwise equal."""
    first = run(getattr(fused, name), arguments, options, gradients)
    second = run(getattr(fused, name), arguments, options, gradients)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def check_compiles(name: str, arguments: dict[str, Any], options: dict[str, Any], gradients: tuple[str, ...] = ()):
    """``torch.compile(fullgraph=True)`` gives the eager results, forward and backward."""

    def op(**kwargs):
        return getattr(fused, name)(**kwargs, **options)

    torch.compiler.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for eager, ours in zip(run(op, arguments, {}, gradients), run(compiled, arguments, {}, gradients), strict=True):
        assert torch.equal(eager, ours)


def check_no_forward_mode(name: str, arguments: dict[str, Any], options: dict[str, Any], argument: str):
    """torch.func.jvp through a differentiable fused op raises: a silent zero tangent would train garbage."""
    try:
        torch.func.jvp(
            lambda x: getattr(fused, name)(**{**arguments, argument: x}, **options),
            (arguments[argument],),
            (torch.ones_like(arguments[argument]),),
        )
    except (RuntimeError, NotImplementedError):
        return
    raise AssertionError(f"{name} has a forward-mode derivative nobody wrote")
