"""Flow matching: the velocity loss alone, the lower bound of what a training step costs."""

from torch import Tensor, nn

from soflow_fast.objectives.soflow import SoFlow
from soflow_fast.require import require_range


class FlowMatching(SoFlow):
    """Flow matching over any network ``F = net(x, t, s, labels)``, called at ``s = t``.

    Args:
        net, path, guidance_scale, guidance_mix, guidance_decay_time, label_drop, p, eps, impl: as in
            :class:`~soflow_fast.SoFlow`; by default no guidance and unit weights.
        time_mean, time_std: of the logit-normal draw of t.
        ode_steps: Euler steps of one :meth:`solution`, so a "one-step" sample costs this many network calls.
    """

    def __init__(
        self,
        net: nn.Module,
        path: str = "linear",
        guidance_scale: float = 1.0,
        guidance_mix: float = 1.0,
        guidance_decay_time: float = 1.0,
        label_drop: float = 0.1,
        p: float = 0.0,
        eps: float = 0.01,
        time_mean: float = 0.0,
        time_std: float = 1.0,
        ode_steps: int = 32,
        impl: str | None = None,
    ):
        require_range("ode_steps", ode_steps, 1, 10**6)
        super().__init__(
            net,
            path,
            guidance_scale=guidance_scale,
            guidance_mix=guidance_mix,
            guidance_decay_time=guidance_decay_time,
            label_drop=label_drop,
            p=p,
            eps=eps,
            velocity_share=1.0,
            time_mean=(time_mean,) * 3,
            time_std=(time_std,) * 3,
            quotient="two_forwards",
            impl=impl,
        )
        self.ode_steps = ode_steps

    renoises = False

    def solution(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        """The velocity ODE from t to s by Euler's method; see the base class."""
        step = (s - t) / self.ode_steps
        for i in range(self.ode_steps):
            x = x + step.view(-1, 1, 1, 1) * self.velocity(x, t + i * step, labels)
        return x
