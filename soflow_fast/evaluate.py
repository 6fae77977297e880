"""Scores of a trained model: Fréchet distances by torch-fidelity, and on the digits recognition and memorisation.

Shapes: n samples, C channels, H height, W width. Images are in [-1, 1].
"""

import hashlib
import itertools
import logging
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from soflow_fast.build import sample_shape
from soflow_fast.config import TrainConfig
from soflow_fast.data import CIFAR10, digits
from soflow_fast.data.crop import centre_crop, centred
from soflow_fast.data.folder import files_below, is_image
from soflow_fast.distributed import Processes
from soflow_fast.images import are_images, in_file_name, labels_of_samples, save_folder
from soflow_fast.require import require_package
from soflow_fast.sample import Decoder, Sampler
from soflow_fast.size import as_size

_log = logging.getLogger(__name__)

_INCEPTION = "inception-v3-compat"
_IMAGE_SUFFIXES = "png,jpg,jpeg,bmp,webp"
# How long a network file system may take to show the first process what the others wrote.
_SEEN_WITHIN_SECONDS = 60
_REFERENCES = "a folder of real images or a .npz file of their statistics"


def digit_scores(samples: Tensor, labels: Tensor | None) -> dict[str, float]:
    """How good samples of the handwritten digits are.

    Args:
        samples: (n, 1, 8, 8) float32 in [-1, 1], on the CPU. labels: (n,) the classes they were asked for, if any.

    Returns:
        ``frechet_all`` and ``frechet_held_out``: distance in pixel space to all real digits and to those not trained
        on. ``memorisation``: median distance of a sample to its nearest training digit, over that of the held-out
        digits; well below 1 means copies. ``recognised``, where there are classes: share of the samples that a logistic
        regression, fitted to all real digits, takes for theirs.
    """
    from sklearn.linear_model import LogisticRegression

    train, held_out, real = (digits(split).tensors for split in ("train", "held_out", "all"))
    scores = {
        "frechet_all": _fidelity().frechet_distance(samples, real[0]),
        "frechet_held_out": _fidelity().frechet_distance(samples, held_out[0]),
        "memorisation": _median_nearest(samples, train[0]) / _median_nearest(held_out[0], train[0]),
    }
    if labels is not None:
        classifier = LogisticRegression(max_iter=1000).fit(real[0].flatten(1).numpy(), real[1].numpy())
        scores["recognised"] = float((classifier.predict(samples.flatten(1).numpy()) == labels.numpy()).mean())
    return scores


def why_unscored(config: TrainConfig, decode: Decoder | None = None) -> str | None:
    """Why the samples of a configuration, or of this decoder, get no score, or None if they do."""
    if config.data.kind == "digits":
        return None
    if config.data.vae is None and decode is None and not _are_pixels(config):
        return "no autoencoder is set (data.vae), so samples stay latents"
    return None if _reference(config) else f"evaluation.reference is not set to {_REFERENCES}"


def require_scored(config: TrainConfig) -> None:
    """ValueError, with the option of ``soflow eval`` that is missing, for samples that get no score."""
    if why := why_unscored(config):
        option = "--vae NAME" if config.data.vae is None and not _are_pixels(config) else "--reference PATH"
        raise ValueError(f"no score is possible: {why}; give {option}, or draw without a score by soflow sample")


def compared_with(config: TrainConfig) -> dict[str, str]:
    """The ``features`` by which samples are scored and the ``reference``."""
    if config.data.kind == "digits":
        return {"features": "pixels", "reference": "digits"}
    return {"features": config.evaluation.features or _INCEPTION, "reference": str(_reference(config))}


def evaluation_name(config: TrainConfig, step: int, seed: int) -> str:
    """A file name without suffix that two evaluations share only if they score the same samples in the same way."""
    wanted = config.evaluation
    parts = [samples_name(step, wanted.steps, wanted.samples, seed)]
    if wanted.features is not None:
        parts.append(in_file_name(wanted.features))
    parts += wanted.metrics
    for name in ("reference", "weights"):
        path = getattr(wanted, name)
        if path is not None:  # two folders may be called the same
            digest = hashlib.sha256(str(Path(path).resolve()).encode()).hexdigest()[:6]
            parts.append(f"{name}-{in_file_name(Path(path).stem)}-{digest}")
    return "-".join(parts)


def samples_name(step: int, steps: int, n: int, seed: int) -> str:
    """What the name of a file of n samples, or of their scores, begins with: of the training's and the sampling's
    steps, and of a seed other than 0.
    """
    return f"step-{step:08d}-{steps}-step-{n}-samples" + (f"-seed-{seed}" if seed else "")


def check_evaluation(config: TrainConfig) -> None:
    """Finds what would make :func:`evaluate` fail before anything is drawn; downloads the extractor's weights.

    Warns of fewer samples than the rank of their features' covariance needs.

    Raises:
        ValueError: for a missing package, an unknown feature extractor or one whose weights cannot be had, a reference
            that is neither a folder of images nor statistics of the features, and settings that would do nothing.
    """
    wanted, unscored = config.evaluation, why_unscored(config)
    if config.data.kind == "digits" or unscored:
        why = unscored or "the digits are always compared with the real digits, pixel by pixel"
        for name in ("reference", "features", "weights", "metrics"):
            if getattr(wanted, name) not in (None, ()):
                remedy = "set that, or leave it out" if unscored else "leave it out"
                raise ValueError(f"evaluation.{name}={getattr(wanted, name)!r} does nothing here: {why}; {remedy}")
    if config.data.kind == "digits":
        _fidelity()
        _warn_of_few(wanted.samples, digits()[0][0].numel())
    elif not unscored:
        _check_reference(_reference(config), config)


def evaluate(
    model: nn.Module,
    config: TrainConfig,
    folder: Path,
    *,
    dataset: Dataset | None = None,
    decode: Decoder | None = None,
    seed: int = 0,
    precision: str | None = None,
    compile: bool | None = None,
    processes: Processes | None = None,
    reference: "Reference | None" = None,
) -> dict[str, float | str]:
    """Draws samples and scores them as the configuration's ``evaluation`` section says.

    The digits get :func:`digit_scores`. Images, and latents that are decoded, are written to ``folder`` and compared
    with ``evaluation.reference``, or with the training data where they are a folder or CIFAR-10, as in arXiv
    2512.15657.

    A folder of real images is resized and cropped to the size of the samples: to a square as torch-fidelity does it,
    otherwise as ``data.kind=folder`` or ``soflow encode`` do it to train on them. Inception squeezes all of them into a
    square of its own. Real images are read before anything is drawn, and their statistics kept next to ``folder`` for
    the next time. A ``.npz`` file of statistics must be of the same features, see
    :func:`soflow_fast.fidelity.scores`; nothing is resized then: the samples are scored at their own
    size, and that of the real images is not known. Grey samples count as RGB with three equal channels.

    Several processes, all of which must call this, each draw, decode and write a share of the images, which are those
    of one process. The first scores them, and draws the digits alone.

    Args:
        model: an objective, its weights already those to score. folder: for images, in place of any that are there.
        dataset: whose items' conditions are drawn for, evenly spread, where the network is told conditions.
        decode: from latents to images, see :func:`soflow_fast.autoencoder.vae_decoder`. seed: of the noise.
        precision, compile: of the sampling, see :class:`~soflow_fast.sample.Sampler`.
        processes: of the run; by default this one is alone.
        reference: what an earlier evaluation of the same configuration has read; by default it is read again.

    Returns:
        The scores by name, and under ``samples`` where the samples were written; in all processes.

    Raises:
        ValueError: before any is drawn, where there can be no score.
        OtherProcessError: where another process failed; whatever fails in one ends this in all of them.
    """
    wanted, unscored = config.evaluation, why_unscored(config, decode)
    if unscored:
        raise ValueError(f"no score is possible: {unscored}; set it, or draw without a score by soflow sample")
    labels = labels_of_samples(model.network, dataset, (), wanted.samples, config.model.num_classes)
    processes = processes or Processes(0, 1, next(model.parameters()).device)
    share = processes.share(wanted.samples, wanted.batch_size)

    def draw(rows: range | None = None) -> Iterator[Tensor]:
        sampler = Sampler(
            model,
            sample_shape(config),
            steps=wanted.steps,
            seed=seed,
            batch=min(wanted.batch_size, wanted.samples),
            precision=precision,
            compile=compile,
        )
        return sampler.draw(labels, wanted.samples, decode, rows)

    if config.data.kind == "digits":
        classes = labels if torch.is_tensor(labels) else None
        return processes.of_first(lambda: digit_scores(torch.cat(list(draw())), classes))
    real = reference or Reference(config, folder.parent / "reference")
    processes.of_first(lambda: real.read(_sides(model, config, decode)))
    processes.of_first(lambda: _empty(folder))
    # 50,000 files that are read once: fast to write rather than small
    processes.of_all(lambda: save_folder(draw(share), folder, share.start, compress_level=1))
    if processes.world_size > 1:
        processes.of_first(lambda: _await_samples(folder, wanted.samples))
    return {"samples": str(folder), **processes.of_first(lambda: real.scores(folder))}


def _empty(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob("*.png"):
        earlier.unlink()


def _await_samples(folder: Path, n: int) -> None:
    """ValueError if this process does not see what the others wrote."""
    until = time.monotonic() + _SEEN_WITHIN_SECONDS
    while (found := sum(1 for _ in folder.glob("*.png"))) < n:
        if time.monotonic() > until:
            raise ValueError(
                f"the first process sees {found} of the {n} samples in {folder}, and not those of the others; choose a "
                "run_dir in a file system that all processes share"
            )
        time.sleep(1)


def _reference(config: TrainConfig) -> Path | None:
    given = config.evaluation.reference or (config.data.path if config.data.kind in ("folder", "cifar10") else None)
    return None if given is None else Path(given)


def _is_cifar10(config: TrainConfig) -> bool:
    """Whether the reference is the training set of CIFAR-10, and its path the folder that this lies in."""
    return config.data.kind == "cifar10" and config.evaluation.reference is None


def _check_reference(reference: Path, config: TrainConfig) -> None:
    named, fidelity, statistics = f"evaluation.reference={str(reference)!r}", _fidelity(), None
    wanted = config.evaluation
    if _is_cifar10(config):
        CIFAR10(reference)
    elif reference.is_dir():
        first = list(itertools.islice(_image_files(reference), 1 + fidelity.NEIGHBOURS))
        fidelity.require_enough(named, len(first), wanted.metrics)
    elif not reference.exists():
        raise ValueError(f"{named} does not exist; give {_REFERENCES}")
    elif reference.suffix.lower() == ".npz":
        statistics = fidelity.load_statistics(reference)
        if set(fidelity.OF_IMAGES).intersection(wanted.metrics):
            fidelity.require_enough(named, len(fidelity.ImagesOfStatistics(reference)), wanted.metrics)
    else:
        raise ValueError(f"{named} is neither a folder nor a .npz file; give {_REFERENCES}")
    features = wanted.features or _INCEPTION
    extractor = fidelity.load_extractor(features, wanted.weights)
    fidelity.require_metrics(extractor, wanted.metrics)
    # How many pixels a decoded latent has shows when it is decoded; a network's features are as many of any size.
    if _are_pixels(config) or features != fidelity.PIXELS:
        fidelity.require_covariance(features, config.model.input_size)
        length = fidelity.count_features(extractor, config.model.input_size)
        if statistics:
            fidelity.require_length(reference, statistics, features, length)
        _warn_of_few(wanted.samples, length)
        if reference.is_dir() and not _is_cifar10(config):
            real = len(list(itertools.islice(_image_files(reference), length + 1)))
            _warn_of_few(real, length, f"real images in {reference}", "give more")


def _warn_of_few(
    n: int, features: int, what: str = "samples", remedy: str = "draw more (--count, evaluation.samples)"
) -> None:
    if n <= features:
        _log.warning(
            "%d %s are not more than the %d features, so their covariance has no full rank and the Fréchet distance "
            "depends on how many there are; %s",
            n,
            what,
            features,
            remedy,
        )


def _are_pixels(config: TrainConfig) -> bool:
    """Whether samples are images as they come."""
    return config.data.kind != "latents" and are_images(config.model.in_channels)


def _image_files(folder: Path) -> Iterator[os.DirEntry]:
    return filter(is_image, files_below(folder))


class Reference:
    """What samples are compared with; used in one process alone, and cheap to make.

    It is read once, which for a folder of a million images takes seconds even where their statistics are kept. What
    changes in it later is not seen, so that all scores of one object are of the same images.

    Args:
        config: of the samples. folder: where statistics of images are kept.
    """

    def __init__(self, config: TrainConfig, folder: Path):
        self._config, self._path, self._folder = config, _reference(config), folder
        self._sides: tuple[int, int] | None = None
        self._statistics: dict[str, np.ndarray] = {}
        self._features: dict[str, Tensor] | None = None
        self._options = {
            "features": config.evaluation.features or _INCEPTION,
            "cuda": torch.cuda.is_available() and config.device != "cpu",
            "samples_find_deep": True,
            "samples_find_ext": _IMAGE_SUFFIXES,
            "feature_extractor_weights_path": config.evaluation.weights,
        }

    def read(self, sides: tuple[int, int]) -> None:
        """Computes, or finds, what samples of these sides are compared with; ValueError if it is not to be had."""
        if self._sides == sides:
            return
        path, wanted, size, fidelity = self._path, self._config.evaluation, as_size(*sides), _fidelity()
        metrics = [one for one in wanted.metrics if one in fidelity.OF_IMAGES]
        images = None
        fidelity.require_covariance(self._options["features"], size)
        if _is_cifar10(self._config):
            images = CIFAR10(path).images
            depends_on = ("cifar10", hashlib.sha256(images.numpy()).hexdigest(), wanted.weights)
        elif path.is_dir():
            found = [(entry.path, entry.stat()) for entry in _image_files(path)]
            own = partial(centre_crop if self._config.data.kind == "latents" else centred, size=size)
            crop = fidelity.squared(size) if isinstance(size, int) else own
            images = fidelity.RealImages([file for file, _ in found], crop)
            files = [(file, about.st_size, about.st_mtime_ns) for file, about in found]
            depends_on = (str(path.resolve()), sorted(files), size, wanted.weights)
        else:
            length = fidelity.count_features(fidelity.load_extractor(self._options["features"], wanted.weights), size)
            self._statistics = fidelity.load_statistics(path)
            fidelity.require_length(path, self._statistics, self._options["features"], length)
            depends_on = (str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns, wanted.weights)
        name = hashlib.sha256(repr(depends_on).encode()).hexdigest()[:16]
        if images is not None:
            self._statistics = fidelity.statistics_of(images, self._folder, name, **self._options)
        elif metrics:
            images = fidelity.ImagesOfStatistics(path)
        if metrics:
            fidelity.require_enough(f"evaluation.reference={str(path)!r}", len(images), metrics)
            self._features = fidelity.features_of(images, metrics, self._folder, name, **self._options)
            for found in self._features.values():  # pixels, of other images than the statistics
                fidelity.require_length(path, self._statistics, self._options["features"], found.shape[1])
        self._sides = sides

    def scores(self, samples: Path) -> dict[str, float]:
        """Of the images in a folder."""
        return _fidelity().scores(
            samples, self._statistics, self._config.evaluation.metrics, self._features, **self._options
        )


@torch.no_grad()
def _sides(model: nn.Module, config: TrainConfig, decode: Decoder | None) -> tuple[int, int]:
    """Height and width of the images to be drawn."""
    shape = sample_shape(config)
    if decode is None:
        return shape[1:]
    return tuple(decode(torch.zeros(1, *shape, device=next(model.parameters()).device)).shape[2:])


def _median_nearest(points: Tensor, others: Tensor) -> float:
    return torch.cdist(points.flatten(1), others.flatten(1)).min(dim=1).values.median().item()


def _fidelity():
    require_package("torch-fidelity", "a score", "eval")
    from soflow_fast import fidelity

    return fidelity
