"""Fréchet distances and other scores by torch-fidelity, with raw pixels as one more of its feature extractors.

Real images are given as such or as statistics of their features, F of each image. Importing this module needs the
package torch-fidelity.
"""

import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
import torch_fidelity
from PIL import Image
from torch import Tensor, is_tensor
from torch.utils.data import Dataset, Subset
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.metric_fid import (
    fid_features_to_statistics,
    fid_input_id_to_statistics_cached,
    fid_statistics_to_metric,
)
from torch_fidelity.metric_isc import isc_featuresdict_to_metric
from torch_fidelity.metric_kid import kid_featuresdict_to_metric
from torch_fidelity.metric_prc import prc_featuresdict_to_metric
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import (
    create_feature_extractor,
    extract_featuresdict_from_input_id_cached,
    resolve_feature_layer_for_metric,
)
from torchvision.transforms import CenterCrop, Compose, Resize

from soflow_fast.data.folder import read_image
from soflow_fast.size import Size, height_and_width

PIXELS = "pixels"
#: The metrics that compare with images, and not with statistics of them.
OF_IMAGES = ("kid", "prc")

#: Neighbours that span a point's surroundings in the improved precision and recall.
NEIGHBOURS = 3
# Of how many real images KID, precision and recall are, as ADM's reference files hold them for the latter two.
_MOST_REAL = 10_000
_KID_SUBSET = 1000
# Of a covariance of 2 GiB and its root, minutes.
_MOST_PIXELS = 1 << 14
_NAMES = {
    torch_fidelity.KEY_METRIC_FID: "frechet",
    torch_fidelity.KEY_METRIC_ISC_MEAN: "inception_score",
    torch_fidelity.KEY_METRIC_ISC_STD: "inception_score_std",
    torch_fidelity.KEY_METRIC_KID_MEAN: "kid",
    torch_fidelity.KEY_METRIC_KID_STD: "kid_std",
    torch_fidelity.KEY_METRIC_PRECISION: "improved_precision",
    torch_fidelity.KEY_METRIC_RECALL: "improved_recall",
}
_UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
_DEFAULTS = {"cuda": False, "save_cpu_ram": True, "verbose": False}


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
        """(n, C, H, W), uint8 or floating point in [-1, 1], to ((n, C·H·W) float64,)."""
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


class RealImages(Dataset):
    """The images of some files as RGB, (3, H, W) uint8, each cropped; one that cannot be read is named."""

    def __init__(self, files: Sequence[str | Path], crop: Callable[[Image.Image], Image.Image]):
        self.files, self.crop = files, crop

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self.crop(read_image(self.files[index], "RGB")))).permute(2, 0, 1)


def squared(size: int) -> Callable[[Image.Image], Image.Image]:
    """An image to a square one as torch-fidelity does it."""
    return Compose([Resize(size), CenterCrop(size)])


def load_extractor(name: str, weights: str | None) -> FeatureExtractorBase:
    """A feature extractor on the CPU; downloads its weights unless ``weights`` is their file.

    Raises:
        ValueError: if torch-fidelity does not know it, or its weights cannot be had.
    """
    known = FEATURE_EXTRACTORS_REGISTRY
    if name not in known:
        raise ValueError(f"evaluation.features={name!r} is not known; choose one of {', '.join(known)}")
    layers = [known[name].get_default_feature_layer_for_metric("fid")]
    try:
        return create_feature_extractor(name, layers, cuda=False, feature_extractor_weights_path=weights, verbose=False)
    except (OSError, RuntimeError, UnpicklingError) as error:  # not there, of another network, not weights at all
        raise ValueError(
            f"the weights of {name} cannot be had ({error}); set evaluation.weights to their file, or "
            "evaluation.features=pixels"
        ) from None


def load_statistics(file: Path) -> dict[str, np.ndarray]:
    """Mean ``mu`` (F,) and covariance ``sigma`` (F, F) of features in a .npz file, float64.

    Whatever else the file holds stays unread, such as the gigabytes of images in ``arr_0`` of ADM's files.

    Raises:
        ValueError: for a file that is no .npz, lacks one of the two, or holds others than finite numbers of these
            shapes.
    """
    read, names = _read(file, ("mu", "sigma"))
    for name in ("mu", "sigma"):
        if name not in read:
            raise ValueError(
                f"{_named(file)} has no array {name!r} and holds {', '.join(names) or 'nothing'}; "
                "give a file with the mean as mu and the covariance as sigma"
            )
        if read[name].dtype.kind not in "fiu" or not np.isfinite(read[name]).all():
            raise ValueError(f"{_named(file)} has values in {name} that are not finite numbers; write the file again")
    mu, sigma = read["mu"], read["sigma"]
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(
            f"{_named(file)} has mu of shape {mu.shape} and sigma of shape {sigma.shape}, which are not (F,) and "
            "(F, F); give the mean and the covariance of the same features"
        )
    return {name: array.astype(np.float64) for name, array in read.items()}


class ImagesOfStatistics(Dataset):
    """The real images beside the statistics in a .npz file, (3, H, W) uint8: ``arr_0`` (n, H, W, 3), as ADM has them.

    They are gigabytes and read when the first is asked for.

    Raises:
        ValueError: for a file that has none, or in another form.
    """

    def __init__(self, file: Path):
        self._file, self._images = file, None
        shape, dtype = (), None
        try:
            with zipfile.ZipFile(file) as members, suppress(KeyError), members.open("arr_0.npy") as member:
                form = np.lib.format
                is_first = form.read_magic(member) == (1, 0)
                shape, _, dtype = (form.read_array_header_1_0 if is_first else form.read_array_header_2_0)(member)
        except _UNREADABLE as error:
            raise _unreadable(file, error) from None
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3:
            raise ValueError(
                f"{_named(file)} holds no images (arr_0, (n, H, W, 3) uint8), and kid and prc compare with images; "
                "give a file or a folder that has them, or leave the two out of evaluation.metrics"
            )
        self._length = shape[0]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Tensor:
        if self._images is None:
            read, _ = _read(self._file, ("arr_0",))
            self._images = torch.from_numpy(read["arr_0"]).permute(0, 3, 1, 2)
        return self._images[index]


def count_features(extractor: FeatureExtractorBase, size: Size) -> int:
    """How many features F an extractor gives of an RGB image of a size."""
    with torch.no_grad():
        (features,) = extractor(torch.zeros(1, 3, *height_and_width(size), dtype=torch.uint8))
    return features.shape[1]


def require_covariance(features: str, size: Size) -> None:
    """ValueError for pixels of images of a size at which their covariance would take too much memory and time."""
    height, width = height_and_width(size)
    values = 3 * height * width
    if features == PIXELS and values > _MOST_PIXELS:
        raise ValueError(
            f"evaluation.features='pixels' is for small images, and these of {height}x{width} pixels have {values} "
            f"values, of whose covariance {values**2 * 8 >> 30} GiB would be needed; choose inception-v3-compat"
        )


def require_length(file: Path, statistics: dict[str, np.ndarray], features: str, length: int) -> None:
    """ValueError unless a file's statistics are of as many features as there are of the samples."""
    given = len(statistics["mu"])
    if given != length:
        raise ValueError(
            f"{_named(file)} holds statistics of {given} features, and evaluation.features={features!r} gives {length} "
            "of these samples; give statistics of the same features"
        )


def require_enough(what: str, n: int, metrics: Sequence[str]) -> None:
    """ValueError for fewer images than a covariance, or a point's neighbours besides itself, need."""
    least = 1 + NEIGHBOURS if "prc" in metrics else 2
    if n < least:
        raise ValueError(f"{what} holds fewer than {least} images; give more")


def require_metrics(extractor: FeatureExtractorBase, metrics: Sequence[str]) -> None:
    """ValueError for the Inception Score by features that are of no classifier."""
    of_classes, of_images = (extractor.get_default_feature_layer_for_metric(name) for name in ("isc", "fid"))
    if "isc" in metrics and of_classes == of_images:
        raise ValueError(
            f"evaluation.metrics has isc, and evaluation.features={extractor.get_name()!r} tells no classes; leave one "
            "of the two out"
        )


def frechet_distance(
    first: Tensor | Path, second: Tensor | Path | Dataset, *, features: str = PIXELS, **options
) -> float:
    """Fréchet distance of two sets of images.

    Args:
        first, second: (n, C, H, W) images in [-1, 1] or uint8, folders of image files, or a data set of such images.
            features: ``pixels``, for which all must have one size, or a feature extractor that torch-fidelity knows;
            all but ``pixels`` need uint8.
        options: of ``torch_fidelity.calculate_metrics``.
    """
    metrics = torch_fidelity.calculate_metrics(
        input1=_input(first),
        input2=_input(second),
        fid=True,
        feature_extractor=features,
        **{**_DEFAULTS, "cache": False, **options},
    )
    return float(metrics[torch_fidelity.KEY_METRIC_FID])


def statistics_of(
    images: Tensor | Dataset, folder: Path, name: str, *, features: str = PIXELS, **options
) -> dict[str, np.ndarray]:
    """Mean ``mu`` and covariance ``sigma`` of the features of real images, kept in a folder and found there again.

    Args:
        images, features, options: as of :func:`frechet_distance`. folder, name: where and under which name.
    """
    options |= {"input2": _input(images), "input2_cache_name": name, "cache": True, "cache_root": str(folder)}
    extractor, layers, options = _extractor(("fid",), features, options)
    try:
        return fid_input_id_to_statistics_cached(2, extractor, layers["fid"], **options)
    finally:
        for file in folder.glob(f"{name}-*-features-*.pt"):  # gigabytes, and only the statistics are used
            file.unlink()


def features_of(
    images: Tensor | Dataset, metrics: Sequence[str], folder: Path, name: str, *, features: str = PIXELS, **options
) -> dict[str, Tensor]:
    """The features (n, F) of real images, of at most 10,000 evenly spread ones, by layer.

    Args:
        images, features, options, folder, name: as of :func:`statistics_of`. metrics: those of ``OF_IMAGES``.
    """
    taken = min(len(images), _MOST_REAL)
    few = Subset(_input(images), [i * len(images) // taken for i in range(taken)])
    options |= {"input2": few, "input2_cache_name": f"few-{name}", "cache": True, "cache_root": str(folder)}
    extractor, _, options = _extractor(metrics, features, options)
    return extract_featuresdict_from_input_id_cached(2, extractor, **options)


def scores(
    images: Tensor | Path,
    statistics: Mapping[str, np.ndarray],
    metrics: Sequence[str] = (),
    real: Mapping[str, Tensor] | None = None,
    *,
    features: str = PIXELS,
    **options,
) -> dict[str, float]:
    """Scores of a set of images.

    The Fréchet distance to statistics of real images, which must be of the same features: those that ADM and EDM
    distribute are of the Inception of TensorFlow, of which torch-fidelity's ``inception-v3-compat`` is a port, at its
    last pooling (F = 2048). And of the metrics:

    - ``isc``, the Inception Score (Salimans et al. 2016, arXiv 1606.03498), mean and standard deviation over 10 parts;
    - ``kid``, the kernel distance (Bińkowski et al. 2018, arXiv 1801.01401), likewise over 100 draws of 1000 images, or
      of all where there are fewer;
    - ``prc``, improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991) of 3 neighbours.

    Args:
        images, features, options: as of :func:`frechet_distance`. statistics: mean ``mu`` and covariance ``sigma``.
        real: :func:`features_of` the real images, for ``kid`` and ``prc``.

    Returns:
        ``frechet``, ``inception_score``, ``inception_score_std``, ``kid``, ``kid_std``, ``improved_precision``,
        ``improved_recall``.
    """
    options |= {"input1": _input(images), "cache": False, "prc_neighborhood": NEIGHBOURS}
    extractor, layers, options = _extractor(("fid", *metrics), features, options)
    found = extract_featuresdict_from_input_id_cached(1, extractor, **options)
    own = fid_features_to_statistics(found[layers["fid"]])
    own, of_real = ({name: array.astype(np.float64) for name, array in one.items()} for one in (own, statistics))
    results = fid_statistics_to_metric(own, of_real, verbose=False)
    if "isc" in metrics:
        results |= isc_featuresdict_to_metric(found, layers["isc"], **options)
    if "kid" in metrics:
        layer = layers["kid"]
        options["kid_subset_size"] = min(_KID_SUBSET, len(found[layer]), len(real[layer]))
        results |= kid_featuresdict_to_metric(found, real, layer, **options)
    if "prc" in metrics:
        results |= prc_featuresdict_to_metric(found, real, layers["prc"], **options)
    return {_NAMES[name]: float(value) for name, value in results.items() if name in _NAMES}


def _extractor(
    metrics: Sequence[str], features: str, options: dict
) -> tuple[FeatureExtractorBase, dict[str, str], dict]:
    """The extractor of what these metrics need, the layer of each, and all options."""
    options = {**_DEFAULTS, **options, "feature_extractor": features}
    layers = {metric: resolve_feature_layer_for_metric(metric, **options) for metric in metrics}
    return create_feature_extractor(features, list(dict.fromkeys(layers.values())), **options), layers, options


def _read(file: Path, wanted: Sequence[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Those of these arrays that a .npz file holds, and the names of all."""
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{_named(file)} is no .npz file, or not all of one; write or copy it again")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {name: np.asarray(arrays[name]) for name in wanted if name in arrays.files}, arrays.files
    except _UNREADABLE as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: Exception) -> ValueError:
    return ValueError(f"{_named(file)} cannot be read ({error}); write or copy it again")


def _input(images: Tensor | Path | Dataset) -> Dataset | str:
    return _Images(images) if is_tensor(images) else str(images) if isinstance(images, Path) else images


def _named(file: Path) -> str:
    return f"evaluation.reference={str(file)!r}"
