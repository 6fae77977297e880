"""Latent moments of an autoencoder in HDF5, in the form the published SoFlow code writes.

Arrays: ``latents`` float (N, 2C, S, S), the mean and then the standard deviation of each latent, unscaled; ``labels``
integer (N,); scalars ``amount`` = N and ``latent_size`` = S.
"""

import os
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

PUBLIC_NAME = "imagenet_latent.hdf5"

# Samples looked at when the file is opened, and the spread that scaled latents may have: about 1 by definition.
_PROBES = 64
_SPREAD = (0.5, 2.0)


class LatentMoments(Dataset):
    """Map-style data set of (moments, label), read from the file as it is used.

    Args:
        path: of the file, or of the folder that holds ``imagenet_latent.hdf5``. channels: C. size: S.
        num_classes: labels must lie in [0, num_classes). scale: what the unscaled latents will be multiplied by.
        dtype: of the moments; bfloat16 rounds them by at most 2^-8 of their size and halves the memory they take.

    Raises:
        ValueError: for a file that is missing, damaged or of another form, labels outside the classes, standard
            deviations that are not positive, and latents whose spread does not fit the scale.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        channels: int,
        size: int,
        num_classes: int,
        scale: float,
        dtype: torch.dtype = torch.float32,
    ):
        path = Path(path)
        self.dtype = dtype
        self.path = path / PUBLIC_NAME if path.is_dir() else path
        self._file: h5py.File | None = None
        self._opened_by: int | None = None
        if not self.path.is_file():
            raise ValueError(f"the latents file {self.path} does not exist; set data.path to an HDF5 file of latents")
        try:
            with h5py.File(self.path, "r") as file:
                self._check_form(file, channels, size)
                self.length = len(file["labels"])
                self._check_labels(file["labels"][:], num_classes)
                self._check_values(file["latents"], channels, scale)
        except OSError as error:
            raise ValueError(
                f"the latents file {self.path} cannot be read as HDF5 ({error}); it is damaged or incomplete: "
                "write or copy it again"
            ) from None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """The samples of a batch in the order asked for: (2C, S, S) in ``dtype`` and 0-d int64."""
        ascending, back = np.unique(np.asarray(indices), return_inverse=True)
        moments, labels = self._read(ascending)
        return list(zip(moments[back], labels[back], strict=True))

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The samples from start to stop as two tensors: (n, 2C, S, S) in ``dtype`` and (n,) int64."""
        return self._read(slice(start, stop))

    def _read(self, which: np.ndarray | slice) -> tuple[Tensor, Tensor]:
        if self._opened_by != os.getpid():  # a worker must not share the file position of the process it came from
            self._file, self._opened_by = h5py.File(self.path, "r"), os.getpid()
        moments = self._file["latents"][which].astype(np.float32, copy=False)
        labels = self._file["labels"][which].astype(np.int64, copy=False)
        return torch.from_numpy(moments).to(self.dtype), torch.from_numpy(labels)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None, "_opened_by": None}

    def _check_form(self, file: h5py.File, channels: int, size: int) -> None:
        for name in ("latents", "labels"):
            if not isinstance(file.get(name), h5py.Dataset):
                raise ValueError(
                    f"the latents file {self.path} has no array {name!r}; it needs 'latents' (N, {2 * channels}, "
                    f"{size}, {size}) and 'labels' (N,)"
                )
        shape, expected = file["latents"].shape, (2 * channels, size, size)
        if len(shape) != 4 or shape[1:] != expected:
            raise ValueError(
                f"the latents in {self.path} have shape {shape}, and this model needs (N, {2 * channels}, {size}, "
                f"{size}): {channels} channels of mean, then {channels} of standard deviation"
            )
        if file["labels"].shape != shape[:1] or file["labels"].dtype.kind not in "iu":
            raise ValueError(
                f"the labels in {self.path} are {file['labels'].dtype} of shape {file['labels'].shape}; "
                f"they must be integers of shape ({shape[0]},), one per latent"
            )
        for name, value in (("amount", shape[0]), ("latent_size", size)):
            if name in file and int(file[name][()]) != value:
                raise ValueError(
                    f"the latents file {self.path} says {name}={int(file[name][()])} and holds {value}; "
                    "it is incomplete or of another size: write it again"
                )

    def _check_labels(self, labels: np.ndarray, num_classes: int) -> None:
        if len(labels) == 0:
            raise ValueError(f"the latents file {self.path} holds no samples")
        if num_classes and (labels.min() < 0 or labels.max() >= num_classes):
            raise ValueError(
                f"the labels in {self.path} go from {labels.min()} to {labels.max()}, outside the classes "
                f"0..{num_classes - 1}; set model.num_classes to the number of classes"
            )

    def _check_values(self, latents: h5py.Dataset, channels: int, scale: float) -> None:
        probes = np.unique(np.linspace(0, len(latents) - 1, _PROBES).astype(int))
        mean, std = np.split(latents[probes].astype(np.float64), 2, axis=1)
        if not (np.isfinite(mean).all() and np.isfinite(std).all()):
            raise ValueError(f"the latents in {self.path} have values that are not finite; write the file again")
        if not (std > 0).all():
            raise ValueError(
                f"the standard deviations in {self.path} (channels {channels} to {2 * channels - 1}) go down to "
                f"{std.min():.3g} and must be positive; store the mean, then the standard deviation (not its logarithm)"
            )
        spread = np.sqrt(mean.var() + np.square(std).mean()) * scale
        if not _SPREAD[0] <= spread <= _SPREAD[1]:
            raise ValueError(
                f"the latents in {self.path} times data.latent_scale={scale} have a standard deviation of "
                f"{spread:.2g}, and it should be near 1: store them unscaled, or set data.latent_scale="
                f"{scale / spread:.2g} if that is what they are"
            )
