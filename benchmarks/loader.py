"""How fast latents come to the training step: read from HDF5 by 0, 4 and 8 workers, or resident on the device.

    python benchmarks/loader.py [--needed IMAGES_PER_S] [--batch 256] [--json OUT.json]

Writes an HDF5 file of the published form into a temporary folder and draws its batches in random order as the trainer
does: by workers into pinned memory, read ahead, and from there to the device; or from the whole data set in the
device's memory. Nothing is trained meanwhile. ``--needed`` is what a training step takes, from ``throughput.py``. The
file was just written, so it is read from the machine's page cache, not from a disk. A row whose first batch is not that
of the file is not timed. ``--smoke`` takes a small file for a moment: its figures mean nothing.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import h5py
import numpy as np
import torch
from _measure import environment, write_report
from torch import Tensor

from soflow_fast.build import resolve_device
from soflow_fast.data import LatentMoments, batches, load_resident
from soflow_fast.data.order import batch_indices

CHANNELS, SIZE, CLASSES, SCALE, SEED = 4, 32, 1000, 0.18215, 0
RESIDENT = "resident"

_SMOKE = {"samples": 256, "batch": 16, "workers": [0, 1], "seconds": 0.2}

# Batches before the clock starts: the workers are running and have read ahead.
_FIRST_BATCHES = 3
# Samples written at a time.
_CHUNK = 4096


def write_latents(path: Path, samples: int) -> None:
    """An HDF5 file of the published form: means and standard deviations of 32×32×4 latents, unscaled."""
    generator = np.random.default_rng(SEED)
    shape = (min(samples, _CHUNK), CHANNELS, SIZE, SIZE)
    mean = generator.standard_normal(shape, dtype=np.float32) / SCALE
    std = generator.uniform(0.01, 0.1, shape).astype(np.float32)
    chunk = np.concatenate([mean, std], axis=1)
    with h5py.File(path, "w") as file:
        latents = file.create_dataset("latents", (samples, *chunk.shape[1:]), np.float32)
        for start in range(0, samples, _CHUNK):
            latents[start : start + _CHUNK] = chunk[: samples - start]
        file["labels"] = np.arange(samples) % CLASSES
        file["amount"], file["latent_size"] = samples, SIZE


def first_batch(dataset: LatentMoments, batch: int) -> Tensor:
    """What the first batch of every way to read it must be."""
    samples = dataset.__getitems__(batch_indices(len(dataset), batch, 0, SEED))
    return torch.stack([sample for sample, _ in samples]).float()


def rate(steps: Iterator, batch: int, seconds: float, device: torch.device, expected: Tensor) -> dict:
    """Batches and images per second of an iterator, or why it was not timed."""

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    start = time.perf_counter()
    first, _ = next(steps)
    synchronize()
    row = {"first_batch_s": time.perf_counter() - start}
    if not torch.equal(first.cpu(), expected):
        return {**row, "refused": "its first batch is not that of the file"}
    for _ in itertools.islice(steps, _FIRST_BATCHES):
        synchronize()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        next(steps)
        synchronize()  # as a step waits for its batch; the host must not run ahead of the copies
        count += 1
    per_second = count / (time.perf_counter() - start)
    return {**row, "batches": count, "batches_per_s": per_second, "images_per_s": batch * per_second}


def measure(options: argparse.Namespace, device: torch.device, folder: Path) -> list[dict]:
    """One row per way to read the data, ready for JSON."""
    path = folder / "latents.hdf5"
    write_latents(path, options.samples)
    dtype = torch.bfloat16 if options.latent_precision == "bf16" else torch.float32
    dataset = LatentMoments(path, channels=CHANNELS, size=SIZE, num_classes=CLASSES, scale=SCALE, dtype=dtype)
    expected, rows = first_batch(dataset, options.batch), []
    wanted = {"batch": options.batch, "steps": range(2**31), "seed": SEED, "num_classes": CLASSES, "device": device}
    for workers in options.workers:
        steps = batches(dataset, workers=workers, prefetch=options.prefetch, **wanted)
        row = rate(steps, options.batch, options.seconds, device, expected)
        rows.append({"data": f"HDF5, {workers} workers", "workers": workers, **row})
        steps.close()
    start = time.perf_counter()
    resident = load_resident(dataset, device, CLASSES, show=False)
    loading = time.perf_counter() - start
    row = rate(batches(resident, **wanted), options.batch, options.seconds, device, expected)
    rows.append({"data": RESIDENT, "workers": None, "loading_s": loading, "bytes": resident.samples.nbytes, **row})
    for row in rows:
        if options.needed and "images_per_s" in row:
            row["times_needed"] = row["images_per_s"] / options.needed
    return rows


def table(report: dict) -> str:
    """The report as text: one line per way to read the data."""
    lines = [f"{'':18} {'batches/s':>10} {'images/s':>10} {'of needed':>10} {'first batch':>12}"]
    for row in report["rows"]:
        if "refused" in row:
            lines.append(f"{row['data']:18} refused: {row['refused']}")
            continue
        needed = f"{row['times_needed']:.2f}x" if "times_needed" in row else "-"
        line = f"{row['data']:18} {row['batches_per_s']:10.4g} {row['images_per_s']:10.4g} {needed:>10}"
        lines.append(f"{line} {row['first_batch_s']:10.2f} s")
    return "\n".join(lines)


def parsed(arguments: list[str] | None) -> tuple[argparse.Namespace, torch.device]:
    parser = argparse.ArgumentParser(
        prog="loader.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--needed", type=float, metavar="IMAGES_PER_S", help="what the training step takes")
    add("--samples", type=int, default=50_000, help="in the file, 32 KiB each (default %(default)s)")
    add("--batch", type=int, default=256, help="default %(default)s")
    add("--workers", type=int, nargs="+", default=[0, 4, 8], help="loader processes (default: %(default)s)")
    add("--prefetch", type=int, default=4, help="batches each of them reads ahead (default %(default)s)")
    add("--latent-precision", choices=("bf16", "fp32"), default="bf16", help="default %(default)s, the trainer's own")
    add("--seconds", type=float, default=5.0, help="of timing for each row (default %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    add("--json", type=Path, metavar="OUT", help="write the report here")
    add("--smoke", action="store_true", help="a small file for a moment; the figures mean nothing")
    options = parser.parse_args(arguments)
    if options.smoke:
        parser.set_defaults(**_SMOKE)
        options = parser.parse_args(arguments)
    for name in ("samples", "batch", "prefetch", "seconds"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name} {getattr(options, name):g} is not positive")
    if options.needed is not None and not options.needed > 0:
        parser.error(f"--needed {options.needed:g} is not positive")
    if min(options.workers) < 0:
        parser.error(f"--workers {min(options.workers)} is negative; 0 reads in the training process")
    if options.batch > options.samples:
        parser.error(f"--batch {options.batch} is more than the {options.samples} samples of the file")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"the folder of {options.json} does not exist; create it")
    try:
        return options, resolve_device(options.device)
    except ValueError as error:
        parser.error(str(error))


def main(arguments: list[str] | None = None) -> int:
    """Measures, writes the JSON, prints the table; 1 if a row was refused, 2 for bad input."""
    options, device = parsed(arguments)
    settings = ("needed", "samples", "batch", "prefetch", "latent_precision", "seconds", "smoke")
    report = {"environment": environment(), "device": str(device)}
    report |= {name: getattr(options, name) for name in settings}
    with TemporaryDirectory() as folder:
        report["rows"] = measure(options, device, Path(folder))
    if options.json:
        write_report(options.json, report)
    print(table(report))
    if options.smoke:
        print("a smoke run: these figures mean nothing")
    return int(any("refused" in row for row in report["rows"]))


if __name__ == "__main__":
    sys.exit(main())
