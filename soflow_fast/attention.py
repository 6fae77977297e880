"""Softmax attention behind one function, with the backend chosen once and by name.

Shapes: B rows, H heads, N tokens, h head dim.
"""

import logging

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from soflow_fast.flash_packages import PACKAGES, missing_for_flash
from soflow_fast.kernels import MAX_HEAD_DIM, missing_for_triton

_log = logging.getLogger(__name__)

BACKENDS = ("auto", "sdpa", "triton", "torch_flash", "torch_efficient", "cudnn", *PACKAGES, "math")

#: those that run on a GPU alone
OF_A_GPU = ("triton", "torch_efficient", "cudnn", *PACKAGES)

# Torch's own. ``sdpa`` is its choice without cuDNN, which torch 2.11 would take first on an H100: its backward there is
# reported to return NaN for rows whose logsumexp is below −88 at 64, 192, ... tokens (pytorch's issue 196678), and a
# DiT-B/4 at 32×32 has 64.
_OF_TORCH = {
    "sdpa": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "torch_flash": SDPBackend.FLASH_ATTENTION,
    "torch_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def resolve_attention(name: str, head_dim: int, compute_dtype: torch.dtype | None = None) -> str:
    """The backend that ``name`` stands for on this machine; logged.

    ``auto`` is ``sdpa``, torch's own choice among flash, memory-efficient and math attention; cuDNN's has to be asked
    for by name. Which is fastest for a shape has not been measured on a GPU yet. ``math`` is the plain formula, the
    only backend with forward-mode AD and with float64 on a GPU. ``triton`` is the library's own, of a layer from its
    projection on, see :func:`soflow_fast.kernels.fused.self_attention`; a DiT takes it with ``impl="triton"``, up to
    the head dims of :data:`soflow_fast.kernels.MAX_HEAD_DIM`. ``flash_attn``, ``flash_attn_3`` and ``flash_attn_4``
    are FlashAttention 2, 3 (for Hopper) and 4 (Hopper and Blackwell), see :mod:`soflow_fast.flash`. ``torch_flash``,
    ``torch_efficient`` and ``cudnn`` hold torch to one of its own. All that need a GPU are unverified when asked for by
    name, never run natively for this project.

    Args:
        name: one of ``BACKENDS``. head_dim: h. compute_dtype: of q, k and v, where it is known.

    Raises:
        ValueError: for an unknown name, or for a backend that cannot run here; the message says what to install.
    """
    if name not in BACKENDS:
        raise ValueError(f"attention={name!r} is not known; choose one of {', '.join(BACKENDS)}")
    missing = missing_for(name, head_dim, compute_dtype)
    if missing:
        raise ValueError(f"attention={name!r} {missing}; choose attention='sdpa'")
    chosen = "sdpa" if name == "auto" else name
    _log.info("attention=%s is %s", name, chosen)
    return chosen


def missing_for(name: str, head_dim: int, compute_dtype: torch.dtype | None = None) -> str | None:
    """Why a backend cannot run here, as the rest of a sentence about it, or None; of :func:`resolve_attention`."""
    if name == "triton":
        missing, most = missing_for_triton(), MAX_HEAD_DIM.get(compute_dtype, max(MAX_HEAD_DIM.values()))
        if missing or head_dim <= most:
            return missing
        where = f" in {compute_dtype}" if compute_dtype in MAX_HEAD_DIM else ""
        return f"takes head dims up to {most}{where}, and this model has {head_dim}"
    if name in PACKAGES:
        return missing_for_flash(name, head_dim)
    if name == "cudnn" and not (torch.cuda.is_available() and torch.backends.cudnn.is_available()):
        return "needs a CUDA GPU with cuDNN and none is visible"
    if name in OF_A_GPU and not torch.cuda.is_available():
        return "needs a CUDA GPU and none is visible"
    return None


def warn_of_large_heads(head_dim: int, compute_dtype: torch.dtype | None = None) -> None:
    """Logs in which dtypes plain torch makes the difference of attention, as its fused kernel does not take such heads.

    Args:
        head_dim: h. compute_dtype: of q, k and v, where it is known.
    """
    dtypes = [
        str(dtype).removeprefix("torch.")
        for dtype, most in MAX_HEAD_DIM.items()
        if head_dim > most and compute_dtype in (dtype, None)
    ]
    if dtypes:
        _log.warning(
            "the fused difference of attention does not take a head dim of %d in %s, and plain torch makes it, slower; "
            "give the model more heads",
            head_dim,
            ", ".join(dtypes),
        )


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """``softmax(qkᵀ/√h) v``.

    Args:
        q, k, v: (B, H, N, h), any strides with a contiguous last axis. backend: as :func:`resolve_attention` returns,
            but those that make q, k and v too: ``triton`` and the packages of flash attention.

    Returns:
        (B, H, N, h), dtype of q.

    Raises:
        ValueError: for a backend that takes half precision only, and others.
    """
    half_only = backend == "cudnn" or (backend == "torch_flash" and q.is_cuda)
    if half_only and q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"attention={backend!r} takes bfloat16 and float16 and got {q.dtype}; compute in bf16 or choose "
            "attention='sdpa'"
        )
    if backend == "math":
        scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
        return scores.softmax(-1).to(v.dtype) @ v
    if backend == "sdpa" and not q.is_cuda:
        return nn.functional.scaled_dot_product_attention(q, k, v)
    with sdpa_kernel(_OF_TORCH[backend]):
        return nn.functional.scaled_dot_product_attention(q, k, v)
