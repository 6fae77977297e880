"""Augmentation that a network is told of, so that its samples do not show it (Karras et al. 2020, arXiv 2006.06676).

Which changes there are, how likely and how large, and the nine numbers that tell of them are EDM's (arXiv 2206.00364,
table 6), which the published CIFAR-10 recipe takes over; here pixels between pixels are bicubic and beyond the border
mirrored. Every draw is of (seed, step, global row).

Shapes: B rows of images (B, C, H, W). A row is rotated and stretched in pixels, and shifted by parts of H and W.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from soflow_fast import kernels
from soflow_fast.conditions import null_condition
from soflow_fast.kernels.reference import Stream

#: How many numbers tell of a row's augmentation, all 0 where there was none: whether it is mirrored left to right and
#: upside down; the factor's logarithm; cosine − 1 and sine of the rotation; cosine and sine of the stretching's
#: direction, times its logarithm; the shifts. Logarithms and shifts in standard deviations.
AUGMENT_DIM = 9

_SCALE_STD, _STRETCH_STD, _SHIFT_STD = 0.2, 0.2, 0.125  # of log2, of log2, of the image's sides


class Augment:
    """``x, labels = augment(x, labels, rows, seed, step)``.

    Args:
        probability: of each change but the mirroring from left to right, which every second row has.
        num_classes: of the network, the index that means "no label". impl: of the draws.

    Raises:
        ValueError: for a probability outside [0, 1].
    """

    def __init__(self, probability: float, num_classes: int, impl: str = "auto"):
        if not 0 <= probability <= 1:
            raise ValueError(f"probability={probability} of augmentation is outside [0, 1]; choose one in it")
        self.probability, self.num_classes = probability, num_classes
        self.ops = kernels.ops(kernels.resolve_impl(impl))

    @staticmethod
    def check(network: nn.Module, latent_scale: float | None = None) -> None:
        """ValueError where samples cannot be augmented, or the network would not be told."""
        if latent_scale is not None:
            raise ValueError("augmentation is of images, and the data are latents; set data.augment=0")
        if null_condition(network) is not None:
            raise ValueError(
                f"augmentation is told beside a class, and this {type(network).__name__} is told conditions "
                "(null_condition); set data.augment=0"
            )
        if getattr(network, "augment_dim", 0) != AUGMENT_DIM:
            raise ValueError(
                f"augmentation needs a network with augment_dim={AUGMENT_DIM}, which is told of it in labels (B, "
                f"{1 + AUGMENT_DIM}), and this {type(network).__name__} has none; choose model.preset=UNet, or set "
                "data.augment=0"
            )

    def __call__(
        self, x: Tensor, labels: Tensor | None, rows: Tensor, seed: int | Tensor, step: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """The augmented images (B, C, H, W), in float32 or wider, and :meth:`conditions` of them.

        Args:
            x: (B, C, H, W) floating point. labels: (B,) int64 or None. rows: (B,) int64 global rows.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        u = self.ops.uniform(rows, 10, seed=seed, step=step, stream=Stream.AUGMENT)
        z = self.ops.normal(rows, 4, seed=seed, step=step, stream=Stream.AUGMENT_SIZE)
        u, z = u.to(x).unbind(1), z.to(x)
        scaled, rotated, stretched, shifted, upside_down = (gate < self.probability for gate in u[:5])
        mirrored, upside_down = u[5] < 0.5, upside_down & (u[6] < 0.5)
        scale, stretch, shift = z[:, 0] * scaled, z[:, 1] * stretched, z[:, 2:] * shifted[:, None]
        angle = (2 * u[7] - 1) * math.pi * rotated
        direction = (2 * u[8] - 1) * math.pi * (u[9] < 0.5)
        told = torch.stack(
            [
                mirrored.to(x),
                upside_down.to(x),
                scale,
                angle.cos() - 1,
                angle.sin(),
                stretch * direction.cos(),
                stretch * direction.sin(),
                *shift.unbind(1),
            ],
            1,
        )
        x = _where(mirrored, x.flip(3), x)
        x = _where(upside_down, x.flip(2), x)
        # From where in the image a pixel of the result comes; images are turned and stretched in pixels, and the
        # coordinates' unit is half a side, of its own for each.
        factor, squeeze = torch.exp2(-_SCALE_STD * scale), torch.exp2(-_STRETCH_STD * stretch)
        stretching = torch.stack([squeeze, 1 / squeeze], 1)[:, :, None] * _rotation(direction)
        source = _product(_rotation(angle), _product(_rotation(-direction), stretching)) * factor[:, None, None]
        height, width = x.shape[2:]
        axis = torch.arange(2, device=x.device).to(x)
        source = source * (height / width) ** (axis - axis[:, None])
        across, down = ((2 * torch.arange(n, device=x.device).to(x) + 1) / n - 1 for n in (width, height))
        result = torch.stack(torch.meshgrid(across, down, indexing="xy")).flatten(1)[None]  # (1, 2, H·W)
        grid = _product(source, result - 2 * _SHIFT_STD * shift[:, :, None]).mT.unflatten(1, x.shape[2:])
        moved = F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
        return _where(scaled | rotated | stretched | shifted, moved, x), self.conditions(x, labels, told)

    def conditions(self, x: Tensor, labels: Tensor | None, told: Tensor | None = None) -> Tensor:
        """The label, or "no label", and what tells of the augmentation: (B, 1 + AUGMENT_DIM), dtype of x.

        Args:
            x: (B, C, H, W) float32 or wider. told: (B, AUGMENT_DIM), by default nothing.
        """
        label = x.new_full((len(x), 1), self.num_classes) if labels is None else labels[:, None].to(x)
        return torch.cat([label, x.new_zeros(len(x), AUGMENT_DIM) if told is None else told], 1)


def _where(chosen: Tensor, images: Tensor, others: Tensor) -> Tensor:
    return torch.where(chosen.view(-1, 1, 1, 1), images, others)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """(B, 2, 2) times (B, 2, n), which no precision of matrix products rounds."""
    return (a[:, :, :, None] * b[:, None]).sum(2)


def _rotation(angle: Tensor) -> Tensor:
    """(B, 2, 2)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
