"""Latent moments in HDF5, in the form the published SoFlow code writes, and ``soflow encode``.

Arrays: ``latents`` float (N, 2C, H, W), the mean and then the standard deviation of each latent, unscaled; ``labels``
integer (N,), where there are classes; scalars ``amount`` = N and ``latent_size`` = H = W, or both, (2,). A file of
``soflow encode`` also counts the rows that are there, in the scalar ``written``. For networks that are told conditions
there is another array, ``conditions`` (N, ...).
"""

import os
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from soflow_fast.data.moments import Moments, probe_rows
from soflow_fast.size import Size, as_size, height_and_width

PUBLIC_NAME = "imagenet_latent.hdf5"


class LatentMoments(Moments):
    """Map-style data set of (moments, label), or of (moments, condition), read from the file as it is used.

    Args:
        path: of the file, or of the folder that holds ``imagenet_latent.hdf5``. channels: C. size: one number or
            (H, W). num_classes, scale, mean, std, dtype: see :class:`~soflow_fast.data.moments.Moments`.
        with_conditions: whether items have the file's conditions in place of labels.

    Raises:
        ValueError: for a file that is missing, damaged, incomplete or of another form, and see there.
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
        with_conditions: bool = False,
    ):
        path, self._with_conditions = Path(path), with_conditions
        self.path = path / PUBLIC_NAME if path.is_dir() else path
        self._file: h5py.File | None = None
        self._opened_by: int | None = None
        if not self.path.is_file():
            raise ValueError(
                f"the latents file {self.path} does not exist; set data.path to an HDF5 file of latents, or to a "
                "folder with dataset.json and a .npy file per image"
            )
        try:
            with h5py.File(self.path, "r") as file:
                self._check_form(file, channels, *height_and_width(size), num_classes)
                n = len(file["latents"])
                labels = file["labels"][:] if "labels" in file else np.zeros(n, np.int64)
                probes = file["latents"][probe_rows(n)]
        except OSError as error:
            raise ValueError(
                f"the latents file {self.path} cannot be read as HDF5 ({error}); it is damaged or incomplete: "
                "write or copy it again"
            ) from None
        form = {"num_classes": num_classes, "scale": scale, "mean": mean, "std": std, "dtype": dtype}
        super().__init__(self.path, labels, probes, **form)

    def _read(self, rows: np.ndarray | slice) -> np.ndarray:
        return self._rows("latents", rows).astype(np.float32, copy=False)

    def _told(self, rows: np.ndarray | slice) -> np.ndarray:
        if not self._with_conditions:
            return super()._told(rows)
        conditions = self._rows("conditions", rows)
        return conditions.astype(conditions.dtype.newbyteorder("="), copy=False)

    def conditions(self, items: list[int]) -> Tensor:
        """The conditions of some items, (n, ...)."""
        ascending, back = np.unique(np.asarray(items), return_inverse=True)
        return torch.from_numpy(self._told(ascending)[back])

    def _rows(self, name: str, rows: np.ndarray | slice) -> np.ndarray:
        """Rows of an array. Scattered ones that lie in the file as they are, uncompressed and in no chunks, are read
        without HDF5, which would take several times as long.
        """
        # A worker opens the file anew. HDF5 gives it the descriptor of the process that it came from if the file was
        # open there; that they share its position does not matter, since HDF5 reads by pread, as is done here.
        if self._opened_by != os.getpid():
            self._file, self._opened_by = h5py.File(self.path, "r"), os.getpid()
        array = self._file[name]
        scattered = not isinstance(rows, slice) and len(rows) and rows[0] >= 0 and rows[-1] < len(array)
        start = array.id.get_offset()  # None where there are chunks
        plain = start is not None and array.id.get_type() == h5py.h5t.py_create(array.dtype)
        if not (scattered and plain and self._file.driver == "sec2"):
            return array[rows]
        found = np.empty((len(rows), *array.shape[1:]), array.dtype)
        file, places = self._file.id.get_vfd_handle(), found.reshape(len(rows), -1).view(np.uint8)
        for row, place in zip(rows.tolist(), places, strict=True):
            if os.preadv(file, [place], start + row * place.nbytes) != place.nbytes:
                raise ValueError(f"the latents file {self.path} ends before sample {row}; write or copy it again")
        return found

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None, "_opened_by": None}

    def _check_form(self, file: h5py.File, channels: int, height: int, width: int, num_classes: int) -> None:
        for name in ("latents", "labels") if num_classes or "labels" in file else ("latents",):
            if not isinstance(file.get(name), h5py.Dataset):
                raise ValueError(
                    f"the latents file {self.path} has no array {name!r}; it needs 'latents' (N, {2 * channels}, "
                    f"{height}, {width}) and 'labels' (N,)"
                )
        shape, expected = file["latents"].shape, (2 * channels, height, width)
        if len(shape) != 4 or shape[1:] != expected:
            raise ValueError(
                f"the latents in {self.path} have shape {shape}, and this model needs (N, {2 * channels}, {height}, "
                f"{width}): {channels} channels of mean, then {channels} of standard deviation"
            )
        if "labels" in file and (file["labels"].shape != shape[:1] or file["labels"].dtype.kind not in "iu"):
            raise ValueError(
                f"the labels in {self.path} are {file['labels'].dtype} of shape {file['labels'].shape}; "
                f"they must be integers of shape ({shape[0]},), one per latent"
            )
        conditions = file.get("conditions")
        if self._with_conditions and (not isinstance(conditions, h5py.Dataset) or conditions.shape[:1] != shape[:1]):
            raise ValueError(
                f"the latents file {self.path} has no array 'conditions' of {shape[0]} rows, and this network is told "
                "conditions; add it with h5py, a row for each latent"
            )
        for name, value in (("amount", shape[0]), ("latent_size", as_size(height, width)), ("written", shape[0])):
            found = list(map(int, np.ravel(file[name][()]))) if name in file else None
            if found not in (None, list(np.ravel(value))):
                raise ValueError(
                    f"the latents file {self.path} says {name}={'x'.join(map(str, found))} and holds "
                    f"{'x'.join(map(str, np.ravel(value)))}; "
                    "it is incomplete or of another size: write it again"
                )
