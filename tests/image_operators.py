"""Operators as image generators call them: with weights, biases and masks that move, and those that few others need.

Functions of x (B, 4, 4, 4), positive and away from the kinks, and of t (B,).
"""

import torch
import torch.nn.functional as nnf

B = 3
GAIN = 1 + torch.randn(8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64) / 5
FEW = GAIN[:3, :4]
GRID = (GAIN.view(1, 4, 8, 2) - 1).expand(B, -1, -1, -1)
MASK = torch.tensor([True, False, True, True])


def _style(x, t):
    """A weight and a bias, (4,), that move."""
    return 1 + t[0] * x[0, 0, 0], torch.sin(3 * x[0, 1, 0] + t[1])


def _adain(x, t):
    """The instance norm of one sample that holds the channels of all, each with a weight and a bias of its own."""
    weight, bias = (torch.outer(y, GAIN[0, :4].to(t)).view(-1) for y in (t, 1 + t * t))
    return nnf.instance_norm(x.reshape(1, -1, 4, 4), weight=weight, bias=bias).view(x.shape)


MOVING = {
    "layer_norm": lambda x, t: nnf.layer_norm(x, (4,), *_style(x, t)),
    "layer_norm_of_two": lambda x, t: nnf.layer_norm(x, (4, 4), x[0, 0], x[1, 1]),
    "layer_norm_of_what_stays": lambda x, t: nnf.layer_norm(FEW.to(x), (4,), *_style(x, t)),
    "rms_norm": lambda x, t: nnf.rms_norm(x, (4,), _style(x, t)[0], 1e-6),
    "group_norm": lambda x, t: nnf.group_norm(x, 2, *_style(x, t)),
    "instance_norm": _adain,
    "instance_norm_of_what_stays": lambda x, t: _adain(GAIN.repeat(3, 1).view(B, 4, 4, 4).to(x), t),
    "instance_norm_of_other_statistics": lambda x, t: nnf.instance_norm(
        x, FEW[0].to(x), FEW[1].to(x), *_style(x, t), use_input_stats=False
    ),
    "batch_norm": lambda x, t: nnf.batch_norm(x, FEW[0].to(x), FEW[1].to(x), *_style(x, t)),
    "linear": lambda x, t: nnf.linear(x, FEW.to(x), x[0, 0, 0, :3]),
    "linear_of_what_stays": lambda x, t: nnf.linear(FEW.to(x), FEW.to(x), x[0, 0, 0, :3]),
    "conv": lambda x, t: nnf.conv2d(x, GAIN.view(4, 4, 2, 2).to(x), _style(x, t)[1]),
    "conv_transpose": lambda x, t: nnf.conv_transpose1d(x[0], GAIN.view(4, 4, 4).to(x), x[1, 1, 1]),
    "attention_mask": lambda x, t: nnf.scaled_dot_product_attention(x, x * x, x, attn_mask=3 * x[:, :1]),
    "attention_mask_alone": lambda x, t: nnf.scaled_dot_product_attention(*(GAIN.view(4, 4, 4).to(x),) * 3, x[0, 0]),
    "lerp": lambda x, t: torch.lerp(x, x * x, t.view(B, 1, 1, 1)) + torch.lerp(FEW[0].to(x), x, x),
}

OTHERS = {
    "bilinear_antialiased": lambda x, t: nnf.interpolate(x, size=(3, 3), mode="bilinear", antialias=True),
    "bicubic_antialiased": lambda x, t: nnf.interpolate(x, size=(3, 3), mode="bicubic", antialias=True),
    "grid_sample": lambda x, t: nnf.grid_sample(x, GRID.to(x), align_corners=False),
    "grid_sample_3d": lambda x, t: nnf.grid_sample(
        x[:, None], torch.cat([GRID, GRID[..., :1]], -1)[:, None].to(x), align_corners=False
    ),
    "conv_transpose3d": lambda x, t: nnf.conv_transpose3d(x[:, :, None], GAIN.view(4, 2, 2, 2, 2).to(x), t[:2]),
    "complex": lambda x, t: torch.complex(x, x * x).abs() + torch.complex(x, torch.ones_like(x)).abs(),
    "polar": lambda x, t: torch.view_as_real(torch.polar(x, x * x) + torch.polar(torch.ones_like(x), x)),
    "view_as_complex": lambda x, t: torch.view_as_real(
        torch.view_as_complex(GAIN.view(8, 4, 2).to(t) + t.view(B, 1, 1, 1)) * (1 + 2j)
    ),
    "max_pool": lambda x, t: nnf.max_pool1d(x.flatten(2), 2)[..., :2, None] + nnf.max_pool3d(x, 2)[:, :1],
    "pieces": lambda x, t: x.nan_to_num() + nnf.threshold(x, 0.7, 0.1) + x.erfc(),
    "bent_at_zero": lambda x, t: nnf.relu(x - 0.8) + nnf.leaky_relu(0.9 - x, 0.2) + nnf.leaky_relu(x) * (x - 1.1).abs(),
    "casts": lambda x, t: (x.double().type_as(t) + t.double().to(x.dtype).view(B, 1, 1, 1)) * x.to(x.dtype),
    "whole_slices": lambda x, t: (x * x)[:, :] + t[...].view(B, 1, 1, 1),
    "constant_pad": lambda x, t: torch.constant_pad_nd(x * x, (1, 0), 3.0),
    "boolean_mask": lambda x, t: (x * x)[:, MASK],
    "bilinear": lambda x, t: nnf.bilinear(x, x * x, GAIN.view(4, 4, 4).to(x), x[0, 0, 0]),
    "norms": lambda x, t: torch.linalg.vector_norm(x, 1, 1) + torch.linalg.vector_norm(x, float("inf"), 2),
}


def inputs(step):
    """x, t, and steps dx and dt of about that size."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(3, 4, 4, 4, generator=generator, dtype=torch.float64) + 0.5
    t = torch.rand(3, generator=generator, dtype=torch.float64) / 2 + 0.4
    dx = step * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return x, t, dx, -step * t
