"""AdamW in one pass with clipping, EMA and compute copies; equal to torch's AdamW, and exchanging state with it."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from soflow_fast import kernels
from soflow_fast.ema import EMA
from soflow_fast.precision import ComputeCopy


class AdamW(torch.optim.AdamW):
    """:class:`torch.optim.AdamW` over float32 parameters that also clips, averages and writes compute copies.

    The hyper-parameters, the state and the state_dict are torch's. Learning rates are plain numbers, which any torch
    scheduler may set; :meth:`prepare` brings them to a captured CUDA graph.

    Args:
        params: as in torch. lr, betas, eps, weight_decay: as in torch; by default the published recipe.
        impl: ``triton`` is one pass over the parameters; ``torch`` is torch's fused AdamW and foreach operations.

    Raises:
        ValueError: for impl="triton" with parameters that are not float32.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        impl: str = "auto",
    ):
        self.impl = kernels.resolve_impl(impl)
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        parameters = [p for group in self.param_groups for p in group["params"]]
        self._use_fused()
        if self.impl == "triton" and any(p.dtype != torch.float32 for p in parameters):
            raise ValueError(
                f"AdamW(impl='triton') takes float32 parameters and got {parameters[0].dtype}; use impl='torch'"
            )
        self._passes: list[_Pass] = []
        self._lrs: list[_OnDevice] = []

    def _use_fused(self) -> None:
        """In every group torch's form that can leave a step out and that a CUDA graph can hold."""
        for group in self.param_groups:
            group |= {"fused": True, "foreach": None, "capturable": group["params"][0].is_cuda}

    def prepare(self) -> None:
        """Before the replay of a CUDA graph that holds :meth:`update`: brings to the device what the host decides."""
        for group in self.param_groups[len(self._lrs) :]:
            self._lrs.append(_OnDevice(group["params"][0].device))
        for group, lr in zip(self.param_groups, self._lrs, strict=True):
            lr.set(float(group["lr"]))
        for one_pass in self._passes:
            one_pass.fill_captured_tables()

    @torch.no_grad()
    def update(
        self, *, ema: EMA | None = None, copy: ComputeCopy | None = None, grad_clip: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Clips, steps, averages and writes the copies, unless the gradient is not finite; nothing syncs.

        Args:
            ema: over (at least) these parameters. copy: of (at least) these parameters. grad_clip: largest norm.

        Returns:
            ``(norm, finite)``: 0-d gradient norm before clipping, and whether it is finite.
        """
        if not _capturing():
            self.prepare()
        if self.impl == "torch":
            with self._lrs_on_device():
                return update(self, ema=ema, copy=copy, grad_clip=grad_clip)
        self._passes += [_Pass(self, group) for group in self.param_groups[len(self._passes) :]]
        self._opt_called = True  # torch's schedulers warn where no step came before theirs
        norm = torch.stack([one_pass.norm(ema, copy) for one_pass in self._passes]).square().sum().sqrt()
        weight = None if ema is None else (1 - ema.current_decay()).float()
        for one_pass, lr in zip(self._passes, self._lrs, strict=True):
            one_pass.step(norm, lr.tensor, weight, math.inf if grad_clip is None else grad_clip)
        finite = torch.isfinite(norm)
        if ema is not None:
            ema.updates += finite
        for one_pass in self._passes:
            torch.autograd.graph.increment_version(
                one_pass.parameters
            )  # the kernel's writes do not count by themselves
        if copy is not None:
            copy.mark_written()
        return norm, finite

    @contextmanager
    def _lrs_on_device(self) -> Iterator[None]:
        """For torch's own step: a graph would keep a plain number as it was at the capture."""
        numbers = [group["lr"] for group in self.param_groups]
        for group, lr in zip(self.param_groups, self._lrs, strict=True):
            if lr.tensor.is_cuda:
                group["lr"] = lr.tensor
        try:
            yield
        finally:
            for group, number in zip(self.param_groups, numbers, strict=True):
                group["lr"] = number

    def step(self, closure: Callable[[], Tensor] | None = None):
        """As torch's: :meth:`update` without clipping, averages and copies."""
        if self.impl == "torch":
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss

    def state_dict(self) -> dict:
        """As torch's, which wants a step counter for each parameter where here the parameters of a group share one."""
        saved = super().state_dict()
        saved["state"] = {
            key: {**state, "step": state["step"].clone()} if "step" in state else state
            for key, state in saved["state"].items()
        }
        return saved

    def load_state_dict(self, state_dict) -> None:
        """As torch's; also takes the state of a torch.optim.AdamW."""
        super().load_state_dict(state_dict)
        self._use_fused()
        for p, state in self.state.items():
            if "step" in state:  # torch leaves it on the CPU where the optimizer that saved it was not fused
                state["step"] = state["step"].to(p.device, torch.float32)
        for one_pass, group in zip(self._passes, self.param_groups, strict=False):
            one_pass.adopt(self, group)


class _OnDevice:
    """A number and its copy on the device, written when it changes."""

    def __init__(self, device: torch.device):
        self.value, self.tensor = math.nan, torch.zeros((), device=device)

    def set(self, value: float) -> None:
        if value != self.value:
            self.value = value
            self.tensor.fill_(value)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class _Pass:
    """The tables and the state of one parameter group."""

    def __init__(self, optimizer: AdamW, group: dict):
        from soflow_fast.kernels import optimizer as kernel

        self.kernel, self.group = kernel, group
        self.parameters = [p for p in group["params"] if p.requires_grad]
        self.device = self.parameters[0].device
        if any(p.data_ptr() % 16 for p in self.parameters):
            raise ValueError("AdamW(impl='triton') got a parameter that does not start at 16 bytes; use impl='torch'")
        states = [optimizer.state[p] for p in self.parameters]
        steps = [state["step"] for state in states if "step" in state]
        self.step_count = torch.zeros((), device=self.device)
        if steps:
            self.step_count.copy_(steps[0])
        for p, state in zip(self.parameters, states, strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                state.setdefault(name, torch.zeros_like(p, memory_format=torch.preserve_format))
            state["step"] = self.step_count  # one counter for the group, as all its parameters step together
        self.states = [[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")]
        self.ema = self.copy = self.averages = self.copies = None
        self.blocks = kernel.block_table(self.parameters).to(self.device)
        self.table, self.addresses = self._new_table(), []
        self.captured: list[Tensor] = []
        self.unfilled: list[tuple[Tensor, list[int]]] = []

    def _new_table(self) -> Tensor:
        return torch.empty(len(self.parameters) * 6, dtype=torch.int64, device=self.device)

    def adopt(self, optimizer: AdamW, group: dict) -> None:
        """Copies a newly loaded state into the tensors that the tables, and a captured graph, point to."""
        self.group = group
        for i, p in enumerate(self.parameters):
            state = optimizer.state[p]
            self.step_count.copy_(state["step"])
            for name, tensors in zip(("exp_avg", "exp_avg_sq"), self.states, strict=True):
                tensors[i].copy_(state[name])
                state[name] = tensors[i]
            state["step"] = self.step_count

    def norm(self, ema: EMA | None, copy: ComputeCopy | None) -> Tensor:
        gradients = [p.grad for p in self.parameters]
        if any(g is None for g in gradients):
            raise RuntimeError("AdamW(impl='triton') needs a gradient for every parameter; one has none")
        self.gradients = [_laid_out_as(p, g) for p, g in zip(self.parameters, gradients, strict=True)]
        if ema is not self.ema:
            self.ema, self.averages = ema, None if ema is None else ema.averages_of(self.parameters)
        if copy is not self.copy:
            self.copy, self.copies = copy, None if copy is None else copy.copies_of(self.parameters)
        addresses = self.kernel.address_table(self.parameters, self.gradients, *self.states, self.averages, self.copies)
        self.in_use = self.table
        if _capturing():
            # A graph has gradients, and so a table, of its own; it is filled after the capture.
            self.in_use = self._new_table()
            self.captured.append(self.in_use)
            self.unfilled.append((self.in_use, addresses))
        elif addresses != self.addresses:
            self.addresses = addresses
            _fill(self.table, addresses)
        return self.kernel.gradient_norm(self.in_use, self.blocks, gradients[0].dtype)

    def fill_captured_tables(self) -> None:
        while self.unfilled:
            _fill(*self.unfilled.pop())

    def step(self, norm: Tensor, lr: Tensor, average_weight: Tensor | None, grad_clip: float) -> None:
        # a beta of 0 as one that is 0 in float32: its logarithm is finite
        log_betas = tuple(math.log(max(beta, 1e-38)) for beta in self.group["betas"])
        self.kernel.adamw_(
            self.in_use,
            self.blocks,
            norm,
            self.step_count,
            lr,
            average_weight,
            log_betas=log_betas,
            eps=self.group["eps"],
            weight_decay=self.group["weight_decay"],
            grad_clip=grad_clip,
            gradient_dtype=self.gradients[0].dtype,
            copy_dtype=None if self.copies is None else self.copies[0].dtype,
        )
        self.step_count += torch.isfinite(norm)


def _laid_out_as(p: Tensor, gradient: Tensor) -> Tensor:
    """The gradient, or a copy where the kernel's accesses, 16 bytes wide and in the order of p, would miss it.

    Views into the buckets of data parallelism may start anywhere.
    """
    if gradient.data_ptr() % 16 == 0 and gradient.stride() == p.stride():
        return gradient
    return torch.empty_like(p, dtype=gradient.dtype).copy_(gradient)


def _fill(table: Tensor, addresses: list[int]) -> None:
    """From pinned memory, so that the host does not wait for the device."""
    table.copy_(torch.tensor(addresses, dtype=torch.int64, pin_memory=table.is_cuda), non_blocking=True)


@torch.no_grad()
def update(
    optimizer: torch.optim.Optimizer,
    *,
    ema: EMA | None = None,
    copy: ComputeCopy | None = None,
    grad_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """:meth:`AdamW.update` for any torch optimizer; only fused ones can leave out a gradient that is not finite."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    finite = torch.isfinite(norm)
    if grad_clip is not None:
        nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)
    if any(group.get("fused") for group in optimizer.param_groups):
        # the protocol by which torch's GradScaler tells a fused optimizer to leave a step out
        optimizer.grad_scale, optimizer.found_inf = None, 1 - finite.float()
    optimizer.step()
    torch.autograd.graph.increment_version(parameters)  # fused ones do not count their writes
    if ema is not None:
        ema.update(finite)
    if copy is not None:
        copy.write()
    return norm, finite
