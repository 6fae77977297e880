"""The fused ops, with the names and signatures of ``reference``."""

from . import activation_difference, adaln
from ._cases import Case
from .activation_difference import gelu_difference, silu_difference
from .adaln import gated_residual_layernorm, modulated_layernorm

__all__ = ["gated_residual_layernorm", "gelu_difference", "modulated_layernorm", "silu_difference"]

_FAMILIES = (activation_difference, adaln)


def cases() -> list[Case]:
    """The cases of every family."""
    return [case for family in _FAMILIES for case in family.cases()]
