"""The ways of training that soflow-fast is compared with, as objectives, networks and updates for the same step.

Published SoFlow code runs in float32 with TensorFloat-32 products. The simple ways to run it in low precision keep the
quotient usable by raising the precision of the consistency pair, by float16 with a loss scale, or by a larger gap.
Published MeanFlow code in PyTorch takes its Jacobian-vector product through math attention on all rows.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from soflow_fast import DiT, SoFlow
from soflow_fast.ema import EMA
from soflow_fast.kernels import reference
from soflow_fast.kernels.reference import split_heads
from soflow_fast.layers import Attention, linear, product
from soflow_fast.objectives.base import TotalLoss, combine
from soflow_fast.objectives.meanflow import MeanFlow
from soflow_fast.objectives.soflow import Times
from soflow_fast.optim import AdamW

# --------------------------------------------------------------------------------------------------------- SoFlow


class SixCalls(SoFlow):
    """Each loss with network calls of its own, as published: six with guidance, of the same numbers."""

    def loss_of_rows(self, x0, labels, rows, n_velocity, progress, seed, step, latent_scale=None) -> TotalLoss:
        times = self.draw_times(rows, n_velocity, progress, seed, step)
        if x0.dtype == torch.float64:
            times = Times(*(z.double() for z in times))
        drop = self.draw_drop(rows, labels, seed, step)
        x_t, v_t = self.ops.noisy_sample(
            x0, times.t, rows, seed=seed, step=step, path=self.path, latent_scale=latent_scale
        )
        v_t = self._regressed(x_t, v_t, times.t, labels)
        parts = {}
        for name, part, loss, extra in (
            ("velocity", slice(None, n_velocity), self._velocity_loss, ()),
            ("consistency", slice(n_velocity, None), self._consistency_loss, (times.gap, times.s)),
        ):
            if len(times.t[part]):
                parts[name] = loss(x_t[part], v_t[part], times.t[part], *extra, _rows(labels, part), drop[part])
        return combine(parts)


class _FusedDraws:
    """Random numbers by the fused kernels on a GPU, so that an eager baseline does not pay for how they are drawn."""

    @property
    def ops(self):
        if next(self.network.parameters()).device.type != "cuda":
            return super().ops
        from soflow_fast.kernels import fused

        draws = {name: getattr(fused, name) for name in ("normal", "uniform", "noisy_sample")}
        return SimpleNamespace(**{**vars(super().ops), **draws})


class EagerSoFlow(_FusedDraws, SoFlow):
    """SoFlow for a step that is not compiled."""


class EagerSixCalls(_FusedDraws, SixCalls):
    """As published, also in its calls."""


@contextmanager
def _as_the_parameters(network: nn.Module):
    low, network.compute_dtype = network.compute_dtype, None
    try:
        yield
    finally:
        network.compute_dtype = low


def _rows(labels: Tensor | None, rows: slice) -> Tensor | None:
    return None if labels is None else labels[rows]


class Fp32PairSoFlow(SoFlow):
    """Low precision by the network's ``compute_dtype``, but both forwards of the consistency pair in float32."""

    def _with_difference(self, x_t, t, s, labels, v, gap, rows=slice(None)):
        low, pair = slice(None, len(t) - len(gap)), slice(len(t) - len(gap), None)
        with _as_the_parameters(self.network):
            F, dF = super()._with_difference(x_t[pair], t[pair], s[pair], _rows(labels, pair), v, gap)
        if len(gap) < len(t):
            F = torch.cat([self.network(x_t[low], t[low], s[low], _rows(labels, low)), F])
        return F, dF


class ScaledLossSoFlow(SoFlow):
    """The loss times a scale on the device, for float16; :class:`ScaledAdamW` divides it out and adapts it."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        device = next(self.network.parameters()).device
        self.register_buffer("scale", torch.tensor(2.0**14, device=device), persistent=False)

    def loss_of_rows(self, *arguments, **keywords) -> TotalLoss:
        out = super().loss_of_rows(*arguments, **keywords)
        return TotalLoss(out.loss * self.scale, out.parts)  # _replace cannot be traced


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


class _Foreign(nn.Module):
    """A network of which nothing is known but ``net(x, t, s, labels)`` and its number of classes."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.run, self.num_classes = net.forward, net.num_classes
        self._parameters, self._modules = net._parameters, net._modules  # under the names that they have there

    def forward(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.run(x, t, s, labels)


class DerivedSoFlow(SoFlow):
    """Over the network as if it came from elsewhere: its difference forward is derived from its operators, and low
    precision is autocast's."""

    def __init__(self, net: DiT, *arguments, **keywords):
        super().__init__(_Foreign(net), *arguments, impl=net.impl, **keywords)


# ------------------------------------------------------------------------------------------------------- MeanFlow


class AllRowsMeanFlow(MeanFlow):
    """A Jacobian-vector product without gradient through every row, also those with r = t that need none."""

    def with_derivative(self, z, t, r, labels, v, rows: slice) -> tuple[Tensor, Tensor]:
        n = len(t) - len(v)
        u = self.network(z, t, r, labels)
        with torch.no_grad():
            v_all = torch.cat([torch.zeros_like(z[:n]), v])
            return u, self.network.jvp(z, t, r, labels, v_all, torch.ones_like(t))[1][n:]


class PublishedMeanFlow(_FusedDraws, MeanFlow):
    """As public PyTorch code: the conditional and the unconditional prediction of every row in calls of their own, and
    one Jacobian-vector product on all rows with gradient, whose primal is the prediction that is trained."""

    def _guidance(self, z, t, labels, n: int, drop) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            u_own = self.network(z, t, t, labels)
            return self.network(z, t, t, torch.full_like(labels, self.network.num_classes)), u_own[n:]

    def with_derivative(self, z, t, r, labels, v, rows: slice) -> tuple[Tensor, Tensor]:
        n = len(t) - len(v)
        v_all = torch.cat([torch.zeros_like(z[:n]), v])
        u, derivative = self.network.jvp(z, t, r, labels, v_all, torch.ones_like(t))
        return u, derivative[n:].detach()


class StrongMeanFlow(MeanFlow):
    """One Jacobian-vector product, on the rows with r < t only, whose primal is the prediction that is trained.

    Compiled, nothing is kept of the tangents. The rows with r = t take a call of their own, by the network's attention.
    """

    def with_derivative(self, z, t, r, labels, v, rows: slice) -> tuple[Tensor, Tensor]:
        plain = slice(None, rows.start)
        u_plain = self.network(z[plain], t[plain], r[plain], _rows(labels, plain))
        one = torch.ones_like(t[rows])
        u, derivative = self.network.jvp(z[rows], t[rows], r[rows], _rows(labels, rows), v, one)
        return torch.cat([u_plain, u]), derivative.detach()


class Fp32PairMeanFlow(MeanFlow):
    """A finite difference whose two forwards run in float32, the rest in the network's ``compute_dtype``."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.needs_float32 = False  # by itself; its difference step is made for TF32 products

    def with_derivative(self, z, t, r, labels, v, rows: slice) -> tuple[Tensor, Tensor]:
        plain = slice(None, rows.start)
        u_plain = self.network(z[plain], t[plain], r[plain], _rows(labels, plain))
        with _as_the_parameters(self.network):
            pair = super().with_derivative(z[rows], t[rows], r[rows], _rows(labels, rows), v, slice(None))
        return torch.cat([u_plain, pair[0]]), pair[1]


# ------------------------------------------------------------------------------------------------------- networks


def _attention_difference(q, k, v, dq, dk, dv, o, *, tangent: bool = False) -> Tensor:
    """The reference op with its five products on operands in their own dtype, as compiled code should have them."""
    scale = q.shape[-1] ** -0.5
    k, dk = k - k.mean(-2, keepdim=True), dk - dk.mean(-2, keepdim=True)
    moved_k, moved_v = (k, v) if tangent else (k + dk, v + dv)
    wide = torch.promote_types(q.dtype, torch.float32)
    p = torch.softmax((q @ k.mT).to(wide) * scale, dim=-1)
    e = (dq @ moved_k.mT + q @ dk.mT).to(wide) * scale
    if not tangent:
        e = torch.tanh(e / 2) * (torch.exp(e) + 1)
    z = (p * e).sum(-1, keepdim=True)
    dp = p * (e - z) / (1 if tangent else 1 + z)
    return dp.to(v.dtype) @ moved_v + p.to(v.dtype) @ dv


_PLAIN_OPS = SimpleNamespace(**{**vars(reference), "attention_difference": _attention_difference})


class PlainDiT(DiT):
    """The difference forward in plain torch at its fastest: the reference upcasts the operands of its attention."""

    def _call(self, *arguments, **keywords):
        return super()._call(*arguments, **keywords)._replace(ops=_PLAIN_OPS)


class _JvpFlashAttention(Attention):
    """Flash attention with forward-mode AD (the package jvp-flash-attention) where a derivative is taken."""

    def forward(self, h, dh, call):
        if call.attention != "math":
            return super().forward(h, dh, call)
        from jvp_flash_attention.jvp_attention import JVPAttn

        o = JVPAttn.fwd_dual(*split_heads(linear(self.qkv, h), self.num_heads))
        return product(self.proj, o.transpose(1, 2).flatten(2)), None


class JvpFlashDiT(DiT):
    """Takes its Jacobian-vector product through :class:`_JvpFlashAttention`.

    Raises:
        ValueError: where the package is not installed or does not have the head dim; the message says which.
    """

    HEAD_DIMS = (32, 64, 128, 256)

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        head_dim = self.hidden_size // self.num_heads
        if head_dim not in self.HEAD_DIMS:
            raise ValueError(f"jvp-flash-attention has head dims {self.HEAD_DIMS} and this model {head_dim}")
        try:
            import jvp_flash_attention.jvp_attention  # noqa: F401
        except ImportError as error:
            raise ValueError(f"the package jvp-flash-attention is not installed ({error})") from error
        for block in self.blocks:
            attention = _JvpFlashAttention(self.hidden_size, self.num_heads)
            attention.load_state_dict(block.attn.state_dict())
            block.attn = attention


# -------------------------------------------------------------------------------------------------------- updates


class LoopEMA(EMA):
    """As public code: one parameter after the other, without a warm-up."""

    @torch.no_grad()
    def update(self, taken: Tensor | bool = True) -> None:
        for name, average in self.averages.items():
            average.mul_(self.decay).add_(self._parameters[name], alpha=1 - self.decay)
