"""The ways of training that soflow-fast is compared with, as objectives for the same step.

Published SoFlow code runs in float32 with TensorFloat-32 products. The simple ways to run it in low precision keep the
quotient usable by raising the precision of the consistency pair, by float16 with a loss scale, or by a larger gap.
Published MeanFlow code in PyTorch takes its Jacobian-vector product through math attention on all rows.
"""

import torch
from torch import Tensor

from soflow_fast import SoFlow
from soflow_fast.objectives.base import TotalLoss
from soflow_fast.objectives.meanflow import MeanFlow
from soflow_fast.optim import AdamW


class Fp32PairSoFlow(SoFlow):
    """Low precision by the network's ``compute_dtype``, but both forwards of the consistency pair in float32."""

    def _with_difference(self, *arguments):
        low, self.network.compute_dtype = self.network.compute_dtype, torch.float32
        try:
            return super()._with_difference(*arguments)
        finally:
            self.network.compute_dtype = low


class ScaledLossSoFlow(SoFlow):
    """The loss times a scale on the device, for float16; :class:`ScaledAdamW` divides it out and adapts it."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        device = next(self.network.parameters()).device
        self.register_buffer("scale", torch.tensor(2.0**14, device=device), persistent=False)

    def loss_of_rows(self, *arguments, **keywords) -> TotalLoss:
        out = super().loss_of_rows(*arguments, **keywords)
        return out._replace(loss=out.loss * self.scale)


class ScaledAdamW(AdamW):
    """As torch's GradScaler: half the scale after an overflow, twice the scale after ``growth`` steps without one."""

    def __init__(self, params, *, objective: ScaledLossSoFlow, growth: int = 200, **keywords):
        super().__init__(params, **keywords)
        self.scale, self.growth = objective.scale, growth
        self.good = torch.zeros_like(self.scale)

    def update(self, **keywords) -> tuple[Tensor, Tensor]:
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        torch._foreach_div_(gradients, self.scale)
        norm, finite = super().update(**keywords)
        self.good.copy_(torch.where(finite, self.good + 1, 0))
        grown = torch.where(self.good % self.growth == 0, 2.0, 1.0)
        self.scale.mul_(torch.where(finite, grown, 0.5))
        return norm, finite


class AllRowsMeanFlow(MeanFlow):
    """A Jacobian-vector product without gradient through every row, also those with r = t that need none."""

    def with_derivative(self, z, t, r, labels, v, rows: slice) -> tuple[Tensor, Tensor]:
        n = len(t) - len(v)
        u = self.network(z, t, r, labels)
        with torch.no_grad():
            v_all = torch.cat([torch.zeros_like(z[:n]), v])
            return u, self.network.jvp(z, t, r, labels, v_all, torch.ones_like(t))[1][n:]


class PublishedMeanFlow(MeanFlow):
    """As public PyTorch code: the conditional and the unconditional prediction of every row in calls of their own, and
    one Jacobian-vector product on all rows with gradient, whose primal is the prediction that is trained."""

    def _guidance(self, z, t, labels, n: int) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            u_own = self.network(z, t, t, labels)
            return self.network(z, t, t, torch.full_like(labels, self.network.num_classes)), u_own[n:]

    def with_derivative(self, z, t, r, labels, v, rows: slice) -> tuple[Tensor, Tensor]:
        n = len(t) - len(v)
        v_all = torch.cat([torch.zeros_like(z[:n]), v])
        u, derivative = self.network.jvp(z, t, r, labels, v_all, torch.ones_like(t))
        return u, derivative[n:].detach()
