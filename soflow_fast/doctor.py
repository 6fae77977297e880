"""``soflow doctor``: what is installed, which GPU there is, and what ``auto`` would choose here and why."""

import platform
from importlib import metadata

import torch

from soflow_fast.attention import missing_for, resolve_attention
from soflow_fast.flash_packages import PACKAGES
from soflow_fast.kernels import missing_for_triton, resolve_impl

# Package, and what is missing without it.
_PACKAGES = {
    "torch": "everything",
    "triton": "impl='triton'",
    "h5py": "data.kind='latents'",
    "pillow": "data.kind='folder' and sample grids",
    "scikit-learn": "data.kind='digits' and the demo",
    "torch-fidelity": "scores",
    "torchvision": "scores and data.kind='cifar10'",
    "matplotlib": "the demo's figures",
    "diffusers": "encoding to latents and decoding them (data.vae)",
    **{package.name: f"attention={backend!r}" for backend, package in PACKAGES.items()},
}

# What the tests run on and the kernels are compiled with offline; the first numbers of constraints.txt.
_TESTED = {"torch": "2.11", "triton": "3.6"}

# A head dim that every backend supports: the reasons below are about the machine, not about a model.
_HEAD_DIM = 64


def version() -> str:
    """Of this package, with its name."""
    return f"soflow-fast {_version('soflow-fast') or 'of unknown version, as it is not installed'}"


def report() -> str:
    """The text of ``soflow doctor``."""
    lines = [f"{version()}, Python {platform.python_version()}, {platform.platform()}", ""]
    lines += ["packages"]
    for name, use in _PACKAGES.items():
        lines.append(f"  {name:<16}{_described(name) or f'not installed: needed for {use}'}")
    lines += ["", "devices", f"  cpu             {torch.get_num_threads()} threads"]
    lines += [f"  {name:<16}{text}" for name, text in _gpus()]
    impl, attention = resolve_impl("auto"), resolve_attention("auto", _HEAD_DIM)
    lines += ["", "choices", f"  device=auto     {'cuda' if torch.cuda.is_available() else 'cpu'}"]
    lines += [f"  impl=auto       {impl}: {_why_impl(impl)}"]
    why = "torch's own choice among its kernels, without cuDNN's; none has been measured to be better here"
    lines += [f"  attention=auto  {attention}: {why}"]
    for backend in ("triton", *PACKAGES, "cudnn"):
        lines.append(f"  attention={backend:<13}{missing_for(backend, _HEAD_DIM) or 'available, unverified'}")
    return "\n".join(lines)


def _described(package: str) -> str | None:
    version, tested = _version(package), _TESTED.get(package)
    if version is None or tested is None or version.startswith(f"{tested}."):
        return version
    return f"{version} (tested with {tested}; pip install -c constraints.txt installs that)"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        return [("cuda", f"no GPU is visible ({built})")]
    found = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = gpu.total_memory / 2**30
        found.append((f"cuda:{index}", f"{gpu.name}, {memory:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"))
    return found


def _why_impl(impl: str) -> str:
    if impl == "triton":
        return "a CUDA GPU that runs the fused kernels is visible"
    return missing_for_triton() or "Triton's interpreter is on, which is for tests"
