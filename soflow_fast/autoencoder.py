"""Autoencoders, of diffusers or the user's own: from images to latent moments, and from latents to images.

Shapes: n samples, images (n, 3, H, W) in [-1, 1], latents (n, C, h, w), their moments (n, 2C, h, w): means, then
standard deviations.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from soflow_fast.build import imported
from soflow_fast.config import DataConfig
from soflow_fast.imported import is_import_path
from soflow_fast.require import require_package
from soflow_fast.sample import Decoder


def is_own(name: str) -> bool:
    """Whether an autoencoder is the user's, named by its import path."""
    return is_import_path(name) and "/" not in name and not Path(name).exists()


def load_vae(name: str, setting: str = "data.vae") -> nn.Module:
    """An autoencoder on the CPU, in float32, for inference.

    Args:
        name: of an autoencoder published in diffusers' form, ``owner/name`` or ``owner/name/folder``, such as
            ``black-forest-labs/FLUX.1-dev/vae``; a folder that holds one; or ``package.module.make``, a class or
            function that makes a module with ``decode(latents)``, the images, and, to encode with,
            ``encode(images)``, the latents or their (means, standard deviations). setting: what the user calls it.

    Raises:
        ValueError: if diffusers is not installed, or the autoencoder cannot be read or is none.
    """
    if is_own(name):
        vae = imported(setting, name, {}, seed=0)
        remedy = "is to be a torch.nn.Module with decode(latents), which returns the images"
    else:
        vae = _published(name, setting)
        remedy = "is to be an autoencoder, such as stabilityai/sd-vae-ft-ema"
    if not isinstance(vae, nn.Module) or not hasattr(vae, "decode"):
        raise ValueError(f"{setting}={name!r} is a {type(vae).__name__}, and {remedy}")
    return vae.cpu().float().eval().requires_grad_(False)


def _published(name: str, setting: str) -> nn.Module:
    otherwise = ", or leave it out to keep latents" if setting == "data.vae" else ""
    require_package("diffusers", f"{setting}={name!r}", "vae", otherwise)
    from diffusers import AutoencoderKL, AutoModel

    place, folder = name, {}
    if not Path(name).exists() and name.count("/") == 2:
        place, _, folder["subfolder"] = name.rpartition("/")
    errors = []
    for of in (AutoModel, AutoencoderKL):  # of which some were published without the name of their class
        try:
            vae = of.from_pretrained(place, low_cpu_mem_usage=False, **folder)
        except (OSError, ValueError, KeyError, ImportError) as error:
            errors.append(error)
        else:
            return _OfUnitRange(vae) if type(vae).__name__ == "AutoencoderRAE" else vae
    raise ValueError(f"{setting}={name!r} cannot be read ({errors[0]}); give a name or a folder that can") from None


class _OfUnitRange(nn.Module):
    """diffusers' ``AutoencoderRAE``, whose images are in [0, 1], and which normalises its latents itself."""

    def __init__(self, coder: nn.Module):
        super().__init__()
        self.coder = coder

    def encode(self, images: Tensor) -> Tensor:
        return self.coder.encode((images + 1) / 2).latent

    def decode(self, latents: Tensor) -> Tensor:
        return 2 * self.coder.decode(latents).sample - 1


def own_value(vae: nn.Module, name: str) -> Any:
    """What an autoencoder's configuration, if it has one, says of its latents, such as ``scaling_factor``."""
    return getattr(getattr(vae, "config", None), name, None)


def shift_of(vae: nn.Module) -> float:
    """What an autoencoder such as SD3's and FLUX's subtracts from latents before they are scaled; 0 for others."""
    return own_value(vae, "shift_factor") or 0.0


def encode_moments(vae: nn.Module, images: Tensor) -> Tensor:
    """The moments of images, (n, 2C, h, w) float32, the means less the autoencoder's own shift.

    One that draws nothing, and so gives latents alone, has standard deviations of 0.

    Raises:
        ValueError: if what it gives is neither.
    """
    found = vae.encode(images)
    mean, std = _mean_and_std(found)
    if not all(isinstance(x, Tensor) and x.dim() == 4 for x in (mean, std)) or mean.shape != std.shape:
        shape = f" of shape {tuple(mean.shape)}" if isinstance(mean, Tensor) else ""
        raise ValueError(
            f"encode(images) of the autoencoder {type(vae).__name__} gives a {type(found).__name__}{shape}; it is to "
            "give latents (n, C, h, w), or their (means, standard deviations)"
        )
    return torch.cat([mean.float() - shift_of(vae), std.float()], dim=1)


def _mean_and_std(found: Any) -> tuple[Any, Any]:
    """Of what an autoencoder's ``encode`` gives: tensors, distributions, and outputs that hold either."""
    if isinstance(found, Tensor):
        return found, torch.zeros_like(found)
    if isinstance(found, (tuple, list)):
        return tuple(found) if len(found) == 2 else _mean_and_std(found[0]) if len(found) == 1 else (None, None)
    if hasattr(found, "logvar"):
        return found.mean, (found.logvar.float() / 2).exp()
    inside = next((name for name in ("latent_dist", "latent", "latents") if hasattr(found, name)), None)
    return (None, None) if inside is None else _mean_and_std(getattr(found, inside))


def vae_decoder(
    name: str, scale: float, device: torch.device, *, mean: Sequence[float] = (), std: Sequence[float] = ()
) -> Decoder:
    """The function from latents as the network makes them, (n, C, h, w), to images (n, 3, H, W).

    An autoencoder's own shift, if it has one, is added to the unscaled latents: ``soflow encode`` stores them without
    it.

    Args:
        name: see :func:`load_vae`, also for what it raises. scale: what latents were multiplied by. mean, std: (C,),
            what each channel was normalised by before that, or empty.
    """
    vae = load_vae(name)
    coder = getattr(vae, "coder", vae)
    if not is_own(name) and hasattr(coder, "encoder"):
        del coder.encoder  # which would take memory, and lie in every exported program
    return _Decoder(vae, scale, mean, std).to(device)


def decoder_of(data: DataConfig, device: torch.device) -> Decoder | None:
    """:func:`vae_decoder` as configured; None without an autoencoder."""
    if data.vae is None:
        return None
    return vae_decoder(data.vae, data.latent_scale, device, mean=data.latent_mean, std=data.latent_std)


class _Decoder(nn.Module):
    def __init__(self, vae: nn.Module, scale: float, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.vae, self.scale = vae, scale
        shift = torch.tensor(mean or (0.0,)) + shift_of(vae)
        self.register_buffer("shift", shift.view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std or (1.0,)).view(-1, 1, 1))

    def forward(self, latents: Tensor) -> Tensor:
        images = self.vae.decode(latents / self.scale * self.std + self.shift)
        return images[0] if isinstance(images, tuple) else getattr(images, "sample", images)
