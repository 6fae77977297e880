"""What is called of the packages of FlashAttention 2, 3 and 4, and why one cannot run here.

Their functions are those that torch calls too (``torch.nn.attention``) or that their own autograd functions do.

Shapes: q, k, v, o, do, dq, dk, dv are (B, N, H, h), of any strides with a contiguous last axis; lse (B, H, N), float32.
A backward writes into dq, dk and dv.
"""

import importlib
import inspect
from collections.abc import Callable
from importlib import metadata
from typing import NamedTuple

import torch
from torch import Tensor
from torch.torch_version import TorchVersion


def _forward_2(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_forward

    o, lse, *_ = _flash_attn_forward(
        q, k, v, dropout_p=0.0, softmax_scale=scale, causal=False, window_size_left=-1, window_size_right=-1,
        softcap=0.0, alibi_slopes=None, return_softmax=False,
    )  # fmt: skip
    return o, lse


def _backward_2(do, q, k, v, o, lse, dq, dk, dv, scale: float, deterministic: bool) -> None:
    from flash_attn.flash_attn_interface import _flash_attn_backward

    _flash_attn_backward(
        do, q, k, v, o, lse, dq, dk, dv, dropout_p=0.0, softmax_scale=scale, causal=False, window_size_left=-1,
        window_size_right=-1, softcap=0.0, alibi_slopes=None, deterministic=deterministic, rng_state=None,
    )  # fmt: skip


def _forward_3(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    # All by position, as torch does, because not every build has names or defaults for them: what is for caches,
    # sequences of several lengths and float8; then causal, window, chunk, softcap, rotary, metadata, one split, packing
    # and SMs left free.
    unused = 20 * [None]
    o, lse, *_ = torch.ops.flash_attn_3.fwd(q, k, v, *unused, scale, False, -1, -1, 0, 0.0, True, None, 1, None, 0)
    return o, lse


def _backward_3(do, q, k, v, o, lse, dq, dk, dv, scale: float, deterministic: bool) -> None:
    unused = 6 * [None]
    torch.ops.flash_attn_3.bwd(do, q, k, v, o, lse, dq, dk, dv, *unused, scale, False, -1, -1, 0.0, deterministic, 0)


def _forward_4(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_fwd

    o, lse, *_ = _flash_attn_fwd(q, k, v, softmax_scale=scale, causal=False, return_lse=True)
    return o, lse


def _backward_4(do, q, k, v, o, lse, dq, dk, dv, scale: float, deterministic: bool) -> None:
    from flash_attn.cute.interface import _flash_attn_bwd

    _flash_attn_bwd(
        q, k, v, o, do, lse, softmax_scale=scale, causal=False, deterministic=deterministic, dq=dq, dk=dk, dv=dv
    )


class _Package(NamedTuple):
    """A package and what is called of it.

    Attributes:
        name: of the distribution. oldest: version. module: whose import makes its kernels known. install: how it gets
            here. capabilities: the first numbers of the compute capabilities it has kernels for. widest: head dim.
    """

    name: str
    oldest: str
    module: str
    install: str
    capabilities: range
    widest: int
    forward: Callable
    backward: Callable


PACKAGES = {
    "flash_attn": _Package(
        "flash-attn", "2.7", "flash_attn.flash_attn_interface", "pip install 'soflow-fast[flash]'", range(8, 13), 256,
        _forward_2, _backward_2,
    ),
    "flash_attn_3": _Package(
        "flash-attn-3", "3.0.0b1", "flash_attn_interface",
        "PyTorch has wheels of it; it is built in the folder 'hopper' of flash-attention's repository",
        range(9, 10), 256, _forward_3, _backward_3,
    ),
    "flash_attn_4": _Package(
        "flash-attn-4", "4.0.0b36", "flash_attn.cute.interface", "pip install 'soflow-fast[flash4]'", range(9, 13), 128,
        _forward_4, _backward_4,
    ),
}  # fmt: skip


def missing_for_flash(name: str, head_dim: int) -> str | None:
    """Why one of PACKAGES cannot run here, as the rest of a sentence about it, or None."""
    package = PACKAGES[name]
    try:
        version = metadata.version(package.name)
    except metadata.PackageNotFoundError:
        return f"needs the package {package.name}, which is not installed ({package.install})"
    if TorchVersion(version) < package.oldest:
        return f"needs the package {package.name} of version {package.oldest} or newer, and here is {version}"
    if not torch.cuda.is_available():
        return "needs a CUDA GPU and none is visible"
    capability = torch.cuda.get_device_capability()[0]
    if capability not in package.capabilities:
        return f"has no kernels for compute capability {capability}, which {torch.cuda.get_device_name()} is of"
    if head_dim % 8 or head_dim > package.widest:
        return f"takes head dims that are multiples of 8 up to {package.widest}, and this model has {head_dim}"
    # Up to 4.0.0b36 its backward adds dq up in rows of a multiple of 16 and reads them as of a multiple of 32
    # (flash-attention's pull request 2896): dq is wrong, silently.
    if name == "flash_attn_4" and capability == 9 and 0 < head_dim % 32 <= 16:
        return (
            f"has a wrong gradient for head dim {head_dim} on GPUs of compute capability 9 (flash-attention's pull "
            "request 2896)"
        )
    repeats = (capability < 12) if name == "flash_attn_4" else (head_dim <= 192 or name != "flash_attn_3")
    if torch.are_deterministic_algorithms_enabled() and not repeats:
        return (
            f"has no deterministic backward for head dim {head_dim} on GPUs of compute capability {capability}, which "
            "torch.use_deterministic_algorithms asks for"
        )
    try:
        _load(name)
    except Exception as error:  # whatever a package that was built for something else raises
        return f"needs the package {package.name}, which does not load here ({type(error).__name__}: {error})"
    return None


def _load(name: str) -> None:
    """Imports one of PACKAGES; an error if it has not what is called of it."""
    module = importlib.import_module(PACKAGES[name].module)
    if name == "flash_attn_3":
        torch.ops.flash_attn_3.fwd, torch.ops.flash_attn_3.bwd  # noqa: B018
    if name == "flash_attn_4":  # an older one comes with some of flash-attn's wheels, in the same folder
        inspect.signature(module._flash_attn_bwd).bind_partial(dq=None, dk=None, dv=None, deterministic=False)
