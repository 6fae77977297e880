"""Latent moments as one file per image, in the form that EDM2's and REPA's preprocessing write.

``<number>/img-mean-std-<number>.npy`` are float (2C, H, W), the mean and then the standard deviation of each latent,
unscaled; ``dataset.json`` is ``{"labels": [["00000/img-mean-std-00000000.npy", 6], ...]}``, or has null there where
there are no classes.

REPA encodes images in [-1, 1], as everything here does. EDM2's own tool encodes them in [0, 1]: a model can be trained
on its latents, but what the autoencoder decodes of the model's samples then lies in [0, 1] too.
"""

import io
import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from soflow_fast.data.folder import files_below
from soflow_fast.data.moments import Moments, probe_rows
from soflow_fast.size import Size, height_and_width

_INDEX = "dataset.json"
_REPA_FOLDER = "vae-sd"

# Files read at a time: what is waited for is mostly the file system.
_READERS = 16

# numpy reads a file's header with Python's parser, which fails now and then (SystemError, CPython's issue 106905) where
# several threads are in it. Only the reading has to be waited for, so the parsing can be one thread's at a time.
_PARSER = threading.Lock()


def find_moments_folder(path: str | Path) -> Path | None:
    """The folder of this form at a path: itself or, as REPA's scripts lay it, ``vae-sd`` in it; None if there is none.

    A folder is of this form if it holds ``dataset.json``.
    """
    return next((folder for folder in (Path(path), Path(path) / _REPA_FOLDER) if (folder / _INDEX).is_file()), None)


class MomentsFolder(Moments):
    """Map-style data set of (moments, label), in the order of the files' names, read as they are used.

    Args:
        path: of the folder that holds ``dataset.json``. channels: C. size: one number or (H, W). num_classes, scale,
            mean, std, dtype: see :class:`~soflow_fast.data.moments.Moments`.

    Raises:
        ValueError: for an index that is not of this form or has no labels where there are classes, files that are
            missing, damaged or of another shape (some are looked at here, the others when they are read), and see
            there.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        channels: int,
        size: Size,
        num_classes: int,
        scale: float,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        dtype: torch.dtype = torch.float32,
    ):
        self.path, self._shape = Path(path), (2 * channels, *height_and_width(size))
        names, labels = self._read_index(num_classes)
        self._names = np.array([os.fsencode(name) for name in names])  # without a Python object per file
        probes = self._read(probe_rows(len(names)))
        form = {"num_classes": num_classes, "scale": scale, "mean": mean, "std": std, "dtype": dtype}
        super().__init__(self.path, labels, probes, **form)

    def _read_index(self, num_classes: int) -> tuple[list[str], np.ndarray]:
        index = self.path / _INDEX
        try:
            entries = json.loads(index.read_bytes())["labels"]
            names, labels = zip(*sorted(entries), strict=True) if entries else ((), ())
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f'{index} is not {{"labels": [["00000/img-mean-std-00000000.npy", 6], ...]}}; write it again'
            ) from None
        if entries is None and num_classes:
            raise ValueError(f"{index} has no labels; set model.num_classes=0 for latents without classes")
        if entries is None:
            found, start = files_below(self.path), len(os.path.join(self.path, ""))
            names = sorted(entry.path[start:] for entry in found if entry.name.endswith(".npy"))
            labels = [0] * len(names)
        if not names:
            raise ValueError(f"the latents folder {self.path} holds no samples")
        other = next((name for name in names if not str(name).endswith(".npy")), None)
        if other is not None:
            raise ValueError(f"{index} lists {other!r}; set data.path to a folder of latents, one .npy file per image")
        if not all(type(label) is int for label in labels):
            raise ValueError(f"the labels in {index} must be integers, one per file, as EDM2's and REPA's tools write")
        return list(names), np.array(labels)

    def _read(self, rows: np.ndarray | slice) -> np.ndarray:
        with ThreadPoolExecutor(_READERS) as pool:
            return np.stack(list(pool.map(self._load, self._names[rows])))

    def _load(self, name: bytes) -> np.ndarray:
        file = self.path / os.fsdecode(name)
        try:
            content = io.BytesIO(file.read_bytes())
            with _PARSER:
                moments = np.lib.format.read_array(content)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"the latents file {file} cannot be read ({error}); write or copy it again") from None
        if moments.shape != self._shape or moments.dtype.kind != "f":
            raise ValueError(
                f"the latents in {file} are {moments.dtype} of shape {moments.shape}, and this model needs floats of "
                f"shape {self._shape}: {self._shape[0] // 2} channels of mean, then as many of standard deviation"
            )
        return moments.astype(np.float32, copy=False)
