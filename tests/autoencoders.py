"""A real autoencoder of diffusers, small and with random weights."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL


def write_vae(folder: Path, *, seed=0, in_channels=3, spread=5.0, **config) -> str:
    """An ``AutoencoderKL`` of half the size and 4 channels, whose latents have about the spread of the published one.

    Its means are stretched to ``spread`` and its standard deviations made small, as a trained one's are.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        vae = AutoencoderKL(
            in_channels=in_channels,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            latent_channels=4,
            **config,
        )
    with torch.no_grad():
        vae.quant_conv.weight[:4] *= spread / 0.2
        vae.quant_conv.bias[:4] *= spread / 0.2
        vae.quant_conv.bias[4:] -= 5
    vae.save_pretrained(folder)
    return str(folder)
