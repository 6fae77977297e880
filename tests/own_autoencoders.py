"""Autoencoders that a user might name by their import path; each loses nothing, so that what comes back is known."""

import torch
from torch import nn


class Shuffled(nn.Module):
    """Pixels of 2×2 as channels, each with a mean and a spread of its own; gives latents alone."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(1, 6.5, 12).view(-1, 1, 1))

    def encode(self, images):
        return nn.functional.pixel_unshuffle(images, 2) * self.scale + 3 * self.scale

    def decode(self, latents):
        return nn.functional.pixel_shuffle(latents / self.scale - 3, 2)


class Uncertain(Shuffled):
    """Gives means and standard deviations."""

    def encode(self, images):
        means = super().encode(images)
        return means, torch.full_like(means, 0.5)


class WithoutParameters(nn.Module):
    """What it gives in one channel is always the same."""

    def encode(self, images):
        latents = nn.functional.pixel_unshuffle(images, 2)
        return torch.cat([torch.full_like(latents[:, :1], 0.3), latents[:, 1:]], 1)

    def decode(self, latents):
        return nn.functional.pixel_shuffle(latents, 2)


class Louder(WithoutParameters):
    def encode(self, images):
        return 2 * super().encode(images)


class Silent(WithoutParameters):
    def encode(self, images):
        return 0 * super().encode(images)


class Tokens(WithoutParameters):
    def encode(self, images):
        return super().encode(images).flatten(2).mT


class Broken(WithoutParameters):
    def encode(self, images):
        return super().encode(images) @ torch.ones(7, 7)


class Drawn(WithoutParameters):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))


class OnlyDecodes(nn.Module):
    def decode(self, latents):
        return latents[:, :3]


def nothing():
    return "no module"
