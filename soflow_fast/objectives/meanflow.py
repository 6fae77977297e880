"""MeanFlow (Geng et al. 2025, arXiv 2505.13447), the baseline that needs a Jacobian-vector product.

Its network is the average velocity, see :mod:`soflow_fast.objectives.average_velocity`, also for the shapes.
"""

import torch
from torch import Tensor, nn

from soflow_fast.objectives.average_velocity import AverageVelocity
from soflow_fast.objectives.base import require_null_label
from soflow_fast.require import require_range


class MeanFlow(AverageVelocity):
    """The MeanFlow objective over any network ``F = net(x, t, s, labels)``.

    Guided velocity ``v_g = ω v + κ u(z,t,t,y) + (1−ω−κ) u(z,t,t,∅)`` for t in the guidance interval and rows with a
    label, else ``v``; the effective scale is ω/(1−κ). Target ``v_g − (t−r) du/dt`` without gradient, the total
    derivative along ``(v_g, 1)`` in (z, t). Loss of a row ``Σe²/(Σe²+eps)^p``, the sum over the sample.

    The defaults are those published for B/4; for B/2 they are guidance_scale 1, guidance_mix 0.5, and for L/2 and XL/2
    guidance_scale 0.2, guidance_mix 0.92, guidance_interval (0, 0.8).

    Args:
        net: as for :class:`~soflow_fast.SoFlow`; ``derivative="jvp"`` needs a method ``jvp``.
        path: ``linear`` or ``trig``.
        guidance_scale: ω. guidance_mix: κ in [0, 1); (ω, κ) = (1, 0) is no guidance. guidance_interval: of t.
        label_drop: share of rows trained without label, see :mod:`soflow_fast.dropping`. p, eps: the adaptive weight.
        velocity_share: share of rows with r = t, whose target needs no derivative.
        time_mean, time_std: of the two logit-normal draws of which the larger is t and the smaller r.
        derivative: ``tangent``, by the difference forward; ``jvp``, by torch.func.jvp through math attention;
            ``finite_difference``, by a second forward ``difference_step`` earlier in t.
        direction: of the derivative in z: ``target``, v_g; or ``prediction``, u(z,t,t) with the label that the network
            sees, u(z,t,t,∅) where it was dropped, which does not depend on the noise that was drawn. That is improved
            MeanFlow's (Geng et al. 2025, arXiv 2512.02012), but that it has a second head for this and takes the label
            also where it was dropped; its guidance of scale w is ω = 1, κ = 1 − 1/w.

    Raises:
        ValueError: for a value outside its range, or for guidance without a "no label" row to guide with.
    """

    def __init__(
        self,
        net: nn.Module,
        path: str = "linear",
        guidance_scale: float = 3.0,
        guidance_mix: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        label_drop: float = 0.1,
        p: float = 1.0,
        eps: float = 0.01,
        velocity_share: float = 0.75,
        time_mean: float = -0.4,
        time_std: float = 1.0,
        derivative: str = "tangent",
        difference_step: float = 1e-3,
        direction: str = "target",
        impl: str | None = None,
    ):
        super().__init__(
            net,
            path=path,
            label_drop=label_drop,
            p=p,
            eps=eps,
            velocity_share=velocity_share,
            time_mean=time_mean,
            time_std=time_std,
            derivative=derivative,
            difference_step=difference_step,
            direction=direction,
            impl=impl,
        )
        require_range("guidance_scale", guidance_scale, 0, float("inf"))
        if not 0 <= guidance_mix < 1:
            raise ValueError(
                f"guidance_mix={guidance_mix} is outside [0, 1), as the scale is ω/(1−κ); choose one in it"
            )
        if len(guidance_interval) != 2 or not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1:
            raise ValueError(
                f"guidance_interval={tuple(guidance_interval)} is not an interval of times; give (start, end) in [0, 1]"
            )
        self.guided = (guidance_scale, guidance_mix) != (1, 0)
        require_null_label(net, f"guidance_scale={guidance_scale}" if self.guided else None, label_drop)
        self.guidance_scale, self.guidance_mix = guidance_scale, guidance_mix
        self.guidance_interval = tuple(guidance_interval)

    def _guidance(self, z, t, labels, n: int, drop) -> tuple[Tensor, Tensor]:
        needs_all = self.direction == "prediction"  # which a row that drops its label has too
        return self.guidance_outputs(z, t, labels, n, None if needs_all else drop)

    def _guided_velocity(self, v, u_null, u_own, t, drop, labels) -> Tensor:
        omega, kappa = self.guidance_scale, self.guidance_mix
        guided = omega * v + kappa * u_own + (1 - omega - kappa) * u_null
        start, end = self.guidance_interval
        plain = drop | (t < start) | (t > end)
        return torch.where(plain.view(-1, 1, 1, 1), v, guided)
