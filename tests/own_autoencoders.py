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


class OnlyDecodes(nn.Module):
    def decode(self, latents):
        return latents[:, :3]


def nothing():
    return "no module"
