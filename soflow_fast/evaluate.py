"""Scores of a trained model: Fréchet distances by torch-fidelity, and on the digits recognition and memorisation.

Shapes: n samples, C channels, S height and width. Images are in [-1, 1].
"""

import importlib.util
import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from soflow_fast.build import sample_shape
from soflow_fast.config import TrainConfig
from soflow_fast.data import digits
from soflow_fast.images import Decoder, are_images, balanced_labels, generate, save_png

_log = logging.getLogger(__name__)

_INCEPTION = "inception-v3-compat"
_IMAGE_SUFFIXES = "png,jpg,jpeg,bmp,webp"


def digit_scores(samples: Tensor, labels: Tensor) -> dict[str, float]:
    """How good samples of the handwritten digits are.

    Args:
        samples: (n, 1, 8, 8) float32 in [-1, 1], on the CPU. labels: (n,) the classes they were asked for.

    Returns:
        ``frechet_all`` and ``frechet_held_out``: distance in pixel space to all real digits and to those not trained
        on. ``recognised``: share of the samples that a logistic regression, fitted to all real digits, takes for their
        class. ``memorisation``: median distance of a sample to its nearest training digit, over that of the held-out
        digits; well below 1 means copies.
    """
    from sklearn.linear_model import LogisticRegression

    train, held_out, real = (digits(split).tensors for split in ("train", "held_out", "all"))
    classifier = LogisticRegression(max_iter=1000).fit(real[0].flatten(1).numpy(), real[1].numpy())
    recognised = classifier.predict(samples.flatten(1).numpy()) == labels.numpy()
    return {
        "frechet_all": _fidelity().frechet_distance(samples, real[0]),
        "frechet_held_out": _fidelity().frechet_distance(samples, held_out[0]),
        "recognised": float(recognised.mean()),
        "memorisation": _median_nearest(samples, train[0]) / _median_nearest(held_out[0], train[0]),
    }


def check_evaluation(config: TrainConfig) -> None:
    """ValueError where :func:`evaluate` could not run at all, so that a training run need not find out late."""
    reference = _reference(config)
    if config.data.kind == "digits" or reference is not None:
        _fidelity()
    if reference is not None and not reference.is_dir():
        raise ValueError(f"evaluation.reference={str(reference)!r} is not a folder; give one of real images")


def evaluate(
    model: nn.Module,
    config: TrainConfig,
    folder: Path,
    *,
    decode: Decoder | None = None,
    seed: int = 0,
    precision: str | None = None,
    compile: bool | None = None,
) -> dict[str, float | str]:
    """Draws samples and scores them as the configuration's ``evaluation`` section says.

    The digits get :func:`digit_scores`. Images, and latents that are decoded, are written to ``folder`` and compared
    with the real images of ``evaluation.reference`` (or of the training folder); latents without an autoencoder are
    written as one array.

    Args:
        model: an objective, its weights already those to score. folder: for the samples of images and latents, in
            place of any that are there.
        decode: from latents to images, see :func:`soflow_fast.images.vae_decoder`. seed: of the noise.
        precision, compile: of the sampling, see :class:`~soflow_fast.sample.Sampler`.

    Returns:
        The scores by name, and under ``samples`` where the samples were written.
    """
    wanted = config.evaluation
    labels = balanced_labels(wanted.samples, config.model.num_classes)
    parts = generate(
        model,
        labels,
        wanted.samples,
        sample_shape(config),
        steps=wanted.steps,
        seed=seed,
        batch=wanted.batch_size,
        decode=decode,
        precision=precision,
        compile=compile,
    )
    if config.data.kind == "digits":
        return digit_scores(torch.cat(list(parts)), labels)
    if decode is None and (config.data.kind == "latents" or not are_images(config.model.in_channels)):
        return {"samples": str(_write_latents(parts, wanted.samples, config, folder))}
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob("*.png"):
        earlier.unlink()
    for number, image in enumerate(image for part in parts for image in part):
        save_png(image, folder / f"{number:06d}.png")
    scores: dict[str, float | str] = {"samples": str(folder)}
    reference = _reference(config)
    if reference is None:
        _log.warning("no score: set evaluation.reference to a folder of real images")
        return scores
    scores["frechet"] = _score_folders(folder, reference, image.shape[-1], config)
    return scores


def _reference(config: TrainConfig) -> Path | None:
    given = config.evaluation.reference or (config.data.path if config.data.kind == "folder" else None)
    return None if given is None else Path(given)


def _score_folders(samples: Path, reference: Path, size: int, config: TrainConfig) -> float:
    features = config.evaluation.features or _INCEPTION
    try:
        return _fidelity().frechet_distance(
            samples,
            reference,
            features=features,
            cuda=torch.cuda.is_available() and config.device != "cpu",
            samples_find_deep=True,
            samples_find_ext=_IMAGE_SUFFIXES,
            samples_resize_and_crop=size,
            feature_extractor_weights_path=config.evaluation.weights,
        )
    except OSError as error:
        raise ValueError(
            f"the weights of {features} cannot be had ({error}); set evaluation.weights to their file"
        ) from None


def _write_latents(parts, n: int, config: TrainConfig, folder: Path) -> Path:
    path = folder.with_suffix(".npy")
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(n, *sample_shape(config)))
    first = 0
    for part in parts:
        array[first : first + len(part)] = part.numpy()
        first += len(part)
    array.flush()
    _log.warning("no autoencoder is set (data.vae), so the samples stay latents: %s", path)
    return path


def _median_nearest(points: Tensor, others: Tensor) -> float:
    return torch.cdist(points.flatten(1), others.flatten(1)).min(dim=1).values.median().item()


def _fidelity():
    if importlib.util.find_spec("torch_fidelity") is None:
        raise ValueError(
            "scores need the package torch-fidelity, which is not installed; run pip install 'soflow-fast[eval]'"
        )
    from soflow_fast import fidelity

    return fidelity
