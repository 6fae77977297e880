"""The fused ops, with the names and signatures of ``reference``."""

from . import activation_difference, adaln, adaln_difference, conditioning
from ._cases import Case
from .activation_difference import gelu_difference, silu_difference
from .adaln import gated_residual_layernorm, modulated_layernorm
from .adaln_difference import gated_residual_layernorm_difference, modulated_layernorm_difference
from .conditioning import condition, time_sinusoids, time_sinusoids_difference

__all__ = [
    "condition",
    "gated_residual_layernorm",
    "gated_residual_layernorm_difference",
    "gelu_difference",
    "modulated_layernorm",
    "modulated_layernorm_difference",
    "silu_difference",
    "time_sinusoids",
    "time_sinusoids_difference",
]

_FAMILIES = (activation_difference, adaln, adaln_difference, conditioning)


def cases() -> list[Case]:
    """The cases of every family."""
    return [case for family in _FAMILIES for case in family.cases()]
