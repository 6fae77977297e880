"""Writing latent moments to HDF5 so that a kill at any instant loses nothing that was recorded.

``OUT.partial`` is laid out as a whole first, with every label and a fingerprint of every image. From then on only
numbers at fixed places of it change: rows of moments and, once they have reached the disk, their count. No structure of
HDF5 is ever half written, and the complete file is renamed to ``OUT``.
"""

import json
import os
import time
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from soflow_fast.checkpoint import flush
from soflow_fast.size import as_size

# Seconds between flushes; bytes per copy.
_FLUSH_SECONDS = 10.0
_COPY_BYTES = 2**26


class Contents(NamedTuple):
    """What a file of latents is to hold.

    Attributes:
        settings: by name, what the moments depend on besides the images. shape: (2C, H, W) of a row.
        labels: (n,) int64. sources: (n,) uint64, a fingerprint of each row's image, its class included.
    """

    settings: dict[str, object]
    shape: tuple[int, int, int]
    labels: np.ndarray
    sources: np.ndarray


class LatentsWriter:
    """Writes rows of moments in order, going on where an earlier writer of the same contents stopped.

    What follows the rows that are written may have changed since then: images repaired, removed or added. As a context
    it records what was written, whatever ends it.

    Args:
        out: the file that :meth:`finish` leaves. contents: of the file.

    Raises:
        ValueError: if ``OUT.partial`` is damaged, or holds rows of other settings or other images.
    """

    def __init__(self, out: Path, contents: Contents):
        self.out, self.partial = out, out.with_name(f"{out.name}.partial")
        if not self.partial.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            _lay_out(self.partial, contents)
        elif not _holds(self.partial, contents, "remove it to begin again"):
            _lay_out(self.partial, contents, earlier=self.partial)
        with h5py.File(self.partial, "r") as file:
            self._rows_at, self._count_at = (file[name].id.get_offset() for name in ("latents", "written"))
            self.written = int(file["written"][()])
        self._row_bytes = int(np.prod(contents.shape)) * np.dtype("<f4").itemsize
        self._flushed_at = time.monotonic()
        self._file = os.open(self.partial, os.O_RDWR)

    def __enter__(self) -> "LatentsWriter":
        return self

    def __exit__(self, *_) -> None:
        try:
            self._flush()
        finally:
            os.close(self._file)

    def append(self, moments: np.ndarray) -> None:
        """Writes the next rows, (m, 2C, H, W) float32, and records them every ten seconds.

        Raises:
            OSError: if the disk is full or fails; the rows before these count.
        """
        rows = np.ascontiguousarray(moments, dtype="<f4")
        try:
            _write_at(self._file, memoryview(rows).cast("B"), self._rows_at + self.written * self._row_bytes)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.partial)) from None
        self.written += len(rows)
        if time.monotonic() - self._flushed_at >= _FLUSH_SECONDS:
            self._flush()

    def finish(self) -> None:
        """Gives the file its name; every row is written, and the writer closed."""
        flush(self.partial)
        os.rename(self.partial, self.out)
        flush(self.out.parent)

    def _flush(self) -> None:
        os.fsync(self._file)  # the rows are there before their count says so
        _write_at(self._file, memoryview(np.int64(self.written).astype("<i8").tobytes()), self._count_at)
        self._flushed_at = time.monotonic()


def is_complete(out: Path, contents: Contents) -> bool:
    """Whether a file with these contents is there already.

    Raises:
        ValueError: if a file is there, with other contents.
    """
    if not out.exists():
        return False
    remedy = "choose another name, or remove it"
    if not _holds(out, contents, remedy):
        raise ValueError(f"{out} holds latents of other images; {remedy}")
    return True


def _lay_out(path: Path, contents: Contents, earlier: Path | None = None) -> None:
    """Makes a file with everything but the moments, and the rows that an earlier one holds; all at once."""
    new = path.with_name(f"{path.name}.new")
    with h5py.File(new, "w") as file:
        file.attrs["settings"] = json.dumps(contents.settings)
        file["labels"], file["sources"] = contents.labels, contents.sources
        file["amount"], file["latent_size"] = np.int64(len(contents.labels)), np.int64(as_size(*contents.shape[1:]))
        file["written"] = np.int64(0)
        latents = _reserve(file, "latents", (len(contents.labels), *contents.shape))
        if earlier is not None:
            _copy_rows(earlier, latents, file["written"])
    flush(new)
    os.rename(new, path)
    flush(path.parent)


def _reserve(file: h5py.File, name: str, shape: tuple[int, ...]) -> h5py.Dataset:
    """A float32 array with its place in the file, contiguous, which takes no space on the disk until it is written."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)  # as h5py has it: the same contents are the same bytes
    space = h5py.h5s.create_simple(shape)
    return h5py.Dataset(h5py.h5d.create(file.id, name.encode(), h5py.h5t.IEEE_F32LE, space, properties))


def _copy_rows(earlier: Path, latents: h5py.Dataset, written: h5py.Dataset) -> None:
    with h5py.File(earlier, "r") as file:
        n, step = int(file["written"][()]), max(1, _COPY_BYTES // (4 * int(np.prod(latents.shape[1:]))))
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            latents[rows] = file["latents"][rows]
        written[()] = n


def _holds(path: Path, contents: Contents, remedy: str) -> bool:
    """Whether a file is laid out for these contents, and not only the rows that it holds so far are the same.

    Raises:
        ValueError: if it is damaged, or holds rows of other contents.
    """
    try:
        with h5py.File(path, "r") as file:
            settings, written = json.loads(file.attrs["settings"]), int(file["written"][()])
            sources = file["sources"][:]
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is there and is not a file of soflow encode, or a damaged one ({error}); {remedy}"
        ) from None
    for name, value in contents.settings.items():
        if settings.get(name) != value:
            raise ValueError(
                f"{path} holds latents made with {name} {settings.get(name)}, and this command has {value}; "
                f"give the same, or {remedy}"
            )
    if not np.array_equal(sources[:written], contents.sources[:written]):  # also where there are fewer now
        raise ValueError(
            f"{path} holds {written} latents, and not of the images that come first in this command (their names, "
            f"sizes or classes are others); give the same images, or {remedy}"
        )
    return np.array_equal(sources, contents.sources)


def _write_at(file: int, data: memoryview, at: int) -> None:
    while data:
        count = os.pwrite(file, data, at)
        data, at = data[count:], at + count
