"""Several processes, each with its part of every batch: who this one is, and what they do together.

torchrun --nproc-per-node=8 -m soflow_fast.cli train CONFIG.yaml
"""

import atexit
import itertools
import os
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# The others wait for what only the first does, such as scoring 50,000 samples; a step's own reductions keep torch's
# much shorter limit, so that a process that hangs is still noticed.
_LONGEST_WAIT = timedelta(days=1)

# What a thread of gloo gets at the end of the process to let go of the last tensors. One that needs Python for it while
# Python is ending aborts the process (before Python 3.14).
_LAST_WORK_SECONDS = 0.2


class OtherProcessError(RuntimeError):
    """What another process failed in, which raises its own error."""


class LostProcessError(RuntimeError):
    """Another process has ended, or cannot be reached."""


class Processes:
    """This process among those of a run.

    Attributes:
        rank: from 0. world_size: how many there are. device: of this one.
    """

    def __init__(self, rank: int, world_size: int, device: torch.device):
        self.rank, self.world_size, self.device = rank, world_size, device
        self._host = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT) if world_size > 1 else None

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def rows(self, batch: int) -> slice:
        """This process's rows of the global batch.

        Raises:
            ValueError: if the processes cannot share it equally.
        """
        if batch % self.world_size:
            raise ValueError(
                f"batch_size={batch} cannot be shared equally by {self.world_size} processes; choose a multiple of "
                f"{self.world_size}, or another --nproc-per-node"
            )
        n = batch // self.world_size
        return slice(self.rank * n, (self.rank + 1) * n)

    def share(self, n: int, batch: int) -> range:
        """This process's part of samples 0 to n-1, in whole batches, so that each is that of one process; the first's
        is never empty.
        """
        batches = -(-n // batch)
        start, stop = (-(-rank * batches // self.world_size) * batch for rank in (self.rank, self.rank + 1))
        return range(min(start, n), min(stop, n))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes; ``values`` may be overwritten."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def minimum(self, values: Tensor) -> Tensor:
        """The smallest over the processes, element by element; ``values`` may be overwritten."""
        if self.world_size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MIN)
        return values

    def largest(self, number: int) -> int:
        """Of the processes' numbers, without a wait for the device."""
        if self.world_size == 1:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._host)
        return int(found)

    def of_first(self, work: Callable[[], Any]) -> Any:
        """What ``work`` returns in the first process, in all of them; only the first runs it.

        Raises:
            OtherProcessError: where it failed, in the others; LostProcessError: as of :meth:`of_all`.
        """
        return self.of_all(lambda: work() if self.is_first else None)[0]

    def of_all(self, work: Callable[[], Any]) -> list[Any]:
        """What ``work`` returns in each process, by rank; where it fails in one, all of them raise.

        Raises:
            OtherProcessError: where it failed in another process only; its own error where it failed in this one.
            LostProcessError: where another process is no longer there.
        """
        if self.world_size == 1:
            return [work()]
        result = error = failure = None
        try:
            result = work()
        except Exception as caught:
            error, failure = caught, f"process {self.rank} failed with {type(caught).__name__}: {caught}"
        found = [None] * self.world_size
        try:
            dist.all_gather_object(found, (result, failure), group=self._host)
        except RuntimeError as lost:
            raise LostProcessError(str(lost)) from lost
        if error is not None:
            try:
                raise error
            finally:
                del error  # whose traceback has this frame, and so would keep what the work held
        for _, theirs in found:
            if theirs is not None:
                raise OtherProcessError(theirs)
        return [theirs for theirs, _ in found]


def rank() -> int:
    """Which process this is, from 0, of those that torchrun started, before they have joined too."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes there are, before they have joined too."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def begin_alike(processes: Processes, module: nn.Module) -> None:
    """All processes begin with the parameters and buffers of the first.

    Raises:
        ValueError: in all of them, where they do not have the same ones.
    """
    if processes.world_size == 1:
        return
    tensors = [*module.named_parameters(), *module.named_buffers()]
    found = processes.of_all(lambda: [(name, tuple(t.shape), str(t.dtype)) for name, t in tensors])
    for rank, theirs in enumerate(found):
        if theirs != found[0]:
            pairs = itertools.zip_longest(theirs, found[0], fillvalue=("nothing",))
            one, other = next([" ".join(map(str, x)) for x in pair] for pair in pairs if pair[0] != pair[1])
            raise ValueError(
                f"process {rank} has another {type(module).__name__} than the first, {one} in place of {other}; build "
                "the same network in every process"
            )
    broadcast([t for _, t in tensors])


def broadcast(tensors: Iterable[Tensor]) -> None:
    """All processes begin with the tensors of the first; they have to be alike."""
    for tensor in tensors:
        first = tensor.detach().contiguous()
        dist.broadcast(first, src=0)
        tensor.detach().copy_(first)


def join(device: torch.device) -> Processes:
    """This process among those that torchrun started, or alone where it started none.

    Initialises torch.distributed from torchrun's environment unless that has been done: NCCL for GPUs, where each
    process takes the one numbered by its LOCAL_RANK, and gloo for the CPU.

    Args:
        device: as configured: the CPU, or ``cuda`` without a number where there are several processes.

    Raises:
        ValueError: for one numbered GPU for several processes, or fewer GPUs than processes.
    """
    number = world_size()
    if number == 1:
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # else pinned memory would begin to use the first GPU too
        return Processes(0, 1, device)
    if device.type == "cuda":
        device = _own_gpu(device, number)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    atexit.register(time.sleep, _LAST_WORK_SECONDS)
    return Processes(rank(), number, device)


def require_alone(command: str) -> None:
    """ValueError if torchrun started several processes, for a command that works in one."""
    if world_size() > 1:
        raise ValueError(
            f"{command} works in one process, and WORLD_SIZE={world_size()} says that there are more; start it without "
            "torchrun"
        )


def whose() -> str:
    """Prefix of this process's messages, empty when alone."""
    return f"process {rank()} of {world_size()}: " if world_size() > 1 else ""


def leave() -> None:
    """Ends what :func:`join` began, after the last use of the processes; does nothing in a process alone."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _own_gpu(device: torch.device, world_size: int) -> torch.device:
    if device.index is not None:
        raise ValueError(f"device='{device}' is one GPU and there are {world_size} processes; set device=cuda")
    if "LOCAL_RANK" not in os.environ:
        raise ValueError("LOCAL_RANK is not set, which says which GPU is this process's; start them with torchrun")
    index, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if index >= found:
        raise ValueError(
            f"process {index} of this machine has no GPU: {found} are visible; start {found} processes "
            f"(--nproc-per-node={found}) or set device=cpu"
        )
    return torch.device("cuda", index)
