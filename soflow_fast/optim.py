"""AdamW and RAdam in one pass with clipping, EMA and compute copies; equal to torch's, and exchanging state with it."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from soflow_fast import kernels
from soflow_fast.ema import EMA
from soflow_fast.precision import ComputeCopy


class OnePass(torch.optim.Optimizer):
    """A torch optimizer over float32 parameters that also clips, averages and writes compute copies.

    Base of :class:`AdamW` and :class:`RAdam`. The hyper-parameters, the state and the state_dict are torch's. Learning
    rates are plain numbers, which any torch scheduler may set; :meth:`prepare` brings them to a captured CUDA graph.

    Args:
        params: as in torch. lr, betas, eps, weight_decay: as in torch; by default the published recipe.
        impl: ``triton`` is one pass over the parameters; ``torch`` is operations of torch's.

    Raises:
        ValueError: for impl="triton" with parameters that are not float32.
    """

    rectified: bool
    _options: dict[str, bool]  # which of torch's forms it is

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
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **self._options)
        parameters = [p for group in self.param_groups for p in group["params"]]
        self._use_options()
        if self.impl == "triton" and any(p.dtype != torch.float32 for p in parameters):
            raise ValueError(
                f"{type(self).__name__}(impl='triton') takes float32 parameters and got {parameters[0].dtype}; "
                "use impl='torch'"
            )
        self._passes: list[_Pass] = []
        self._lrs: list[_OnDevice] = []

    def _use_options(self) -> None:
        """In every group the form that can leave a step out and that a CUDA graph can hold."""
        for group in self.param_groups:
            group |= {**self._options, "foreach": None, "capturable": group["params"][0].is_cuda}

    def prepare(self) -> None:
        """Before the replay of a CUDA graph that holds :meth:`update`: brings to the device what the host decides.

        Also before another such graph is captured.
        """
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
        self._opt_called = True  # torch's schedulers warn where no step came before theirs
        if self.impl == "torch":
            with self._lrs_on_device():
                return update(self, ema=ema, copy=copy, grad_clip=grad_clip)
        self._passes += [_Pass(self, group) for group in self.param_groups[len(self._passes) :]]
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
        """As torch's; also takes the state of torch's optimizer of the same name.

        Raises:
            ValueError: for one with an option that this step does not have; nothing is changed.
        """
        for group in state_dict["param_groups"]:
            for option in ("maximize", "amsgrad"):
                if group.get(option):
                    raise ValueError(f"the state has {option}=True, which {type(self).__name__} here does not")
        super().load_state_dict(state_dict)
        self._use_options()
        for p, state in self.state.items():
            if "step" in state:  # torch leaves it on the CPU where the optimizer that saved it was not fused
                state["step"] = state["step"].to(p.device, torch.float32)
        for one_pass, group in zip(self._passes, self.param_groups, strict=False):
            one_pass.adopt(self, group)


class AdamW(OnePass, torch.optim.AdamW):
    """:class:`torch.optim.AdamW`; arguments and errors as :class:`OnePass`, impl="torch" is torch's fused one."""

    rectified = False
    _options = {"fused": True}  # noqa: RUF012

    def step(self, closure: Callable[[], Tensor] | None = None):
        """As torch's: :meth:`update` without clipping, averages and copies."""
        return torch.optim.AdamW.step(self, closure) if self.impl == "torch" else super().step(closure)


class RAdam(OnePass, torch.optim.RAdam):
    """:class:`torch.optim.RAdam` with decoupled weight decay; arguments and errors as :class:`OnePass`.

    Rectified Adam (Liu et al. 2020, arXiv 1908.03265): the first steps, as long as few squared gradients are averaged,
    are those of gradient descent with momentum, and later ones Adam's times a factor that grows to 1, in place of a
    warm-up. :mod:`soflow_fast.kernels.optimizer` has the equations; its factor is within 5e-6 of that in float64.
    impl="torch" is plain operations, as torch's own RAdam has no form that could leave a step out.
    """

    rectified = True
    _options = {"decoupled_weight_decay": True}  # noqa: RUF012

    def load_state_dict(self, state_dict) -> None:
        """As torch's; also takes the state of torch's RAdam with decoupled weight decay.

        Raises:
            ValueError: for one whose weight decay is part of the gradient; nothing is changed.
        """
        for group in state_dict["param_groups"]:
            if group["weight_decay"] and not group.get("decoupled_weight_decay"):
                raise ValueError(
                    f"the state has weight_decay={group['weight_decay']} as part of the gradient, which RAdam here "
                    "does not; take one of torch.optim.RAdam(decoupled_weight_decay=True)"
                )
        super().load_state_dict(state_dict)

    def _step_where(self, finite: Tensor) -> None:
        """The step of impl="torch"; all stays as it was where ``finite``, a 0-d bool, is false."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            states = [_with_moments(self.state[p], p) for p in parameters]
            for p, state in zip(parameters, states, strict=True):
                state.setdefault("step", torch.zeros((), device=p.device))
            counts = torch.stack([state["step"] for state in states]).double() + 1
            factors = zip(*_radam_factors(counts, *group["betas"]), strict=True)
            rest1, rest2 = (1 - beta for beta in group["betas"])
            lr, eps, kept = group["lr"], group["eps"], 1 - group["lr"] * group["weight_decay"]
            for p, state, (unbiased, rectified, is_rectified) in zip(parameters, states, factors, strict=True):
                m = state["exp_avg"] + rest1 * (p.grad - state["exp_avg"])
                v = state["exp_avg_sq"] + rest2 * (p.grad.square() - state["exp_avg_sq"])
                adapted = torch.where(is_rectified, rectified / (v.sqrt() + eps), 1.0)
                new = p * kept - lr * unbiased * m * adapted
                pairs = [(p, new), (state["exp_avg"], m), (state["exp_avg_sq"], v), (state["step"], state["step"] + 1)]
                for old, value in pairs:
                    old.copy_(torch.where(finite, value, old))


#: The optimizers by their names in the configuration.
OPTIMIZERS = {"adamw": AdamW, "radam": RAdam}


def _radam_factors(k: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor, Tensor]:
    """``1/(1−β₁ᵏ)``, ``r_k √(1−β₂ᵏ)`` and whether the latter is used, (n,) each, for steps k, (n,) float64."""
    power = beta2**k
    limit = 2 / (1 - beta2) - 1
    length = limit - 2 * k * power / (1 - power)
    # no less than 5, below which the factor may not exist and is not used
    at, end = length.clamp(min=5), max(limit, 5.0)
    r = ((at - 4) / (end - 4) * ((at - 2) / (end - 2)) * (end / at)).sqrt()
    return 1 / (1 - beta1**k), r * (1 - power).sqrt(), length > 5


def _with_moments(state: dict, p: Tensor) -> dict:
    """The state of a parameter, with moments of zero where it has none yet."""
    for name in ("exp_avg", "exp_avg_sq"):
        state.setdefault(name, torch.zeros_like(p, memory_format=torch.preserve_format))
    return state


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

    def __init__(self, optimizer: OnePass, group: dict):
        from soflow_fast.kernels import optimizer as kernel

        self.kernel, self.group, self.rectified = kernel, group, optimizer.rectified
        self.name = type(optimizer).__name__
        self.parameters = [p for p in group["params"] if p.requires_grad]
        self.device = group["params"][0].device
        if any(p.data_ptr() % 16 for p in self.parameters):
            raise ValueError(
                f"{self.name}(impl='triton') got a parameter that does not start at 16 bytes; use impl='torch'"
            )
        states = [_with_moments(optimizer.state[p], p) for p in self.parameters]
        steps = [state["step"] for state in states if "step" in state]
        self.step_count = torch.zeros((), device=self.device)
        if steps:
            self.step_count.copy_(steps[0])
        for state in states:
            state["step"] = self.step_count  # one counter for the group, as all its parameters step together
        self.states = [[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")]
        self.ema = self.copy = self.averages = self.copies = None
        self.blocks = kernel.block_table(self.parameters).to(self.device)
        self.table, self.addresses = self._new_table(), []
        self.captured: list[Tensor] = []
        self.unfilled: list[tuple[Tensor, list[int]]] = []
        self.next_captured: Tensor | None = self._new_table()

    def _new_table(self) -> Tensor:
        return torch.empty(len(self.parameters) * 6, dtype=torch.int64, device=self.device)

    def _captured_table(self) -> Tensor:
        """Made before the capture: a graph's own memory is used again for what it computes earlier in each replay."""
        table, self.next_captured = self.next_captured, None
        if table is None:
            raise RuntimeError(f"{self.name}.prepare() has to be called between two captures of its update")
        self.captured.append(table)
        return table

    def adopt(self, optimizer: OnePass, group: dict) -> None:
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
        if not self.parameters:  # a group of frozen ones
            return torch.zeros((), device=self.device)
        gradients = [p.grad for p in self.parameters]
        if any(g is None for g in gradients):
            raise RuntimeError(f"{self.name}(impl='triton') needs a gradient for every parameter; one has none")
        self.gradients = [_laid_out_as(p, g) for p, g in zip(self.parameters, gradients, strict=True)]
        if ema is not self.ema:
            self.ema, self.averages = ema, None if ema is None else ema.averages_of(self.parameters)
        if copy is not self.copy:
            self.copy, self.copies = copy, None if copy is None else copy.copies_of(self.parameters)
        addresses = self.kernel.address_table(self.parameters, self.gradients, *self.states, self.averages, self.copies)
        self.in_use = self.table
        if _capturing():
            # A graph has gradients, and so a table, of its own; it is filled after the capture.
            self.in_use = self._captured_table()
            self.unfilled.append((self.in_use, addresses))
        elif addresses != self.addresses:
            self.addresses = addresses
            _fill(self.table, addresses)
        return self.kernel.gradient_norm(self.in_use, self.blocks, gradients[0].dtype)

    def fill_captured_tables(self) -> None:
        while self.unfilled:
            _fill(*self.unfilled.pop())
        if self.next_captured is None:
            self.next_captured = self._new_table()

    def step(self, norm: Tensor, lr: Tensor, average_weight: Tensor | None, grad_clip: float) -> None:
        if not self.parameters:
            return
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
            rectified=self.rectified,
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
    """:meth:`OnePass.update` for any torch optimizer; only fused ones can leave out a gradient that is not finite."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    finite = torch.isfinite(norm)
    if grad_clip is not None:
        nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)
    if isinstance(optimizer, RAdam) and optimizer.impl == "torch":
        optimizer._step_where(finite)
    elif any(group.get("fused") for group in optimizer.param_groups):
        # the protocol by which torch's GradScaler tells a fused optimizer to leave a step out
        optimizer.grad_scale, optimizer.found_inf = None, 1 - finite.float()
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf
    else:
        optimizer.step()
    torch.autograd.graph.increment_version(parameters)  # fused ones do not count their writes
    if ema is not None:
        ema.update(finite)
    if copy is not None:
        copy.write()
    return norm, finite
