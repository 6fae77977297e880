"""What NVIDIA's management library says of the GPU while rows are timed: power, energy, clocks, temperature."""

import statistics

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


class GpuMonitor:
    """Samples of the current CUDA device, to be taken while it works, and the energy it has drawn."""

    def __init__(self):
        pynvml.nvmlInit()
        # CUDA's numbering need not be NVML's: find the device by its UUID.
        self._device = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}".encode())

    def sample(self) -> dict:
        """Power in W, SM clock in MHz, temperature in °C, and the names of what holds the clocks down."""
        reasons = pynvml.nvmlDeviceGetCurrentClocksEventReasons(self._device)
        return {
            "power_w": pynvml.nvmlDeviceGetPowerUsage(self._device) / 1000,
            "sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(self._device, pynvml.NVML_CLOCK_SM),
            "temperature_c": pynvml.nvmlDeviceGetTemperature(self._device, pynvml.NVML_TEMPERATURE_GPU),
            "throttled_by": [name for name, flag in _THROTTLING.items() if reasons & flag],
        }

    def energy_j(self) -> float | None:
        """Joules since the driver was loaded; None where the GPU does not count them."""
        try:
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(self._device) * _ENERGY_UNIT_J
        except pynvml.NVMLError_NotSupported:
            return None


def summary(samples: list[dict]) -> dict:
    """Of the samples of a row: median power and clock, highest temperature, everything that held the clocks down."""
    return {
        "power_w": statistics.median(sample["power_w"] for sample in samples),
        "sm_clock_mhz": statistics.median(sample["sm_clock_mhz"] for sample in samples),
        "temperature_c": max(sample["temperature_c"] for sample in samples),
        "throttled_by": sorted({name for sample in samples for name in sample["throttled_by"]}),
    }
