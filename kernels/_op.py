"""Raw operators ``soflow::<name>``, as torch's dispatcher and compilers know them."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._inductor.lowering import make_fallback


def raw_op(name: str, function: Callable, fake: Callable | None = None) -> Callable:
    """An operator without derivatives that changes none of its arguments.

    Inductor is told of it here. One that it only meets, it first describes in its log, with all that the arguments were
    computed from: text that grows manyfold with each block of a DiT, so that the backward of a whole one would never
    compile (torch 2.11).

    Args:
        name: after ``soflow::``. function: of tensors and numbers, annotated. fake: its shape function, by default the
            function itself.
    """
    op = torch.library.custom_op(f"soflow::{name}", function, mutates_args=(), tags=[torch.Tag.needs_exact_strides])
    op.register_fake(function if fake is None else fake)
    make_fallback(getattr(torch.ops.soflow, name).default, warn=False)
    return op


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on, so that a backward gets operands of one dtype."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta has none to ask about
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)
