"""Low-precision compute copies of float32 master parameters, and which products may be TensorFloat-32."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

PRECISIONS = ("bf16", "tf32", "fp32")


class _ToMaster(torch.autograd.Function):
    """The compute copies as differentiable values of their masters: no work forward, one cast backward."""

    @staticmethod
    def forward(ctx, copies: list[Tensor], *masters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = masters[0].dtype
        return tuple(copy.view_as(copy) for copy in copies)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        present = [g for g in gradients if g is not None]
        wide = [torch.empty_like(g, dtype=ctx.dtype) for g in present]
        torch._foreach_copy_(wide, present)
        wide = iter(wide)
        return None, *(None if g is None else next(wide) for g in gradients)


class ComputeCopy:
    """Persistent bfloat16 copies of a module's parameters, the masters.

    The copies take the masters' place in a forward; gradients reach and accumulate on the masters in float32. A copy
    whose master has since been written is refreshed before it is used; after writes by way of ``.data``, which torch
    does not count, call :meth:`write`.

    Args:
        module: by whose names its parameters, the masters, are known. part: the module in it that has copies, such as
            an objective's network; all of it by default. What is beside it computes on its own parameters.
    """

    def __init__(self, module: nn.Module, part: nn.Module | None = None):
        inside = {id(p) for p in (module if part is None else part).parameters()}
        named = dict(module.named_parameters())
        self._masters = {name: p for name, p in named.items() if id(p) in inside}
        self.copies = {name: p.detach().bfloat16() for name, p in self._masters.items()}
        self._trained = [name for name, p in self._masters.items() if p.requires_grad]
        # an optimizer that writes the copies writes one of each parameter
        beside = [p for p in named.values() if p.requires_grad and id(p) not in inside]
        self._unread = {id(p): torch.empty_like(p, dtype=torch.bfloat16) for p in beside}
        self._versions = self._current_versions()

    def _current_versions(self) -> list[int]:
        return [p._version for p in self._masters.values()]

    @torch.no_grad()
    def write(self) -> None:
        """Copies every master: after an optimizer step, as torch's fused ones do not count their writes as versions."""
        torch._foreach_copy_(list(self.copies.values()), list(self._masters.values()))
        self.mark_written()

    def mark_written(self) -> None:
        """Declares the copies equal to the masters, after an optimizer that wrote both."""
        self._versions = self._current_versions()

    def copies_of(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The copies of the given parameters, also those that nothing reads, for an optimizer that writes them."""
        by_master = self._unread | {id(p): self.copies[name] for name, p in self._masters.items()}
        return [by_master[id(p)] for p in parameters]

    def refresh(self) -> None:
        """Copies the masters if any of them was written since the last time, by a checkpoint or by the user."""
        if self._current_versions() != self._versions:
            self.write()

    def parameters(self) -> dict[str, Tensor]:
        """The copies by their masters' names, for :func:`torch.func.functional_call`; gradients go to the masters."""
        if not self._trained:
            return self.copies
        copies = [self.copies[name] for name in self._trained]
        masters = [self._masters[name] for name in self._trained]
        return {**self.copies, **dict(zip(self._trained, _ToMaster.apply(copies, *masters), strict=True))}


def follows_parameters(network: nn.Module) -> bool:
    """Whether a network computes in the dtype of its parameters, as DiT does; low precision of others is autocast's."""
    return hasattr(network, "compute_dtype") and hasattr(network, "forward_difference")


def require_float8(network: nn.Module, device: torch.device, precision: str) -> None:
    """ValueError for a network with ``float8_guidance`` that cannot be trained so on this device in this precision."""
    if not getattr(network, "float8_guidance", False) or device.type != "cuda":
        return
    if precision != "bf16" and network.compute_dtype != torch.bfloat16:
        raise ValueError(
            f"float8_guidance=True computes in bfloat16 on a GPU, and precision={precision!r}; choose precision="
            "'bf16', or float8_guidance=False"
        )
    if torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(
            "float8_guidance=True needs a GPU of compute capability 8.9 or newer, and "
            f"{torch.cuda.get_device_name(device)} is older; choose float8_guidance=False"
        )


@contextlib.contextmanager
def tensor_cores(precision: str) -> Iterator[None]:
    """TensorFloat-32 products inside the block, except for ``fp32``; they are exact for operands that were bfloat16.

    Products of bfloat16 operands are summed in float32: a split one of weight gradients would by default add its parts
    in bfloat16.
    """
    matmul, cudnn, tf32 = torch.backends.cuda.matmul, torch.backends.cudnn, precision != "fp32"
    sums = (matmul, "allow_bf16_reduced_precision_reduction", False)
    settings = [sums, (matmul, "allow_tf32", tf32), (cudnn, "allow_tf32", tf32)]
    try:
        before = [getattr(owner, name) for owner, name, _ in settings]
    except RuntimeError:  # where the newer names have been used, torch refuses these
        value = "tf32" if tf32 else "ieee"
        settings = [sums, (matmul, "fp32_precision", value), (cudnn.conv, "fp32_precision", value)]
        before = [getattr(owner, name) for owner, name, _ in settings]
    try:
        for owner, name, value in settings:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(settings, before, strict=True):
            setattr(owner, name, value)
