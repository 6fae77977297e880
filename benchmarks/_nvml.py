"""What NVIDIA's management library says of the GPU while rows are timed: power, energy, clocks, temperature."""

import statistics
from collections.abc import Callable

import pynvml
import torch

_ENERGY_UNIT_J = 1e-3

#: Why clocks were lower than they could be; the rest of NVML's flags are settings or an idle GPU.
_THROTTLING = {
    "power cap": pynvml.nvmlClocksEventReasonSwPowerCap,
    "power brake": pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown,
    "heat": pynvml.nvmlClocksEventReasonSwThermalSlowdown | pynvml.nvmlClocksEventReasonHwThermalSlowdown,
    "hardware slowdown": pynvml.nvmlClocksEventReasonHwSlowdown,
}


def told(ask: Callable, *arguments) -> object:
    """What NVML answers; None where it cannot, as in some containers."""
    try:
        return ask(*arguments)
    except pynvml.NVMLError:
        return None


def current_device() -> object:
    """NVML's handle of the current CUDA device, found by its UUID as CUDA's numbering need not be NVML's."""
    told(pynvml.nvmlInit)
    return told(pynvml.nvmlDeviceGetHandleByUUID, f"GPU-{torch.cuda.get_device_properties().uuid}".encode())


class GpuMonitor:
    """Samples of the current CUDA device, to be taken while it works, and the energy it has drawn.

    What NVML does not tell is None.
    """

    def __init__(self):
        self._device = current_device()

    def sample(self) -> dict:
        """Power in W, SM clock in MHz, temperature in °C, and the names of what holds the clocks down."""
        reasons = told(pynvml.nvmlDeviceGetCurrentClocksEventReasons, self._device)
        power = told(pynvml.nvmlDeviceGetPowerUsage, self._device)
        return {
            "power_w": power and power / 1000,
            "sm_clock_mhz": told(pynvml.nvmlDeviceGetClockInfo, self._device, pynvml.NVML_CLOCK_SM),
            "temperature_c": told(pynvml.nvmlDeviceGetTemperature, self._device, pynvml.NVML_TEMPERATURE_GPU),
            "throttled_by": None if reasons is None else [name for name, flag in _THROTTLING.items() if reasons & flag],
        }

    def energy_j(self) -> float | None:
        """Joules since the driver was loaded."""
        energy = told(pynvml.nvmlDeviceGetTotalEnergyConsumption, self._device)
        return None if energy is None else energy * _ENERGY_UNIT_J


def summary(samples: list[dict]) -> dict:
    """Of the samples of a row: median power and clock, highest temperature, everything that held the clocks down."""

    def of(name: str, reduce: Callable) -> object:
        values = [sample[name] for sample in samples if sample[name] is not None]
        return reduce(values) if values else None

    return {
        "power_w": of("power_w", statistics.median),
        "sm_clock_mhz": of("sm_clock_mhz", statistics.median),
        "temperature_c": of("temperature_c", max),
        "throttled_by": of("throttled_by", lambda lists: sorted(set().union(*lists))),
    }
