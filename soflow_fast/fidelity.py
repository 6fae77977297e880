"""Fréchet distances by torch-fidelity, with raw pixels as one more of its feature extractors.

Importing this module needs the package torch-fidelity.
"""

from pathlib import Path
from pickle import UnpicklingError

import torch_fidelity
from torch import Tensor, is_tensor
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor

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


def check_features(name: str, weights: str | None) -> None:
    """Builds a feature extractor, downloading its weights unless ``weights`` is their file.

    Raises:
        ValueError: if torch-fidelity does not know it, or its weights cannot be had.
    """
    known = FEATURE_EXTRACTORS_REGISTRY
    if name not in known:
        raise ValueError(f"evaluation.features={name!r} is not known; choose one of {', '.join(known)}")
    layers = [known[name].get_default_feature_layer_for_metric("fid")]
    try:
        create_feature_extractor(name, layers, cuda=False, feature_extractor_weights_path=weights, verbose=False)
    except (OSError, RuntimeError, UnpicklingError) as error:  # not there, of another network, not weights at all
        raise ValueError(
            f"the weights of {name} cannot be had ({error}); set evaluation.weights to their file"
        ) from None


def frechet_distance(
    first: Tensor | Path,
    second: Tensor | Path,
    *,
    features: str = PIXELS,
    cache_folder: Path | None = None,
    second_name: str | None = None,
    **options,
) -> float:
    """Fréchet distance of two sets of images.

    Args:
        first, second: (n, C, S, S) images in [-1, 1], or folders of image files. features: ``pixels``, or a feature
            extractor that torch-fidelity knows.
        cache_folder: where the statistics of the second are kept, under ``second_name``, and used again.
        options: of ``torch_fidelity.calculate_metrics``.
    """
    defaults = {"cuda": False, "save_cpu_ram": True, "verbose": False}
    metrics = torch_fidelity.calculate_metrics(
        input1=_Images(first) if is_tensor(first) else str(first),
        input2=_Images(second) if is_tensor(second) else str(second),
        fid=True,
        feature_extractor=features,
        cache=cache_folder is not None,
        cache_root=str(cache_folder),
        input2_cache_name=second_name,
        **{**defaults, **options},
    )
    if cache_folder is not None:
        for file in cache_folder.glob(f"{second_name}-*-features-*.pt"):  # gigabytes, and only the statistics are used
            file.unlink()
    return float(metrics[torch_fidelity.KEY_METRIC_FID])
