"""The transformer of improved MeanFlow (MiT, Geng et al. 2025, arXiv 2512.02012), conditioned by tokens.

Everything that it is told of a row stands in front of the row's patches, in one sequence; there is no modulation. The
last blocks are a head for F and, where it is trained, a second one for the velocity. The difference forward is derived,
see :mod:`soflow_fast.differencing`.

Shapes: B rows, N patches, P tokens before them, D width, H heads, h head dim, C channels, p patch size. Parameters have
the names of the public code, but that its layers wrap those of their framework.
"""

import torch
from torch import Tensor, nn

from soflow_fast.layers import (
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    prediction_of,
    require_divides,
    sinusoids,
    sizes_of_preset,
    unpatchified,
)
from soflow_fast.size import Size, as_size, format_size, height_and_width

_SIZES = {
    "B": (768, 12, 12),
    "M": (768, 24, 12),
    "L": (1024, 32, 16),
    "XL": (1024, 48, 16),
}

_PATCHES = (1, 2, 4, 8, 16, 32)

#: patch size, width, depth, heads; published are those with patches of 2. Of the depth, 8 blocks are the head's.
PRESETS = {f"MiT-{name}/{patch}": (patch, *sizes) for name, sizes in _SIZES.items() for patch in _PATCHES}

#: Their names, in words.
PRESET_NAMES = f"MiT-{{{','.join(_SIZES)}}}/{{{','.join(map(str, _PATCHES))}}}"

_NORM_EPS = 1e-6
_ROTATION_PERIOD = 10000.0

# Of the normal draws of the weights, times the root of their inputs; of what embeds, and of tokens, it is 1.
_BLOCK_GAIN = 0.32


class MiT(nn.Module):
    """MeanFlow improved Transformer ``F(x, t, s, label)`` over images or latents.

    Of the times it is told ``t − s`` alone. In front of the patches are learned tokens, to which the embeddings of what
    they stand for are added: of the class, of the guidance's ``1 − 1/w`` and of both ends of its interval where it is
    told of a guidance, and of the time.

    Args:
        input_size: of x, one number or (H, W). patch_size: divides both. in_channels: of x and of the output.
        hidden_size: width D, a multiple of num_heads, by which it is divided into even parts.
        depth: blocks that F goes through. head_depth: the last of these, which the velocity's head has too, as its own.
        mlp_ratio: width of the SwiGLU over D. num_classes: the index of "no label"; 0 for unconditional models.
        class_dropout_prob: if positive, the label table has a row for "no label"; its value has no other effect.
        condition_dim: 3 for the guidance of
            :class:`~soflow_fast.objectives.improved_meanflow.ImprovedMeanFlow`, else 0, without its tokens.
        velocity_head: whether there is one. An objective that does not train it leaves it as it is drawn.
        num_class_tokens, num_cfg_tokens, num_interval_tokens, num_time_tokens: how many stand for the class, for w, for
            each end of the interval and for the time.
        prediction: ``velocity``, or ``data``, of both heads, see :class:`~soflow_fast.layers.DataPrediction`.
        impl: of the fused ops of the objective and of the difference of attention.

    Raises:
        ValueError: for sizes that do not divide, and for another condition_dim.
    """

    def __init__(
        self,
        input_size: Size = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 8 / 3,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        *,
        head_depth: int = 8,
        condition_dim: int = 0,
        velocity_head: bool = False,
        num_class_tokens: int = 8,
        num_cfg_tokens: int = 4,
        num_interval_tokens: int = 2,
        num_time_tokens: int = 4,
        prediction: str = "velocity",
        impl: str = "auto",
    ):
        super().__init__()
        height, width = height_and_width(input_size)
        require_divides("patch_size", patch_size, f"input_size={format_size(input_size)}", height, width)
        require_divides("num_heads", num_heads, f"hidden_size={hidden_size}", hidden_size)
        if hidden_size // num_heads % 2:
            raise ValueError(
                f"hidden_size={hidden_size} in num_heads={num_heads} makes heads of {hidden_size // num_heads}, and "
                "rotary positions turn pairs of numbers; choose heads of an even size"
            )
        if not 1 <= head_depth <= depth:
            raise ValueError(
                f"head_depth={head_depth} is not among the depth={depth} blocks; choose one from 1 to {depth}"
            )
        if condition_dim not in (0, 3):
            raise ValueError(
                f"condition_dim={condition_dim} is not what a MiT is told beside the label; choose 3, a guidance and "
                "the ends of its interval, or 0"
            )
        self.input_size, self.patch_size, self.in_channels = as_size(height, width), patch_size, in_channels
        self.hidden_size, self.depth, self.num_heads, self.head_depth = hidden_size, depth, num_heads, head_depth
        self.mlp_ratio, self.num_classes, self.condition_dim = mlp_ratio, num_classes, condition_dim
        self.impl = impl
        self.grid = (height // patch_size, width // patch_size)

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.class_tokens = nn.Parameter(torch.empty(num_class_tokens, hidden_size))
        if condition_dim:
            self.omega_embedder = TimestepEmbedder(hidden_size)
            self.cfg_t_start_embedder = TimestepEmbedder(hidden_size)
            self.cfg_t_end_embedder = TimestepEmbedder(hidden_size)
            self.omega_tokens = nn.Parameter(torch.empty(num_cfg_tokens, hidden_size))
            self.t_min_tokens = nn.Parameter(torch.empty(num_interval_tokens, hidden_size))
            self.t_max_tokens = nn.Parameter(torch.empty(num_interval_tokens, hidden_size))
        self.h_embedder = TimestepEmbedder(hidden_size)
        self.time_tokens = nn.Parameter(torch.empty(num_time_tokens, hidden_size))

        def blocks(n: int) -> nn.ModuleList:
            return nn.ModuleList(MiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(n))

        self.shared_blocks, self.u_heads = blocks(depth - head_depth), blocks(head_depth)
        self.u_final_layer = _FinalLayer(hidden_size, patch_size, in_channels)
        self.v_heads = blocks(head_depth) if velocity_head else None
        self.v_final_layer = _FinalLayer(hidden_size, patch_size, in_channels) if velocity_head else None
        self.prediction = prediction_of(prediction)
        self._initialize()

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "MiT":
        """A published size, such as ``"MiT-B/2"`` (``"MiT-B-2"`` is accepted); overrides are constructor arguments."""
        return cls(**{**sizes_of_preset(name, PRESETS, PRESET_NAMES), **overrides})

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, (MiTBlock, TimestepEmbedder)):
                gain = _BLOCK_GAIN if isinstance(module, MiTBlock) else 1
                for layer in (m for m in module.modules() if isinstance(m, nn.Linear)):
                    nn.init.normal_(layer.weight, std=gain * layer.in_features**-0.5)
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)
            elif isinstance(module, _FinalLayer):
                nn.init.zeros_(module.linear.weight)
                nn.init.zeros_(module.linear.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        tokens = [p for name, p in self.named_parameters(recurse=False) if name.endswith("_tokens")]
        for embedding in (self.y_embedder.embedding_table.weight, *tokens):
            nn.init.normal_(embedding, std=self.hidden_size**-0.5)

    @property
    def has_velocity_head(self) -> bool:
        """Whether :meth:`forward_with_velocity` and :meth:`forward_velocity` can be called."""
        return self.v_heads is not None

    @property
    def null_label(self) -> int:
        """The row of the label table that means "no label".

        Raises:
            ValueError: if the table was built without one (class_dropout_prob=0).
        """
        return self.y_embedder.null_row

    def forward(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        """``F(x, t, s, labels)``.

        Args:
            x: (B, C, H, W) floating point. t, s: (B,) in [0, 1], s <= t, float32 (float64 for a float64 model).
            labels: (B,) int64 in [0, num_classes]; or (B, 1 + condition_dim) floating point, the label, ``1 − 1/w`` and
                the interval's ends, without which these are 0; or None for "no label".

        Returns:
            (B, C, H, W), dtype of x.

        Raises:
            ValueError: for labels of another width, and for x of another size.
        """
        sequence, rotation = self._trunk(x, t, s, labels)
        return self._head(sequence, rotation, self.u_heads, self.u_final_layer, x, t)

    def forward_with_velocity(
        self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``F`` and the velocity at (x, t), of both heads over one trunk; arguments as of :meth:`forward`.

        Returns:
            two of (B, C, H, W), dtype of x.
        """
        sequence, rotation = self._trunk(x, t, s, labels)
        u = self._head(sequence, rotation, self.u_heads, self.u_final_layer, x, t)
        return u, self._head(sequence, rotation, self.v_heads, self.v_final_layer, x, t)

    def forward_velocity(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The velocity at (x, t) with s = t, of its head alone; (B, C, H, W), dtype of x."""
        sequence, rotation = self._trunk(x, t, t, labels)
        return self._head(sequence, rotation, self.v_heads, self.v_final_layer, x, t)

    def _trunk(self, x, t, s, labels) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The sequence (B, P+N, D) after the shared blocks, and the rotation of its positions."""
        if x.shape[2:] != height_and_width(self.input_size):
            raise ValueError(
                f"x of shape {tuple(x.shape)} does not fit a MiT of input_size={format_size(self.input_size)}; give x "
                "of that size"
            )
        dtype = self.class_tokens.dtype
        labels, numbers = self._told(labels, t)
        sequence = [self._tokens(self.class_tokens, self.y_embedder.embedding_table(labels))]
        if self.condition_dim:
            for tokens, embedder, number in zip(
                (self.omega_tokens, self.t_min_tokens, self.t_max_tokens),
                (self.omega_embedder, self.cfg_t_start_embedder, self.cfg_t_end_embedder),
                numbers.unbind(1),
                strict=True,
            ):
                sequence.append(self._tokens(tokens, embedder(sinusoids(number).to(dtype))[0]))
        sequence.append(self._tokens(self.time_tokens, self.h_embedder(sinusoids(t - s).to(dtype))[0]))
        # under autocast the embeddings are bfloat16, and the stream of the blocks stays float32
        sequence = torch.cat([part.to(dtype) for part in (*sequence, self.x_embedder(x.to(dtype)))], 1)
        rotation = rotation_of_positions(sequence.shape[1], self.hidden_size // self.num_heads, sequence)
        for block in self.shared_blocks:
            sequence = block(sequence, *rotation)
        return sequence, rotation

    def _head(self, sequence, rotation, blocks, final_layer, x, t) -> Tensor:
        for block in blocks:
            sequence = block(sequence, *rotation)
        rows, columns = self.grid
        out = final_layer(sequence[:, -rows * columns :])
        out = unpatchified(out, self.grid, self.patch_size).to(x.dtype)
        return out if self.prediction is None else self.prediction(out, x, t)

    @staticmethod
    def _tokens(tokens: Tensor, embedding: Tensor) -> Tensor:
        return tokens + embedding.to(tokens.dtype)[:, None]

    def _told(self, labels: Tensor | None, t: Tensor) -> tuple[Tensor, Tensor]:
        """The labels (B,) int64 and the numbers (B, condition_dim)."""
        numbers = t.new_zeros(t.shape[0], self.condition_dim)
        if labels is None:
            return torch.full_like(t, self.null_label, dtype=torch.int64), numbers
        if labels.dim() == 1:
            return labels, numbers
        if labels.shape[1] != 1 + self.condition_dim:
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} do not fit a MiT with condition_dim={self.condition_dim}; give "
                f"(B,) or (B, {1 + self.condition_dim})"
            )
        return labels[:, 0].long(), labels[:, 1:].to(t)


class MiTBlock(nn.Module):
    """Attention and SwiGLU on the RMS-normed stream, each added times a vector, which begins at 0."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1, self.norm2 = (nn.RMSNorm(hidden_size, eps=_NORM_EPS) for _ in range(2))
        self.attn = _Attention(hidden_size, num_heads)
        self.mlp = _SwiGLU(hidden_size, int(hidden_size * mlp_ratio))
        self.attn_gate, self.mlp_gate = (nn.Parameter(torch.zeros(hidden_size)) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, P+N, D), of x (B, P+N, D) and :func:`rotation_of_positions`."""
        x = x + self.attn(self.norm1(x), cos, sin) * self.attn_gate
        return x + self.mlp(self.norm2(x)) * self.mlp_gate


class _Attention(nn.Module):
    """Self-attention of heads of which q and k are RMS-normed, then rotated by their position."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(4)
        )
        self.q_norm, self.k_norm = (nn.RMSNorm(hidden_size // num_heads, eps=_NORM_EPS) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (proj(x).unflatten(2, (self.num_heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (rotated(norm(y.to(x.dtype)), cos, sin) for norm, y in ((self.q_norm, q), (self.k_norm, k)))
        out = nn.functional.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)))
        return self.out_proj(out.transpose(1, 2).flatten(2))


class _SwiGLU(nn.Module):
    """``w2(silu(w1 x) · w3 x)``."""

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(hidden_size, inner_size, bias=False) for _ in range(2))
        self.w2 = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class _FinalLayer(nn.Module):
    """The output projection, which begins at 0; the vector per token is (p, p, C), channel fastest."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=_NORM_EPS)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


def rotation_of_positions(n: int, head_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The cosine and sine of the angles by which the pairs of numbers at n positions are turned (RoPE).

    Returns:
        ``(cos, sin)``, each (n, 1, h/2), on the device of ``like``; float32, float64 where that is.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    pairs = torch.arange(0, head_dim, 2, dtype=dtype, device=like.device)
    positions = torch.arange(n, dtype=dtype, device=like.device)
    angle = (positions[:, None] * _ROTATION_PERIOD ** (-pairs / head_dim))[:, None]
    return angle.cos(), angle.sin()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring numbers of heads, as complex ones, turned by an angle.

    Args:
        x: (B, n, H, h). cos, sin: of :func:`rotation_of_positions`.
    """
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1).flatten(-2)
