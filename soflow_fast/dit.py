"""Diffusion transformer with adaLN-Zero (Peebles & Xie 2023) conditioned on two times, and its difference forward.

Shapes: B rows, b rows that carry a difference, N tokens, D width, C channels, H×W pixels, p patch size. The
state_dict keys are those of the public SoFlow checkpoints.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from soflow_fast import kernels
from soflow_fast.attention import resolve_attention, warn_of_large_heads
from soflow_fast.layers import (
    LN_EPS,
    SINUSOID_WIDTH,
    Call,
    DiTBlock,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    linear,
    prediction_of,
    product,
    require_divides,
    require_multiples_of_16,
    sinusoids,
    sizes_of_preset,
    unpatchified,
)
from soflow_fast.positions import position_table
from soflow_fast.size import Size, as_size, format_size, height_and_width

RECOMPUTE = ("none", "elementwise", "block")

_SIZES = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "M": (1024, 16, 16),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}

_PATCHES = (1, 2, 4, 8, 16, 32)

#: patch size, width, depth, heads. Patches of 1 are for latents of 16×16, of 2 and 4 for ones of 32×32, and larger ones
#: for pixels.
PRESETS = {f"DiT-{name}/{patch}": (patch, *sizes) for name, sizes in _SIZES.items() for patch in _PATCHES}

#: Their names, in words.
PRESET_NAMES = f"DiT-{{{','.join(_SIZES)}}}/{{{','.join(map(str, _PATCHES))}}}"


# Of the layers of torch that a DiT is made of.
_FORWARDS = tuple(layer.forward for layer in (nn.Conv2d, nn.Embedding, nn.Linear, nn.Sequential, nn.SiLU))


class DiT(nn.Module):
    """Diffusion transformer ``F(x, t, s, label)`` over images or latents.

    The conditioning is ``embed_t(t) + embed_s(t−s) + embed_y(label)``; times are not scaled. With
    ``condition_dim`` there is another term, of these numbers.

    Args:
        input_size: of x, one number or (H, W). patch_size: divides both. in_channels: of x and of the output.
        hidden_size: width D, a multiple of 4 and of num_heads. depth: blocks. mlp_ratio: MLP width over D.
        class_dropout_prob: if positive, the label table has a row for "no label"; its value has no other effect. Which
            labels are dropped is decided by the objective, never here.
        num_classes: the index of "no label"; 0 for unconditional models.
        embedding_dim: size k of an embedding, such as of a text, that a row is conditioned on in place of a class, see
            :mod:`soflow_fast.conditions`; 0 for classes. ``null_condition`` is then 0 until it is set.
        condition_dim: how many numbers, of about [0, 1], a row is conditioned on beside its label, such as the guidance
            of :class:`~soflow_fast.objectives.improved_meanflow.ImprovedMeanFlow`; 0 for none.
        prediction: ``velocity``, or ``data``: the last layer then predicts the data, for pixels in large patches, see
            :class:`~soflow_fast.layers.DataPrediction`.
        impl: ``auto``, ``torch`` or ``triton``, see :func:`soflow_fast.kernels.resolve_impl`. For heads larger than
            :data:`soflow_fast.kernels.MAX_HEAD_DIM`, plain torch computes attention's difference; this is logged.
        attention: see :func:`soflow_fast.attention.resolve_attention`.
        compute_dtype: of matrix operands and activations; parameters are cast to it. By default the parameters' own.
        residual_dtype: of the residual stream and its difference; at least as wide as compute_dtype, the default.
        recompute: what the backward computes again instead of keeping it: ``none``, ``elementwise`` (the GELU, which
            saves a third of the activations) or ``block`` (everything but the blocks' inputs).
        float8_guidance: objectives guide by :meth:`forward_float8`.

    Raises:
        ValueError: for sizes that do not divide, and for an implementation that cannot run here.
    """

    def __init__(
        self,
        input_size: Size = 32,
        patch_size: int = 4,
        in_channels: int = 4,
        hidden_size: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        *,
        embedding_dim: int = 0,
        condition_dim: int = 0,
        prediction: str = "velocity",
        impl: str = "auto",
        attention: str = "auto",
        compute_dtype: torch.dtype | None = None,
        residual_dtype: torch.dtype | None = None,
        recompute: str = "none",
        float8_guidance: bool = False,
    ):
        super().__init__()
        height, width = height_and_width(input_size)
        require_divides("patch_size", patch_size, f"input_size={format_size(input_size)}", height, width)
        require_divides("num_heads", num_heads, f"hidden_size={hidden_size}", hidden_size)
        if hidden_size % 4:
            raise ValueError(f"hidden_size={hidden_size} is not a multiple of 4, which the position embedding needs")
        self.input_size, self.patch_size, self.in_channels = as_size(height, width), patch_size, in_channels
        self.hidden_size, self.depth, self.num_heads = hidden_size, depth, num_heads
        self.mlp_ratio, self.num_classes = mlp_ratio, 0 if embedding_dim else num_classes
        self.embedding_dim, self.condition_dim = embedding_dim, condition_dim
        self.impl = kernels.resolve_impl(impl)
        head_dim = hidden_size // num_heads
        self.attention = resolve_attention(attention, head_dim, compute_dtype)
        if self.attention == "triton" and self.impl == "torch":
            raise ValueError("attention='triton' is one of the fused ops; choose impl='triton', or attention='sdpa'")
        if self.impl == "triton":
            warn_of_large_heads(head_dim, compute_dtype)
        self.compute_dtype, self.residual_dtype = compute_dtype, residual_dtype
        if recompute not in RECOMPUTE:
            raise ValueError(f"recompute={recompute!r} is not known; choose one of {', '.join(RECOMPUTE)}")
        self.recompute = recompute
        if float8_guidance:
            require_multiples_of_16(hidden_size, int(hidden_size * mlp_ratio))
        self.float8_guidance = float8_guidance

        self.grid = (height // patch_size, width // patch_size)
        self.pos_embed = nn.Parameter(position_table(hidden_size, *self.grid), requires_grad=False)
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.s_embedder = TimestepEmbedder(hidden_size)
        if embedding_dim:
            self.y_embedder = TimestepEmbedder(hidden_size, embedding_dim)
            self.register_buffer("null_condition", torch.zeros(embedding_dim))
        else:
            self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        numbers = condition_dim * SINUSOID_WIDTH
        self.condition_embedder = TimestepEmbedder(hidden_size, numbers) if condition_dim else None
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels)
        self.prediction = prediction_of(prediction)
        self._initialize()

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "DiT":
        """A published size, such as ``"DiT-B/4"`` (``"DiT-B-4"`` is accepted); overrides are constructor arguments."""
        return cls(**{**sizes_of_preset(name, PRESETS, PRESET_NAMES), **overrides})

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.data.flatten(1))
                nn.init.zeros_(module.bias)
        by_features = [self.t_embedder, self.condition_embedder]
        if self.embedding_dim:
            by_features.append(self.y_embedder)
        else:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for embedder in filter(None, by_features):
            nn.init.normal_(embedder.mlp[0].weight, std=0.02)
            nn.init.normal_(embedder.mlp[2].weight, std=0.02)
        for layer in (*self._modulation_layers(), self.final_layer.linear):
            nn.init.zeros_(layer.weight)

    def require_own_layers(self) -> None:
        """ValueError for a layer that is not this class's own any more, as adapters replace one by theirs: only its
        weight would be used.
        """
        for name, part in self.named_modules():
            of_dit = isinstance(part, nn.Sequential) or type(part).__module__ == TimestepEmbedder.__module__
            for key, layer in part.named_children() if of_dit else ():
                if type(layer).forward not in _FORWARDS and type(layer).__module__ != TimestepEmbedder.__module__:
                    raise ValueError(
                        f"{name}.{key} of the DiT is a {type(layer).__module__}.{type(layer).__name__}, which it would "
                        "not call: a DiT computes with the weights of its layers; have torch.nn.utils.parametrize add "
                        "to a weight what is to be trained of it"
                    )

    @property
    def null_label(self) -> int:
        """The row of the label table that means "no label".

        Raises:
            ValueError: if the table was built without one (class_dropout_prob=0).
        """
        return 0 if self.embedding_dim else self.y_embedder.null_row

    def forward(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        """``F(x, t, s, labels)``.

        Args:
            x: (B, C, H, W) floating point. t, s: (B,) in [0, 1], s <= t, float32 (float64 for a
                float64 model).
            labels: (B,) int64 in [0, num_classes]; or (B, 1 + condition_dim) floating point, the label and then the
                numbers that the row is conditioned on, without which they are 0; (B, embedding_dim) floating point
                where there are no classes; or None for "no label" and "no condition".

        Returns:
            (B, C, H, W), dtype of x.

        Raises:
            ValueError: for labels of another width.
        """
        return self._run(x, t, s, labels, self._call())[0]

    @torch.no_grad()
    def forward_float8(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        """:meth:`forward` without gradient, with products on operands in float8, each row with a scale of its own.

        These are the products of each block's normalised inputs and of its hidden units; not attention and its
        output's, nor what lies outside of the blocks. On a GPU the DiT computes in bfloat16, and its widths are
        multiples of 16.
        """
        return self._run(x, t, s, labels, self._call()._replace(float8=True))[0]

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
            dx: (b, C, H, W). dt: (b,) the shift of t and of t−s.
            rows: the b rows that carry the difference, by default all.
            mode: ``difference``, or ``tangent`` for the exact derivative of F along (dx, dt).

        Returns:
            ``(F, dF)``; F is differentiable, dF (b, C, H, W) is not.
        """
        if mode not in ("difference", "tangent"):
            raise ValueError(f"mode={mode!r} is not known; choose 'difference' or 'tangent'")
        call = self._call(slice(None) if rows is None else rows, mode == "tangent")
        return self._run(x, t, s, labels, call, dx, dt)

    def jvp(
        self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None, dx: Tensor, dt: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``F`` and its derivative along (dx, dt) by :func:`torch.func.jvp`, for comparison with the tangent mode.

        Forward-mode AD has no flash attention: this runs the math backend and the plain torch ops, on all rows.
        """
        call = Call(kernels.ops("torch"), "math")
        # Dual tensors of views cannot be traced by torch.compile: a view of a slice ends in an internal error.
        x, t, dx, dt = (z.clone() for z in (x, t, dx, dt))
        return torch.func.jvp(lambda x, t: self._run(x, t, s, labels, call)[0], (x, t), (dx, dt))

    def _call(self, rows: slice | None = None, tangent: bool = False) -> Call:
        return Call(kernels.ops(self.impl), self.attention, rows, tangent, self.recompute)

    def _run(self, x, t, s, labels, call: Call, dx=None, dt=None):
        dtype = self.compute_dtype or self.x_embedder.proj.weight.dtype
        residual_dtype = torch.promote_types(self.residual_dtype or dtype, dtype)
        ops, rows = call.ops, call.rows
        if x.shape[2:] != height_and_width(self.input_size):  # another grid may have as many tokens
            raise ValueError(
                f"x of shape {tuple(x.shape)} does not fit a DiT of input_size={format_size(self.input_size)}; give x "
                "of that size"
            )
        tokens = self.x_embedder(x.to(dtype)).to(residual_dtype) + self.pos_embed.to(residual_dtype)
        (first, *modulation), (d_first, *dmodulation) = self._modulation(t, s, labels, dtype, call, dt)
        shift, scale = first.unbind(1)
        narrow = torch.float8_e4m3fn if call.float8 else dtype
        h = ops.modulated_layernorm(tokens, shift, scale, eps=LN_EPS, dtype=narrow)
        d = dh = None
        if rows is not None:
            with torch.no_grad():
                d = self.x_embedder.difference(dx.to(dtype)).to(residual_dtype)
                dh = ops.modulated_layernorm_difference(
                    tokens[rows], d, scale[rows], *d_first.unbind(1), eps=LN_EPS, dtype=dtype, tangent=call.tangent
                )
        for i, block in enumerate(self.blocks):
            run = block
            if call.recompute == "block" and torch.is_grad_enabled():
                run = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
            of_block = call if i + 1 < self.depth else call._replace(float8=False)
            tokens, h, d, dh = run(tokens, h, modulation[i], (d, dh, dmodulation[i]), of_block)
        out = unpatchified(linear(self.final_layer.linear, h), self.grid, self.patch_size).to(x.dtype)
        if self.prediction is not None:
            out = self.prediction(out, x, t)
        if rows is None:
            return out, None
        with torch.no_grad():
            d_out = unpatchified(product(self.final_layer.linear, dh), self.grid, self.patch_size).to(x.dtype)
            if self.prediction is not None:
                d_out = self.prediction.difference(out[rows], d_out, dx, t[rows], dt, call.tangent)
            return out, d_out

    def _modulation_layers(self) -> list[nn.Linear]:
        return [m.adaLN_modulation[1] for m in (*self.blocks, self.final_layer)]

    def _modulation(self, t, s, labels, dtype, call: Call, dt):
        """All shifts, scales and gates from one product over the stacked weights, and their differences.

        In the order of use they are shift, scale, gate, shift, scale, gate of each block and shift, scale of the last
        layer: the first two, (B, 2, D), normalise the input of the blocks, and six, (B, 6, D), go to each block.
        """
        ops, rows = call.ops, call.rows
        table, labels, numbers = self._told(labels, t, dtype)
        features = ops.time_sinusoids(t, s, width=SINUSOID_WIDTH, dtype=dtype)
        t_embedding, u_t = self.t_embedder(features[0])
        s_embedding, u_s = self.s_embedder(features[1])
        if self.condition_embedder is not None:
            s_embedding = s_embedding + self.condition_embedder(sinusoids(numbers).flatten(1).to(dtype))[0]
        c, active = ops.condition(t_embedding, s_embedding, table, labels)
        layers = self._modulation_layers()
        weight = torch.cat([layer.weight.to(dtype) for layer in layers])
        bias = torch.cat([layer.bias.to(dtype) for layer in layers])
        sizes = [2] + [6] * self.depth
        modulation = nn.functional.linear(active, weight, bias).unflatten(1, (-1, self.hidden_size)).split(sizes, 1)
        if rows is None:
            return modulation, (None,) * len(sizes)
        with torch.no_grad():
            d_features = ops.time_sinusoids_difference(
                t[rows], s[rows], dt, width=SINUSOID_WIDTH, dtype=dtype, tangent=call.tangent
            )
            dc = self.t_embedder.difference(u_t, d_features[0], call)
            dc = dc + self.s_embedder.difference(u_s, d_features[1], call)
            d_active = ops.silu_difference(c[rows], dc, tangent=call.tangent)
            dmodulation = nn.functional.linear(d_active, weight).unflatten(1, (-1, self.hidden_size)).split(sizes, 1)
        return modulation, dmodulation

    def _told(self, labels: Tensor | None, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """A table of embeddings (K, D), which of them is each row's (B,), and the numbers (B, condition_dim)."""
        numbers = t.new_zeros(t.shape[0], self.condition_dim)
        if self.embedding_dim:
            embeddings = self.null_condition.expand(t.shape[0], -1) if labels is None else labels
            if embeddings.shape != (t.shape[0], self.embedding_dim):
                raise ValueError(
                    f"labels of shape {tuple(embeddings.shape)} do not fit a DiT with "
                    f"embedding_dim={self.embedding_dim}; give (B, {self.embedding_dim})"
                )
            return self.y_embedder(embeddings.to(dtype))[0], torch.arange(t.shape[0], device=t.device), numbers
        table = self.y_embedder.embedding_table.weight
        if labels is None:
            return table, torch.full(t.shape, self.null_label, device=t.device), numbers
        if labels.dim() == 1:
            return table, labels, numbers
        if labels.shape[1] != 1 + self.condition_dim:
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} do not fit a DiT with condition_dim={self.condition_dim}; "
                f"give (B,) or (B, {1 + self.condition_dim})"
            )
        return table, labels[:, 0].long(), labels[:, 1:].to(t)
