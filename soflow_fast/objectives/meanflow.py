"""MeanFlow (Geng et al. 2025, arXiv 2505.13447), the baseline that needs a Jacobian-vector product.

The network is the average velocity ``u(z,t,r) = 1/(t−r) ∫_r^t v``, trained on the identity ``u = v − (t−r) du/dt``.
Here ``u(z,t,r) = F(z,t,s=r)``. Shapes: B rows, n of one loss, samples (B, C, H, W), times (B,), ``0 <= r <= t <= 1``.
"""

import torch
from torch import Tensor, nn

from soflow_fast import paths
from soflow_fast.kernels.reference import Stream
from soflow_fast.objectives.base import (
    LossOutput,
    Objective,
    TotalLoss,
    combine,
    require_choice,
    require_null_label,
    require_range,
)

DIRECTIONS = ("target", "prediction")


class MeanFlow(Objective):
    """The MeanFlow objective over any network ``F = net(x, t, s, labels)``.

    Guided velocity ``v_g = ω v + κ u(z,t,t,y) + (1−ω−κ) u(z,t,t,∅)`` for t in the guidance interval and rows with a
    label, else ``v``; the effective scale is ω/(1−κ). Target ``v_g − (t−r) du/dt`` without gradient, the total
    derivative along ``(v_g, 1)`` in (z, t). Loss of a row ``Σe²/(Σe²+eps)^p``, the sum over the sample.

    Args:
        net: as for :class:`~soflow_fast.SoFlow`; ``derivative="jvp"`` needs a method ``jvp``.
        path: ``linear`` or ``trig``.
        guidance_scale: ω. guidance_mix: κ in [0, 1); (ω, κ) = (1, 0) is no guidance. guidance_interval: of t.
        label_drop: share of rows trained without label. p, eps: the adaptive weight.
        velocity_share: share of rows with r = t, whose target needs no derivative.
        time_mean, time_std: of the two logit-normal draws of which the larger is t and the smaller r.
        derivative: ``tangent``, by the difference forward; ``jvp``, by torch.func.jvp through math attention;
            ``finite_difference``, by a second forward ``difference_step`` earlier in t.
        direction: of the derivative in z: ``target``, v_g; or ``prediction``, u(z,t,t) with the label that the network
            sees, which does not depend on the noise that was drawn, as in improved MeanFlow (Geng et al. 2025, arXiv
            2512.02012, without its second head; its guidance of scale w is ω = 1, κ = 1 − 1/w).

    Raises:
        ValueError: for a value outside its range, or for guidance without a "no label" row to guide with.
    """

    derivatives: tuple[str, ...] = ("tangent", "jvp", "finite_difference")

    def __init__(
        self,
        net: nn.Module,
        path: str = "linear",
        guidance_scale: float = 1.0,
        guidance_mix: float = 0.5,
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
        super().__init__(net, velocity_share, impl)
        require_choice("path", path, paths.PATHS)
        require_choice("derivative", derivative, self.derivatives)
        require_choice("direction", direction, DIRECTIONS)
        require_range("guidance_scale", guidance_scale, 0, float("inf"))
        if not 0 <= guidance_mix < 1:
            raise ValueError(f"guidance_mix={guidance_mix} is outside [0, 1): the effective scale is ω/(1−κ)")
        require_range("label_drop", label_drop, 0, 1)
        require_range("eps", eps, 0, float("inf"))
        require_range("time_std", time_std, 0, float("inf"))
        require_range("difference_step", difference_step, 1e-8, 0.1)
        if len(guidance_interval) != 2 or not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1:
            raise ValueError(f"guidance_interval={tuple(guidance_interval)} is not an interval of times in [0, 1]")
        self.guided = (guidance_scale, guidance_mix) != (1, 0)
        require_null_label(net, f"guidance_scale={guidance_scale}" if self.guided else None, label_drop)
        if derivative == "jvp" and not hasattr(net, "jvp"):
            raise ValueError(
                f"derivative='jvp' needs a network with jvp; {type(net).__name__} has none: use derivative='tangent'"
            )
        self.path, self.guidance_scale, self.guidance_mix = path, guidance_scale, guidance_mix
        self.guidance_interval = tuple(guidance_interval)
        self.label_drop, self.p, self.eps = label_drop, p, eps
        self.time_mean, self.time_std = time_mean, time_std
        self.derivative, self.difference_step, self.direction = derivative, difference_step, direction
        self.needs_float32 = derivative == "finite_difference"

    renoises = False

    def prepare(self, x: Tensor, labels: Tensor | None) -> None:
        """Derives the difference forward of a network that has none; see the base class.

        Raises:
            ValueError: where it cannot be derived, and for a finite difference of two forwards of which each draws
                another dropout.
        """
        if self.derivative == "finite_difference":
            self.require_no_draws(x, labels, "derivative='finite_difference'")
        if self.derivative in ("jvp", "finite_difference"):
            return
        try:
            self.derive(x, labels, self.derivative)
        except ValueError as error:
            raise ValueError(
                f"derivative={self.derivative!r} needs a difference forward, and {error}; write the network's "
                "forward_difference, or use derivative='finite_difference'"
            ) from error

    def velocity(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The model's velocity ``u(x,t,t,y)``."""
        return self.network(x, t, t, labels)

    def solution(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        """``x − (t−s) u(x,t,s,y)``; see the base class."""
        return x - (t - s).view(-1, 1, 1, 1) * self.network(x, t, s, labels)

    def time_pairs(self, rows: Tensor, seed: int | Tensor, step: int | Tensor) -> Tensor:
        """(B, 2) float32, the two logit-normal draws of each row."""
        z = self.ops.normal(rows, 2, seed=seed, step=step, stream=Stream.TIMES)
        return paths.logit_normal(z, self.time_mean, self.time_std)

    def draw_times(
        self, rows: Tensor, n_velocity: int, seed: int | Tensor, step: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """``(t, r)``, each (B,) float32; r = t on the first ``n_velocity`` rows."""
        pair = self.time_pairs(rows, seed, step)
        t, r = pair.amax(1), pair.amin(1)
        return t, torch.cat([t[:n_velocity], r[n_velocity:]])

    def loss_of_rows(
        self, x0, labels, rows, n_velocity, progress, seed, step, latent_scale=None, *, merged=False
    ) -> TotalLoss:
        """The loss of the rows with r = t ("velocity") and of the others ("average"); see the base class.

        There is one form, the merged one: a call without gradient for the guidance, in which the rows with r = t need
        no prediction with their own label, as the call with gradient makes it; and that call, for both kinds of rows.
        ``jvp`` and ``finite_difference`` add one on the rows with r < t.
        """
        n = n_velocity
        t, r = self.draw_times(rows, n, seed, step)
        if x0.dtype == torch.float64:
            t, r = t.double(), r.double()
        drop = self.draw_drop(rows, labels, seed, step)
        z, v = self.ops.noisy_sample(x0, t, rows, seed=seed, step=step, path=self.path, latent_scale=latent_scale)
        if not torch.compiler.is_compiling():
            self.prepare(z[n:], labels)
        labels = self._conditioned(labels, rows, n, seed, step)
        guided = self.guided and labels is not None and self.network.num_classes > 0
        v_average, u_null, u_own = v[n:], None, None
        if guided:
            u_null, u_own = self._guidance(z, t, labels, n)
            v_average = self._guided_velocity(v_average, u_null[n:], u_own, t[n:], drop[n:], labels[n:])
        labels = self.input_labels(labels, drop)
        along = v_average
        if self.direction == "prediction" and guided:
            along = torch.where(drop[n:].view(-1, 1, 1, 1), u_null[n:], u_own)
        elif self.direction == "prediction" and n < len(rows):
            with torch.no_grad():
                along = self.network(z[n:], t[n:], t[n:], None if labels is None else labels[n:])
        u, change = self._with_change(z, t, r, labels, along, slice(n, None), progress)
        u_velocity, u_average = u.split([n, len(rows) - n])
        parts = {}
        if n:
            target = v[:n]
            if guided:
                target = self._guided_velocity(target, u_null[:n], u_velocity.detach(), t[:n], drop[:n], labels[:n])
            parts["velocity"] = self._reduce(u_velocity.to(target.dtype) - target, t[:n])
        if n < len(rows):
            parts["average"] = self._average_loss(u_average, v_average, change, t[n:], progress)
        return combine(parts)

    def _conditioned(self, labels, rows, n: int, seed, step) -> Tensor | None:
        """The labels with what else the network is told of each row; the first n rows train the velocity."""
        return labels

    @torch.no_grad()
    def _guidance(self, z, t, labels, n: int) -> tuple[Tensor, Tensor]:
        """``u(z,t,t,∅)`` of all rows and ``u(z,t,t,y)`` of those from n on."""
        null = self.no_label(labels)
        t_all = torch.cat([t, t[n:]])
        u = self.network(torch.cat([z, z[n:]]), t_all, t_all, torch.cat([null, labels[n:]]))
        return u[: len(t)], u[len(t) :]

    def _guided_velocity(self, v, u_null, u_own, t, drop, labels) -> Tensor:
        omega, kappa = self.guidance_scale, self.guidance_mix
        guided = omega * v + kappa * u_own + (1 - omega - kappa) * u_null
        start, end = self.guidance_interval
        plain = drop | (t < start) | (t > end)
        return torch.where(plain.view(-1, 1, 1, 1), v, guided)

    def _with_change(self, z, t, r, labels, v, rows: slice, progress) -> tuple[Tensor, Tensor]:
        """``u(z,t,r,y)`` of all rows, and ``(t−r) du/dt`` along ``(v, 1)`` of the given ones, without gradient."""
        u, derivative = self.with_derivative(z, t, r, labels, v, rows)
        return u, (t - r)[rows].view(-1, 1, 1, 1) * derivative

    def _average_loss(self, u, v, change, t, progress) -> LossOutput:
        return self._reduce(u.to(v.dtype) - (v - change), t)

    def with_derivative(self, z, t, r, labels, v, rows: slice) -> tuple[Tensor, Tensor]:
        """``u(z,t,r,y)`` of all rows, and ``du/dt`` along ``(v, 1)`` of the given ones, without gradient."""
        one = torch.ones_like(t[rows])
        if self.derivative == "tangent":
            return self.forward_difference(z, t, r, labels, v, one, rows=rows, mode="tangent")
        if self.derivative == "finite_difference":
            u, difference = self.two_forwards(z, t, r, labels, v, rows, self.difference_step * one)
            return u, difference / -self.difference_step
        u = self.network(z, t, r, labels)
        with torch.no_grad():
            labels = None if labels is None else labels[rows]
            return u, self.network.jvp(z[rows], t[rows], r[rows], labels, v, one)[1]

    def two_forwards(self, z, t, r, labels, v, rows: slice, step: Tensor) -> tuple[Tensor, Tensor]:
        """``u(z,t,r,y)`` of all rows, and ``u(z − step·v, t − step, r, y) − u`` of the given ones, in the precision of
        the parameters; step: (b,)."""
        with torch.autocast(z.device.type, enabled=False):
            u = self.network(z, t, r, labels)
            with torch.no_grad():
                labels = None if labels is None else labels[rows]
                moved = z[rows] - step.view(-1, 1, 1, 1) * v
                return u, self.network(moved, t[rows] - step, r[rows], labels) - u[rows]

    def _reduce(self, error: Tensor, t: Tensor) -> LossOutput:
        squares = error.square().flatten(1)
        total = squares.sum(1)
        weight = (total.detach() + self.eps).pow(-self.p)
        return LossOutput((weight * total).mean(), squares.detach().mean(1), weight, t)
