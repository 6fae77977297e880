"""What a benchmark must say about where it ran, and the file it says it in."""

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

import torch

_ROOT = Path(__file__).parents[1]
_PACKAGES = ("soflow-fast", "torch", "triton", "numpy")


def environment() -> dict:
    """Hardware, package versions and commit of this run, ready for JSON.

    Returns:
        ``python``, ``versions`` (package: version or None), ``cpu`` (model, cores, threads torch uses), ``gpu`` (name,
        driver, clocks in MHz, power limit in W, each None where NVML does not tell; or None), ``commit`` (hash and
        whether files differ from it other than results and the campaign's cache; or None). Where the files are without
        their history, the hash is read from a file COMMIT beside them.
    """
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "cpu": {"model": _cpu_model(), "cores": len(_usable_cores()), "threads": torch.get_num_threads()},
        "gpu": _gpu(),
        "commit": _commit(),
    }


def identity(environment: dict) -> tuple:
    """Of an :func:`environment` the card (or CPU) and the commit: only figures of the same ones belong together."""
    hardware = environment["gpu"] or environment["cpu"]
    return hardware.get("name") or hardware.get("model"), (environment["commit"] or {}).get("hash")


def write_report(path: Path, report: dict, *, partial: bool = False) -> None:
    """Writes a report as JSON, whole or not at all.

    Args:
        partial: whether more is to come; the file then says so, and counts as unfinished if the run is stopped here.
    """
    write_whole(path, json.dumps({**report, "partial": True} if partial else report, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that a kill leaves the one before or the new one."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _gpu() -> dict | None:
    if not torch.cuda.is_available():
        return None
    import pynvml
    from _nvml import current_device, told

    device = current_device()
    power_limit = told(pynvml.nvmlDeviceGetEnforcedPowerLimit, device)
    return {
        "name": torch.cuda.get_device_name(),
        "driver": told(pynvml.nvmlSystemGetDriverVersion),
        "cuda": torch.version.cuda,
        "sm_clock_mhz": told(pynvml.nvmlDeviceGetClockInfo, device, pynvml.NVML_CLOCK_SM),
        "memory_clock_mhz": told(pynvml.nvmlDeviceGetClockInfo, device, pynvml.NVML_CLOCK_MEM),
        "power_limit_w": power_limit and power_limit / 1000,
    }


def _commit(root: Path = _ROOT) -> dict | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        # What a campaign itself writes is no change.
        changes = git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!.campaign_cache")
        return {"hash": git("rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.CalledProcessError):
        stamp = root / "COMMIT"
        return {"hash": stamp.read_text().strip(), "dirty": None} if stamp.exists() else None
