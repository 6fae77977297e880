"""What every fused op is checked for; each ``test_<op>.py`` calls these on its own shapes."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from soflow_fast.kernels import fused, reference
from soflow_fast.kernels._accuracy import errors, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class OperatorNames(TorchDispatchMode):
    """The names of the operators that are called inside the block, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        self.names.append(operator.overloadpacket.__name__)
        return operator(*arguments, **(keywords or {}))


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


def check_accuracy(
    name: str, arguments: dict[str, Any], options: dict[str, Any], gradients: tuple[str, ...] = (), **kwargs
):
    """Forward and every gradient against the float64 reference, by the rule of ``_accuracy``; NaN never passes."""
    with poisoned_memory():
        rows = errors(name, arguments, options, gradients, **kwargs)
    for row in rows:
        assert row.within, f"{name}, {row.name}: error {row.ours:.3g}, allowed {row.allowed:.3g}"


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


def check_row_gradients(name: str, arguments: dict[str, Any], options: dict[str, Any]):
    """The gradient of F for those of the rows' losses at any stride: a mean or a sum hands one number to all rows."""
    rows = arguments["F"].shape[0]
    weights = torch.arange(2.0 * rows, device=DEVICE)[::2]
    for incoming in (torch.ones((), device=DEVICE).expand(rows), weights, weights.contiguous()):
        ours, expected = (
            run(getattr(ops, name), arguments, options, ("F",), output_gradients=(incoming,))[-1]
            for ops in (fused, reference)
        )
        assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-8)


def check_autocast(
    name: str, arguments: dict[str, Any], options: dict[str, Any], gradients: tuple[str, ...], tolerance: float
):
    """The products are in its dtype, and the gradients in those of what they are for."""

    def under_autocast(op):
        def run_op(**arguments):
            with torch.autocast(DEVICE, torch.bfloat16), torch.set_grad_enabled(bool(gradients)):
                return op(**arguments)

        return run(run_op, arguments, options, gradients)

    results = (under_autocast(getattr(ops, name)) for ops in (fused, reference))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
