"""Solution Flow Models (arXiv 2512.15657): velocity loss plus solution consistency loss, no Jacobian-vector product.

Shapes: B rows (samples), n rows of one loss; samples are (B, C, H, W), times (B,). Always ``0 <= s <= l < t <= 1``.
"""

import logging
from typing import NamedTuple

import torch
from torch import Tensor, nn

from soflow_fast import paths
from soflow_fast.conditions import takes_labels
from soflow_fast.kernels.coefficients import require_choice
from soflow_fast.kernels.reference import Stream
from soflow_fast.layers import require_linear
from soflow_fast.objectives.base import (
    NORMS_REMEDY,
    LossOutput,
    Objective,
    TotalLoss,
    by_batch,
    require_null_label,
)
from soflow_fast.require import require_range

_log = logging.getLogger(__name__)

QUOTIENTS = ("difference", "two_forwards", "tangent")

# The smallest distances of t from 0 and of s from t, as in the published code.
_MIN_TIME = 1e-4


class Times(NamedTuple):
    """The drawn times of one batch, velocity rows first: t (B,), and s, gap = t−l of the consistency rows, (n_c,)."""

    t: Tensor
    s: Tensor
    gap: Tensor


class SoFlow(Objective):
    """The solution flow objective over any network ``F = net(x, t, s, labels)``.

    ``f(x,t,s) = a(t,s) x + b(t,s) F(x,t,s)`` carries a sample from time t to time s; ``x_0 = f(ε,1,0)`` is a one-step
    sample. The state_dict holds the network alone, under ``network.``.

    Besides what :class:`~soflow_fast.objectives.base.Objective` names, a subclass may override :meth:`gap_ratio` (the
    schedule of the gap), :meth:`draw_times` (the draws of the times), :meth:`data_velocity` (the velocity that is
    regressed, such as a teacher's) and :meth:`row_weight` (a weight of each row).

    Args:
        net: module with ``net(x, t, s, labels)`` and ``net.num_classes``, the index that means "no label"; or with
            ``net.null_condition``, see :mod:`soflow_fast.conditions`.
        path: ``linear`` or ``trig``. parameterization: ``euler`` or ``trig``.
        guidance_scale: ω; 1 is no guidance. guidance_mix: m in [0, 1]. guidance_decay_time: τ, no decay from 1 on.
        label_drop: share of rows trained without label, see :mod:`soflow_fast.dropping`.
        p, eps: the adaptive weight ``(error + eps)^(−p)``.
        velocity_share: share of rows that train the velocity; the rest train the consistency.
        time_mean, time_std: of the logit-normal draws, in the order velocity t, consistency s, consistency t.
        gap_schedule, gap_init, gap_end: r(k), see :func:`soflow_fast.paths.gap_ratio`.
        min_gap: the smallest ``t−l`` (never more than ``t−s``); 0 only with the difference forward.
        quotient: ``difference`` carries ``F(x_l,l,s) − F(x_t,t,s)`` through the network without cancellation, by its
            ``forward_difference`` or one derived from its operators, see :mod:`soflow_fast.differencing`. Where that is
            not possible, it takes two forwards in float32, and a warning says why. ``two_forwards`` subtracts two
            outputs; ``tangent`` is the limit of a gap of 0.
        impl: of the reductions; by default the network's own, see :func:`soflow_fast.kernels.resolve_impl`.

    Raises:
        ValueError: for a value outside its range, or for guidance without a "no label" row to guide with.
    """

    def __init__(
        self,
        net: nn.Module,
        path: str = "linear",
        parameterization: str = "euler",
        guidance_scale: float = 3.0,
        guidance_mix: float = 0.25,
        guidance_decay_time: float = 0.8,
        label_drop: float = 0.1,
        p: float = 1.0,
        eps: float = 0.01,
        velocity_share: float = 0.75,
        time_mean: tuple[float, float, float] = (-0.2, -1.0, 0.2),
        time_std: tuple[float, float, float] = (1.0, 0.8, 0.8),
        gap_schedule: str = "exponential",
        gap_init: float = 0.1,
        gap_end: float = 0.002,
        min_gap: float = 1e-4,
        quotient: str = "difference",
        impl: str | None = None,
    ):
        super().__init__(net, velocity_share, impl)
        require_choice("path", path, paths.PATHS)
        require_choice("parameterization", parameterization, paths.PARAMETERIZATIONS)
        require_choice("gap_schedule", gap_schedule, paths.GAP_SCHEDULES)
        require_choice("quotient", quotient, QUOTIENTS)
        own = {"guidance_scale": guidance_scale, "guidance_decay_time": guidance_decay_time, "p": p, "eps": eps}
        for name, value in own.items():
            require_range(name, value, 0, float("inf"))
        require_range("guidance_mix", guidance_mix, 0, 1)
        require_range("label_drop", label_drop, 0, 1)
        for name, value in (("gap_init", gap_init), ("gap_end", gap_end)):
            if not 0 < value <= 1:
                raise ValueError(f"{name}={value} is outside (0, 1]: it is the gap t−l as a share of t−s")
        for name, values in (("time_mean", time_mean), ("time_std", time_std)):
            if len(values) != 3:
                raise ValueError(f"{name}={tuple(values)} needs 3 numbers: velocity t, consistency s, consistency t")
        for mean, std in zip(time_mean, time_std, strict=True):
            require_range("time_mean", mean, -float("inf"), float("inf"))  # not nan
            require_range("time_std", std, 0, float("inf"))
        require_range("min_gap", min_gap, 0, 1)
        require_linear(net, path, parameterization)
        require_null_label(net, f"guidance_scale={guidance_scale}" if guidance_scale != 1 else None, label_drop)
        if min_gap == 0 and quotient == "two_forwards":
            raise ValueError(
                "min_gap=0 divides rounding error by nothing when the quotient takes two forwards; "
                "use quotient='difference' or min_gap=1e-4"
            )
        self.path, self.parameterization, self.quotient = path, parameterization, quotient
        self._subtracts = quotient == "two_forwards"
        # why there is no difference forward, by mode and shape; copies of this, as of a validation, share it
        self._underivable: dict[tuple[bool, torch.Size], str] = {}
        self.guidance_scale, self.guidance_mix = guidance_scale, guidance_mix
        self.guidance_decay_time, self.label_drop = guidance_decay_time, label_drop
        self.p, self.eps = p, eps
        self.time_mean, self.time_std = tuple(time_mean), tuple(time_std)
        self.gap_schedule, self.gap_init, self.gap_end, self.min_gap = gap_schedule, gap_init, gap_end, min_gap

    # ------------------------------------------------------------------------------------------------ the model

    def velocity(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The model's velocity ``v̂(x,t,y) = ∂_s b·F(x,t,t,y)``; shapes as :meth:`solution`."""
        return paths.velocity_scale(self.parameterization) * self.call_network(x, t, t, labels)

    def solution(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        """``f(x,t,s,y) = a x + b F``; see the base class."""
        a, b = (c.view(-1, 1, 1, 1) for c in paths.solution_coefficients(t, s, self.parameterization))
        return a * x + b * self.call_network(x, t, s, labels)

    def prepare(self, x: Tensor, labels: Tensor | None) -> None:
        """Derives the difference forward of a network that has none; see the base class.

        Raises:
            ValueError: for two forwards of which each draws another dropout or has statistics of another batch; and
                where the difference forward cannot be derived and two forwards are no way out.
        """
        form = self.network.training, x.shape
        if form in self._underivable:
            self._subtracts = self.needs_float32 = True
        if self._subtracts:
            self.require_subtractable(x, labels, "quotient='two_forwards'")
            return
        try:
            self.derive(x, labels, self.quotient)
        except ValueError as error:
            norm = by_batch(self.network)
            if norm is not None:
                raise ValueError(
                    f"the network's {norm} takes the statistics of a batch, with which two forwards differ at any gap, "
                    f"and {error}; {NORMS_REMEDY}"
                ) from error
            if self.quotient == "tangent" or self.min_gap == 0:
                needs = "quotient='tangent'" if self.quotient == "tangent" else "min_gap=0"
                raise ValueError(
                    f"{needs} needs a difference forward, and {error}; write the network's forward_difference, or "
                    "use quotient='two_forwards' with min_gap=1e-4"
                ) from error
            if self.network_draws(x, labels):
                raise ValueError(
                    f"the network draws random numbers, with which two forwards differ at any gap, and {error}; turn "
                    "its dropout off"
                ) from error
            if str(error) not in self._underivable.values():
                _log.warning("the consistency quotient takes two forwards in float32: %s", error)
            self._underivable[form] = str(error)
            self._subtracts = self.needs_float32 = True

    # --------------------------------------------------------------------------------------------------- losses

    def velocity_loss(
        self, x0: Tensor, noise: Tensor, t: Tensor, labels: Tensor | None, drop: Tensor | None = None
    ) -> LossOutput:
        """Velocity (flow matching) loss; every random draw is an argument.

        Args:
            x0, noise: (n, C, H, W). t: (n,) in (0, 1). labels: (n,) int64 or None. drop: (n,) bool, the rows trained
                without label; None is none.
        """
        x_t, v_t = self.ops.interpolate(x0, noise, t, path=self.path)
        return self._velocity_loss(x_t, self._regressed(x_t, v_t, t, labels), t, labels, drop)

    def consistency_loss(
        self,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        l: Tensor | None,
        s: Tensor,
        labels: Tensor | None,
        drop: Tensor | None = None,
        *,
        gap: Tensor | None = None,
    ) -> LossOutput:
        """Solution consistency loss; every random draw is an argument.

        Args:
            x0, noise: (n, C, H, W). t, l, s: (n,), ``s <= l < t``. labels, drop: as in :meth:`velocity_loss`.
            gap: (n,) ``t−l``, instead of l: exact where l would round to t.
        """
        if (l is None) == (gap is None):
            raise ValueError("consistency_loss takes exactly one of l and gap")
        x_t, v_t = self.ops.interpolate(x0, noise, t, path=self.path)
        v_t = self._regressed(x_t, v_t, t, labels)
        return self._consistency_loss(x_t, v_t, t, t - l if gap is None else gap, s, labels, drop)

    def loss_of_rows(
        self,
        x0: Tensor,
        labels: Tensor | None,
        rows: Tensor,
        n_velocity: int,
        progress: float | Tensor,
        seed: int | Tensor,
        step: int | Tensor,
        latent_scale: float | None = None,
    ) -> TotalLoss:
        """Both losses, ``loss_v·n_v/B + loss_c·n_c/B``; see the base class.

        There are two network calls: one without gradient for all of the guidance, and one with gradient for both
        losses, whose consistency rows carry the difference (``two_forwards`` adds one on these).
        """
        times = self.draw_times(rows, n_velocity, progress, seed, step)
        if x0.dtype == torch.float64:
            times = Times(*(z.double() for z in times))
        drop = self.draw_drop(rows, labels, seed, step)
        x_t, v_path = self.ops.noisy_sample(
            x0, times.t, rows, seed=seed, step=step, path=self.path, latent_scale=latent_scale
        )
        v_t = self._regressed(x_t, v_path, times.t, labels)
        (t, s, gap), n = times, n_velocity
        x_c, t_c, v = x_t[n:], t[n:], v_t[n:]
        F_null = None
        if self._guided(labels):
            F_null, F_own = self.guidance_outputs(x_t, t, labels, n, drop)
            v = self._target_velocity(v, F_null[n:], F_own, t_c, drop[n:])
            F_null = F_null[:n]
        labels = self.input_labels(labels, drop, x_t)
        s_all = torch.cat([t[:n], s])
        if not len(s):
            F, dF = self.network(x_t, t, s_all, labels), None
        else:
            F, dF = self._with_difference(x_t, t, s_all, labels, v, gap, slice(n, None))
        F_v, F_c = F.split([n, len(s)])
        parts = {}
        if n:
            parts["velocity"] = self._reduce_velocity(F_v, v_t[:n], F_null, t[:n], drop[:n])
        if len(s):
            parts["consistency"] = self._reduce_consistency(F_c, dF, v, x_c, t_c, gap, s)
        return self.combined(
            parts,
            v_path,
            x_t=x_t,
            t=t,
            s=s_all,
            labels=labels,
            F=F,
            n_velocity=n,
            rows=rows,
            progress=progress,
            seed=seed,
            step=step,
        )

    def draw_times(
        self, rows: Tensor, n_velocity: int, progress: float | Tensor, seed: int | Tensor, step: int | Tensor
    ) -> Times:
        """The times of a batch, float32; ``gap = max(r(k)(t−s), min_gap)``, at most ``t−s``."""
        z = self.ops.normal(rows, 2, seed=seed, step=step, stream=Stream.TIMES)
        velocity_t = paths.logit_normal(z[:n_velocity, 0], self.time_mean[0], self.time_std[0])
        t = paths.logit_normal(z[n_velocity:, 0], self.time_mean[2], self.time_std[2]).clamp(min=_MIN_TIME)
        s = paths.logit_normal(z[n_velocity:, 1], self.time_mean[1], self.time_std[1])
        s = torch.minimum(s, t - _MIN_TIME)
        ratio = torch.as_tensor(self.gap_ratio(progress)).to(t)
        gap = torch.minimum(((t - s) * ratio).clamp(min=self.min_gap), t - s)
        return Times(torch.cat([velocity_t, t]), s, gap)

    def gap_ratio(self, progress: float | Tensor) -> Tensor:
        """``r(k)``, the gap t−l as a share of t−s: 0-d, in (0, 1]; of a tensor progress, which is not read."""
        return paths.gap_ratio(progress, self.gap_schedule, self.gap_init, self.gap_end)

    def data_velocity(self, x_t: Tensor, v_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """The velocity that is regressed, before guidance is mixed in: v_t, that of the path. Called without gradient.

        Args:
            x_t, v_t: (n, C, H, W). t: (n,). labels: (n,) int64 or (n, ...) conditions, none of them dropped, or None.

        Returns:
            (n, C, H, W).
        """
        return v_t

    def row_weight(self, t: Tensor, s: Tensor) -> Tensor | None:
        """What each row's loss is multiplied by, beside its adaptive weight; None is 1.

        Args:
            t, s: (n,), equal on rows that train the velocity.

        Returns:
            (n,) or None.
        """
        return None

    def _weighted(self, loss, mse, weight, t, s) -> LossOutput:
        own = self.row_weight(t, s)
        if own is not None:
            loss, weight = loss * own, weight * own.detach()
        return LossOutput(loss.mean(), mse, weight, t)

    @torch.no_grad()
    def _regressed(self, x_t, v_t, t, labels) -> Tensor:
        return self.data_velocity(x_t, v_t, t, labels).to(v_t.dtype)

    def _guided(self, labels: Tensor | None) -> bool:
        return labels is not None and self.guidance_scale != 1 and takes_labels(self.network)

    def _null_output(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.guidance_forward(x_t, t, self.no_label(labels))

    def _guidance(self) -> dict:
        return {
            "parameterization": self.parameterization,
            "guidance_scale": self.guidance_scale,
            "guidance_mix": self.guidance_mix,
            "decay_time": self.guidance_decay_time,
        }

    def _velocity_loss(self, x_t, v_t, t, labels, drop) -> LossOutput:
        F_null = self._null_output(x_t, t, labels) if self._guided(labels) else None
        F = self.network(x_t, t, t, self.input_labels(labels, drop, x_t))
        return self._reduce_velocity(F, v_t, F_null, t, drop)

    def _reduce_velocity(self, F, v_t, F_null, t, drop) -> LossOutput:
        drop = torch.zeros_like(t, dtype=torch.bool) if drop is None else drop
        loss, mse, weight = self.ops.velocity_loss(F, v_t, F_null, t, drop, **self._guidance(), p=self.p, eps=self.eps)
        return self._weighted(loss, mse, weight, t, t)

    def _target_velocity(self, v_t, F_null, F_own, t, drop) -> Tensor:
        drop = torch.zeros_like(t, dtype=torch.bool) if drop is None else drop
        return self.ops.guided_velocity(v_t, F_null, F_own, t, drop, **self._guidance())

    def _consistency_loss(self, x_t, v_t, t, gap, s, labels, drop) -> LossOutput:
        v = v_t
        if self._guided(labels):
            F_null = self._null_output(x_t, t, labels)
            F_own = self.guidance_forward(x_t, t, labels)
            v = self._target_velocity(v_t, F_null, F_own, t, drop)
        labels = self.input_labels(labels, drop, x_t)
        F, dF = self._with_difference(x_t, t, s, labels, v, gap)
        return self._reduce_consistency(F, dF, v, x_t, t, gap, s)

    def _with_difference(self, x_t, t, s, labels, v, gap, rows=slice(None)) -> tuple[Tensor, Tensor]:
        """``F(x_t,t,s)``, and of the given rows ``F(x_l,l,s) − F(x_t,t,s)`` (tangent: its limit over the gap)."""
        if not torch.compiler.is_compiling():
            self.prepare(x_t[rows], labels)
        if not self._subtracts:
            step = torch.ones_like(gap) if self.quotient == "tangent" else gap
            dx = -step.view(-1, 1, 1, 1) * v
            return self.forward_difference(x_t, t, s, labels, dx, -step, rows=rows, mode=self.quotient)
        return self.two_forwards(x_t, t, s, labels, v, rows, gap)

    def _reduce_consistency(self, F, dF, v, x_t, t, gap, s) -> LossOutput:
        loss, mse, weight = self.ops.consistency_loss(
            F,
            dF,
            v,
            x_t,
            t,
            gap,
            s,
            parameterization=self.parameterization,
            p=self.p,
            eps=self.eps,
            tangent=self.quotient == "tangent",
        )
        return self._weighted(loss, mse, weight, t, s)
