"""How every kernel of this package is launched, and how a launch is recorded without a GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

#: First numbers of the compute capabilities whose tensor cores have a memory of their own.
TENSOR_MEMORY = (10, 11)


@dataclass(frozen=True)
class Launch:
    """Launch parameters of a kernel: one row of its launch table.

    Attributes:
        num_warps, num_stages: as in Triton. max_registers: per thread; the offline compilation fails above it, so that
            the occupancy the row was chosen for is kept. idle: whether its programs end at once but for rare inputs.
        tensor_cores: whether its products are theirs.
    """

    num_warps: int = 4
    num_stages: int = 1
    max_registers: int = 255
    idle: bool = False
    tensor_cores: bool = False

    def options(self, arch: int) -> dict[str, Any]:
        """What Triton compiles the kernel with for a compute capability, such as 90; the instructions count on fused
        multiply-adds, which 3.10 turns off.

        Products into tensor memory are not pipelined: Triton 3.6 to 3.8 do that wrongly where two of a loop go on from
        one accumulator, and with races (triton's issues 10821, 9871 and 10590).
        """
        stages = 1 if self.tensor_cores and arch // 10 in TENSOR_MEMORY else self.num_stages
        return {"num_warps": self.num_warps, "num_stages": stages, "enable_fp_fusion": True}


class Record(NamedTuple):
    """One launch: the kernel, its arguments (tensors included), its compile-time options and its grid."""

    kernel: Any
    args: tuple
    constants: dict[str, Any]
    config: Launch
    grid: Callable[[], tuple[int, ...]] | None = None

    def run(self) -> None:
        """Launches the kernel on the current device."""
        major, minor = (0, 0) if triton.knobs.runtime.interpret else torch.cuda.get_device_capability()
        self.kernel[self.grid()](*self.args, **self.constants, **self.config.options(10 * major + minor))

    @property
    def bytes_moved(self) -> int:
        """Every tensor argument once; nothing if the programs are idle."""
        return 0 if self.config.idle else sum(a.numel() * a.element_size() for a in self.args if isinstance(a, Tensor))


_records: list[Record] | None = None


@contextmanager
def recording() -> Iterator[list[Record]]:
    """Collects the launches that ops make inside the block; on meta and fake tensors nothing runs."""
    global _records
    outer, _records = _records, []
    try:
        yield _records
    finally:
        _records = outer


def launch(kernel, grid: Callable[[], tuple[int, ...]], *args, config: Launch, **constants) -> None:
    """Launches a Triton kernel on the device of its first tensor argument.

    On fake and meta tensors nothing runs: an op's one Python function, which allocates its outputs and launches, is
    also its shape function.

    Args:
        kernel: a ``triton.jit`` function. grid: makes the grid; a function, so that tracing evaluates no sizes.
        args: the kernel's arguments in order. constants: its ``tl.constexpr`` arguments by name.

    Raises:
        ValueError: for a tensor on a device on which Triton cannot run here, and for tensors on several devices.
    """
    first = next(a for a in args if isinstance(a, Tensor))
    record = Record(kernel, args, constants, config, grid)
    if _records is not None:
        _records.append(record)
    if isinstance(first, FakeTensor) or first.device.type == "meta":
        return
    device, *others = dict.fromkeys(a.device for a in args if isinstance(a, Tensor))
    if others:
        found = " and ".join(map(str, (device, *others)))
        raise ValueError(f"a fused op got tensors on {found}; move the model and its inputs to one device")
    if device.type == "cuda":
        with torch.cuda.device(device):
            record.run()
    elif triton.knobs.runtime.interpret:
        record.run()
    else:
        raise ValueError(
            f"impl='triton' got a tensor on {device}, where Triton cannot run; "
            "move the model and its inputs to a CUDA GPU or build it with impl='torch'"
        )


def constants(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, those that there are, detached, for an op without derivatives.

    Raises:
        NotImplementedError: under forward-mode AD, where a custom op's tangent would be zero without a word.
    """
    present = [tensor for tensor in tensors if tensor is not None]
    if not torch.compiler.is_compiling() and any(forward_ad.unpack_dual(x).tangent is not None for x in present):
        raise NotImplementedError("a fused op without derivatives got a tangent; use impl='torch' under jvp")
    return [None if tensor is None else tensor.detach() for tensor in tensors]


def require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """ValueError unless the tensor has that shape."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)} where {tuple(shape)} is needed")


def require_dtype(name: str, tensor: Tensor) -> None:
    """ValueError unless the tensor's dtype is one the kernels take."""
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"{name} has dtype {tensor.dtype}; the fused kernels take float32, bfloat16 and float16: "
            "convert it or use impl='torch'"
        )
