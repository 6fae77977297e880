"""AdamW in one pass with clipping, EMA and compute copies; equal to torch's AdamW, and exchanging state with it."""

import math

import torch
from torch import Tensor, nn

from soflow_fast import kernels
from soflow_fast.ema import EMA
from soflow_fast.precision import ComputeCopy


class AdamW(torch.optim.AdamW):
    """:class:`torch.optim.AdamW` over float32 parameters that also clips, averages and writes compute copies.

    The hyper-parameters, the state and the state_dict are torch's. Learning rates are plain numbers, which any torch
    scheduler may set; they reach the device outside of a captured CUDA graph, by :meth:`prepare`.

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
        for group in self.param_groups:
            group["capturable"] = parameters[0].device.type == "cuda"
        if self.impl == "triton" and any(p.dtype != torch.float32 for p in parameters):
            raise ValueError(
                f"AdamW(impl='triton') takes float32 parameters and got {parameters[0].dtype}; use impl='torch'"
            )
        self._passes: list[_Pass] | None = None

    def prepare(self) -> None:
        """Brings to the device what the host decides; to be called before each step, outside of a graph capture."""
        for group, one_pass in zip(self.param_groups, self._passes or (), strict=False):
            one_pass.prepare(float(group["lr"]))

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
        if self.impl == "torch":
            return update(self, ema=ema, copy=copy, grad_clip=grad_clip)
        if self._passes is None:
            self._passes = [_Pass(self, group, ema, copy) for group in self.param_groups]
            self.prepare()
        norm = torch.stack([one_pass.norm() for one_pass in self._passes]).square().sum().sqrt()
        weight = None if ema is None else 1 - ema.current_decay()
        for one_pass in self._passes:
            one_pass.step(norm, weight, math.inf if grad_clip is None else grad_clip)
        finite = torch.isfinite(norm)
        if ema is not None:
            ema.updates += finite
        if copy is not None:
            copy.mark_written()
        return norm, finite

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
        for one_pass in self._passes or ():
            one_pass.adopt(self)


class _Pass:
    """The tables and device scalars of one parameter group."""

    def __init__(self, optimizer: AdamW, group: dict, ema: EMA | None, copy: ComputeCopy | None):
        from soflow_fast.kernels import optimizer as kernel

        self.kernel, self.group = kernel, group
        self.parameters = [p for p in group["params"] if p.requires_grad]
        device = self.parameters[0].device
        states = [optimizer.state[p] for p in self.parameters]
        steps = [state["step"] for state in states if "step" in state]
        self.step_count = torch.zeros((), device=device) if not steps else steps[0].to(device, torch.float32).clone()
        for p, state in zip(self.parameters, states, strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                state.setdefault(name, torch.zeros_like(p, memory_format=torch.preserve_format))
            state["step"] = self.step_count  # one counter for the group, as all its parameters step together
        self.states = [[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")]
        self.averages = None if ema is None else ema.averages_of(self.parameters)
        self.copies = None if copy is None else copy.copies_of(self.parameters)
        self.blocks = kernel.block_table(self.parameters).to(device)
        self.table = torch.zeros(len(self.parameters) * 6, dtype=torch.int64, device=device)
        self.addresses: list[int] = []
        self.pending = False
        self.lr_value, self.lr = math.nan, torch.zeros((), device=device)

    def adopt(self, optimizer: AdamW) -> None:
        """Copies a newly loaded state into the tensors that the tables, and a captured graph, point to."""
        for i, p in enumerate(self.parameters):
            state = optimizer.state[p]
            self.step_count.copy_(state["step"])
            for name, tensors in zip(("exp_avg", "exp_avg_sq"), self.states, strict=True):
                tensors[i].copy_(state[name])
                state[name] = tensors[i]
            state["step"] = self.step_count

    def prepare(self, lr: float) -> None:
        if lr != self.lr_value:
            self.lr_value = lr
            self.lr.fill_(lr)
        if self.pending:
            self.table.copy_(torch.tensor(self.addresses, dtype=torch.int64))
            self.pending = False

    def norm(self) -> Tensor:
        gradients = [p.grad for p in self.parameters]
        if any(g is None for g in gradients):
            raise RuntimeError("AdamW(impl='triton') needs a gradient for every parameter; one has none")
        addresses = self.kernel.address_table(self.parameters, gradients, *self.states, self.averages, self.copies)
        if addresses != self.addresses:
            # A captured graph finds its gradients at addresses known only now; the table is filled after the capture.
            self.addresses, self.pending = addresses, True
            if not (self.table.is_cuda and torch.cuda.is_current_stream_capturing()):
                self.prepare(self.lr_value)
        self.gradient_dtype = gradients[0].dtype
        return self.kernel.gradient_norm(self.table, self.blocks, self.gradient_dtype)

    def step(self, norm: Tensor, average_weight: Tensor | None, grad_clip: float) -> None:
        beta1, beta2 = self.group["betas"]
        self.kernel.adamw_(
            self.table,
            self.blocks,
            norm,
            self.step_count,
            self.lr,
            average_weight,
            log_betas=(math.log(beta1), math.log(beta2)),
            eps=self.group["eps"],
            weight_decay=self.group["weight_decay"],
            grad_clip=grad_clip,
            gradient_dtype=self.gradient_dtype,
            copy_dtype=None if self.copies is None else self.copies[0].dtype,
        )
        self.step_count += torch.isfinite(norm)


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
    if ema is not None:
        ema.update(finite)
    if copy is not None:
        copy.write()
    return norm, finite
