"""Diffusion transformer with adaLN-Zero (Peebles & Xie 2023) conditioned on two times, and its difference forward.

Shapes: B rows, b rows that carry a difference, N tokens, D width, H heads, h head dim, C channels, p patch size.
The state_dict keys are those of the public SoFlow checkpoints.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from soflow_fast import kernels
from soflow_fast.attention import attention, resolve_attention

_SINUSOID_WIDTH = 256
_LN_EPS = 1e-6

#: patch size, width, depth, heads
PRESETS = {
    "DiT-S/4": (4, 384, 12, 6),
    "DiT-S/2": (2, 384, 12, 6),
    "DiT-B/4": (4, 768, 12, 12),
    "DiT-B/2": (2, 768, 12, 12),
    "DiT-M/2": (2, 1024, 16, 16),
    "DiT-L/2": (2, 1024, 24, 16),
    "DiT-XL/2": (2, 1152, 28, 16),
}


class _Shift(NamedTuple):
    """Which rows carry a difference, and whether it is a finite one or the tangent."""

    rows: slice
    tangent: bool


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return nn.functional.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def _linear_difference(layer: nn.Linear, d: Tensor) -> Tensor:
    return nn.functional.linear(d, layer.weight.to(d.dtype))


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
    """Linear–SiLU–Linear on the sinusoids of a time."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(_SINUSOID_WIDTH, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The embedding and, for the difference, the SiLU's input."""
        u = _linear(self.mlp[0], features)
        return _linear(self.mlp[2], nn.functional.silu(u)), u

    def difference(self, u: Tensor, d_features: Tensor, tangent: bool, ops) -> Tensor:
        du = _linear_difference(self.mlp[0], d_features)
        return _linear_difference(self.mlp[2], ops.silu_difference(u, du, tangent=tangent))


class LabelEmbedder(nn.Module):
    """The label table; its last row is "no label" where label dropping is on."""

    def __init__(self, num_classes: int, hidden_size: int, class_dropout_prob: float):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (class_dropout_prob > 0), hidden_size)


class Attention(nn.Module):
    """Multi-head self-attention; the qkv output reshapes to (B, N, 3, H, h)."""

    def __init__(self, hidden_size: int, num_heads: int, backend: str):
        super().__init__()
        self.num_heads, self.backend = num_heads, backend
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, h: Tensor, dh: Tensor | None, shift: _Shift | None, ops) -> tuple[Tensor, Tensor | None]:
        q, k, v = self._heads(_linear(self.qkv, h))
        o = attention(q, k, v, self.backend)
        out = _linear(self.proj, o.transpose(1, 2).flatten(2))
        if shift is None:
            return out, None
        with torch.no_grad():
            rows = shift.rows
            dq, dk, dv = self._heads(_linear_difference(self.qkv, dh))
            do = ops.attention_difference(q[rows], k[rows], v[rows], dq, dk, dv, o[rows], tangent=shift.tangent)
            return out, _linear_difference(self.proj, do.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear–tanh-GELU–Linear."""

    def __init__(self, hidden_size: int, mlp_hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_hidden_size)
        self.fc2 = nn.Linear(mlp_hidden_size, hidden_size)

    def forward(self, h: Tensor, dh: Tensor | None, shift: _Shift | None, ops) -> tuple[Tensor, Tensor | None]:
        u = _linear(self.fc1, h)
        out = _linear(self.fc2, nn.functional.gelu(u, approximate="tanh"))
        if shift is None:
            return out, None
        with torch.no_grad():
            du = _linear_difference(self.fc1, dh)
            return out, _linear_difference(self.fc2, ops.gelu_difference(u[shift.rows], du, tangent=shift.tangent))


class DiTBlock(nn.Module):
    """Attention and MLP, each gated into the residual stream.

    A block receives its input already normalised and modulated, and returns the next block's: then each gate, residual
    and following LayerNorm is one op.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, backend: str):
        super().__init__()
        self.attn = Attention(hidden_size, num_heads, backend)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, h, modulation, pair, shift, ops):
        """One block.

        Args:
            x: (B, N, D) residual stream. h: (B, N, D) normalised, modulated x.
            modulation: gate, shift, scale of the attention's output and the MLP's input, then gate, shift, scale of
                the MLP's output and the next block's input; (B, D) each.
            pair: ``(d, dh, dmodulation)``, the differences of the three above on the shifted rows, or Nones.

        Returns:
            ``(x, h, d, dh)`` for the next block.
        """
        d, dh, dmodulation = pair
        for i, layer in enumerate((self.attn, self.mlp)):
            branch, d_branch = layer(h, dh, shift, ops)
            gate, *shift_scale = modulation[3 * i : 3 * i + 3]
            x, h = ops.gated_residual_layernorm(x, branch, gate, *shift_scale, eps=_LN_EPS)
            if shift is not None:
                with torch.no_grad():
                    rows = shift.rows
                    d, dh = ops.gated_residual_layernorm_difference(
                        x[rows], d, branch[rows], d_branch, gate[rows], shift_scale[1][rows],
                        *dmodulation[3 * i : 3 * i + 3], eps=_LN_EPS, tangent=shift.tangent,
                    )  # fmt: skip
        return x, h, d, dh


class FinalLayer(nn.Module):
    """The output projection and the modulation before it; the vector per token is (p, p, C), channel fastest."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))


def _sincos_position_embedding(hidden_size: int, grid: int) -> Tensor:
    """Fixed 2-D sin-cos embedding, (1, grid², D): half the width per axis, the column first, ``[sin, cos]``."""
    omega = 10000.0 ** (-torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4))
    phase = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([phase.sin(), phase.cos()], dim=1)
    column, row = axis.expand(grid, -1, -1), axis[:, None].expand(-1, grid, -1)
    return torch.cat([column, row], dim=-1).reshape(1, grid * grid, hidden_size).float()


class DiT(nn.Module):
    """Diffusion transformer ``F(x, t, s, label)`` over images or latents.

    The conditioning is ``embed_t(t) + embed_s(t−s) + embed_y(label)``; times are not scaled.

    Args:
        input_size: height and width of x. patch_size: divides it. in_channels: of x and of the output.
        hidden_size: width D, a multiple of 4 and of num_heads. depth: blocks. mlp_ratio: MLP width over D.
        class_dropout_prob: only whether it is positive counts: then the label table has a row for "no label". Which
            labels are dropped is decided by the objective, never here.
        num_classes: the index of "no label"; 0 for unconditional models.
        impl: ``auto``, ``torch`` or ``triton``, see :func:`soflow_fast.kernels.resolve_impl`.
        attention: see :func:`soflow_fast.attention.resolve_attention`.
        compute_dtype: of matrix operands and activations; by default that of the parameters, which are cast to it.
        residual_dtype: of the residual stream and of its difference; by default compute_dtype.

    Raises:
        ValueError: for sizes that do not divide, and for an implementation that cannot run here.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 4,
        in_channels: int = 4,
        hidden_size: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        *,
        impl: str = "auto",
        attention: str = "auto",
        compute_dtype: torch.dtype | None = None,
        residual_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _require_divides("patch_size", patch_size, "input_size", input_size)
        _require_divides("num_heads", num_heads, "hidden_size", hidden_size)
        if hidden_size % 4:
            raise ValueError(f"hidden_size={hidden_size} is not a multiple of 4, which the position embedding needs")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.hidden_size, self.depth, self.num_heads = hidden_size, depth, num_heads
        self.mlp_ratio, self.num_classes = mlp_ratio, num_classes
        self.impl = kernels.resolve_impl(impl)
        self.attention = resolve_attention(attention, hidden_size // num_heads)
        self.compute_dtype, self.residual_dtype = compute_dtype, residual_dtype

        grid = input_size // patch_size
        self.pos_embed = nn.Parameter(_sincos_position_embedding(hidden_size, grid), requires_grad=False)
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.s_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio, self.attention) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels)
        self._initialize()

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "DiT":
        """A published size, such as ``"DiT-B/4"`` (``"DiT-B-4"`` is accepted); overrides are constructor arguments."""
        preset = PRESETS.get(name) or PRESETS.get("/".join(name.rsplit("-", 1)))
        if preset is None:
            raise ValueError(f"no DiT preset is called {name!r}; choose one of {', '.join(PRESETS)}")
        sizes = dict(zip(("patch_size", "hidden_size", "depth", "num_heads"), preset, strict=True))
        return cls(**{**sizes, **overrides})

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.data.flatten(1))
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (*self._modulation_layers(), self.final_layer.linear):
            nn.init.zeros_(layer.weight)

    @property
    def ops(self):
        """The module of ops that ``impl`` stands for."""
        return kernels.ops(self.impl)

    @property
    def null_label(self) -> int:
        """The row of the label table that means "no label".

        Raises:
            ValueError: if the table was built without one (class_dropout_prob=0).
        """
        if self.y_embedder.embedding_table.num_embeddings <= self.num_classes:
            raise ValueError(
                "this DiT has no row for 'no label', because it was built with class_dropout_prob=0; "
                "pass labels, or build it with class_dropout_prob > 0"
            )
        return self.num_classes

    def forward(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        """``F(x, t, s, labels)``.

        Args:
            x: (B, C, input_size, input_size) floating point. t, s: (B,) in [0, 1], s <= t, float32 (float64 for a
                float64 model). labels: (B,) int64 in [0, num_classes], or None for "no label".

        Returns:
            (B, C, input_size, input_size), dtype of x.
        """
        return self._run(x, t, s, labels)[0]

    def forward_difference(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        labels: Tensor | None,
        dx: Tensor,
        dt: Tensor,
        *,
        rows: slice | None = None,
        mode: str = "difference",
    ) -> tuple[Tensor, Tensor]:
        """``F = net(x,t,s,y)`` and ``dF = net(x+dx, t+dt, s, y) − F`` in one forward, without cancellation.

        The pair ``(value, difference)`` goes through every layer by formulas that never subtract two nearly equal
        numbers, so dF has the relative accuracy of the arithmetic however small (dx, dt) is.

        Args:
            x, t, s, labels: as in :meth:`forward`.
            dx: (b, C, input_size, input_size). dt: (b,) the shift of t and of t−s.
            rows: the b rows that carry the difference, by default all.
            mode: ``difference``, or ``tangent`` for the exact derivative of F along (dx, dt).

        Returns:
            ``(F, dF)``; F is differentiable, dF (b, C, input_size, input_size) is not.
        """
        if mode not in ("difference", "tangent"):
            raise ValueError(f"mode={mode!r} is not known; choose 'difference' or 'tangent'")
        shift = _Shift(slice(None) if rows is None else rows, mode == "tangent")
        return self._run(x, t, s, labels, shift, dx, dt)

    def _run(self, x, t, s, labels, shift=None, dx=None, dt=None):
        dtype = self.compute_dtype or self.x_embedder.proj.weight.dtype
        residual_dtype = self.residual_dtype or dtype
        ops = self.ops
        tokens = self.x_embedder(x.to(dtype)).to(residual_dtype) + self.pos_embed.to(residual_dtype)
        modulation, dmodulation = self._modulation(t, s, labels, dtype, shift, dt)
        h = ops.modulated_layernorm(tokens, *modulation[:2], eps=_LN_EPS, dtype=dtype)
        d = dh = None
        if shift is not None:
            with torch.no_grad():
                rows = shift.rows
                d = self.x_embedder.difference(dx.to(dtype)).to(residual_dtype)
                dh = ops.modulated_layernorm_difference(
                    tokens[rows], d, modulation[1][rows], *dmodulation[:2],
                    eps=_LN_EPS, dtype=dtype, tangent=shift.tangent,
                )  # fmt: skip
        for i, block in enumerate(self.blocks):
            window = slice(6 * i + 2, 6 * i + 8)
            pair = (d, dh, dmodulation[window] if shift is not None else None)
            tokens, h, d, dh = block(tokens, h, modulation[window], pair, shift, ops)
        out = self._unpatchify(_linear(self.final_layer.linear, h)).to(x.dtype)
        if shift is None:
            return out, None
        with torch.no_grad():
            return out, self._unpatchify(_linear_difference(self.final_layer.linear, dh)).to(x.dtype)

    def _modulation_layers(self) -> list[nn.Linear]:
        return [m.adaLN_modulation[1] for m in (*self.blocks, self.final_layer)]

    def _modulation(self, t, s, labels, dtype, shift, dt):
        """All shifts, scales and gates, 6·depth+2 of (B, D), from one product over the stacked weights.

        In the order of use: shift, scale, gate, shift, scale, gate of each block; shift, scale of the last layer.
        """
        if labels is None:
            labels = torch.full(t.shape, self.null_label, device=t.device)
        ops = self.ops
        features = ops.time_sinusoids(t, s, width=_SINUSOID_WIDTH, dtype=dtype)
        t_embedding, u_t = self.t_embedder(features[0])
        s_embedding, u_s = self.s_embedder(features[1])
        table = self.y_embedder.embedding_table.weight
        c, active = ops.condition(t_embedding, s_embedding, table, labels)
        layers = self._modulation_layers()
        weight = torch.cat([layer.weight.to(dtype) for layer in layers])
        bias = torch.cat([layer.bias.to(dtype) for layer in layers])
        modulation = nn.functional.linear(active, weight, bias).unflatten(1, (-1, self.hidden_size)).unbind(1)
        if shift is None:
            return modulation, None
        with torch.no_grad():
            rows = shift.rows
            d_features = ops.time_sinusoids_difference(
                t[rows], s[rows], dt, width=_SINUSOID_WIDTH, dtype=dtype, tangent=shift.tangent
            )
            dc = self.t_embedder.difference(u_t[rows], d_features[0], shift.tangent, ops)
            dc = dc + self.s_embedder.difference(u_s[rows], d_features[1], shift.tangent, ops)
            d_active = ops.silu_difference(c[rows], dc, tangent=shift.tangent)
            dmodulation = nn.functional.linear(d_active, weight).unflatten(1, (-1, self.hidden_size)).unbind(1)
        return modulation, dmodulation

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        p, grid = self.patch_size, self.input_size // self.patch_size
        pixels = tokens.unflatten(2, (p, p, -1)).unflatten(1, (grid, grid))
        return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def _require_divides(name: str, divisor: int, of: str, value: int) -> None:
    if divisor < 1 or value % divisor:
        raise ValueError(f"{name}={divisor} does not divide {of}={value}; choose a {name} that does")
