"""The fused ops, with the names and signatures of ``reference``."""

from . import activation_difference, adaln, adaln_difference, conditioning, consistency, float8, heads, noise, velocity
from . import attention_difference as attention_family
from . import mlp as mlp_family
from . import self_attention as self_attention_family
from ._cases import Case
from .activation_difference import gelu_difference, silu_difference
from .adaln import gated_residual_layernorm, modulated_layernorm
from .adaln_difference import gated_residual_layernorm_difference, modulated_layernorm_difference
from .attention_difference import attention_difference
from .conditioning import condition, time_sinusoids, time_sinusoids_difference
from .consistency import consistency_loss
from .float8 import gelu_rows
from .heads import project_heads
from .mlp import mlp
from .noise import interpolate, noisy_sample, normal, uniform
from .self_attention import self_attention
from .velocity import guided_velocity, velocity_loss

__all__ = [
    "attention_difference",
    "condition",
    "consistency_loss",
    "gated_residual_layernorm",
    "gated_residual_layernorm_difference",
    "gelu_difference",
    "gelu_rows",
    "guided_velocity",
    "interpolate",
    "mlp",
    "modulated_layernorm",
    "modulated_layernorm_difference",
    "noisy_sample",
    "normal",
    "project_heads",
    "self_attention",
    "silu_difference",
    "time_sinusoids",
    "time_sinusoids_difference",
    "uniform",
    "velocity_loss",
]

_FAMILIES = (
    activation_difference,
    adaln,
    adaln_difference,
    attention_family,
    conditioning,
    consistency,
    float8,
    heads,
    mlp_family,
    noise,
    self_attention_family,
    velocity,
)


def cases() -> list[Case]:
    """The cases of every family."""
    return [case for family in _FAMILIES for case in family.cases()]
