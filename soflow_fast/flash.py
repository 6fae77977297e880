"""FlashAttention 2, 3 and 4 by their own packages, from the projection on.

A package's function of q, k and v returns three gradients, which are then packed for the products of the projection's
backward and summed for its bias, 12 bytes per token and column of o (:mod:`soflow_fast.kernels.heads`). Its kernels
write gradients wherever they are told to: here into their places in the projection's own, so that only dq and the
gradient of o are read once more, for the sums, 4 bytes.

A forward and a backward are one operator each, of which Inductor is told, also where a package has none of its own.

Shapes: B rows, N tokens, D = H·h width, H heads, h head dim.
"""

import importlib
from collections.abc import Callable
from importlib import metadata
from typing import NamedTuple

import torch
from torch import Tensor

from soflow_fast.kernels._op import autocast, raw_op
from soflow_fast.kernels._projection import attention_of_projection, count_flops


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
    # more than one part of the keys would be for a few long sequences, and is added up in no fixed order
    o, lse, *_ = torch.ops.flash_attn_3.fwd(q, k, v, softmax_scale=scale, is_causal=False, num_splits=1)
    return o, lse


def _backward_3(do, q, k, v, o, lse, dq, dk, dv, scale: float, deterministic: bool) -> None:
    torch.ops.flash_attn_3.bwd(
        do, q, k, v, o, lse, dq, dk, dv, softmax_scale=scale, is_causal=False, deterministic=deterministic
    )


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
        name: of the distribution. module: whose import makes its kernels known. install: how it gets here.
        capabilities: the first numbers of the compute capabilities it has kernels for. widest: head dim.
    """

    name: str
    module: str
    install: str
    capabilities: range
    widest: int
    forward: Callable
    backward: Callable


PACKAGES = {
    "flash_attn": _Package(
        "flash-attn", "flash_attn.flash_attn_interface", "pip install 'soflow-fast[flash]'", range(8, 13), 256,
        _forward_2, _backward_2,
    ),
    "flash_attn_3": _Package(
        "flash-attn-3", "flash_attn_interface", "build it in the folder 'hopper' of flash-attention's repository",
        range(9, 10), 256, _forward_3, _backward_3,
    ),
    "flash_attn_4": _Package(
        "flash-attn-4", "flash_attn.cute.interface", "pip install 'soflow-fast[flash4]'", range(9, 13), 128,
        _forward_4, _backward_4,
    ),
}  # fmt: skip


def missing_for_flash(name: str, head_dim: int) -> str | None:
    """Why one of PACKAGES cannot run here, as the rest of a sentence about it, or None."""
    package = PACKAGES[name]
    try:
        metadata.version(package.name)
    except metadata.PackageNotFoundError:
        return f"needs the package {package.name}, which is not installed ({package.install})"
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
    try:
        importlib.import_module(package.module)
    except ImportError as error:
        return f"needs the package {package.name}, and its import fails ({error})"
    return None


def _forward(y: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """``(o, lse)``: (B, N, H, h), and (B, H, N) in float32."""
    o, lse = PACKAGES[backend].forward(*y.unbind(2), y.shape[-1] ** -0.5)
    return o.contiguous(), lse.contiguous()


def _forward_fake(y: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    B, n, _, heads, h = y.shape
    return y.new_empty(B, n, heads, h), y.new_empty((B, heads, n), dtype=torch.float32)


def _backward(y: Tensor, do: Tensor, o: Tensor, lse: Tensor, backend: str) -> Tensor:
    """dy, (B, N, 3, H, h)."""
    dy, deterministic = torch.empty_like(y), torch.are_deterministic_algorithms_enabled()
    scale = y.shape[-1] ** -0.5
    PACKAGES[backend].backward(do.contiguous(), *y.unbind(2), o, lse, *dy.unbind(2), scale, deterministic)
    return dy


def _backward_fake(y: Tensor, do: Tensor, o: Tensor, lse: Tensor, backend: str) -> Tensor:
    return torch.empty_like(y)


_forward_op = raw_op("flash_attention_fwd", _forward, _forward_fake)
_backward_op = raw_op("flash_attention_bwd", _backward, _backward_fake)
count_flops(torch.ops.soflow.flash_attention_fwd, torch.ops.soflow.flash_attention_bwd)


def _of(backend: str) -> Callable:
    def forward(y: Tensor) -> tuple[Tensor, Tensor]:
        return _forward_op(y, backend)

    def backward(y: Tensor, do: Tensor, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        dy = _backward_op(y, do, o, lse, backend)
        # rows of P add up to 1 and those of the scores' gradient to 0
        of_queries, of_values = (x.sum((0, 1), dtype=torch.float32).flatten() for x in (dy[:, :, 0], do))
        return dy, torch.cat([of_queries, torch.zeros_like(of_queries), of_values]).view(1, 1, -1)

    return attention_of_projection(forward, backward)


_ATTENTION = {name: _of(name) for name in PACKAGES}


def self_attention(
    h: Tensor, weight: Tensor, bias: Tensor, *, heads: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`soflow_fast.kernels.reference.self_attention` by one of PACKAGES.

    Args:
        h: (B, N, D). weight: (3D, D). bias: (3D,), all bfloat16 or all float16. heads: H, divides D.

    Returns:
        ``(o, q, k, v)``, each (B, H, N, h); o is stored as (B, N, H, h), the others are views of one tensor, without
        gradient.

    Raises:
        ValueError: for another dtype.
    """
    h, weight, bias = autocast(h, weight, bias)
    if h.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"attention={backend!r} takes bfloat16 and float16 and got {h.dtype}; compute in bf16 or choose "
            "attention='sdpa'"
        )
    return _ATTENTION[backend](h, weight, bias, heads)
