"""What a benchmark says of the machine: the commit and its changes, and what NVML tells of the GPU."""

import subprocess
from types import SimpleNamespace

import _measure
import _nvml
import pynvml
import pytest
import torch


def test_a_campaigns_own_files_are_no_changes(tmp_path):
    def git(*arguments):
        who = ["-c", "user.name=name", "-c", "user.email=name@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    source = tmp_path / "source.py"
    source.write_text("1\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    for written in ("benchmarks/results/h200/rates.json", ".campaign_cache/triton/kernel"):
        (tmp_path / written).parent.mkdir(parents=True)
        (tmp_path / written).write_text("2\n")
    assert _measure._commit(tmp_path)["dirty"] is False
    source.write_text("3\n")
    assert _measure._commit(tmp_path)["dirty"] is True


@pytest.fixture
def gpu(monkeypatch):
    """Each of NVML's questions answered by 4000 but for those in the set that it yields, which raise."""
    silent = set()

    def answer(name):
        def ask(*_):
            if name in silent:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return 4000

        return ask

    for name in dir(pynvml):
        if name.startswith(("nvmlInit", "nvmlSystemGet", "nvmlDeviceGet")):
            monkeypatch.setattr(pynvml, name, answer(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(uuid="1"))
    return silent


def test_what_nvml_does_not_tell_is_none(gpu):
    assert _measure._gpu()["power_limit_w"] == 4.0
    monitor = _nvml.GpuMonitor()
    assert (monitor.sample()["power_w"], monitor.energy_j()) == (4.0, 4.0)

    whole = [monitor.sample()]
    gpu |= {"nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetPowerUsage", "nvmlDeviceGetTotalEnergyConsumption"}
    gpu.add("nvmlDeviceGetCurrentClocksEventReasons")
    assert (_measure._gpu()["power_limit_w"], _measure._gpu()["sm_clock_mhz"]) == (None, 4000)
    part = monitor.sample()
    assert (part["power_w"], part["throttled_by"], part["temperature_c"]) == (None, None, 4000)
    assert monitor.energy_j() is None
    assert _nvml.summary([*whole, part])["power_w"] == 4.0
    assert _nvml.summary([part])["throttled_by"] is None


def test_a_machine_without_nvml_has_a_gpu_of_a_name(gpu):
    gpu |= {name for name in dir(pynvml) if name.startswith("nvml")}
    assert _measure._gpu() == {
        "name": "a GPU",
        "driver": None,
        "cuda": torch.version.cuda,
        "sm_clock_mhz": None,
        "memory_clock_mhz": None,
        "power_limit_w": None,
    }
    assert set(_nvml.GpuMonitor().sample().values()) == {None}
