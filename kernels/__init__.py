"""Fused ops of the training step. ``reference`` is the specification in plain torch; the other modules are the Triton
kernels that replace it. This package imports torch and triton only, never the rest of the library."""

if __name__ == "kernels":
    raise ImportError(
        "import soflow_fast.kernels, not the checkout's folder 'kernels' as a top-level package; where "
        "transformers, and with it diffusers and peft, looks for its own package of that name, start Python in another "
        "folder"
    )

import importlib.util
from types import ModuleType

import torch

IMPLEMENTATIONS = ("auto", "torch", "triton")

#: head dims up to which the fused attention and its difference take a dtype: above, they spill at every size of block,
#: in float32 because its products hold whole operands in registers
MAX_HEAD_DIM = {torch.float32: 80, torch.bfloat16: 128, torch.float16: 128}


def resolve_impl(name: str) -> str:
    """``"torch"`` or ``"triton"``: the implementation that ``name`` stands for on this machine.

    ``auto`` is triton where a CUDA GPU of compute capability 8.0 or newer and the package triton are present.

    Raises:
        ValueError: for an unknown name, or for triton where it cannot run; the message says what is missing.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"impl={name!r} is not known; choose one of {', '.join(IMPLEMENTATIONS)}")
    if name == "torch":
        return name
    missing = missing_for_triton()
    if name == "auto":
        return "torch" if missing or not torch.cuda.is_available() else "triton"
    if missing:
        raise ValueError(f"impl='triton' {missing}; choose impl='torch'")
    return name


def missing_for_triton() -> str | None:
    """Why Triton's kernels cannot run here, as the rest of a sentence about them, or None."""
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed (pip install triton)"
    from triton import knobs

    if knobs.runtime.interpret:
        return None
    if not torch.cuda.is_available():
        return "needs a CUDA GPU and none is visible (on a CPU it runs only under Triton's interpreter)"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"needs compute capability 8.0 or newer and {torch.cuda.get_device_name()} is older"
    return None


def ops(impl: str) -> ModuleType:
    """The module of ops for a resolved implementation; both have the same ops, by the same names."""
    if impl == "triton":
        from . import fused

        return fused
    from . import reference

    return reference
