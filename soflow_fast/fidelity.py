"""Fréchet distances by torch-fidelity, with raw pixels as one more of its feature extractors.

Importing this module needs the package torch-fidelity.
"""

from pathlib import Path

import torch_fidelity
from torch import Tensor, is_tensor
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

PIXELS = "pixels"


class PixelFeatures(FeatureExtractorBase):
    """Every value of an image, in [-1, 1] and float64; for images too small for a trained extractor."""

    def __init__(self, name: str, features_list: list[str], **kwargs):
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str]:
        return (PIXELS,)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return PIXELS

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """(n, C, S, S), uint8 or floating point in [-1, 1], to ((n, C·S·S) float64,)."""
        values = images.double() if images.is_floating_point() else images.double() / 127.5 - 1
        return (values.flatten(1),)


torch_fidelity.register_feature_extractor(PIXELS, PixelFeatures)


class _Images(Dataset):
    """Bare images, as torch-fidelity takes them."""

    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def frechet_distance(first: Tensor | Path, second: Tensor | Path, *, features: str = PIXELS, **options) -> float:
    """Fréchet distance of two sets of images.

    Args:
        first, second: (n, C, S, S) images in [-1, 1], or folders of image files. features: ``pixels``, or a feature
            extractor that torch-fidelity knows.
        options: of ``torch_fidelity.calculate_metrics``.
    """
    defaults = {"cuda": False, "cache": False, "save_cpu_ram": True, "verbose": False}
    metrics = torch_fidelity.calculate_metrics(
        input1=_Images(first) if is_tensor(first) else str(first),
        input2=_Images(second) if is_tensor(second) else str(second),
        fid=True,
        feature_extractor=features,
        **{**defaults, **options},
    )
    return float(metrics[torch_fidelity.KEY_METRIC_FID])
