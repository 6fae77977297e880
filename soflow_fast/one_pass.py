"""A group of parameters as the fused update sees it: tables of addresses and of blocks, and the state it writes."""

import math

import torch
from torch import Tensor

from soflow_fast.ema import EMA
from soflow_fast.precision import ComputeCopy

#: The names of the moments in the state of a parameter.
MOMENTS = ("exp_avg", "exp_avg_sq")


class OnDevice:
    """A number and its copy on the device, written when it changes."""

    def __init__(self, device: torch.device):
        self.value, self.tensor = math.nan, torch.zeros((), device=device)

    def set(self, value: float) -> None:
        """Changes the number, and its copy where it is another one, without a wait for the device."""
        if value != self.value:
            self.value = value
            self.tensor.fill_(value)


def capturing() -> bool:
    """Whether what runs now becomes part of a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def require_dense(name: str, parameters: list[Tensor]) -> None:
    """ValueError for a parameter with gaps: a fused update, torch's too, takes the memory in them for a part of it."""
    for p in parameters:
        if torch.empty_like(p, device="meta").stride() != p.stride():
            raise ValueError(
                f"{name} got a parameter of shape {tuple(p.shape)} that is a view with gaps, of strides {p.stride()}; "
                "make it nn.Parameter(view.clone())"
            )


def with_moments(state: dict, p: Tensor) -> dict:
    """The state of a parameter, with moments of zero where it has none yet, and laid out as the parameter is."""
    for name in MOMENTS:
        state[name] = laid_out_as(p, state[name]) if name in state else torch.zeros_like(p)
    return state


def laid_out_as(p: Tensor, tensor: Tensor) -> Tensor:
    """The tensor, or a copy where the kernel's accesses, 16 bytes wide and in the order of p, would miss it.

    Gradients that are views into the buckets of data parallelism may start anywhere.
    """
    if tensor.data_ptr() % 16 == 0 and tensor.stride() == p.stride():
        return tensor
    return torch.empty_like(p, dtype=tensor.dtype).copy_(tensor)


class ParameterPass:
    """The tables and the state of one parameter group: of those of its parameters that have a gradient at first.

    Args:
        optimizer: an ``OnePass``, whose group it is; the gradients of its first update are there.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, group: dict):
        from soflow_fast.kernels import optimizer as kernel

        self.kernel, self.group, self.rectified = kernel, group, optimizer.rectified
        self.name = type(optimizer).__name__
        self.parameters = _with_gradient(group)
        self.device = optimizer.device
        states = [with_moments(optimizer.state[p], p) for p in self.parameters]
        # A count for each: one that is trained since later has its bias corrected by its own.
        self.step_counts = torch.zeros(len(states), device=self.device)
        for count, state in zip(self.step_counts.unbind(), states, strict=True):
            _count_in(count, state)
        self.states = [[state[name] for state in states] for name in MOMENTS]
        self.ema = self.copy = self.averages = self.copies = None
        self.blocks = kernel.block_table(self.parameters).to(self.device)
        self.table, self.addresses = self._new_table(), []
        #: tables of graphs, with the gradients that they point to
        self.captured: list[tuple[Tensor, list[Tensor]]] = []
        self.unfilled: list[tuple[Tensor, list[int]]] = []
        self.next_captured: Tensor | None = self._new_table()

    def _new_table(self) -> Tensor:
        return torch.empty(len(self.parameters) * 6, dtype=torch.int64, device=self.device)

    def _captured_table(self) -> Tensor:
        """Made before the capture: a graph's own memory is used again for what it computes earlier in each replay."""
        table, self.next_captured = self.next_captured, None
        if table is None:
            raise RuntimeError(f"{self.name}.prepare() has to be called between two captures of its update")
        self.captured.append((table, self.gradients))
        return table

    def adopt(self, optimizer: torch.optim.Optimizer, group: dict) -> None:
        """Copies a newly loaded state into the tensors that the tables, and a captured graph, point to."""
        self.group = group
        for i, p in enumerate(self.parameters):
            state = with_moments(optimizer.state[p], p)  # of an optimizer that has not stepped there is none
            for name, tensors in zip(MOMENTS, self.states, strict=True):
                tensors[i].copy_(state[name])
                state[name] = tensors[i]
            _count_in(self.step_counts[i], state)

    def norm(self, ema: EMA | None, copy: ComputeCopy | None) -> Tensor:
        """The 0-d norm of the gradients; the tables are then those of :meth:`step`, to be called next.

        Raises:
            RuntimeError: where other parameters have a gradient than at first.
            ValueError: for what the kernel would take in another order, or its 16-byte accesses would miss.
        """
        if len(_with_gradient(self.group)) != len(self.parameters) or any(p.grad is None for p in self.parameters):
            raise RuntimeError(
                f"{self.name}(impl='triton') updates the {len(self.parameters)} parameters that had a gradient in its "
                f"first update, and now {len(_with_gradient(self.group))} have one; use impl='torch', or "
                "requires_grad_(False) on what is not trained"
            )
        if not self.parameters:  # a group of frozen ones
            return torch.zeros((), device=self.device)
        self.gradients = [laid_out_as(p, p.grad) for p in self.parameters]
        if ema is not self.ema:
            self.ema, self.averages = ema, None if ema is None else ema.averages_of(self.parameters)
        if copy is not self.copy:
            self.copy, self.copies = copy, None if copy is None else copy.copies_of(self.parameters)
        addresses = self.kernel.address_table(self.parameters, self.gradients, *self.states, self.averages, self.copies)
        self.in_use = self.table
        if capturing():
            # A graph has gradients, and so a table, of its own; it is filled after the capture.
            self._require_alike()
            self.in_use = self._captured_table()
            self.unfilled.append((self.in_use, addresses))
        elif addresses != self.addresses:
            self._require_alike()
            self.addresses = addresses
            _fill(self.table, addresses)
        return self.kernel.gradient_norm(self.in_use, self.blocks, self.gradients[0].dtype)

    def _require_alike(self) -> None:
        """ValueError for a tensor that does not lie in memory as its parameter does: they are gone through together."""
        moments = [("a moment", tensors) for tensors in self.states]
        others = [("an average", self.averages), ("a compute copy", self.copies)]
        for what, tensors in (("a parameter", self.parameters), *moments, *others):
            for p, tensor in zip(self.parameters, tensors or self.parameters, strict=True):
                if tensor.data_ptr() % 16:
                    raise ValueError(
                        f"{self.name}(impl='triton') got {what} that does not start at 16 bytes; use impl='torch'"
                    )
                if tensor.stride() != p.stride():
                    raise ValueError(
                        f"{self.name}(impl='triton') got {what} of strides {tensor.stride()} for a parameter of shape "
                        f"{tuple(p.shape)} and strides {p.stride()}; call model.to(memory_format=...) before the "
                        "optimizer, averages and copies are made, or use impl='torch'"
                    )

    def fill_captured_tables(self) -> None:
        """Outside of a capture: fills the tables of the ones before, and has one for the next."""
        while self.unfilled:
            _fill(*self.unfilled.pop())
        if self.next_captured is None:
            self.next_captured = self._new_table()

    def step(self, norm: Tensor, lr: Tensor, average_weight: Tensor | None, grad_clip: float) -> None:
        """The update; of 0-d tensors: the norm of all groups, the learning rate, a parameter's share of its average."""
        if not self.parameters:
            return
        # a beta of 0 as one that is 0 in float32: its logarithm is finite
        log_betas = tuple(math.log(max(beta, 1e-38)) for beta in self.group["betas"])
        self.kernel.adamw_(
            self.in_use,
            self.blocks,
            norm,
            self.step_counts,
            lr,
            average_weight,
            log_betas=log_betas,
            eps=self.group["eps"],
            weight_decay=self.group["weight_decay"],
            grad_clip=grad_clip,
            rectified=self.rectified,
            gradient_dtype=self.gradients[0].dtype,
            copy_dtype=None if self.copies is None else self.copies[0].dtype,
        )
        self.step_counts += torch.isfinite(norm)
        self.gradients = []  # so that zero_grad frees them, and the next ones have their place


def _with_gradient(group: dict) -> list[Tensor]:
    return [p for p in group["params"] if p.requires_grad and p.grad is not None]


def _count_in(count: Tensor, state: dict) -> None:
    """Has the steps of a parameter counted in that 0-d tensor."""
    count.copy_(state.get("step", torch.zeros(())))
    state["step"] = count


def _fill(table: Tensor, addresses: list[int]) -> None:
    """From pinned memory, so that the host does not wait for the device."""
    table.copy_(torch.tensor(addresses, dtype=torch.int64, pin_memory=table.is_cuda), non_blocking=True)
