"""What MeanFlow and its descendants share: the average velocity, and a derivative of it in the target.

The network is ``u(z,t,r) = 1/(t−r) ∫_r^t v``, trained on the identity ``u = v − (t−r) du/dt``. Here ``u(z,t,r) =
F(z,t,s=r)``. Shapes: B rows, n of one loss, samples (B, C, H, W), times (B,), ``0 <= r <= t <= 1``.
"""

import torch
from torch import Tensor, nn

from soflow_fast import paths
from soflow_fast.conditions import takes_labels
from soflow_fast.kernels.coefficients import require_choice
from soflow_fast.kernels.reference import Stream
from soflow_fast.objectives.base import LossOutput, TotalLoss
from soflow_fast.objectives.derivative import DerivativeObjective

DIRECTIONS = ("target", "prediction")


class AverageVelocity(DerivativeObjective):
    """An objective of an average velocity, with a part of its rows for the velocity, u at r = t.

    A subclass says in ``guided`` whether its velocity is guided where there are labels, and if so implements
    :meth:`_guidance` and :meth:`_guided_velocity`. Arguments are those of
    :class:`~soflow_fast.objectives.derivative.DerivativeObjective` and direction.
    """

    renoises = False
    guided: bool

    def __init__(self, net: nn.Module, *, direction: str, **others):
        super().__init__(net, **others)
        require_choice("direction", direction, DIRECTIONS)
        self.direction = direction

    def velocity(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The model's velocity ``u(x,t,t,y)``."""
        return self.call_network(x, t, t, labels)

    def solution(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        """``x − (t−s) u(x,t,s,y)``; see the base class."""
        return x - (t - s).view(-1, 1, 1, 1) * self.call_network(x, t, s, labels)

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

    def loss_of_rows(self, x0, labels, rows, n_velocity, progress, seed, step, latent_scale=None) -> TotalLoss:
        """The loss of the rows with r = t ("velocity") and of the others ("average"); see the base class. Where the
        network's second head is trained, its loss of all rows ("velocity_head") is added to their mean.

        There are two network calls: one without gradient for the guidance, in which the rows with r = t need no
        prediction with their own label, as the call with gradient makes it; and that call, for both kinds of rows.
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
        guided = self.guided and labels is not None and takes_labels(self.network)
        v_average, u_null, u_own = v[n:], None, None
        if guided:
            u_null, u_own = self._guidance(z, t, labels, n, drop)
            v_average = self._guided_velocity(v_average, u_null[n:], u_own, t[n:], drop[n:], labels[n:])
        labels = self.input_labels(labels, drop, z)
        along = v_average
        if self.direction == "prediction" and guided:
            along = self._direction(u_null[n:], u_own, drop[n:])
        elif self.direction == "prediction" and n < len(rows):
            with torch.no_grad():
                along = self.network(z[n:], t[n:], t[n:], None if labels is None else labels[n:])
        u, change = self._with_change(z, t, r, labels, along, slice(n, None), progress)
        u, predicted = u if self.velocity_head else (u, u)  # the latter is of the velocity where r = t
        u_velocity, u_average = u.split([n, len(rows) - n])
        parts, targets = {}, []
        if n:
            target = v[:n]
            if guided:
                own = predicted[:n].detach()
                target = self._guided_velocity(target, u_null[:n], own, t[:n], drop[:n], labels[:n])
            parts["velocity"] = self._reduce(u_velocity.to(target.dtype) - target, t[:n])
            targets.append(target)
        if n < len(rows):
            parts["average"] = self._average_loss(u_average, v_average, change, t[n:], progress)
            targets.append(v_average)
        added = {}
        if self.velocity_head:
            targets = torch.cat(targets)
            added["velocity_head"] = self._reduce(predicted.to(targets.dtype) - targets, t)
        return self.combined(
            parts,
            v,
            added,
            x_t=z,
            t=t,
            s=r,
            labels=labels,
            F=u,
            n_velocity=n,
            rows=rows,
            progress=progress,
            seed=seed,
            step=step,
        )

    def _conditioned(self, labels, rows, n: int, seed, step) -> Tensor | None:
        """The labels with what else the network is told of each row; the first n rows train the velocity."""
        return labels

    def _direction(self, u_null, u_own, drop) -> Tensor:
        """Along which the derivative is taken of guided rows, where that is a prediction."""
        return torch.where(drop.view(-1, 1, 1, 1), u_null, u_own)

    def _guidance(self, z, t, labels, n: int, drop) -> tuple[Tensor, Tensor]:
        """``u(z,t,t,∅)`` of all rows and ``u(z,t,t,y)`` of those from n on, without gradient."""
        raise NotImplementedError

    def _guided_velocity(self, v, u_null, u_own, t, drop, labels) -> Tensor:
        """The velocity that rows train, of v and of both predictions."""
        raise NotImplementedError

    def _with_change(self, z, t, r, labels, v, rows: slice, progress) -> tuple[Tensor, Tensor]:
        """``u(z,t,r,y)`` of all rows, and ``(t−r) du/dt`` along ``(v, 1)`` of the given ones, without gradient."""
        u, derivative = self.with_derivative(z, t, r, labels, v, rows)
        return u, (t - r)[rows].view(-1, 1, 1, 1) * derivative

    def _average_loss(self, u, v, change, t, progress) -> LossOutput:
        return self._reduce(u.to(v.dtype) - (v - change), t)

    def _reduce(self, error: Tensor, t: Tensor) -> LossOutput:
        squares = error.square().flatten(1)
        total = squares.sum(1)
        weight = (total.detach() + self.eps).pow(-self.p)
        # of the mean, as mse is, so that weight times mse is the loss
        return LossOutput((weight * total).mean(), squares.detach().mean(1), weight * squares.shape[1], t)
