"""CIFAR-10 (Krizhevsky, 2009): 50,000 training images of 32×32 pixels in ten classes, as published for Python.

torchvision reads, checks and downloads it; the 10,000 test images can be validated on.
"""

import fcntl
import os
import shutil
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from soflow_fast.require import require_package

NUM_CLASSES = 10


class CIFAR10(Dataset):
    """Map-style data set of (image, label), the training or the test images in their published order.

    Args:
        path: of the folder that holds ``cifar-10-batches-py``; if that is not there it is downloaded, 170 MB, and may
            be asked for by several processes at once. num_classes: 10, or 0 where the labels will not be looked at.
        train: whether it is of the 50,000 training images, or of the 10,000 test images.

    Attributes:
        images: (50000, 3, 32, 32) uint8, RGB, or (10000, 3, 32, 32). labels: (n,) int64 in [0, 10).

    Raises:
        ValueError: if torchvision is not installed, for another number of classes, a failed download, and files that
            are not the published ones.
    """

    def __init__(self, path: str | Path, *, num_classes: int = NUM_CLASSES, train: bool = True):
        if num_classes not in (0, NUM_CLASSES):
            raise ValueError(
                f"model.num_classes={num_classes} does not fit CIFAR-10, which has {NUM_CLASSES} classes; set "
                f"{NUM_CLASSES}, or 0 for images without classes"
            )
        require_package("torchvision", "data.kind='cifar10'", "eval")
        from torchvision import datasets

        path = Path(path)
        folder = path / datasets.CIFAR10.base_folder
        if not folder.exists():
            _download(path)
        try:
            published = datasets.CIFAR10(path, train=train)
        except RuntimeError:
            raise ValueError(
                f"{folder} is incomplete or damaged: the MD5 sums of its files are not those of CIFAR-10; remove it, "
                "and it is downloaded again"
            ) from None
        self.images = torch.from_numpy(published.data).permute(0, 3, 1, 2).contiguous()
        self.labels = torch.tensor(published.targets)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """(3, 32, 32) float32 in [-1, 1], and the label, 0-d int64."""
        return self._pair(index)

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """The samples of a batch in the order asked for."""
        return list(zip(*self._pair(indices), strict=True))

    def read_range(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The samples from start to stop as two tensors: (n, 3, 32, 32) float32 in [-1, 1] and (n,) int64."""
        return self._pair(slice(start, stop))

    def _pair(self, rows: int | list[int] | slice) -> tuple[Tensor, Tensor]:
        return self.images[rows].float() / 127.5 - 1, self.labels[rows]


def _download(path: Path) -> None:
    """Puts the published folder into another one, all at once; of several processes one does, and the others wait."""
    from torchvision import datasets

    name, unpacked = datasets.CIFAR10.base_folder, path / ".cifar10-download"
    try:
        path.mkdir(parents=True, exist_ok=True)
        with open(path / ".cifar10-lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (path / name).exists():
                return
            try:
                datasets.CIFAR10(unpacked, download=True)
                os.rename(unpacked / name, path / name)
            finally:
                shutil.rmtree(unpacked, ignore_errors=True)
    except (OSError, RuntimeError, HTTPException) as error:
        raise ValueError(
            f"data.path={str(path)!r} has no {name}, and CIFAR-10 cannot be downloaded into it ({error}); unpack "
            f"{datasets.CIFAR10.url} there"
        ) from None
