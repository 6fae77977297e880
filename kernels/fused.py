"""The fused ops, with the names and signatures of ``reference``."""

from . import activation_difference
from ._cases import Case
from .activation_difference import gelu_difference, silu_difference

__all__ = ["gelu_difference", "silu_difference"]

_FAMILIES = (activation_difference,)


def cases() -> list[Case]:
    """The cases of every family."""
    return [case for family in _FAMILIES for case in family.cases()]
