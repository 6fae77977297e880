"""What objectives with a derivative of the network in their target share: how that derivative is taken.

Shapes: B rows, b of them with a derivative, samples (B, C, H, W), times (B,).
"""

import torch
from torch import Tensor, nn

from soflow_fast import paths
from soflow_fast.kernels.coefficients import require_choice
from soflow_fast.layers import require_linear
from soflow_fast.objectives.base import NORMS_REMEDY, Objective, by_batch
from soflow_fast.require import require_range


class DerivativeObjective(Objective):
    """An objective that needs the total derivative of its network along the velocity of the path, s fixed.

    Arguments are those of :class:`~soflow_fast.objectives.meanflow.MeanFlow`; ``derivatives`` are those that a subclass
    can take.
    """

    derivatives: tuple[str, ...] = ("tangent", "jvp", "finite_difference")

    def __init__(
        self,
        net: nn.Module,
        *,
        path: str,
        label_drop: float,
        p: float,
        eps: float,
        velocity_share: float,
        time_mean: float,
        time_std: float,
        derivative: str,
        difference_step: float,
        impl: str | None,
    ):
        super().__init__(net, velocity_share, impl)
        require_choice("path", path, paths.PATHS)
        require_linear(net, path)
        require_choice("derivative", derivative, self.derivatives)
        require_range("label_drop", label_drop, 0, 1)
        for name, value in (("p", p), ("eps", eps), ("time_std", time_std)):
            require_range(name, value, 0, float("inf"))
        require_range("time_mean", time_mean, -float("inf"), float("inf"))  # not nan
        require_range("difference_step", difference_step, 1e-8, 0.1)
        if derivative == "jvp" and not hasattr(net, "jvp"):
            raise ValueError(
                f"derivative='jvp' needs a network with jvp; {type(net).__name__} has none: use derivative='tangent'"
            )
        self.path, self.label_drop, self.p, self.eps = path, label_drop, p, eps
        self.time_mean, self.time_std = time_mean, time_std
        self.derivative, self.difference_step = derivative, difference_step
        self.needs_float32 = derivative == "finite_difference"

    def prepare(self, x: Tensor, labels: Tensor | None) -> None:
        """Derives the difference forward of a network that has none; see the base class.

        Raises:
            ValueError: where it cannot be derived, and for a finite difference of two forwards of which each draws
                another dropout or has statistics of another batch.
        """
        if self.derivative == "finite_difference":
            self.require_subtractable(x, labels, "derivative='finite_difference'")
        if self.derivative in ("jvp", "finite_difference"):
            return
        try:
            self.derive(x, labels, self.derivative)
        except ValueError as error:
            remedy = "write the network's forward_difference, or use derivative='finite_difference'"
            if by_batch(self.network) is not None:  # with which that is no way out
                remedy = NORMS_REMEDY
            raise ValueError(
                f"derivative={self.derivative!r} needs a difference forward, and {error}; {remedy}"
            ) from error

    def with_derivative(self, x, t, s, labels, v, rows: slice) -> tuple[Tensor, Tensor]:
        """``F(x,t,s,y)`` of all rows (of two heads both outputs), and ``dF/dt`` along ``(v, 1)`` in (x, t) of the given
        ones, without gradient.
        """
        one = torch.ones_like(t[rows])
        if self.derivative == "tangent":
            return self.forward_difference(x, t, s, labels, v, one, rows=rows, mode="tangent")
        if self.derivative == "finite_difference":
            F, difference = self.two_forwards(x, t, s, labels, v, rows, self.difference_step * one)
            return F, difference / -self.difference_step
        F = self.trained_forward()(x, t, s, labels)
        with torch.no_grad():
            labels = None if labels is None else labels[rows]
            return F, self.network.jvp(x[rows], t[rows], s[rows], labels, v, one)[1]
