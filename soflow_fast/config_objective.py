"""The objectives' sections of the configuration."""

from dataclasses import dataclass

from soflow_fast.config_io import Section
from soflow_fast.require import require


@dataclass
class _ObjectiveConfig(Section):
    """What all objectives refuse alike; the rest is checked by each of them."""

    def __post_init__(self):
        super().__post_init__()
        require(self.p >= 0, f"{self.section}p={self.p} must not be negative; 0 weighs all rows alike")


@dataclass
class SoFlowConfig(_ObjectiveConfig, section="soflow."):
    """The objective ``soflow``; every attribute is an argument of :class:`~soflow_fast.SoFlow`, which checks it."""

    path: str = "linear"
    parameterization: str = "euler"
    guidance_scale: float = 3.0
    guidance_mix: float = 0.25
    guidance_decay_time: float = 0.8
    label_drop: float = 0.1
    p: float = 1.0
    eps: float = 0.01
    velocity_share: float = 0.75
    time_mean: tuple[float, float, float] = (-0.2, -1.0, 0.2)
    time_std: tuple[float, float, float] = (1.0, 0.8, 0.8)
    gap_schedule: str = "exponential"
    gap_init: float = 0.1
    gap_end: float = 0.002
    min_gap: float = 1e-4
    quotient: str = "difference"


@dataclass
class MeanFlowConfig(_ObjectiveConfig, section="meanflow."):
    """The objective ``meanflow``, with the published guidance, times and weight of B/4; every attribute is an argument
    of :class:`~soflow_fast.objectives.meanflow.MeanFlow`, which checks it.

    Published runs also have ``optimizer.betas`` of (0.9, 0.95), where the default is SoFlow's (0.9, 0.99).
    """

    path: str = "linear"
    guidance_scale: float = 3.0
    guidance_mix: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    label_drop: float = 0.1
    p: float = 1.0
    eps: float = 0.01
    velocity_share: float = 0.75
    time_mean: float = -0.4
    time_std: float = 1.0
    derivative: str = "tangent"
    difference_step: float = 1e-3
    direction: str = "target"


@dataclass
class ImprovedMeanFlowConfig(_ObjectiveConfig, section="improved_meanflow."):
    """The objective ``improved_meanflow``; every attribute is an argument of
    :class:`~soflow_fast.objectives.improved_meanflow.ImprovedMeanFlow`, which checks it.

    sample_scale and sample_interval may change during a run, and be chosen anew for its samples. The network of a
    preset MiT has the second head unless velocity_head is false. Published runs also have ``batch_size`` 1024,
    ``optimizer.betas`` of (0.9, 0.95), ``optimizer.warmup_steps`` of 12510 (10 epochs) and ``total_steps`` of 800640
    (640 epochs), of XL/2 1000800; the learning rate and the average are SoFlow's.
    """

    path: str = "linear"
    guidance_max: float = 8.0
    guidance_power: float = 1.0
    sample_scale: float = 7.5
    sample_interval: tuple[float, float] = (0.4, 0.65)
    label_drop: float = 0.1
    p: float = 1.0
    eps: float = 0.01
    velocity_share: float = 0.5
    time_mean: float = -0.4
    time_std: float = 1.0
    derivative: str = "tangent"
    difference_step: float = 1e-3
    velocity_head: bool | None = None


@dataclass
class AlphaFlowConfig(_ObjectiveConfig, section="alphaflow."):
    """The objective ``alphaflow``, as published for B/2; every attribute is an argument of
    :class:`~soflow_fast.objectives.alphaflow.AlphaFlow`, which checks it.

    Published runs also have ``optimizer.betas`` of (0.9, 0.95), where the default is SoFlow's (0.9, 0.99).
    """

    path: str = "linear"
    guidance_scale: float = 1.0
    guidance_mix: float = 0.5
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    label_drop: float = 0.1
    p: float = 1.0
    eps: float = 0.001
    velocity_share: float = 0.25
    time_mean: float = -0.4
    time_std: float = 1.0
    alpha_interval: tuple[float, float] = (0.0, 1.0)
    alpha_steepness: float = 25.0
    alpha_clamp: float = 0.005
    target_clip: float | None = None
    derivative: str = "difference"
    difference_step: float = 1e-3


@dataclass
class SCMConfig(_ObjectiveConfig, section="scm."):
    """The objective ``scm``, with the times published for CIFAR-10 and ImageNet 64; every attribute is an argument of
    :class:`~soflow_fast.objectives.scm.SCM`, which checks it."""

    label_drop: float = 0.1
    p: float = 0.0
    eps: float = 0.01
    time_mean: float = -1.0
    time_std: float = 1.4
    sigma_data: float = 0.5
    tangent_warmup: float = 0.5
    norm_constant: float = 0.1
    derivative: str = "tangent"
    difference_step: float = 1e-3


@dataclass
class FlowMatchingConfig(_ObjectiveConfig, section="flow_matching."):
    """The objective ``flow_matching``; every attribute is an argument of
    :class:`~soflow_fast.objectives.flow_matching.FlowMatching`, which checks it."""

    path: str = "linear"
    guidance_scale: float = 1.0
    guidance_mix: float = 1.0
    guidance_decay_time: float = 1.0
    label_drop: float = 0.1
    p: float = 0.0
    eps: float = 0.01
    time_mean: float = 0.0
    time_std: float = 1.0
    ode_steps: int = 32


#: The section of each objective; the section's name in the file is the objective's.
OBJECTIVE_SECTIONS = {
    "soflow": SoFlowConfig,
    "meanflow": MeanFlowConfig,
    "improved_meanflow": ImprovedMeanFlowConfig,
    "alphaflow": AlphaFlowConfig,
    "scm": SCMConfig,
    "flow_matching": FlowMatchingConfig,
}
