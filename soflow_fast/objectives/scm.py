"""Consistency training in continuous time, sCT (Lu & Song 2024, arXiv 2410.11081), also called sCM.

TrigFlow: with the angle ``τ = πt/2`` and noise of the data's own deviation, ``x_t = cos τ x_0 + sin τ ε``, and the data
that a sample stands for is ``f(x,t) = cos τ x − sin τ F(x,t,s=0)``, which is x at t = 0. It is to stay the same along
the path: F moves along ``cos τ df/dτ``. Shapes: B rows, samples (B, C, H, W), times (B,) in [0, 1].
"""

import math

import torch
from torch import Tensor, nn

from soflow_fast import paths
from soflow_fast.kernels.reference import Stream
from soflow_fast.objectives.base import LossOutput, TotalLoss, require_null_label
from soflow_fast.objectives.derivative import DerivativeObjective
from soflow_fast.require import require_range

_HALF_PI = math.pi / 2


class SCM(DerivativeObjective):
    """The objective sCT over any network ``F = net(x, t, s, labels)``, called at s = 0 alone.

    Algorithm 1 of the paper, F⁻ being F without gradient:

        g = −cos² τ (F⁻ − dx/dτ) − r cos τ sin τ (x + dF⁻/dτ),   g ← g / (‖g‖ + norm_constant)

    The derivative is the total one along ``(dx/dτ, 1)`` in (x, τ), by default the difference forward's limit: no
    Jacobian-vector product, so that attention, precision and compilation are those of any other step. r rises from 0,
    which trains F as a velocity, to 1 over ``tangent_warmup``. Loss of a row ``w mean((F − F⁻ − g)²)``, with
    ``w = (mean(g²) + eps)^−p``. As g is normalised the loss says little; what its part reports as the error is
    ``mean(g²)`` before that, with r = 1 that of ``cos τ df/dτ``.

    Differences from the paper: the warm-up is a share of the training, and long: the paper's is of 10,000 steps, of a
    network that starts as a trained diffusion model. ``‖g‖`` is the root of the mean square over the sample, so that
    norm_constant means the same for samples of every size; Algorithm 1 has the norm, public code either. Left out are
    the learned weight ``e^w(t)``, whose optimum is one over the mean error at a time, as p = 1 is one over the error of
    a row (both favour times near 1, where g is small, and trained from nothing on digits p = 1 was much worse than 0);
    distillation (sCD); guidance, which needs a velocity of the network, and here none is trained; and the rearranged
    derivative, which keeps float16 from overflowing, as bfloat16 does not.

    Args:
        net: as for :class:`~soflow_fast.SoFlow`.
        label_drop: share of rows trained without label, see :mod:`soflow_fast.dropping`. p, eps: of w.
        time_mean, time_std: of the normal log σ; ``tan τ = σ / sigma_data``.
        sigma_data: the standard deviation of the data where the noise has σ. Samples are used as they are, beside noise
            of deviation 1: those of deviation 1 have the published times with the published 0.5.
        tangent_warmup: share of the training after which r is 1; 0 for at once, as from weights that are trained.
        norm_constant: greater than 0.
        derivative, difference_step: as in :class:`~soflow_fast.objectives.meanflow.MeanFlow`. impl: of the fused ops.

    Raises:
        ValueError: for a value outside its range.
    """

    def __init__(
        self,
        net: nn.Module,
        label_drop: float = 0.1,
        p: float = 0.0,
        eps: float = 0.01,
        time_mean: float = -1.0,
        time_std: float = 1.4,
        sigma_data: float = 0.5,
        tangent_warmup: float = 0.5,
        norm_constant: float = 0.1,
        derivative: str = "tangent",
        difference_step: float = 1e-3,
        impl: str | None = None,
    ):
        super().__init__(
            net,
            path="trig",
            label_drop=label_drop,
            p=p,
            eps=eps,
            velocity_share=0.0,
            time_mean=time_mean,
            time_std=time_std,
            derivative=derivative,
            difference_step=difference_step,
            impl=impl,
        )
        require_range("tangent_warmup", tangent_warmup, 0, 1)
        for name, value, published in (("sigma_data", sigma_data, 0.5), ("norm_constant", norm_constant, 0.1)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}={value} must be a number greater than 0, such as the published {published}")
        require_null_label(net, None, label_drop)
        self.sigma_data, self.tangent_warmup, self.norm_constant = sigma_data, tangent_warmup, norm_constant

    def solution(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        """``cos(τ−σ) x − sin(τ−σ) F(x,t,s,y)``, σ = πs/2, of which s = 0 is trained; see the base class."""
        a, b = (c.view(-1, 1, 1, 1) for c in paths.solution_coefficients(t, s, "trig"))
        return a * x + b * self.call_network(x, t, s, labels)

    def draw_times(self, rows: Tensor, seed: int | Tensor, step: int | Tensor) -> Tensor:
        """(B,) float32 in (0, 1), ``2/π arctan(σ / sigma_data)``."""
        z = self.ops.normal(rows, 1, seed=seed, step=step, stream=Stream.TIMES)[:, 0]
        return torch.atan(torch.exp(self.time_mean + self.time_std * z) / self.sigma_data) / _HALF_PI

    def warmup(self, progress: float | Tensor) -> Tensor:
        """r at a progress of the training in [0, 1]: a 0-d tensor, float32 (the dtype of a tensor progress)."""
        k = torch.as_tensor(progress, dtype=None if torch.is_tensor(progress) else torch.float32)
        return (k / self.tangent_warmup).clamp(max=1) if self.tangent_warmup else torch.ones_like(k)

    def tangent(self, x: Tensor, t: Tensor, v: Tensor, F: Tensor, dF: Tensor, progress: float | Tensor) -> Tensor:
        """g before it is normalised.

        Args:
            x, F: (B, C, H, W) samples and the network's output for them. t: (B,). v, dF: (B, C, H, W), their
                derivatives by t, not by τ. progress: of the training.

        Returns:
            (B, C, H, W), dtype of v.
        """
        cos, sin, _, _ = (c.to(v.dtype).view(-1, 1, 1, 1) for c in paths.path_coefficients(t, "trig"))
        r, F, dF = self.warmup(progress).to(v), F.to(v.dtype), dF.to(v.dtype)
        return -cos * (cos * (F - v / _HALF_PI) + r * sin * (x + dF / _HALF_PI))

    def loss_of_rows(self, x0, labels, rows, n_velocity, progress, seed, step, latent_scale=None) -> TotalLoss:
        """The loss, its one part "consistency", of one network call that carries the derivative; see the base class.

        Raises:
            ValueError: for rows that train the velocity, of which there are none.
        """
        if n_velocity:
            raise ValueError(f"n_velocity={n_velocity}, and SCM has no rows that train the velocity; give 0")
        t = self.draw_times(rows, seed, step)
        if x0.dtype == torch.float64:
            t = t.double()
        drop = self.draw_drop(rows, labels, seed, step)
        x, v = self.ops.noisy_sample(x0, t, rows, seed=seed, step=step, path=self.path, latent_scale=latent_scale)
        if not torch.compiler.is_compiling():
            self.prepare(x, labels)
        labels, s = self.input_labels(labels, drop, x), torch.zeros_like(t)
        F, dF = self.with_derivative(x, t, s, labels, v, slice(None))
        g = self.tangent(x, t, v, F.detach(), dF, progress)
        return self.combined(
            {"consistency": self._reduce(F.to(v.dtype), g, t)},
            v,
            x_t=x,
            t=t,
            s=s,
            labels=labels,
            F=F,
            n_velocity=0,
            rows=rows,
            progress=progress,
            seed=seed,
            step=step,
        )

    def _reduce(self, F: Tensor, g: Tensor, t: Tensor) -> LossOutput:
        norm = g.square().flatten(1).mean(1).sqrt()
        scale = 1 / (norm + self.norm_constant)
        error = F - F.detach() - scale.view(-1, 1, 1, 1) * g
        mse = error.square().flatten(1).mean(1)
        weight = (mse.detach() + self.eps).pow(-self.p)
        return LossOutput((weight * mse).mean(), norm.square(), weight * scale.square(), t)
