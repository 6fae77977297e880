"""One training step: loss, backward, optimizer, EMA."""

from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor, nn

from soflow_fast.ema import EMA
from soflow_fast.objectives.base import LossOutput
from soflow_fast.paths import row_order


class StepStats(NamedTuple):
    """What a step reports, on the device; reading a value on the host synchronises.

    Attributes:
        loss: 0-d. grad_norm: 0-d, global L2 norm before clipping. parts: the losses of the last micro-batch's parts.
        finite: 0-d bool, whether loss and grad_norm are; if not, the step was left out.
    """

    loss: Tensor
    grad_norm: Tensor
    parts: dict[str, LossOutput]
    finite: Tensor


class TrainStep:
    """``stats = step(x0, labels)``: one optimizer step of an objective.

    Every draw of step k depends on (seed, k, global row) alone, so a run can stop and go on, or be split over
    processes and micro-batches, without changing its numbers. Progress and the step live on the device.

    Where the loss or the gradient is not finite, a fused optimizer and the EMA stay as they were: decided on the
    device, so that no step waits for the host.

    Args:
        model: an objective such as :class:`~soflow_fast.SoFlow`, already on its device.
        optimizer: over ``model.parameters()``, best with ``fused=True``: only fused ones can leave a step out.
        ema: updated after each step, or None.
        total_steps: of the run; progress is step/total_steps. seed: of all draws.
        accumulation: micro-batches per step; it divides the batch. grad_clip: largest global gradient norm, or None.
        latent_scale: x0 holds latent moments (B, 2C, H, W), see
            :func:`soflow_fast.kernels.reference.noisy_sample`; None: x0 are samples.
        rank, world_size: this process holds rows ``rank·B .. (rank+1)·B-1`` of the global batch.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: torch.optim.Optimizer,
        ema: EMA | None = None,
        total_steps: int,
        seed: int = 0,
        accumulation: int = 1,
        grad_clip: float | None = None,
        latent_scale: float | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.model, self.optimizer, self.ema = model, optimizer, ema
        self.total_steps, self.seed, self.accumulation = total_steps, seed, accumulation
        self.grad_clip, self.latent_scale = grad_clip, latent_scale
        self.rank, self.world_size = rank, world_size
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.step = torch.zeros((), dtype=torch.int64, device=self._parameters[0].device)
        self._orders: dict[int, list[tuple[Tensor, Tensor, int]]] = {}

    def __call__(self, x0: Tensor, labels: Tensor | None = None) -> StepStats:
        """One step.

        Args:
            x0: (B, C, H, W) this process's rows of the global batch, in their global order. labels: (B,) int64 or None.
        """
        progress = (self.step.float() / self.total_steps).clamp(max=1)
        total = torch.zeros((), device=self.step.device)
        for order, rows, n_velocity in self._row_orders(x0.shape[0]):
            out = self.model.loss_of_rows(
                x0[order],
                None if labels is None else labels[order],
                rows,
                n_velocity,
                progress,
                self.seed,
                self.step,
                self.latent_scale,
            )
            (out.loss / self.accumulation).backward()
            total += out.loss.detach() / self.accumulation
        limit = float("inf") if self.grad_clip is None else self.grad_clip
        grad_norm = nn.utils.clip_grad_norm_(self._parameters, limit)
        finite = torch.isfinite(total) & torch.isfinite(grad_norm)
        # the protocol by which torch's GradScaler tells a fused optimizer to leave a step out
        self.optimizer.grad_scale, self.optimizer.found_inf = None, 1 - finite.float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(finite)
        self.step += 1
        return StepStats(total, grad_norm, out.parts, finite)

    def _row_orders(self, batch: int) -> list[tuple[Tensor, Tensor, int]]:
        """For each micro-batch: offsets into the rows, velocity first; their global rows; how many are velocity."""
        if batch not in self._orders:
            if batch % self.accumulation:
                raise ValueError(f"accumulation={self.accumulation} does not divide the batch of {batch} rows")
            n, device, share = batch // self.accumulation, self.step.device, self.model.velocity_share
            firsts = range(0, batch * self.world_size, n)
            counts = {row_order(n, share, first)[1] for first in firsts}
            if len(counts) > 1:
                raise ValueError(
                    f"batches of {n} rows do not all hold the same number of velocity rows at velocity_share={share}; "
                    f"choose a batch per process and micro-batch that is a multiple of {_period(share)}"
                )
            orders = []
            for micro in range(self.accumulation):
                first = self.rank * batch + micro * n
                order, n_velocity = row_order(n, share, first)
                order = torch.tensor(order, device=device)
                orders.append((micro * n + order, first + order, n_velocity))
            self._orders[batch] = orders
        return self._orders[batch]


def _period(share: float) -> int:
    """After how many rows the pattern of velocity and consistency rows repeats."""
    return Fraction(share).limit_denominator(10**6).denominator
