"""Averages of any length after the training, from snapshots of a few (arXiv 2312.02696, section 3 and appendix C).

After t updates a :class:`~soflow_fast.ema.PowerEMA` is the mean of the parameters over the updates with the profile
``p(τ) = (γ+1) τ^γ / t^(γ+1)``, 0 <= τ <= t, where those of update k stand for k-1 < τ <= k. The profile of another
length is nearly a sum of the snapshots' profiles, and the same sum of the snapshots is nearly the other average.

Snapshots are float32: rounded to float16 they would add more than twice the error of the reconstruction itself
(tests/test_posthoc.py).
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from soflow_fast import checkpoint
from soflow_fast.ema import PowerEMA, power_exponent

FOLDER = "ema"

# Up to it, and from six or more snapshots of each, an average was at most a quarter as far from the true one as the
# nearest of those tracked (the trajectory of tests/test_posthoc.py). It lets twenty snapshots of each of 0.05 and 0.1
# reach from 0.025 to 0.24, and eighty from 0.01 to 0.27.
_WORST_RESIDUAL = 0.05


class Snapshot(NamedTuple):
    """An average as it was after a step of the training.

    Attributes:
        path: of its file. step: of the training. std: of the average. updates: behind it.
    """

    path: Path
    step: int
    std: float
    updates: int


class Reconstruction(NamedTuple):
    """An average that was not tracked.

    Attributes:
        weights: by name, float32 on the CPU; those that are trained. step: of the training. snapshots: how many it is a
            sum of. residual: relative L2 distance of the sum of their profiles from the one asked for.
    """

    weights: dict[str, Tensor]
    step: int
    snapshots: int
    residual: float


def save(run_dir: Path, step: int, average: PowerEMA) -> None:
    """Writes the snapshot of an average after a step; one that is there already is replaced as a whole. OSError if it
    cannot be written.
    """
    path = checkpoint.path_of(run_dir / FOLDER, step) / f"{average.std}.safetensors"
    profile = {"step": step, "std": average.std, "updates": int(average.updates)}
    remedy = "make room, and the same command goes on from the newest checkpoint"
    with checkpoint.writing(f"the snapshot of step {step}", run_dir, remedy), checkpoint.replaced(path) as temporary:
        save_file(checkpoint.on_host(average.named_averages()), temporary, metadata={"profile": json.dumps(profile)})
    checkpoint.flush(path.parent.parent)


def remove_after(run_dir: Path, step: int) -> list[int]:
    """Removes the snapshots of later steps, each step's at once; returns the steps.

    A run that goes on from that step writes others in their place, or, with another ``snapshot_every``, none.
    """
    aside = run_dir / FOLDER / ".removing"
    shutil.rmtree(aside, ignore_errors=True)  # what a kill left
    later = [path for path in checkpoint.step_folders(run_dir / FOLDER) if checkpoint.step_of(path) > step]
    for path in later:
        os.rename(path, aside)  # from here on it is no snapshot
        shutil.rmtree(aside)
    return sorted(map(checkpoint.step_of, later))


def snapshots(run_dir: Path) -> list[Snapshot]:
    """The snapshots of a run, oldest first, without those from before the first update.

    Raises:
        ValueError: if one is damaged.
    """
    found = []
    for folder in checkpoint.step_folders(run_dir / FOLDER):
        for path in folder.glob("[!.]*.safetensors"):
            try:
                with safe_open(path, "pt") as file:
                    profile = (file.metadata() or {}).get("profile")
            except SafetensorError as error:
                raise ValueError(
                    f"the snapshot {path} is damaged ({error}); restore it, or remove it to do with the others"
                ) from None
            if profile is not None:
                found.append(Snapshot(path, **json.loads(profile)))
    return sorted((one for one in found if one.updates), key=lambda one: (one.step, one.std))


def reconstruct(run_dir: str | Path, std: float, step: int | None = None) -> Reconstruction:
    """The average of another length, as it would have been after a step, from the snapshots up to that step.

    The snapshots are read one after the other; the sum takes 8 bytes a parameter.

    Args:
        run_dir: of a run with ``ema.posthoc``. std: relative standard deviation of the average, in (0, 12^-1/2).
        step: one that has snapshots, by default the last.

    Raises:
        ValueError: if there are no such snapshots, one is damaged, or no sum of their profiles is near enough.
    """
    run_dir = Path(run_dir)
    power_exponent(std)
    found = snapshots(run_dir)
    if not found:
        raise ValueError(
            f"the run {run_dir} has no snapshots to reconstruct the average of std {std} from; they are written "
            "every ema.snapshot_every steps of a run that is started with ema.posthoc, such as [0.05, 0.1]"
        )
    last = [one for one in found if step in (None, one.step)][-1:]
    if not last:
        raise ValueError(
            f"the run {run_dir} has no snapshot of step {step}; choose one of "
            f"{', '.join(map(str, dict.fromkeys(one.step for one in found)))}"
        )
    used = [one for one in found if one.step <= last[0].step]
    shares, residual = fit([one.std for one in used], [one.updates for one in used], std, last[0].updates)
    if residual > _WORST_RESIDUAL:
        raise ValueError(
            f"the average of std {std} cannot be had from the {len(used)} snapshots of {run_dir}: the nearest sum of "
            f"their profiles is off by {residual:.1%}, more than {_WORST_RESIDUAL:.0%}; choose a std nearer to "
            f"{' or '.join(map(str, sorted({one.std for one in used})))}, or train with a smaller ema.snapshot_every"
        )
    with safe_open(used[-1].path, "pt") as file:
        trained = set(file.keys())  # what is not any more stays as it is
    sums: dict[str, Tensor] = {}
    for one, share in zip(used, shares, strict=True):
        with safe_open(one.path, "pt") as file:
            for name in file.keys():  # noqa: SIM118, it is no mapping
                if name not in trained:
                    continue
                tensor = file.get_tensor(name)
                sums.setdefault(name, torch.zeros_like(tensor, dtype=torch.float64)).add_(tensor, alpha=share)
    weights = {name: total.float() for name, total in sums.items()}
    return Reconstruction(weights, last[0].step, len(used), residual)


def fit(stds: Sequence[float], updates: Sequence[int], std: float, at: int) -> tuple[np.ndarray, float]:
    """The sum of n profiles that is nearest to another in L2, among those whose weights add up to one.

    The paper's system is without that condition. From four snapshots of each of two averages the weights then add up to
    one but for 1 %, by which every parameter is off, and the error is more than twice as large.

    Args:
        stds, updates: (n,) of the profiles. std, at: of the other and its number of updates.

    Returns:
        ``(weights, residual)``: (n,) float64, and the distance relative to the norm of the other profile.
    """
    exponents, times = np.array([power_exponent(one) for one in stds]), np.array(updates) / at
    products = _product(exponents[:, None], times[:, None], exponents, times)
    exponent, n = power_exponent(std), len(times)
    wanted, square = _product(exponents, times, exponent, 1.0), _product(exponent, 1.0, exponent, 1.0)
    system = np.block([[products, np.ones((n, 1))], [np.ones((1, n)), np.zeros((1, 1))]])
    # Least squares, as snapshots without an update between them are equal and the system singular.
    weights = np.linalg.lstsq(system, np.append(wanted, 1.0), rcond=None)[0][:n]
    distance = weights @ products @ weights - 2 * weights @ wanted + square
    return weights, float(np.sqrt(max(distance, 0.0) / square))


def _product(a, s, b, t):
    """``∫ p_a p_b dτ`` of the profiles with exponents a, b at times s, t: ``(a+1)(b+1)/(a+b+1) · (s/t)^b / t``, s <= t.

    Where s > t, a and s change places with b and t.
    """
    later, ratio = np.where(s <= t, b, a), np.minimum(s, t) / np.maximum(s, t)
    return (a + 1) * (b + 1) / (a + b + 1) * ratio**later / np.maximum(s, t)
