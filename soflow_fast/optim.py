"""AdamW and RAdam in one pass with clipping, EMA and compute copies; equal to torch's, and exchanging state with it."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from soflow_fast import kernels
from soflow_fast.ema import EMA
from soflow_fast.one_pass import (
    MOMENTS,
    OnDevice,
    ParameterPass,
    capturing,
    laid_out_as,
    require_dense,
    with_moments,
)
from soflow_fast.precision import ComputeCopy


class OnePass(torch.optim.Optimizer):
    """A torch optimizer over float32 parameters that also clips, averages and writes compute copies.

    Base of :class:`AdamW` and :class:`RAdam`. The hyper-parameters, the state and the state_dict are torch's. Learning
    rates are plain numbers, which any torch scheduler may set; :meth:`prepare` brings them to a captured CUDA graph.

    Args:
        params: as in torch. lr, betas, eps, weight_decay: as in torch; by default the published recipe.
        impl: ``triton`` is one pass over the parameters; ``torch`` uses torch's operations.

    Raises:
        ValueError: for a parameter that is a view with gaps, and for impl="triton" with one that is not float32.
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
        self._step_supports_amp_scaling = False  # torch's GradScaler unscales the gradients itself
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.device = parameters[0].device  # a group may be empty
        self._use_options()
        require_dense(type(self).__name__, parameters)
        if self.impl == "triton" and any(p.dtype != torch.float32 for p in parameters):
            raise ValueError(
                f"{type(self).__name__}(impl='triton') takes float32 parameters and got {parameters[0].dtype}; "
                "use impl='torch'"
            )
        self._passes: list[ParameterPass] = []
        self._lrs: list[OnDevice] = []

    def _use_options(self) -> None:
        """In every group the form that can leave a step out and that a CUDA graph can hold."""
        for group in self.param_groups:
            group |= {**self._options, "foreach": None, "capturable": self.device.type == "cuda"}

    def prepare(self) -> None:
        """Before the replay of a CUDA graph that holds :meth:`update`: brings to the device what the host decides.

        Also before another such graph is captured.
        """
        for _ in self.param_groups[len(self._lrs) :]:
            self._lrs.append(OnDevice(self.device))
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
        if not capturing():
            self.prepare()
        self._opt_called = True  # torch's schedulers warn where no step came before theirs
        if self.impl == "torch":
            with self._lrs_on_device():
                return update(self, ema=ema, copy=copy, grad_clip=grad_clip)
        self._passes += [ParameterPass(self, group) for group in self.param_groups[len(self._passes) :]]
        if not any(one_pass.parameters for one_pass in self._passes):
            self._passes.clear()
            raise RuntimeError(f"no parameter of this {type(self).__name__} has a gradient; call backward() first")
        norm = torch.stack([one_pass.norm(ema, copy) for one_pass in self._passes]).square().sum().sqrt()
        weight = None if ema is None else (1 - ema.current_decay()).float()
        for one_pass, lr in zip(self._passes, self._lrs, strict=True):
            one_pass.step(norm, lr.tensor, weight, math.inf if grad_clip is None else grad_clip)
        finite = torch.isfinite(norm)
        if ema is not None:
            ema.updates += finite
        for one_pass in self._passes:
            torch.autograd.graph.increment_version(one_pass.parameters)  # the kernel's writes do not count otherwise
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
        """As torch's, which wants a step counter for each parameter where here those of a group are in one tensor."""
        saved = super().state_dict()
        saved["state"] = {
            key: {**state, "step": state["step"].clone()} if "step" in state else state
            for key, state in saved["state"].items()
        }
        return saved

    def load_state_dict(self, state_dict) -> None:
        """As torch's; also takes the state of torch's optimizer of the same name.

        Raises:
            ValueError: for one with an option that this step does not have, or of parameters of other shapes; nothing
                is changed.
        """
        for own, group in zip(self.param_groups, state_dict["param_groups"], strict=False):  # torch compares how many
            for option in ("maximize", "amsgrad"):
                if group.get(option):
                    raise ValueError(f"the state has {option}=True, which {type(self).__name__} here does not")
            for p, number in zip(own["params"], group["params"], strict=False):
                saved = state_dict["state"].get(number, {})
                for name in MOMENTS:  # torch does not look, and the update would write beyond them
                    if name in saved and saved[name].shape != p.shape:
                        raise ValueError(
                            f"the state has {name} of shape {tuple(saved[name].shape)} for a parameter of shape "
                            f"{tuple(p.shape)}; give that of an optimizer over the same parameters in the same order"
                        )
        super().load_state_dict(state_dict)
        self._use_options()
        for p, state in self.state.items():
            if "step" in state:  # torch leaves it on the CPU where the optimizer that saved it was not fused
                state["step"] = state["step"].to(p.device, torch.float32)
        for one_pass, group in zip(self._passes, self.param_groups, strict=False):
            one_pass.adopt(self, group)


class AdamW(OnePass, torch.optim.AdamW):
    """:class:`torch.optim.AdamW`; arguments and errors as :class:`OnePass`. impl="torch" is torch's fused form."""

    rectified = False
    _options = {"fused": True}  # noqa: RUF012

    @torch.no_grad()
    def _step_where(self, finite: Tensor) -> None:
        """The step of impl="torch"; all stays as it was where ``finite``, a 0-d bool, is false."""
        for p in (p for group in self.param_groups for p in group["params"]):
            # laid out as their parameter: torch's fused update goes through them by address too
            if p.grad is not None and p.grad.stride() != p.stride():
                p.grad = laid_out_as(p, p.grad)
            if "exp_avg" in self.state.get(p, ()):
                with_moments(self.state[p], p)
        with _left_out_unless(finite, self):
            torch.optim.AdamW.step(self)


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
            states = [with_moments(self.state[p], p) for p in parameters]
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


def require_all(optimizer: torch.optim.Optimizer, model: nn.Module, which: str) -> None:
    """ValueError, which begins with ``which``, for an optimizer without a parameter that is trained."""
    taken = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad and id(p) not in taken:
            raise ValueError(
                f"{which} without the parameter {name}; give it that too, or set requires_grad_(False) on what is not "
                "to be trained"
            )


def can_leave_out(optimizer: torch.optim.Optimizer) -> bool:
    """Whether :func:`update` leaves weights and state as they are where the gradient is not finite.

    Of torch's the fused forms of Adam, AdamW and Adagrad do; fused SGD would begin with momentum that it has not
    written.
    """
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return isinstance(optimizer, OnePass) or (isinstance(optimizer, (torch.optim.Adam, torch.optim.Adagrad)) and fused)


def _radam_factors(k: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor, Tensor]:
    """``1/(1−β₁ᵏ)``, ``r_k √(1−β₂ᵏ)`` and whether the latter is used, (n,) each, for steps k, (n,) float64.

    In float32, as torch's capturable form has it, the factor is off by up to 0.6% at β₂ = 0.999, and by 58% at 0.9999.
    """
    power = beta2**k
    limit = 2 / (1 - beta2) - 1
    length = limit - 2 * k * power / (1 - power)
    # no less than 5, below which the factor may not exist and is not used
    at, end = length.clamp(min=5), max(limit, 5.0)
    r = ((at - 4) / (end - 4) * ((at - 2) / (end - 2)) * (end / at)).sqrt()
    return 1 / (1 - beta1**k), r * (1 - power).sqrt(), length > 5


@contextmanager
def _left_out_unless(finite: Tensor, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The protocol by which torch's GradScaler tells a fused optimizer to leave a step out."""
    optimizer.grad_scale, optimizer.found_inf = None, 1 - finite.float()
    try:
        yield
    finally:
        del optimizer.grad_scale, optimizer.found_inf


@torch.no_grad()
def update(
    optimizer: torch.optim.Optimizer,
    *,
    ema: EMA | None = None,
    copy: ComputeCopy | None = None,
    grad_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """:meth:`OnePass.update` for any torch optimizer; unless :func:`can_leave_out`, it steps whatever the gradient."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    finite = torch.isfinite(norm)
    if grad_clip is not None:
        nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)
    if isinstance(optimizer, OnePass):
        optimizer._step_where(finite)
    elif can_leave_out(optimizer):
        with _left_out_unless(finite, optimizer):
            optimizer.step()
    else:
        optimizer.step()
    torch.autograd.graph.increment_version(parameters)  # fused ones do not count their writes
    if ema is not None:
        ema.update(finite)
    if copy is not None:
        copy.write()
    return norm, finite


def choose_cuda_graph(
    wanted: bool | None, optimizer: torch.optim.Optimizer, device: torch.device, world_size: int
) -> bool:
    """Whether a step with this optimizer is one CUDA graph: as wanted, by default where it can be.

    Raises:
        ValueError: where it is wanted and cannot be.
    """
    on_gpu, groups, is_ours = device.type == "cuda", optimizer.param_groups, isinstance(optimizer, OnePass)
    capturable = is_ours or all(group.get("capturable", False) for group in groups)
    lr_is_read = is_ours or all(torch.is_tensor(group["lr"]) and group["lr"].is_cuda for group in groups)
    if wanted is None:
        return on_gpu and world_size == 1 and capturable and lr_is_read
    if wanted and (not on_gpu or world_size > 1):
        raise ValueError(
            f"cuda_graph=True needs the model on a CUDA GPU and one process; "
            f"it is on {device} with {world_size}: set cuda_graph=False"
        )
    if wanted and not capturable:
        raise ValueError(
            "cuda_graph=True needs an optimizer built with capturable=True, or one of soflow_fast.optim; "
            "this one was not: rebuild it or set cuda_graph=False"
        )
    if wanted and not lr_is_read:
        raise ValueError(
            "cuda_graph=True would keep a learning rate that is a number as it is at the capture: build the "
            "optimizer with lr=torch.tensor(...) on the GPU, use one of soflow_fast.optim or set cuda_graph=False"
        )
    return wanted
