"""α-Flow (Zhang et al. 2025, arXiv 2510.20771): a curriculum from flow matching to MeanFlow.

The average velocity ``u(z,t,r)`` learns ``α v + (1−α) u(z_h, t−h, r)``, where ``z_h = z − h v`` lies a share α of the
way down, ``h = α (t−r)``: flow matching at α = 1, and MeanFlow in the limit of α = 0. Shapes as in MeanFlow.
"""

import torch
from torch import Tensor, nn

from soflow_fast.objectives.base import LossOutput
from soflow_fast.objectives.meanflow import MeanFlow
from soflow_fast.require import require_range


class AlphaFlow(MeanFlow):
    """The α-Flow objective over any network ``F = net(x, t, s, labels)``.

    The rows with r = t train the velocity, as in MeanFlow, at a time of one draw instead of the larger of two. On the
    others the error is ``e = u − target`` with

        α > 0:  e = α (u − v_g − (1−α) Q),  Q = (u(z_h, t−h, r) − u) / α
        α = 0:  e = u − v_g − Q,            Q by a step of ``difference_step (t−r)``, instead of −(t−r) du/dt

    The network carries ``u(z_h, t−h, r) − u`` itself, so that Q is exact at every step: one compiled form serves the
    whole curriculum, where published code takes two forwards and changes to a Jacobian-vector product at its end. Loss
    of a row ``w mean(e²)/(mean(e²)+eps)^p``, the mean over the sample, with w = α where α > 0 and else 1.

    α falls from 1 to 0 over ``alpha_interval`` as ``1 − sigmoid(steepness (x − ½))``, x the share of it that is over;
    nearer than ``alpha_clamp`` to 0 or 1 it is 0 or 1. Two differences from published code: rows that drop their label
    are never guided, as in MeanFlow's paper, and labels are dropped at all times, not within the guidance interval.

    The defaults are those published for B/2 with guidance; for XL/2 they are guidance_scale 0.2, guidance_mix 0.92,
    guidance_interval (0, 0.75), velocity_share 0.5, alpha_interval (0.5, 0.8333), target_clip 4.

    Args:
        net, path, guidance_scale, guidance_mix, guidance_interval, label_drop, time_mean, time_std: as in
            :class:`~soflow_fast.objectives.meanflow.MeanFlow`.
        p, eps: the adaptive weight. velocity_share: share of rows with r = t.
        alpha_interval: of the training's progress. alpha_steepness, alpha_clamp: of the sigmoid.
        target_clip: bound of every element of the target where α > 0, if there is one.
        derivative: ``difference``, by the difference forward; ``finite_difference``, by a second forward, in float32.
        difference_step: the shortest step, as a share of t−r.

    Raises:
        ValueError: for a value outside its range, or for guidance without a "no label" row to guide with.
    """

    derivatives = ("difference", "finite_difference")

    def __init__(
        self,
        net: nn.Module,
        path: str = "linear",
        guidance_scale: float = 1.0,
        guidance_mix: float = 0.5,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        label_drop: float = 0.1,
        p: float = 1.0,
        eps: float = 0.001,
        velocity_share: float = 0.25,
        time_mean: float = -0.4,
        time_std: float = 1.0,
        alpha_interval: tuple[float, float] = (0.0, 1.0),
        alpha_steepness: float = 25.0,
        alpha_clamp: float = 0.005,
        target_clip: float | None = None,
        derivative: str = "difference",
        difference_step: float = 1e-3,
        impl: str | None = None,
    ):
        super().__init__(
            net,
            path=path,
            guidance_scale=guidance_scale,
            guidance_mix=guidance_mix,
            guidance_interval=guidance_interval,
            label_drop=label_drop,
            p=p,
            eps=eps,
            velocity_share=velocity_share,
            time_mean=time_mean,
            time_std=time_std,
            derivative=derivative,
            difference_step=difference_step,
            impl=impl,
        )
        if len(alpha_interval) != 2 or not 0 <= alpha_interval[0] < alpha_interval[1] <= 1:
            raise ValueError(
                f"alpha_interval={tuple(alpha_interval)} is not an interval of the training's progress; give (start, "
                "end) with 0 <= start < end <= 1"
            )
        require_range("alpha_clamp", alpha_clamp, 0, 0.5)
        require_range("alpha_steepness", alpha_steepness, 0, float("inf"))
        if target_clip is not None and not target_clip > 0:
            raise ValueError(f"target_clip={target_clip} must be greater than 0, or None for no bound")
        self.alpha_interval, self.alpha_steepness = tuple(alpha_interval), alpha_steepness
        self.alpha_clamp, self.target_clip = alpha_clamp, target_clip

    def alpha(self, progress: float | Tensor) -> Tensor:
        """α at a progress of the training in [0, 1]: a 0-d tensor, float32 (the dtype of a tensor progress)."""
        k = torch.as_tensor(progress, dtype=None if torch.is_tensor(progress) else torch.float32)
        start, end = self.alpha_interval
        x = (k - start) / (end - start)
        alpha = torch.sigmoid(self.alpha_steepness * (0.5 - x))
        alpha = torch.where((x < 0) | (alpha > 1 - self.alpha_clamp), 1.0, alpha)
        return torch.where((x > 1) | (alpha < self.alpha_clamp), 0.0, alpha)

    def draw_times(
        self, rows: Tensor, n_velocity: int, seed: int | Tensor, step: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """As MeanFlow's, but on the first ``n_velocity`` rows the first of the two draws, not the larger."""
        pair = self.time_pairs(rows, seed, step)
        first, others = pair[:n_velocity, 0], pair[n_velocity:]
        return torch.cat([first, others.amax(1)]), torch.cat([first, others.amin(1)])

    def _with_change(self, z, t, r, labels, v, rows: slice, progress) -> tuple[Tensor, Tensor]:
        share = self.alpha(progress).to(t).clamp(min=self.difference_step)
        step = share * (t - r)[rows]
        if self.derivative == "finite_difference":
            u, difference = self.two_forwards(z, t, r, labels, v, rows, step)
        else:
            dz = -step.view(-1, 1, 1, 1) * v
            u, difference = self.forward_difference(z, t, r, labels, dz, -step, rows=rows, mode="difference")
        return u, difference / -share

    def _average_loss(self, u, v, change, t, progress) -> LossOutput:
        alpha = self.alpha(progress).to(t)
        weight = torch.where(alpha > 0, alpha, 1.0)
        u = u.to(v.dtype)
        fixed = u.detach()
        rest = torch.where(alpha < 1, (1 - alpha) * change, 0.0)  # also of one that overflowed
        error = weight * (fixed - v + rest)
        if self.target_clip is not None:
            target = fixed - error
            excess = target - target.clamp(-self.target_clip, self.target_clip)
            error = torch.where(alpha > 0, error + excess, error)
        return self._reduce(error + (u - fixed), t, weight)

    def _reduce(self, error: Tensor, t: Tensor, numerator: float | Tensor = 1.0) -> LossOutput:
        mse = error.square().flatten(1).mean(1)
        weight = numerator * (mse.detach() + self.eps).pow(-self.p)
        return LossOutput((weight * mse).mean(), mse.detach(), weight, t)
