"""The layers of the DiT, each also on the difference of its input.

Shapes: B rows, b rows that carry a difference, N tokens, D width, H heads, h head dim, C channels, p patch size. A
layer given the difference ``d`` of its input returns, beside its output, the output's difference, without gradient.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from soflow_fast.attention import attention
from soflow_fast.flash_packages import PACKAGES
from soflow_fast.kernels import MAX_HEAD_DIM, reference
from soflow_fast.kernels.coefficients import require_choice
from soflow_fast.kernels.reference import split_heads
from soflow_fast.kernels.reference_float8 import Float8Rows

SINUSOID_WIDTH = 256
LN_EPS = 1e-6

#: What a network's last layer is of: F itself, or the data, from which F follows.
PREDICTIONS = ("velocity", "data")

# What times below it count as where F is divided by the time, so that it is bounded (arXiv 2511.13720).
_LEAST_TIME = 0.05


class Call(NamedTuple):
    """How one forward is computed: by which ops and attention, which rows carry a difference or a tangent, and whether
    the layer after this one multiplies in float8, without gradient and differences."""

    ops: ModuleType
    attention: str
    rows: slice | None = None
    tangent: bool = False
    recompute: str = "none"
    float8: bool = False


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in the dtype of x."""
    return nn.functional.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def product(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer without its bias, in the dtype of x; of the difference of an input, that of the output."""
    return nn.functional.linear(x, layer.weight.to(x.dtype))


def sinusoids(numbers: Tensor) -> Tensor:
    """The features of times, ``[cos, sin]``, for numbers of any shape, and as wide in a last dimension."""
    phase = numbers[..., None] * reference.frequencies(SINUSOID_WIDTH, numbers)
    return torch.cat([phase.cos(), phase.sin()], -1)


def unpatchified(tokens: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """(B, C, H, W) of the tokens (B, N, p·p·C) of a grid of patches, row-major; the channel is the fastest."""
    pixels = tokens.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, grid)
    return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class PatchEmbed(nn.Module):
    """Non-overlapping p×p patches to tokens, row-major; the weight has a convolution's layout (D, C, p, p)."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def _patches(self, x: Tensor) -> Tensor:
        p = self.patch_size
        return x.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(
            self._patches(x), self.proj.weight.flatten(1).to(x.dtype), self.proj.bias.to(x.dtype)
        )

    def difference(self, dx: Tensor) -> Tensor:
        return nn.functional.linear(self._patches(dx), self.proj.weight.flatten(1).to(dx.dtype))


class TimestepEmbedder(nn.Module):
    """Linear–SiLU–Linear on the sinusoids of a time, or on other features."""

    def __init__(self, hidden_size: int, features: int = SINUSOID_WIDTH):
        super().__init__()
        first = nn.Linear(features, hidden_size)
        self.mlp = nn.Sequential(first, nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The embedding and, for the difference, the SiLU's input."""
        u = linear(self.mlp[0], features)
        return linear(self.mlp[2], nn.functional.silu(u)), u

    def difference(self, u: Tensor, d_features: Tensor, call: Call) -> Tensor:
        du = product(self.mlp[0], d_features)
        return product(self.mlp[2], call.ops.silu_difference(u[call.rows], du, tangent=call.tangent))


class LabelEmbedder(nn.Module):
    """The label table; its last row is "no label" where label dropping is on."""

    def __init__(self, num_classes: int, hidden_size: int, class_dropout_prob: float):
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + (class_dropout_prob > 0), hidden_size)

    @property
    def null_row(self) -> int:
        """The row that means "no label"; ValueError if there is none."""
        if self.embedding_table.num_embeddings <= self.num_classes:
            raise ValueError(
                "this network has no row for 'no label', because it was built with class_dropout_prob=0; "
                "pass labels, or build it with class_dropout_prob > 0"
            )
        return self.num_classes


class Attention(nn.Module):
    """Multi-head self-attention; the qkv output reshapes to (B, N, 3, H, h). The block adds the bias of proj.

    Heads too large for the fused difference of attention, see :data:`soflow_fast.kernels.MAX_HEAD_DIM`, have it made by
    plain torch.
    """

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, h: Tensor | Float8Rows, dh: Tensor | None, call: Call) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.qkv.weight.to(h.dtype), self.qkv.bias.to(h.dtype)
        if call.attention == "triton":
            o, q, k, v = call.ops.self_attention(h, weight, bias, heads=self.num_heads)
        elif call.attention in PACKAGES:
            from soflow_fast.flash import self_attention  # with Inductor, which no command without it should wait for

            o, q, k, v = self_attention(h, weight, bias, heads=self.num_heads, backend=call.attention)
        else:
            q, k, v = call.ops.project_heads(h, weight, bias, heads=self.num_heads)
            o = attention(q, k, v, call.attention)
        out = product(self.proj, o.transpose(1, 2).flatten(2))
        if call.rows is None:
            return out, None
        with torch.no_grad():
            primal = [y[call.rows] for y in (q, k, v)]
            difference = split_heads(product(self.qkv, dh), self.num_heads)
            ops = call.ops if q.shape[-1] <= MAX_HEAD_DIM.get(q.dtype, 0) else reference
            do = ops.attention_difference(*primal, *difference, o[call.rows], tangent=call.tangent)
            return out, product(self.proj, do.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear–tanh-GELU–Linear. The block adds the bias of fc2."""

    def __init__(self, hidden_size: int, mlp_hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_hidden_size)
        self.fc2 = nn.Linear(mlp_hidden_size, hidden_size)

    def forward(self, h: Tensor | Float8Rows, dh: Tensor | None, call: Call) -> tuple[Tensor, Tensor | None]:
        w1, b1, w2 = (p.to(h.dtype) for p in (self.fc1.weight, self.fc1.bias, self.fc2.weight))
        recompute, differs = call.recompute == "elementwise", call.rows is not None
        out, u = call.ops.mlp(h, w1, b1, w2, recompute=recompute, hidden=differs)
        if not differs:
            return out, None
        with torch.no_grad():
            dg = call.ops.gelu_difference(u[call.rows], product(self.fc1, dh), tangent=call.tangent)
            return out, product(self.fc2, dg)


class DiTBlock(nn.Module):
    """Attention and MLP, each gated into the residual stream.

    A block receives its input already normalised and modulated, and returns the next block's: then each gate, residual
    and following LayerNorm is one op, which also adds the bias of the last product and sums its gradient.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.attn = Attention(hidden_size, num_heads)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, h, modulation, pair, call: Call):
        """One block.

        Args:
            x: (B, N, D) residual stream. h: (B, N, D) normalised, modulated x, also in float8.
            modulation: (B, 6, D): gate, shift, scale of the attention's output and the MLP's input, then gate, shift,
                scale of the MLP's output and the next block's input.
            pair: ``(d, dh, dmodulation)``, the differences of the three above on the rows that carry one, or Nones.

        Returns:
            ``(x, h, d, dh)`` for the next block.
        """
        d, dh, dmodulation = pair
        modulation = modulation.unbind(1)
        rounded = isinstance(h, Float8Rows), call.float8
        dmodulation = None if call.rows is None else dmodulation.unbind(1)
        for i, (layer, last) in enumerate(((self.attn, self.attn.proj), (self.mlp, self.mlp.fc2))):
            branch, d_branch = layer(h, dh, call)
            bias, dtype = last.bias.to(branch.dtype), torch.float8_e4m3fn if rounded[i] else None
            gate, shift, scale = modulation[3 * i : 3 * i + 3]
            x, h = call.ops.gated_residual_layernorm(x, branch, gate, shift, scale, bias=bias, eps=LN_EPS, dtype=dtype)
            if call.rows is not None:
                with torch.no_grad():
                    primal = [y[call.rows] for y in (x, branch, gate, scale)]
                    d, dh = call.ops.gated_residual_layernorm_difference(
                        primal[0], d, primal[1], d_branch, *primal[2:], *dmodulation[3 * i : 3 * i + 3],
                        bias=bias, eps=LN_EPS, tangent=call.tangent,
                    )  # fmt: skip
        return x, h, d, dh


class DataPrediction(nn.Module):
    """``F = (x − G)/max(t, 0.05)`` of a prediction G of the data, on the linear path.

    As in pixel MeanFlow (arXiv 2601.22158): from t = 0.05 on ``f(x, t, 0) = x − tF`` is G, an image, which is easier to
    predict of large patches than a velocity as noisy as x. Below, where the paper divides what F is compared with by
    0.05 too, it stays the velocity here, for which G has to have a part of the noise; few rows are drawn there.

    The least time is a buffer, so that weights of one prediction are not loaded for the other.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("least_time", torch.tensor(_LEAST_TIME))

    def forward(self, data: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """F, of the shape and dtype of x, (B, C, H, W), as data is; t is (B,)."""
        return ((x - data) / self._divisor(t)).to(x.dtype)

    @torch.no_grad()
    def difference(self, F: Tensor, d_data: Tensor, dx: Tensor, t: Tensor, dt: Tensor, tangent: bool) -> Tensor:
        """``dF = (dx − dG − F·dc)/(c + dc)``, c the divisor ``max(t, 0.05)``; tangent: without the dc of c + dc."""
        least, divisor = self.least_time.to(t), self._divisor(t)
        if tangent:
            dc = torch.where(t > least, dt, 0.0).view_as(divisor)
        else:
            dc = torch.where(t > least, torch.maximum(dt, least - t), (t + dt - least).clamp(min=0)).view_as(divisor)
            divisor = divisor + dc
        return ((dx - d_data - F * dc) / divisor).to(dx.dtype)

    def _divisor(self, t: Tensor) -> Tensor:
        return torch.maximum(t, self.least_time.to(t)).view(-1, 1, 1, 1)


def prediction_of(name: str) -> DataPrediction | None:
    """What makes F of a network's last layer, None where that is F; ValueError for a name not in PREDICTIONS."""
    require_choice("prediction", name, PREDICTIONS)
    return DataPrediction() if name == "data" else None


def require_linear(net: nn.Module, path: str, parameterization: str = "euler") -> None:
    """ValueError for a network that predicts the data with another path or solution function than it does it for."""
    if isinstance(getattr(net, "prediction", None), DataPrediction) and (path, parameterization) != ("linear", "euler"):
        raise ValueError(
            "the network's prediction='data' is for path='linear' and parameterization='euler', and these are "
            f"{path!r} and {parameterization!r}; choose prediction='velocity', or the former"
        )


def sizes_of_preset(name: str, presets: Mapping[str, tuple[int, ...]], known: str) -> dict[str, int]:
    """The arguments of a transformer that a preset stands for, by its name or with ``-`` in place of ``/``.

    Args:
        presets: by name the patch size, width, depth and heads. known: their names in words.

    Raises:
        ValueError: for another name.
    """
    preset = presets.get(name) or presets.get("/".join(name.rsplit("-", 1)))
    if preset is None:
        raise ValueError(f"no preset is called {name!r}; choose one of {known}")
    return dict(zip(("patch_size", "hidden_size", "depth", "num_heads"), preset, strict=True))


def require_divides(name: str, divisor: int, of: str, *values: int) -> None:
    """ValueError for a setting that does not divide the values of another."""
    if divisor < 1 or any(value % divisor for value in values):
        raise ValueError(f"{name}={divisor} does not divide {of}; choose a {name} that does")


def require_multiples_of_16(*widths: int) -> None:
    """ValueError for layers of widths that cannot be multiplied in float8."""
    for width in widths:
        if width % 16:
            raise ValueError(
                f"float8_guidance=True takes products of multiples of 16, and a layer of this DiT is {width} wide; "
                "choose another hidden_size or mlp_ratio, or float8_guidance=False"
            )


class FinalLayer(nn.Module):
    """The output projection and the modulation before it; the vector per token is (p, p, C), channel fastest."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))
