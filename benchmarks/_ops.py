"""Fused ops at their cases: is one exact, what does it move, a function of no arguments that runs it; which to take."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import _interpreter  # noqa: F401
import torch
from torch import Tensor

from soflow_fast.kernels import _accuracy, _aot, fused, reference
from soflow_fast.kernels._cases import Case, Inputs, as_tuple

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
FORWARD, BOTH = "forward", "forward+backward"


def options(description: str | None, piece: str) -> argparse.ArgumentParser:
    """What the commands that time ops are given; ``piece``: what they begin none of when the time is over."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="OP", help="only ops whose name contains this")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the report here")
    parser.add_argument("--resume", action="store_true", help="go on with the report that is there")
    parser.add_argument("--minutes", type=float, default=9, help=f"begin no {piece} after this time (default: 9)")
    parser.add_argument("--smoke", action="store_true", help="the smallest case of each op, one row")
    return parser


def modes(case: Case) -> tuple[str, ...]:
    """The forward, and with the backward where the case has gradients."""
    return (FORWARD, BOTH) if case.gradients else (FORWARD,)


def selected(smoke: bool, only: str | None = None) -> list[Case]:
    """The cases to run: all, or in a smoke run the smallest of each op."""
    return list({case.op: case for case in by_size(only)}.values()) if smoke else _named(only)


def by_size(only: str | None = None) -> list[Case]:
    """Every case, the one that moves most first."""
    return sorted(_named(only), key=lambda case: bytes_moved(case, modes(case)[-1], None), reverse=True)


def _named(only: str | None) -> list[Case]:
    return [case for case in fused.cases() if not only or only in case.op]


def bytes_moved(case: Case, mode: str, max_rows: int | None) -> int:
    """Of the fused op: every tensor argument of its launches once."""
    case = case if mode == BOTH else replace(case, gradients=())
    return sum(record.bytes_moved for record in _aot.record_case(case, DTYPE, max_rows))


def make_check(case: Case, max_rows: int | None) -> Callable[[], list[str]]:
    """Tells the results of the fused op that are further from the truth than the rule of its tests allows.

    The truth is computed once.
    """
    inputs = case.inputs(Inputs(DEVICE, DTYPE, max_rows=max_rows)), case.options, case.gradients
    plain, exact = _accuracy.run(getattr(reference, case.op), *inputs), _accuracy.truth(case.op, *inputs)

    def failed() -> list[str]:
        ours = _accuracy.run(getattr(fused, case.op), *inputs)
        rows = _accuracy.compare(case.op, ours, plain, exact, case.gradients)
        return [f"{row.name}: error {row.ours:.3g}, allowed {row.allowed:.3g}" for row in rows if not row.within]

    return failed


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
