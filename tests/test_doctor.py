"""``soflow doctor``: what is installed, what there is, what would be chosen."""

import os
import re
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from runs import soflow

from soflow_fast import commands, doctor, flash_packages
from soflow_fast.cli import main


def test_packages_are_listed_with_their_version_or_their_use(monkeypatch):
    def version(name):
        if name == "h5py":
            raise metadata.PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.setattr(metadata, "version", version)
    lines = doctor.report().splitlines()
    assert "  pillow          1.2.3" in lines
    assert "  torch           1.2.3 (tested with 2.11; pip install -c constraints.txt installs that)" in lines
    assert "  h5py            not installed: needed for data.kind='latents'" in lines


def test_what_is_tested_is_what_is_pinned():
    pins = dict(
        re.findall(r"^(\w+)==(\d+\.\d+)", Path(__file__).parents[1].joinpath("constraints.txt").read_text(), re.M)
    )
    assert {name: pins[name] for name in ("torch", "triton")} == doctor._TESTED


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_without_a_gpu_the_choices_and_their_reasons():
    result = soflow("doctor")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert any(line.startswith("  cuda            no GPU is visible") for line in lines)
    assert "  device=auto     cpu" in lines
    assert any(line.startswith("  impl=auto       torch: needs a CUDA GPU and none is visible") for line in lines)
    assert any(line.startswith("  attention=auto  sdpa: torch's own choice") for line in lines)
    assert any(line.startswith("  attention=cudnn        needs a CUDA GPU") for line in lines)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_read_enough_ends_it_without_a_word(unbuffered):
    """As of `soflow doctor | head -1`."""
    command = [sys.executable, "-m", "soflow_fast.cli", "doctor"]
    read, write = os.pipe()
    os.close(read)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    try:
        result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=environment, timeout=300)
    finally:
        os.close(write)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, b"")


def test_another_broken_pipe_is_an_error_like_others(monkeypatch, capsys):
    monkeypatch.setattr(commands, "report", lambda: (_ for _ in ()).throw(BrokenPipeError(32, "Broken pipe")))
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == "soflow: [Errno 32] Broken pipe\n"


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"{doctor.version()}\n"
    assert doctor.report().startswith(f"{doctor.version()}, Python ")


def test_a_gpu_is_described(monkeypatch):
    class Gpu:
        name, total_memory, major, minor = "Some GPU", 80 * 2**30, 9, 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(flash_packages, "_load", lambda name: None)
    lines = doctor.report().splitlines()
    assert "  cuda:0          Some GPU, 80 GiB, compute capability 9.0" in lines
    assert "  device=auto     cuda" in lines
    assert any(line.startswith("  impl=auto       triton: a CUDA GPU") for line in lines)
    installed = doctor._version("flash-attn-4") is not None
    assert ("  attention=flash_attn_4 available, unverified" in lines) == installed
