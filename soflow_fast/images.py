"""From samples to files: what is drawn of which label, PNG grids, folders and arrays of images.

Shapes: n samples, C channels, H height, W width. Images are in [-1, 1].
"""

import hashlib
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from soflow_fast.checkpoint import replaced
from soflow_fast.conditions import ItemConditions, null_condition

_CHANNELS = {1: "grey", 3: "RGB"}
_NOT_IN_FILE_NAMES = str.maketrans({".": "_", "/": "-", ",": "-", " ": None})
_LONGEST_IN_FILE_NAME = 40


def balanced_labels(n: int, num_classes: int) -> Tensor | None:
    """0, 1, .., num_classes−1, 0, ..; of more classes than samples as many, spread evenly.

    Returns:
        (n,) int64, or None if there are no classes.
    """
    if not num_classes:
        return None
    return torch.arange(n) % num_classes if n >= num_classes else torch.arange(n) * num_classes // n


def chosen_labels(chosen: Sequence[int], n: int, num_classes: int, setting: str, what: str = "class") -> Tensor | None:
    """The chosen classes, repeated in turn; where none is chosen, :func:`balanced_labels`.

    Args:
        setting: what the user calls them, with their values. what: each is.

    Returns:
        (n,) int64, or None if there are no classes.

    Raises:
        ValueError: for a class that there is not.
    """
    if not chosen:
        return balanced_labels(n, num_classes)
    for label in chosen:
        if not 0 <= label < num_classes:
            remedy = f"there are 0..{num_classes - 1}" if num_classes else "there are no classes; leave it out"
            raise ValueError(f"{setting} has the {what} {label}, and {remedy}")
    return torch.tensor(chosen)[torch.arange(n) % len(chosen)]


def labels_of_samples(
    network: nn.Module, dataset: Dataset | None, chosen: Sequence[int], n: int, num_classes: int, setting: str = ""
) -> Tensor | ItemConditions | None:
    """What a network is told of n samples to draw: classes, or the conditions of items of a data set.

    Args:
        dataset: needed where the network takes conditions. chosen: the classes or items, repeated in turn; by default
            as evenly spread as they fit. num_classes, setting: as in :func:`chosen_labels`.

    Raises:
        ValueError: for a class or item that there is not, and conditions without a data set.
    """
    if null_condition(network) is None:
        return chosen_labels(chosen, n, num_classes, setting)
    if dataset is None:
        raise ValueError("the network is told conditions, and there is no data set to take them from; give dataset=")
    return ItemConditions(dataset, chosen_labels(chosen, n, len(dataset), setting, "item"))


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] to 0..255, same shape."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def in_file_name(text: str) -> str:
    """What of a text can stand in a file's name, which a file system may limit to 255 bytes; a dot would begin a
    suffix.
    """
    short = text.lower().translate(_NOT_IN_FILE_NAMES)
    if len(short) <= _LONGEST_IN_FILE_NAME:
        return short
    return f"{short[: _LONGEST_IN_FILE_NAME - 7]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def are_images(channels: int) -> bool:
    """Whether a sample of so many channels can be written as an image."""
    return channels in _CHANNELS


def save_png(image: Tensor, path: Path, compress_level: int = -1) -> None:
    """Writes one image (C, H, W) in [-1, 1], C = 1 or 3; of zlib's levels, -1 is its default."""
    pixels = to_uint8(image).permute(1, 2, 0).numpy()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(path, compress_level=compress_level)


def grid(images: Tensor, columns: int, least_size: int = 32) -> Tensor:
    """Images (n, C, H, W) row by row as one, small ones enlarged so that their longer side is about ``least_size``."""
    factor = max(1, least_size // max(images.shape[2:]))
    images = images.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    images = nn.functional.pad(images, (1, 1, 1, 1), value=-1.0)
    blank = images.new_full((-len(images) % columns, *images.shape[1:]), -1.0)
    cells = torch.cat([images, blank]).unflatten(0, (-1, columns))
    return cells.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)


def save_samples(samples: Tensor, stem: Path, columns: int) -> Path:
    """Writes a PNG grid, or of what is no image, an array ``.npy`` (n, C, H, W) float32; returns its path, which is
    ``stem`` with that suffix.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    of_images = are_images(samples.shape[1])
    path = stem.with_name(stem.name + suffix_of_samples(of_images))
    if of_images:
        save_png(grid(samples, columns), path)
    else:
        np.save(path, samples.numpy())
    return path


def suffix_of_samples(of_images: bool) -> str:
    """Of the file that :func:`save_samples` writes."""
    return ".png" if of_images else ".npy"


def save_folder(parts: Iterable[Tensor], folder: Path, first: int = 0, compress_level: int = -1) -> None:
    """Writes every image, of parts (at most B, C, H, W), to ``000000.png`` and so on.

    Args:
        first: number of the first image. compress_level: see :func:`save_png`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate((image for part in parts for image in part), first):
        save_png(image, folder / f"{number:06d}.png", compress_level=compress_level)


def save_npz(parts: Iterable[Tensor], n: int, labels: Tensor | ItemConditions | None, path: Path) -> None:
    """Writes n images, part by part, as ADM's evaluation reads them: ``arr_0`` (n, H, W, C) uint8, and ``arr_1`` (n,)
    int64, their labels, or of conditions the numbers of their items, or of their rows of a file, if they have any. The
    file is there once it is whole.

    Args:
        parts: (at most B, C, H, W). path: the file, with its suffix ``.npz``.
    """
    with replaced(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            for number, part in enumerate(parts):
                pixels = to_uint8(part).permute(0, 2, 3, 1).contiguous().numpy()
                if number == 0:
                    form = {"descr": "|u1", "fortran_order": False, "shape": (n, *pixels.shape[1:])}
                    np.lib.format.write_array_header_1_0(file, form)
                file.write(pixels.data)
        if labels is not None:
            with archive.open("arr_1.npy", "w") as file:
                numbers = labels.items if isinstance(labels, ItemConditions) else labels
                np.lib.format.write_array(file, numbers.numpy())
