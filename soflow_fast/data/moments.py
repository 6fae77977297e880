"""Latent moments of an autoencoder: what every form in which they are stored has in common.

The moments of a sample are (2C, H, W): the mean and then the standard deviation of each latent, unscaled.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

# Samples looked at when latents are opened, and the spread that scaled latents may have: about 1 by definition.
_PROBES = 64
_SPREAD = (0.5, 2.0)


def probe_rows(n: int, most: int = _PROBES) -> np.ndarray:
    """Which of n samples are looked at, by default when latents are opened: evenly spread, ascending int64."""
    return np.unique(np.linspace(0, max(n - 1, 0), most).astype(int))[:n]


def spread(moments: np.ndarray) -> float:
    """The standard deviation of latents drawn from moments (n, 2C, H, W)."""
    mean, std = np.split(moments.astype(np.float64), 2, axis=1)
    return float(np.sqrt(mean.var() + np.square(std).mean()))


def normalise(moments: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Moments (n, 2C, H, W) float32 of the latents less their channel's mean, by its standard deviation, in place.

    Args:
        mean, std: (C,), or empty for 0 and 1.
    """
    means, stds = np.split(moments, 2, axis=1)
    if mean:
        means -= np.array(mean, np.float32).reshape(-1, 1, 1)
    if std:
        gain = 1 / np.array(std, np.float32).reshape(-1, 1, 1)
        means *= gain
        stds *= gain
    return moments


def fits(scale: float, of: float) -> bool:
    """Whether latents whose spread is ``of`` have one near 1 when they are multiplied by a scale."""
    return _SPREAD[0] <= scale * of <= _SPREAD[1]


def normalised_by(dataset: Dataset) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and standard deviation, of each channel, that the moments of a data set are normalised by, or of what it
    is a subset of; empty for none.
    """
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return getattr(dataset, "normalised_by", ((), ()))


class Moments(Dataset, ABC):
    """Map-style data set of (moments, label); a subclass says how the moments of some rows are read.

    Args:
        path: of the file or folder. labels: (n,) of the samples. probes: (m, 2C, H, W), the samples that
            :func:`probe_rows` names. num_classes: labels must lie in [0, num_classes); 0 does not look at them.
        scale: what the unscaled latents will be multiplied by. mean, std: (C,), what each channel is normalised by
            before that, or empty. dtype: of the moments; bfloat16 rounds them by at most 2^-8 of their size and halves
            the memory they take.

    Attributes:
        labels: (n,) int64, on the host. normalised_by: (mean, std).

    Raises:
        ValueError: if there are no samples, for labels outside the classes, negative standard deviations,
            values that are not finite or all the same, and latents whose spread does not fit the scale.
    """

    def __init__(
        self,
        path: Path,
        labels: np.ndarray,
        probes: np.ndarray,
        *,
        num_classes: int,
        scale: float,
        mean: Sequence[float],
        std: Sequence[float],
        dtype: torch.dtype,
    ):
        self.path, self.dtype = path, dtype
        self.normalised_by = tuple(mean), tuple(std)
        self.labels = labels.astype(np.int64, copy=False)
        self._check_labels(num_classes)
        self._check_values(probes, scale)

    @abstractmethod
    def _read(self, rows: np.ndarray | slice) -> np.ndarray:
        """The moments of some rows, given in ascending order: (n, 2C, H, W) float32."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """The samples of a batch in the order asked for: (2C, H, W) in ``dtype`` and 0-d int64."""
        ascending, back = np.unique(np.asarray(indices), return_inverse=True)
        moments, labels = self._pair(ascending)
        return list(zip(moments[back], labels[back], strict=True))

    def read_range(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The samples from start to stop as two tensors: (n, 2C, H, W) in ``dtype`` and (n,) int64."""
        return self._pair(slice(start, stop))

    def _pair(self, rows: np.ndarray | slice) -> tuple[Tensor, Tensor]:
        moments = torch.from_numpy(normalise(self._read(rows), *self.normalised_by))
        return moments.to(self.dtype), torch.from_numpy(self._told(rows))

    def _told(self, rows: np.ndarray | slice) -> np.ndarray:
        """What the network is told of some rows."""
        return self.labels[rows]

    def _check_labels(self, num_classes: int) -> None:
        labels = self.labels
        if len(labels) == 0:
            raise ValueError(f"the latents file {self.path} holds no samples")
        if num_classes and (labels.min() < 0 or labels.max() >= num_classes):
            raise ValueError(
                f"the labels in {self.path} go from {labels.min()} to {labels.max()}, outside the classes "
                f"0..{num_classes - 1}; set model.num_classes to the number of classes"
            )

    def _check_values(self, probes: np.ndarray, scale: float) -> None:
        std, channels = probes[:, probes.shape[1] // 2 :], probes.shape[1] // 2
        if not np.isfinite(probes).all():
            raise ValueError(f"the latents in {self.path} have values that are not finite; write them again")
        if (std < 0).any():
            raise ValueError(
                f"the standard deviations in {self.path} (channels {channels} to {2 * channels - 1}) go down to "
                f"{std.min():.3g} and must not be negative; store the mean, then the standard deviation (not its "
                "logarithm)"
            )
        found = spread(normalise(probes.astype(np.float32), *self.normalised_by))
        if found == 0:
            raise ValueError(f"the latents in {self.path} are all the same; write them again")
        if not fits(scale, found):
            changed = ", normalised," if any(self.normalised_by) else ""
            raise ValueError(
                f"the latents in {self.path}{changed} times data.latent_scale={scale} have a standard deviation of "
                f"{found * scale:.2g}, and it should be near 1: store them unscaled, or set data.latent_scale="
                f"{1 / found:.2g} if that is what they are"
            )
