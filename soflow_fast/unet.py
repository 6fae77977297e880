"""The UNet of DDPM++ (Song et al. 2021, arXiv 2011.13456), on which the papers compare on CIFAR-10, for two times.

Shapes: B rows, C channels, H×W pixels, E width of the embedding. Layers are named as in EDM's code (Karras et al. 2022,
arXiv 2206.00364), which the published SoFlow code adapts, but for that of the second time, ``map_layer0_s``.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from soflow_fast.layers import prediction_of
from soflow_fast.size import Size, as_size, format_size, height_and_width

_EPS, _MAX_GROUPS, _GROUP_CHANNELS = 1e-6, 32, 4
_EMBEDDING_MULT = 4
_ATTENTION = (16,)
_LOWEST_FREQUENCY = 1e-4

# Both summands of a residual sum have about unit variance, and so has the sum.
_SUM_SCALE = math.sqrt(0.5)

# Gains of initial weights: of a branch, which starts out as nearly nothing, and of queries, keys and values.
_BRANCH_GAIN, _ATTENTION_GAIN = 1e-5, math.sqrt(0.2)


class UNet(nn.Module):
    """UNet ``F(x, t, s, label)`` over images; its difference forward is derived, see :mod:`soflow_fast.differencing`.

    The embedding is that of t, of t−s, of the label and of the augmentation; times are not scaled. The defaults are
    the published ones for CIFAR-10, without classes.

    Args:
        input_size: of x, one number or (H, W), multiples of 2^(levels−1). in_channels: C of x and of the output.
        num_classes: the index of "no label", which embeds as nothing; 0 for unconditional models.
        model_channels: the width of level i is ``channel_mult[i]`` times as much; each has half the size of the last.
        num_blocks: residual blocks of a level on the way down; on the way up there is one more.
        attention_resolutions: sizes, by their shorter side, at which the blocks attend, one head as wide as the level;
            by default 16, where there is such a level. dropout: in each block.
        augment_dim: how many numbers say how a row was augmented, see :mod:`soflow_fast.augment`; 0 for none.
        prediction: ``velocity`` or ``data``, see :class:`~soflow_fast.layers.DataPrediction`.

    Raises:
        ValueError: for a size that cannot be halved that often, and widths that GroupNorm or the sinusoids cannot have.
    """

    def __init__(
        self,
        input_size: Size = 32,
        in_channels: int = 3,
        num_classes: int = 0,
        *,
        model_channels: int = 128,
        channel_mult: tuple[int, ...] = (2, 2, 2),
        num_blocks: int = 4,
        attention_resolutions: tuple[int, ...] | None = None,
        dropout: float = 0.13,
        augment_dim: int = 0,
        prediction: str = "velocity",
    ):
        super().__init__()
        sides = height_and_width(input_size)
        sizes = [tuple(side >> level for side in sides) for level in range(len(channel_mult))]
        if not sizes:
            raise ValueError("channel_mult=() has no level; give a factor for each, such as (2, 2, 2)")
        if any(side % 2 ** (len(sizes) - 1) for side in sides):
            raise ValueError(
                f"input_size={format_size(input_size)} cannot be halved for each of channel_mult={tuple(channel_mult)} "
                f"after the first; choose a multiple of {2 ** (len(sizes) - 1)}, or another number of levels"
            )
        for size in attention_resolutions or ():
            if size not in map(min, sizes):
                raise ValueError(
                    f"attention_resolutions={tuple(attention_resolutions)} has {size}, and the levels of this UNet "
                    f"are {', '.join(map(str, map(min, sizes)))}; choose among them"
                )
        attention_resolutions = _ATTENTION if attention_resolutions is None else attention_resolutions
        widths = [model_channels * mult for mult in channel_mult]
        if model_channels < 4 or model_channels % 2:
            raise ValueError(f"model_channels={model_channels} must be even and at least 4, for sines and cosines")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} is outside [0, 1); choose one in it")
        self.input_size, self.in_channels, self.num_classes = as_size(*sides), in_channels, num_classes
        self.model_channels, self.augment_dim = model_channels, augment_dim

        embedding = _EMBEDDING_MULT * model_channels
        self.map_label = nn.Linear(num_classes, model_channels) if num_classes else None
        self.map_augment = nn.Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(model_channels, embedding)
        self.map_layer0_s = nn.Linear(model_channels, embedding, bias=False)
        self.map_layer1 = nn.Linear(embedding, embedding)

        def block(channels: int, out: int, **form) -> _Block:
            return _Block(channels, out, embedding, dropout, **form)

        names = ["x".join(map(str, size)) for size in sizes]
        levels = list(zip(names, widths, [min(size) in attention_resolutions for size in sizes], strict=True))
        self.enc = nn.ModuleDict({f"{names[0]}_conv": _conv(in_channels, model_channels, 3)})
        channels, kept = model_channels, [model_channels]
        for name, width, attends in levels:
            if name != names[0]:
                self.enc[f"{name}_down"] = block(channels, channels, resample="down")
                kept.append(channels)
            for i in range(num_blocks):
                self.enc[f"{name}_block{i}"] = block(channels, width, attends=attends)
                channels = width
                kept.append(channels)
        self.dec = nn.ModuleDict()
        for name, width, attends in reversed(levels):
            if name == names[-1]:
                self.dec[f"{name}_in0"] = block(channels, channels, attends=True)
                self.dec[f"{name}_in1"] = block(channels, channels)
            else:
                self.dec[f"{name}_up"] = block(channels, channels, resample="up")
            for i in range(num_blocks + 1):
                self.dec[f"{name}_block{i}"] = block(channels + kept.pop(), width, attends=attends and i == num_blocks)
                channels = width
        self.dec[f"{names[0]}_aux_norm"] = _norm(channels)
        self.dec[f"{names[0]}_aux_conv"] = _conv(channels, in_channels, 3)
        self.prediction = prediction_of(prediction)
        self._initialize()

    def _initialize(self) -> None:
        for name, layer in self.named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                last = name.rpartition(".")[2]
                is_end = last in ("conv1", "proj") or last.endswith("aux_conv")
                gain = _BRANCH_GAIN if is_end else _ATTENTION_GAIN if last == "qkv" else 1.0
                nn.init.xavier_uniform_(layer.weight, gain)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    @property
    def null_label(self) -> int:
        """The label that means "no label"."""
        return self.num_classes

    def forward(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        """``F(x, t, s, labels)``.

        Args:
            x: (B, C, H, W) floating point. t, s: (B,) in [0, 1], s <= t.
            labels: (B,) int64 in [0, num_classes]; or (B, 1 + augment_dim) floating point, the label and then how the
                row was augmented; or None for "no label". Without the augmentation a row counts as not augmented.

        Returns:
            (B, C, H, W), dtype of x.

        Raises:
            ValueError: for labels of another width.
        """
        e = self._embedding(t, s, labels)
        h, kept = x, []
        for layer in self.enc.values():
            h = layer(h, e) if isinstance(layer, _Block) else layer(h)
            kept.append(h)
        for layer in self.dec.values():
            if not isinstance(layer, _Block):
                break
            h = layer(h if layer.channels == h.shape[1] else torch.cat([h, kept.pop()], 1), e)
        norm, conv = list(self.dec.values())[-2:]
        out = conv(F.silu(norm(h))).to(x.dtype)
        return out if self.prediction is None else self.prediction(out, x, t)

    def _embedding(self, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        """(B, E)."""
        e, told = self._sinusoids(t), t.new_zeros(t.shape[0], self.augment_dim)
        if labels is not None and labels.dim() == 2:
            if labels.shape[1] != 1 + self.augment_dim:
                raise ValueError(
                    f"labels of shape {tuple(labels.shape)} do not fit a UNet with augment_dim={self.augment_dim}; "
                    f"give (B,) or (B, {1 + self.augment_dim})"
                )
            labels, told = labels[:, 0].long(), labels[:, 1:].to(t)
        if self.map_label is not None:
            labels = torch.full_like(t, self.num_classes, dtype=torch.int64) if labels is None else labels
            is_class = torch.arange(self.num_classes, device=t.device) == labels[:, None]
            e = e + self.map_label(is_class.to(e.dtype) * math.sqrt(self.num_classes))
        if self.map_augment is not None:
            e = e + self.map_augment(told)
        e = F.silu(self.map_layer0(e) + self.map_layer0_s(self._sinusoids(t - s)))
        return F.silu(self.map_layer1(e))

    def _sinusoids(self, t: Tensor) -> Tensor:
        """(B, model_channels) ``[sin, cos]`` of a time, at frequencies from 1 to 1e-4."""
        n = self.model_channels // 2
        frequencies = _LOWEST_FREQUENCY ** (torch.arange(n, device=t.device, dtype=t.dtype) / (n - 1))
        phase = t[:, None] * frequencies
        return torch.cat([phase.sin(), phase.cos()], 1)


class _Block(nn.Module):
    """A residual block ``(B, channels, H, W) → (B, out, H', W')``, resampled ``up``, ``down`` or not; it may attend."""

    def __init__(
        self,
        channels: int,
        out: int,
        embedding: int,
        dropout: float,
        *,
        resample: str | None = None,
        attends: bool = False,
    ):
        super().__init__()
        self.channels, self.resample = channels, resample
        self.norm0, self.conv0 = _norm(channels), _conv(channels, out, 3)
        self.affine = nn.Linear(embedding, out)
        self.norm1, self.dropout, self.conv1 = _norm(out), nn.Dropout(dropout), _conv(out, out, 3)
        self.skip = None if channels == out and resample is None else _conv(channels, out, 1)
        self.norm2 = _norm(out) if attends else None
        self.qkv = _conv(out, 3 * out, 1) if attends else None
        self.proj = _conv(out, out, 1) if attends else None

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.conv0(self._resampled(F.silu(self.norm0(x)))) + self.affine(e)[:, :, None, None]
        h = self.conv1(self.dropout(F.silu(self.norm1(h))))
        x = x if self.skip is None else self.skip(self._resampled(x))
        x = (x + h) * _SUM_SCALE
        return x if self.qkv is None else (x + self._attention(x)) * _SUM_SCALE

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2, mode="nearest") if self.resample == "up" else x

    def _attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm2(x)).unflatten(1, (-1, 3)).flatten(3).transpose(1, 3).unbind(2)  # (B, H·W, out)
        attended = F.scaled_dot_product_attention(*(z.unsqueeze(1) for z in (q, k, v))).squeeze(1)
        return self.proj(attended.mT.unflatten(2, x.shape[2:]))


def _norm(channels: int) -> nn.GroupNorm:
    groups = min(_MAX_GROUPS, max(channels // _GROUP_CHANNELS, 1))
    if channels % groups:
        raise ValueError(
            f"a block of this UNet would be {channels} channels wide, which {groups} groups do not divide; choose "
            f"model_channels={_MAX_GROUPS}, or another multiple of it"
        )
    return nn.GroupNorm(groups, channels, eps=_EPS)


def _conv(channels: int, out: int, size: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, size, padding=size // 2)
