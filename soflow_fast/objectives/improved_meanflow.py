"""Improved MeanFlow (Geng et al. 2025, arXiv 2512.02012): its guidance is chosen after the training.

Every row of a batch is trained for a guidance of its own, scale w and interval of times, which the network is told: in
labels (B, 4), the label, ``1 − 1/w`` and the interval's ends. Shapes as in MeanFlow.
"""

import math

import torch
from torch import Tensor, nn

from soflow_fast.kernels.reference import Stream
from soflow_fast.objectives.average_velocity import AverageVelocity
from soflow_fast.objectives.base import require_null_label
from soflow_fast.require import require_range

# Of w: at larger ones 1 − 1/w, which the network is told, would hardly change.
_LARGEST_GUIDANCE = 1e4


class ImprovedMeanFlow(AverageVelocity):
    """MeanFlow with the guidance as a condition, and derivatives along the network's own prediction.

    The guided velocity is ``v_g = v + (1 − 1/w) (v̂(z,t | y,w) − v̂(z,t | ∅,1))`` for t in the interval and rows with a
    label, else v. w is drawn with a density proportional to ``w^−guidance_power`` between 1 and guidance_max; the
    interval from 0 to ½ and from ½ to 1, and [0, 1] on the rows with r = t. Times, weight and loss are MeanFlow's.

    As published, with the second head of a network such as :class:`~soflow_fast.MiT`, v̂ is that head at s = t, told a
    guidance at all times. It is trained on v_g too, at the r, label and interval of each row, with a weight of its own,
    and this loss is added. Derivatives are taken along v̂(z,t | y,w), w = 1 outside of the interval. Rows drop their
    label one by one, while published code drops it on rows with r = t alone: as many as it draws, from the first on.

    Without that head, the boundary u(z,t,t) is v̂, and rows that drop their label take the derivative along
    u(z,t,t | ∅,1).

    Args:
        net: with ``condition_dim`` 3, such as ``MiT(condition_dim=3)`` and ``DiT(condition_dim=3)``, and classes.
        guidance_max, guidance_power: of the draw of w, in (1, 10⁴] and [0, 10].
        sample_scale, sample_interval: the guidance of samples where :meth:`conditioned` does not say another; see
            :meth:`set_sample_guidance`.
        path, label_drop, p, eps, velocity_share, time_mean, time_std, derivative, difference_step, impl: as in
            :class:`~soflow_fast.objectives.meanflow.MeanFlow`.
        velocity_head: whether the network's second head is trained, see
            :class:`~soflow_fast.objectives.base.Objective`; by default where it has one.

    Raises:
        ValueError: for a value outside its range, and a network that cannot be told the guidance.
    """

    condition_dim = 3
    velocity_head = True
    guided = True

    def __init__(
        self,
        net: nn.Module,
        path: str = "linear",
        guidance_max: float = 8.0,
        guidance_power: float = 1.0,
        sample_scale: float = 7.5,
        sample_interval: tuple[float, float] = (0.4, 0.65),
        label_drop: float = 0.1,
        p: float = 1.0,
        eps: float = 0.01,
        velocity_share: float = 0.5,
        time_mean: float = -0.4,
        time_std: float = 1.0,
        derivative: str = "tangent",
        difference_step: float = 1e-3,
        velocity_head: bool | None = None,
        impl: str | None = None,
    ):
        told, classes = (getattr(net, name, None) for name in ("condition_dim", "num_classes"))
        if told != self.condition_dim:
            raise ValueError(
                f"improved MeanFlow tells its network the guidance, and this {type(net).__name__} has condition_dim="
                f"{told}; choose a MiT or DiT preset, or give a network with condition_dim = 3 that takes labels "
                "(B, 4), such as DiT(condition_dim=3)"
            )
        if not classes:
            raise ValueError(
                f"improved MeanFlow guides by classes, and this {type(net).__name__} has num_classes={classes}; set "
                "model.num_classes to the number of classes"
            )
        if label_drop == 0:
            raise ValueError("label_drop=0 never trains the 'no label' prediction that guides; set label_drop > 0")
        if not 1 < guidance_max <= _LARGEST_GUIDANCE:
            raise ValueError(
                f"guidance_max={guidance_max} is outside (1, {_LARGEST_GUIDANCE:g}]; choose one above 1, which is no "
                "guidance, such as 8"
            )
        require_range("guidance_power", guidance_power, 0, 10)
        require_null_label(net, None, label_drop)
        super().__init__(
            net,
            path=path,
            label_drop=label_drop,
            p=p,
            eps=eps,
            velocity_share=velocity_share,
            time_mean=time_mean,
            time_std=time_std,
            derivative=derivative,
            difference_step=difference_step,
            direction="prediction",
            impl=impl,
        )
        has_head = getattr(net, "has_velocity_head", False)
        if velocity_head and not has_head:
            raise ValueError(
                f"velocity_head=True trains a second head of the network, and this {type(net).__name__} has none; "
                "choose a MiT preset, such as MiT-B/2, or velocity_head=False"
            )
        self.velocity_head = has_head if velocity_head is None else velocity_head
        self.guidance_max, self.guidance_power = guidance_max, guidance_power
        # What samples are told. A number would be a constant of compiled code, and of a CUDA graph.
        told = torch.zeros(self.condition_dim, device=next(net.parameters()).device)
        self.register_buffer("_told", told, persistent=False)
        self._sample_guidance = sample_scale, tuple(sample_interval)
        self.set_sample_guidance(sample_scale, sample_interval)

    @property
    def sample_scale(self) -> float:
        """w of samples, see :meth:`set_sample_guidance`."""
        return self._sample_guidance[0]

    @property
    def sample_interval(self) -> tuple[float, float]:
        """The times at which samples are guided, see :meth:`set_sample_guidance`."""
        return self._sample_guidance[1]

    def set_sample_guidance(self, scale: float | None = None, interval: tuple[float, float] | None = None) -> None:
        """Sets the guidance of samples, also of a sampler that is compiled already; None leaves it as it is.

        Args:
            scale: w in [1, guidance_max]. interval: the times that are guided, from [0, 0.5] to [0.5, 1].

        Raises:
            ValueError: for a guidance that was not trained.
        """
        self.require_trained(scale, interval, ("sample_scale=", "sample_interval="))
        scale = self.sample_scale if scale is None else scale
        interval = self.sample_interval if interval is None else tuple(interval)
        self._sample_guidance = scale, interval
        self._told.copy_(torch.tensor([1 - 1 / scale, *interval]))

    def require_trained(
        self,
        scale: float | Tensor | None,
        interval: tuple[float | Tensor, float | Tensor] | None,
        names: tuple[str, str] = ("scale=", "interval="),
    ) -> None:
        """ValueError for a guidance that was not trained; tensors are not read.

        Args:
            scale, interval: as in :meth:`conditioned`. names: what a message has before the value.
        """
        largest = self.guidance_max
        if not (scale is None or torch.is_tensor(scale) or 1 <= scale <= largest):
            raise ValueError(
                f"{names[0]}{scale} is outside [1, {largest}], the scales that guidance_max={largest} trains; choose "
                "one of them, or train with a larger guidance_max"
            )
        if interval is None:
            return
        ranges = ((0, 0.5), (0.5, 1))
        if len(interval) != 2 or not all(
            torch.is_tensor(x) or low <= x <= high for x, (low, high) in zip(interval, ranges, strict=True)
        ):
            raise ValueError(
                f"{names[1]}{tuple(interval)} was not trained; choose a start in [0, 0.5] and an end in [0.5, 1]"
            )

    def conditioned(
        self,
        labels: Tensor,
        scale: float | Tensor | None = None,
        interval: tuple[float | Tensor, float | Tensor] | None = None,
    ) -> Tensor:
        """Labels that ask for a guidance, to sample with.

        Args:
            labels: (B,) int64. scale: w; by default that of samples. interval: the times that are guided; by default
                that of samples. Each a number, or a tensor of one or of (B,) numbers, which is not checked.

        Returns:
            (B, 4) float32.

        Raises:
            ValueError: for a guidance that was not trained.
        """
        self.require_trained(scale, interval)
        mix, *ends = self._told.unbind()
        mix = mix if scale is None else 1 - 1 / scale
        columns = (labels, mix, *(ends if interval is None else interval))
        return torch.stack([_column(x, labels) for x in columns], 1)

    def prepare(self, x: Tensor, labels: Tensor | None) -> None:
        """As MeanFlow's, for labels of the form that the network sees.

        Raises:
            ValueError: also for anything but labels (B,).
        """
        if labels is None or labels.dim() != 1:
            form = "no labels" if labels is None else f"labels of shape {tuple(labels.shape)}"
            raise ValueError(f"improved MeanFlow trains with labels (B,), and there are {form}; give each row a class")
        super().prepare(x, labels.new_empty(len(labels), 1 + self.condition_dim, dtype=torch.float32))

    def velocity(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The model's velocity ``u(x,t,t,y)`` with the guidance of samples."""
        return super().velocity(x, t, self._sample_labels(x, labels))

    def solution(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        """As MeanFlow's; labels (B,) with the guidance of samples, or (B, 4) of :meth:`conditioned`."""
        return super().solution(x, t, s, self._sample_labels(x, labels))

    def _sample_labels(self, x: Tensor, labels: Tensor | None) -> Tensor:
        if labels is None:
            labels = torch.full((len(x),), self.network.num_classes, device=x.device)
        return self.conditioned(labels) if labels.dim() == 1 else labels

    def draw_guidance(self, rows: Tensor, n_velocity: int, seed: int | Tensor, step: int | Tensor) -> Tensor:
        """(B, 3) float32: ``1 − 1/w`` and the interval of each row."""
        draws = self.ops.uniform(rows, 3, seed=seed, step=step, stream=Stream.GUIDANCE)
        power, log_max = 1 - self.guidance_power, math.log(self.guidance_max)
        log_w = draws[:, 0] * log_max
        if power != 0:
            log_w = torch.log1p(draws[:, 0] * math.expm1(power * log_max)) / power
        mix = -torch.expm1(-log_w.clamp(max=log_max))
        start, end = 0.5 * draws[:, 1], 0.5 + 0.5 * draws[:, 2]
        start = torch.cat([torch.zeros_like(start[:n_velocity]), start[n_velocity:]])
        end = torch.cat([torch.ones_like(end[:n_velocity]), end[n_velocity:]])
        return torch.stack([mix, start, end], 1)

    def _conditioned(self, labels, rows, n: int, seed, step) -> Tensor:
        return torch.cat([labels.float()[:, None], self.draw_guidance(rows, n, seed, step)], 1)

    @torch.no_grad()
    def _guidance(self, z, t, labels, n: int, drop) -> tuple[Tensor, Tensor]:
        null, own = self.no_label(labels), labels[n:]
        mix = torch.where(_inside(t[n:], own), own[:, 1], 0.0)
        null = torch.stack([null[:, 0], *_always(torch.zeros_like(null[:, 1]))], 1)
        own = torch.stack([own[:, 0], *_always(mix)], 1)
        x, times, labels = torch.cat([z, z[n:]]), torch.cat([t, t[n:]]), torch.cat([null, own])
        predict = self.network.forward_velocity if self.velocity_head else self.guidance_forward
        v = predict(x, times, labels)
        return v[: len(t)], v[len(t) :]

    def _direction(self, u_null, u_own, drop) -> Tensor:
        return u_own if self.velocity_head else super()._direction(u_null, u_own, drop)

    def _guided_velocity(self, v, u_null, u_own, t, drop, labels) -> Tensor:
        guided = v + labels[:, 1].to(v).view(-1, 1, 1, 1) * (u_own - u_null)
        return torch.where((drop | ~_inside(t, labels)).view(-1, 1, 1, 1), v, guided)


def _column(x: float | Tensor, labels: Tensor) -> Tensor:
    """A number or a tensor as (B,) float32."""
    if torch.is_tensor(x):
        return x.to(labels.device, torch.float32).expand(labels.shape)
    return torch.full_like(labels, x, dtype=torch.float32)


def _inside(t: Tensor, labels: Tensor) -> Tensor:
    """(B,) bool, whether a time is in a row's interval."""
    return (labels[:, 2] <= t) & (t <= labels[:, 3])


def _always(mix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A guidance at all times, which is what a prediction of the velocity is told."""
    return mix, torch.zeros_like(mix), torch.ones_like(mix)
