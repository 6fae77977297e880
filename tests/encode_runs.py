"""What tests of encoding share: a real autoencoder of diffusers, small and with random weights, and images for it."""

from pathlib import Path

import h5py
import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

FORM = {"channels": 4, "size": 8, "num_classes": 2, "scale": 0.18215}
SMALL = {"size": 16, "batch": 2, "device": "cpu", "workers": 0}


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


def random_image(seed: int, width: int, height: int) -> Image.Image:
    """RGB, every byte at random."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_pictures(folder: Path, mirrored=False) -> None:
    """Three images of class a and four of c, of different widths; one of each class in a folder deeper."""
    for label, (name, count) in enumerate({"a": 3, "c": 4}.items()):
        (folder / name / "deep").mkdir(parents=True)
        for number in range(count):
            image = random_image(10 * label + number, 16 + 3 * number, 20)
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image
            image.save(folder / name / ("deep" if number == 1 else "") / f"{number}.png")


def read_arrays(path) -> dict[str, np.ndarray]:
    """Everything in an HDF5 file."""
    with h5py.File(path) as file:
        return {name: file[name][()] for name in file}


def count_written(out) -> int:
    """How many rows the file says it holds that is not complete yet."""
    return int(read_arrays(out.with_name(f"{out.name}.partial"))["written"])
