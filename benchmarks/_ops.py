"""A fused op at one of its cases: is it exact, what does it move, and a function of no arguments that runs it."""

from collections.abc import Callable
from dataclasses import replace

import _interpreter  # noqa: F401
import torch
from torch import Tensor

from soflow_fast.kernels import _accuracy, _aot, fused
from soflow_fast.kernels._cases import Case, Inputs, as_tuple

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
FORWARD, BOTH = "forward", "forward+backward"


def modes(case: Case) -> tuple[str, ...]:
    """The forward, and with the backward where the case has gradients."""
    return (FORWARD, BOTH) if case.gradients else (FORWARD,)


def selected(smoke: bool, only: str | None = None) -> list[Case]:
    """The cases to run: all, or in a smoke run the smallest of each op."""
    cases = [case for case in fused.cases() if not only or only in case.op]
    if not smoke:
        return cases
    smallest = {}
    for case in sorted(cases, key=lambda c: bytes_moved(c, modes(c)[-1], None), reverse=True):
        smallest[case.op] = case
    return list(smallest.values())


def bytes_moved(case: Case, mode: str, max_rows: int | None) -> int:
    """Of the fused op: every tensor argument of its launches once."""
    case = case if mode == BOTH else replace(case, gradients=())
    return sum(record.bytes_moved for record in _aot.record_case(case, DTYPE, max_rows))


def failed_checks(case: Case, max_rows: int | None) -> list[str]:
    """The results of the fused op that are further from the truth than the rule of its tests allows."""
    arguments = case.inputs(Inputs(DEVICE, DTYPE, max_rows=max_rows))
    rows = _accuracy.errors(case.op, arguments, case.options, case.gradients)
    return [f"{row.name}: error {row.ours:.3g}, allowed {row.allowed:.3g}" for row in rows if not row.within]


def make_step(case: Case, mode: str, op: Callable, max_rows: int | None) -> Callable[[], object]:
    """A function of no arguments that runs the op once; also the forward alone keeps what its backward needs."""
    arguments = case.inputs(Inputs(DEVICE, DTYPE, max_rows=max_rows))
    inputs = [arguments[name].requires_grad_() for name in case.gradients]

    def forward() -> tuple[Tensor, ...]:
        return as_tuple(op(**arguments, **case.options))

    if mode == FORWARD:
        return forward
    gradients = [torch.randn_like(o) for o in forward() if o.requires_grad]

    def forward_and_backward():
        return torch.autograd.grad([o for o in forward() if o.requires_grad], inputs, gradients)

    return forward_and_backward
