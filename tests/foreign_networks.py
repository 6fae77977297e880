"""Networks that this library does not ship, written without any thought of it."""

import math

import torch
import torch.nn.functional as nnf
from torch import nn


class Function(nn.Module):
    """Of x and t alone."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, t, s, labels):
        return self.function(x, t)


def _sinusoids(t, width=16):
    phase = t[:, None] * torch.exp(-torch.arange(width // 2, device=t.device) / 2).to(t)
    return torch.cat([phase.cos(), phase.sin()], -1)


class _Residual(nn.Module):
    """A block of a UNet: GroupNorm, SiLU, convolutions, the embedding added, dropout."""

    def __init__(self, channels, out, embedding, dropout):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, channels), nn.GroupNorm(4, out)
        self.conv1, self.conv2 = nn.Conv2d(channels, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.skip, self.embed = nn.Conv2d(channels, out, 1), nn.Linear(embedding, 2 * out)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, e):
        scale, shift = self.embed(nnf.silu(e))[:, :, None, None].chunk(2, 1)
        h = self.conv1(nnf.silu(self.norm1(x), inplace=True))
        h = torch.addcmul(shift, self.norm2(h), scale + 1)
        return (self.skip(x) + self.conv2(self.dropout(nnf.silu(h)))) / math.sqrt(2)


class UNet(nn.Module):
    """As papers on CIFAR-10 have it: two resolutions, attention at the lower one, a skip connection."""

    num_classes = 10

    def __init__(self, dropout=0.0, channels=3):
        super().__init__()
        self.time, self.label = nn.Linear(32, 16), nn.Embedding(11, 16)
        self.enter, self.leave = nn.Conv2d(channels, 8, 3, padding=1), nn.Conv2d(16, channels, 3, padding=1)
        self.down, self.up = _Residual(8, 16, 16, dropout), _Residual(16 + 8, 16, 16, dropout)
        self.norm, self.qkv, self.proj = nn.GroupNorm(4, 16), nn.Conv1d(16, 48, 1), nn.Conv1d(16, 16, 1)

    def attend(self, x):
        q, k, v = self.qkv(self.norm(x).flatten(2)).unflatten(1, (3, 2, 8)).unbind(1)
        weights = torch.einsum("bhcq,bhck->bhqk", q, k / math.sqrt(8)).softmax(-1)
        return x + self.proj(torch.einsum("bhqk,bhck->bhcq", weights, v).flatten(1, 2)).view_as(x)

    def forward(self, x, t, s, labels=None):
        labels = torch.full_like(t, 10, dtype=torch.int64) if labels is None else labels
        e = self.time(torch.cat([_sinusoids(t), _sinusoids(t - s)], -1)) + self.label(labels)
        skip = self.enter(2 * x)
        h = self.attend(self.down(nnf.avg_pool2d(skip, 2), e))
        h = self.up(torch.cat([nnf.interpolate(h, scale_factor=2, mode="nearest"), skip], 1), e)
        return self.leave(nnf.silu(h))


class _Block(nn.Module):
    """As language models have it: RMSNorm, rotary attention with norms of q and k, SwiGLU; modulated."""

    def __init__(self, width=32, heads=2, tokens=16):
        super().__init__()
        self.heads = heads
        self.norm, self.q_norm, self.k_norm = nn.RMSNorm(width), nn.RMSNorm(16), nn.RMSNorm(16)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 96), nn.Linear(48, width)
        self.modulation = nn.Linear(width, 4 * width)
        self.register_buffer("angle", torch.arange(tokens)[:, None] * 10.0 ** -torch.arange(8.0))

    def rotate(self, x):
        a, b = x.chunk(2, -1)
        cos, sin = self.angle.cos().to(x), self.angle.sin().to(x)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def forward(self, x, c):
        scale, gate, scale2, gate2 = self.modulation(nnf.silu(c)).unsqueeze(1).chunk(4, -1)
        h = self.norm(x) * (1 + scale)
        q, k, v = self.qkv(h).reshape(*h.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        o = nnf.scaled_dot_product_attention(self.rotate(self.q_norm(q)), self.rotate(self.k_norm(k)), v)
        x = x + gate * self.proj(o.transpose(1, 2).flatten(2))
        a, b = self.up(self.norm(x) * (1 + scale2)).chunk(2, -1)
        return x + gate2 * self.down(nnf.silu(a) * b)


class Transformer(nn.Module):
    """A transformer this library does not ship."""

    num_classes = 10

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, 32, 2, 2), nn.Linear(32, 12)
        self.time, self.label = nn.Linear(32, 32), nn.Embedding(11, 32)
        self.blocks = nn.ModuleList(_Block() for _ in range(2))
        self.position = nn.Parameter(torch.randn(16, 32) / 10)

    def forward(self, x, t, s, labels=None):
        labels = torch.full_like(t, 10, dtype=torch.int64) if labels is None else labels
        c = self.time(torch.cat([_sinusoids(t), _sinusoids(t - s)], -1)) + self.label(labels)
        h = self.enter(x).flatten(2).mT + self.position
        for block in self.blocks:
            h = block(h, c)
        return nnf.pixel_shuffle(self.leave(h).mT.unflatten(2, (4, 4)), 2)
