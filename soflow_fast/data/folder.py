"""A folder of images by class: ``path/<class>/**/<image>``, classes in the order of their names; or without classes."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from soflow_fast import distributed
from soflow_fast.data.crop import centred
from soflow_fast.size import Size, height_and_width

_log = logging.getLogger(__name__)

_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
_MODES = {1: "L", 3: "RGB"}


def class_folders(path: Path) -> list[str]:
    """The names of the folders in a folder, sorted: class 0, 1, ..; hidden ones are none."""
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not _is_hidden(entry.name))


def files_below(folder: str | Path, within: tuple[tuple[int, int], ...] = ()) -> Iterator[os.DirEntry]:
    """Every file below a folder in a fixed order, that of the parts of its path; links are followed.

    Hidden files, and all that lies in hidden folders, are left out; and so is a link to a folder that it lies in, which
    would have no end. A link that leads nowhere is among the files.

    Args:
        within: device and inode of the folders that this one was found in.
    """
    about = os.stat(folder)
    here = about.st_dev, about.st_ino
    if here in within:
        return
    with os.scandir(folder) as entries:
        found = sorted((entry for entry in entries if not _is_hidden(entry.name)), key=attrgetter("name"))
    for entry in found:
        if _holds(entry.is_dir):
            yield from files_below(entry.path, (*within, here))
        else:
            yield entry


def is_image(entry: os.DirEntry) -> bool:
    """Whether it is a file, or a link to one, with the suffix of an image."""
    return _suffix(entry.name) in _SUFFIXES and _holds(entry.is_file)


def _holds(test: Callable[[], bool]) -> bool:
    """What a ``DirEntry`` tells of where it leads, which fails for a link to itself."""
    try:
        return test()
    except OSError:
        return False


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def labelled_images(path: Path, classes: list[str], otherwise: str = "") -> list[tuple[str, int]]:
    """The name, relative to the folder, and the class of every image below the class folders, as :func:`files_below`
    orders them; ``[""]`` takes all of the folder as one.

    Files of other suffixes are left out, and links that lead nowhere; the first process logs how many there are.

    Args:
        path: of the folder. classes: names of folders in it. otherwise: another remedy where there are no images.

    Raises:
        ValueError: if there are no images, or none in one of the class folders.
    """
    samples, left_out, start = [], Counter(), len(os.path.join(path, ""))
    for label, name in enumerate(classes):
        for entry in files_below(os.path.join(path, name)):
            if is_image(entry):
                samples.append((entry.path[start:], label))
            else:
                kind = _suffix(entry.name) or "without suffix"
                left_out[kind if _holds(entry.is_file) else "broken links"] += 1
    if not samples:
        flat = any(_suffix(file.name) in _SUFFIXES for file in path.iterdir())
        found = "its images in no class folders" if flat else f"no images ({', '.join(sorted(_SUFFIXES))})"
        raise ValueError(f"the image folder {path} holds {found}; put them in one folder per class{otherwise}")
    filled = {label for _, label in samples}
    empty = [name for label, name in enumerate(classes) if label not in filled]
    if empty:
        raise ValueError(
            f"{len(empty)} of the {len(classes)} class folders in {path} hold no images ({', '.join(empty[:5])}"
            f"{', ..' if len(empty) > 5 else ''}); remove them, or put images of their classes there"
        )
    if left_out and distributed.rank() == 0:
        found = ", ".join(f"{n:,} {suffix}" for suffix, n in left_out.most_common())
        read = ", ".join(sorted(_SUFFIXES))
        _log.warning("files of other suffixes than %s are left out of the image folder %s: %s", read, path, found)
    return samples


def _is_hidden(name: str) -> bool:
    """Whether a file or folder is a system's or tool's own, such as ``.ipynb_checkpoints``."""
    return name.startswith(".") or name == "__MACOSX"


def read_image(file: str | Path, mode: str) -> Image.Image:
    """An image in a mode of PIL, such as ``RGB``; of 16 bits a pixel, the nearest of 8.

    Raises:
        ValueError: for a file that is missing, damaged or no image.
    """
    try:
        with Image.open(file) as image:
            return (_in_bytes(image) if image.mode.startswith("I") else image).convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"the image {file} cannot be read ({error}); repair or remove it") from None


def _in_bytes(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits as one of 8; PIL's own conversion takes everything above 255 as white."""
    values = np.asarray(image)
    if image.mode == "I" and values.max(initial=0) < 256:  # 32 bits that hold 8
        return Image.fromarray(values.clip(0).astype(np.uint8))
    return Image.fromarray((values / 257).round().clip(0, 255).astype(np.uint8))


class ImageFolder(Dataset):
    """Map-style data set of (image, label) in pixel space, in [-1, 1]: of each image what :func:`~.crop.centred` takes.

    Args:
        path: of the folder. channels: 1 (grey) or 3 (RGB). size: of the result, one number or (H, W).
        num_classes: at least as many as there are class folders; 0 takes every image below the folder, of class 0.
        flip: mirrors an image with probability 1/2, drawn from torch's global generator.

    Attributes:
        labels: (n,) int64, on the host.

    Raises:
        ValueError: for a folder that is missing or without images, class folders without images, and more class
            folders than classes.
    """

    def __init__(self, path: str | Path, *, channels: int, size: Size, num_classes: int, flip: bool = False):
        self.path, self.sides, self.flip = Path(path), height_and_width(size), flip
        if not self.path.is_dir():
            raise ValueError(f"the image folder {self.path} does not exist; set data.path to a folder of class folders")
        if channels not in _MODES:
            raise ValueError(f"model.in_channels={channels} does not fit images; choose 1 (grey) or 3 (RGB)")
        self.mode = _MODES[channels]
        self.classes = class_folders(self.path) if num_classes else [""]
        samples = labelled_images(
            self.path,
            self.classes,
            otherwise=", or set model.num_classes=0 for images without classes" if num_classes else "",
        )
        if num_classes and len(self.classes) > num_classes:
            raise ValueError(
                f"the image folder {self.path} has {len(self.classes)} class folders, outside the classes "
                f"0..{num_classes - 1}; set model.num_classes={len(self.classes)}"
            )
        # without a Python object per file, which every worker process would come to copy
        self._files = np.array([os.fsencode(name) for name, _ in samples])
        self.labels = np.array([label for _, label in samples])

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """(channels, H, W) float32 in [-1, 1], and the label."""
        file = self.path / os.fsdecode(self._files[index])
        image = centred(read_image(file, self.mode), self.sides)
        if self.flip and torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)) / 127.5 - 1
        return pixels.view(*self.sides, -1).permute(2, 0, 1), int(self.labels[index])
