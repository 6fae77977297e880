"""From a folder of images to a file of latent moments, as fast as the autoencoder goes.

Shapes: b images of a batch, C channels, H height and W width of a latent.
"""

import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from soflow_fast.autoencoder import encode_moments, is_own, load_vae, own_value, shift_of
from soflow_fast.build import resolve_device
from soflow_fast.config import DataConfig
from soflow_fast.config_io import lists
from soflow_fast.data.crop import centre_crop
from soflow_fast.data.folder import class_folders, labelled_images, read_image
from soflow_fast.data.latents import LatentMoments
from soflow_fast.data.moments import fits, normalise, probe_rows, spread
from soflow_fast.data.writer import Contents, LatentsWriter, is_complete
from soflow_fast.precision import PRECISIONS, tensor_cores
from soflow_fast.require import require_count
from soflow_fast.size import Size, as_size, format_size, height_and_width

_log = logging.getLogger(__name__)

_MOST_WORKERS = 16
# Samples whose channels are measured, how many are read at a time, and the share of a channel's mean square below which
# its variance is rounding.
_MEASURED, _READ_ROWS = 4096, 64
_NO_SPREAD = 1e-10


class Encoded(NamedTuple):
    """A file of latent moments, and what a configuration has to say to train on it.

    Attributes:
        path: of the file. rows: samples in it. shape: (C, H, W) of a latent. num_classes: 0 for images without
            classes. scale: what makes the latents' standard deviation about 1. vae: name of the autoencoder. mean, std:
            (C,), what each channel is to be normalised by before it is scaled, or empty.
    """

    path: Path
    rows: int
    shape: tuple[int, int, int]
    num_classes: int
    scale: float
    vae: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def configuration(self) -> dict[str, dict]:
        """The sections ``model`` and ``data`` as far as the file determines them."""
        size = as_size(*self.shape[1:])
        model = {"input_size": size, "in_channels": self.shape[0], "num_classes": self.num_classes}
        data = {"kind": "latents", "path": str(self.path), "vae": self.vae}
        if self.scale != DataConfig().latent_scale:
            data["latent_scale"] = self.scale
        channels = {"latent_mean": self.mean, "latent_std": self.std}
        data |= lists({name: values for name, values in channels.items() if values})
        return {"model": lists(model), "data": data}


def encode(
    images: str | Path,
    out: str | Path,
    *,
    vae: str,
    size: Size = 256,
    batch: int = 32,
    device: str = "auto",
    precision: str | None = None,
    workers: int | None = None,
    flip: bool = False,
    per_channel: bool = False,
) -> Encoded:
    """Writes the latent moments of a folder of images as HDF5, see :mod:`soflow_fast.data.latents`.

    It can be killed at any instant; the same call goes on where it stopped, and on a CPU ends with bitwise the same
    file. Images are cropped as by :func:`~.data.crop.centre_crop` and given to the autoencoder in [-1, 1]. Of one with
    a shift, as SD3's and FLUX's, the means are stored less that, so that only the scale is left to apply.

    Args:
        images: folder of class folders, whose sorted names are classes 0, 1, ..; or of images without classes.
        out: the file; until it is complete it lies beside it as ``OUT.partial``.
        vae: the autoencoder, see :func:`~soflow_fast.autoencoder.load_vae`.
        size: of the images, one number or (H, W). batch: images at a time; it changes the result by rounding only.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        precision: ``tf32``, the default on a GPU, as is torch's own for convolutions and so that of the published
            scripts; ``fp32``, the default on a CPU; ``bf16``, with errors of about 2^-8 of the means, which may be more
            than the standard deviations beside them. Moments are stored in float32.
        workers: processes that read images, 0 for none; by default as many as there are CPU cores, up to 16.
        flip: each image is followed by its mirror image, so that there are twice as many samples.
        per_channel: give back the mean and the standard deviation of each channel, of up to 4,096 samples, to normalise
            by. It changes nothing in the file. Otherwise these are the autoencoder's own, if it has any.

    Raises:
        ValueError: for a folder or a class folder without images, an image that cannot be read, an autoencoder that
            cannot be used or whose latents are not finite, a batch that does not fit the memory, numbers below their
            least, and a file there already that was made of other images or in another way.
    """
    images, out = Path(images), Path(out)
    sides = height_and_width(size, "size=")
    require_count("batch", batch)
    if workers is not None:
        require_count("workers", workers, least=0)
    if precision not in (None, *PRECISIONS):
        raise ValueError(f"precision={precision!r} is not known; choose one of {', '.join(PRECISIONS)}")
    if out.is_dir():
        raise ValueError(f"{out} is a folder; give the name of a file in it, such as {out / 'latents.hdf5'}")
    place = resolve_device(device)
    precision = precision or ("tf32" if place.type == "cuda" else "fp32")
    classes, samples = _samples(images)
    network = load_vae(vae, "vae")
    shape = _latent_shape(network, vae, sides)
    own_channels = ((), ()) if per_channel else _own_channels(network, vae, shape[0])
    copies = 1 + flip
    size = lists(as_size(*sides))
    settings = {"size": size, "flip": flip, "precision": precision, "autoencoder weights": _digest(network)}
    settings["shift"] = shift_of(network)
    if is_own(vae):  # of the published ones the weights tell enough
        settings["autoencoder"] = vae
    contents = Contents(
        settings,
        (2 * shape[0], *shape[1:]),
        np.repeat(np.array([label for _, label in samples], np.int64), copies),
        np.repeat(_fingerprints(images, samples), copies),
    )
    if is_complete(out, contents):
        _log.warning("%s is complete already", out)
    else:
        writer = LatentsWriter(out, contents)
        with writer:
            _write(writer, network.to(place), place, samples, sides, batch, precision, workers, copies)
        writer.finish()
    mean, std = _channels(out) if per_channel else own_channels
    form = {"channels": shape[0], "size": shape[1:], "num_classes": classes, "mean": mean, "std": std}
    form["scale"] = _scale(None if per_channel else own_value(network, "scaling_factor"), out, mean, std)
    return Encoded(out, len(LatentMoments(out, **form)), shape, classes, form["scale"], vae, mean, std)


class _Batches(Dataset):
    """The images of each batch, (b, 3, height, width) uint8, or as a value the error that keeps one from being read."""

    def __init__(self, files: list[str], sides: tuple[int, int], batch: int):
        self.files, self.sides, self.batch = files, sides, batch

    def __len__(self) -> int:
        return -(-len(self.files) // self.batch)

    def __getitem__(self, index: int) -> Tensor | ValueError:
        files = self.files[index * self.batch : (index + 1) * self.batch]
        try:
            pixels = np.stack([np.asarray(centre_crop(read_image(file, "RGB"), self.sides)) for file in files])
        except ValueError as error:  # a worker would wrap it in a traceback; as a value it stays one sentence
            return error
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def _samples(images: Path) -> tuple[int, list[tuple[str, int]]]:
    """How many classes there are, 0 for a folder without class folders; and the images with their classes."""
    if not images.is_dir():
        raise ValueError(f"the image folder {images} does not exist; give a folder of class folders, or of images")
    classes = class_folders(images)
    samples = labelled_images(images, classes or [""])
    return len(classes), [(os.path.join(images, name), label) for name, label in samples]


@torch.inference_mode()
def _latent_shape(vae: nn.Module, name: str, sides: tuple[int, int]) -> tuple[int, int, int]:
    """(C, H, W), of an image that is tried."""
    if not hasattr(vae, "encode"):
        raise ValueError(f"vae={name!r} is a {type(vae).__name__} and has no encode(images); give one that has")
    channels = own_value(vae, "in_channels") or 3
    if channels != 3:
        raise ValueError(f"vae={name!r} takes images of {channels} channels; choose one for RGB images")
    factor, size = _factor(vae), format_size(as_size(*sides))
    impossible = f"size={size} is not possible with this autoencoder"
    if factor and any(side % factor for side in sides):
        raise ValueError(f"{impossible}; choose a multiple of {factor}")
    try:
        _, moments, *latent = encode_moments(vae, torch.zeros(1, 3, *sides)).shape
    except RuntimeError as error:
        if is_own(name):
            raise
        raise ValueError(f"{impossible} ({error}); choose another") from error
    factor = factor or round(sides[0] / latent[0])
    if any(factor * part != side for part, side in zip(latent, sides, strict=True)):
        raise ValueError(f"{impossible}; choose a multiple of {factor}")
    return moments // 2, *latent


def _factor(vae: nn.Module) -> int | None:
    """How many times smaller than images its latents are, if an autoencoder says so."""
    levels = own_value(vae, "block_out_channels")
    return 2 ** (len(levels) - 1) if levels else getattr(vae, "spatial_compression_ratio", None)


def _digest(vae: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        if isinstance(weight, Tensor):  # and no extra state
            digest.update(weight.numpy().tobytes())
    return digest.hexdigest()[:16]


def _fingerprints(images: Path, samples: list[tuple[str, int]]) -> np.ndarray:
    """(n,) uint64 of the name, the bytes and the class of each image."""
    start = len(os.path.join(images, ""))
    texts = (f"{file[start:]}\0{os.path.getsize(file)}\0{label}" for file, label in samples)
    digests = (hashlib.blake2b(os.fsencode(text), digest_size=8).digest() for text in texts)
    return np.frombuffer(b"".join(digests), dtype="<u8")


def _write(writer, vae, device, samples, sides, batch, precision, workers, copies) -> None:
    """Encodes the images that the writer has not, ``copies`` rows of each."""
    done = writer.written // copies
    cores = len(os.sched_getaffinity(0))
    loader = DataLoader(
        _Batches([file for file, _ in samples[done:]], sides, batch),
        batch_size=None,
        num_workers=min(cores, _MOST_WORKERS) if workers is None else workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # the loader seeds its workers from it, not from the global one
    )
    bar = tqdm(total=len(samples), initial=done, unit="image", desc=f"encoding to {writer.partial}")
    try:
        with bar, torch.inference_mode(), tensor_cores(precision):
            for moments in _moments(vae, loader, device, precision, mirrored=copies == 2):
                finite = np.isfinite(moments).all(axis=(1, 2, 3))
                if not finite.all():
                    file = samples[(writer.written + int(finite.argmin())) // copies][0]
                    raise ValueError(
                        f"the latents of the image {file} with precision={precision!r} are not finite; choose another "
                        "precision or autoencoder"
                    )
                writer.append(moments)
                bar.update(len(moments) // copies)
    except torch.OutOfMemoryError:
        raise ValueError(
            f"batch={batch} does not fit the memory of {device}; with a smaller one the same command goes on"
        ) from None


def _moments(vae, loader, device: torch.device, precision: str, *, mirrored: bool) -> Iterator[np.ndarray]:
    """Of each batch (rows, 2C, H, W) float32 on the host, which is had while the device is at the next one.

    Raises:
        ValueError: for an image that cannot be read, when everything before its batch has been had.
    """
    pending = None
    for images in loader:
        upcoming = None if isinstance(images, ValueError) else _launch(vae, images, device, precision, mirrored)
        if pending is not None:
            yield _arrived(*pending)
        if upcoming is None:
            raise images
        pending = upcoming
    if pending is not None:
        yield _arrived(*pending)


def _launch(vae, images: Tensor, device, precision: str, mirrored: bool) -> tuple[Tensor, torch.cuda.Event | None]:
    """The moments of a batch on their way to the host, and the event of their arrival where that takes its time."""
    x = images.to(device, non_blocking=True).contiguous().float() / 127.5 - 1
    if mirrored:
        x = torch.stack([x, x.flip(-1)], dim=1).flatten(0, 1)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        moments = encode_moments(vae, x)
    if device.type != "cuda":
        return moments, None
    moments, event = moments.to("cpu", non_blocking=True), torch.cuda.Event()
    event.record()
    return moments, event


def _arrived(moments: Tensor, event: torch.cuda.Event | None) -> np.ndarray:
    if event is not None:
        event.synchronize()
    return moments.numpy()


def _channels(path: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of the latents in a file, to five digits; of one value 1."""
    axes, totals = (0, 2, 3), []
    with h5py.File(path, "r") as file:
        rows = probe_rows(len(file["labels"]), _MEASURED)
        for first in range(0, len(rows), _READ_ROWS):
            mean, std = np.split(file["latents"][rows[first : first + _READ_ROWS]].astype(np.float64), 2, axis=1)
            totals.append([mean.sum(axes), np.square(mean).sum(axes) + np.square(std).sum(axes)])
        values = len(rows) * np.prod(file["latents"].shape[2:])
    mean, square = np.sum(totals, axis=0) / values
    variance = square - np.square(mean)
    spread = np.where(variance > _NO_SPREAD * square, np.sqrt(variance.clip(0)), 1)
    return tuple(tuple(float(f"{x:.5g}") for x in values) for values in (mean, spread))


def _own_channels(vae: nn.Module, name: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What an autoencoder says its latents are to be normalised by, for means that are less its shift."""
    found = []
    for key in ("latents_mean", "latents_std"):
        values = own_value(vae, key)
        values = [] if values is None else torch.as_tensor(values, dtype=torch.float64).flatten().tolist()
        if len(values) not in (0, channels):
            raise ValueError(
                f"vae={name!r} has {len(values)} numbers in {key} and latents of {channels} channels; measure them by "
                "--per-channel"
            )
        found.append(values)
    mean, std = found
    return tuple(x - shift_of(vae) for x in mean), tuple(std)


def _scale(own: float | None, path: Path, mean: tuple[float, ...], std: tuple[float, ...]) -> float:
    """The autoencoder's own scale if it fits the latents, otherwise 1 or, to three digits, the one that does."""
    with h5py.File(path, "r") as file:
        probes = file["latents"][probe_rows(len(file["labels"]))]
    found = spread(normalise(probes, mean, std))
    if (own and fits(own, found)) or found == 0:
        return own or 1.0
    if own:
        _log.warning("the autoencoder's own scale %s gives latents of standard deviation %.2g", own, own * found)
    return 1.0 if std and fits(1.0, found) else float(f"{1 / found:.3g}")
