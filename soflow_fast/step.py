"""One training step: loss, backward, optimizer, EMA; compiled, in low precision and as one CUDA graph where asked."""

import contextlib
import copy
import logging
from collections.abc import Sequence
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from soflow_fast import optim
from soflow_fast.augment import Augment
from soflow_fast.capture import Captured, compiled, on_side_stream
from soflow_fast.differencing import left_as_it_was
from soflow_fast.distributed import broadcast
from soflow_fast.dit import DiT
from soflow_fast.ema import EMA
from soflow_fast.kernels.coefficients import require_choice
from soflow_fast.objectives.base import Objective, is_objective, require_batch
from soflow_fast.objectives.losses import LossOutput, TotalLoss, joined
from soflow_fast.paths import row_order, row_period
from soflow_fast.precision import PRECISIONS, ComputeCopy, follows_parameters, require_float8, tensor_cores
from soflow_fast.reduction import INDUCTOR_OPTIONS, CompiledReduction
from soflow_fast.require import require_count
from soflow_fast.sample import evaluating

_log = logging.getLogger(__name__)

# Steps run before the capture: kernels are compiled and loaded, optimizer state and library workspaces allocated.
_STEPS_BEFORE_CAPTURE = 3


class StepStats(NamedTuple):
    """What a step reports, on the device; reading a value on the host synchronises. The next step may overwrite it.

    Attributes:
        loss: 0-d. grad_norm: 0-d, global L2 norm before clipping. parts: the losses by name, over this process's rows;
            0-d where the objective reports a term so.
        finite: 0-d bool, whether the gradient is; if not, the step was left out.
    """

    loss: Tensor
    grad_norm: Tensor
    parts: dict[str, LossOutput | Tensor]
    finite: Tensor


class _Loss(nn.Module):
    """The loss of one micro-batch: augmentation, draws, guidance and gradient forward, one compiled graph.

    A module of its own because DistributedDataParallel may wrap it; then the compute copies enter outside of the
    compiled graph, so that the masters' gradient hooks see float32. With a reduction they enter inside.
    """

    def __init__(self, model: Objective, *, latent_scale, augment, copy, autocast, compile, reduction):
        super().__init__()
        self.model, self.augment, self.copy, self.reduction = model, augment, copy, reduction
        self.latent_scale, self.autocast = latent_scale, autocast
        # of the class: bound, it would keep this module in a cycle
        self.compute = compiled(_Loss._compute, compile, None if reduction is None else INDUCTOR_OPTIONS)

    def _compute(self, parameters, x0, labels, order, rows, n_velocity, progress, seed, step) -> TotalLoss:
        if self.reduction is not None:
            parameters = self.reduction(*parameters)
        x0, labels = x0[order], None if labels is None else labels[order]
        if self.augment is not None:
            with torch.autocast(x0.device.type, enabled=False):
                x0, labels = self.augment(x0, labels, rows, seed, step)
        arguments = (x0, labels, rows, n_velocity, progress)
        keywords = {"latent_scale": self.latent_scale, "seed": seed, "step": step}
        with torch.autocast(x0.device.type, torch.bfloat16, enabled=self.autocast):
            if parameters is None:
                return self.model(*arguments, **keywords)
            return functional_call(self.model, parameters, arguments, keywords)

    def forward(self, *arguments) -> TotalLoss:
        return self.compute(self, self._inputs(), *arguments)

    def _inputs(self):
        """The parameters as what is compiled takes them."""
        if self.reduction is not None:
            return self.reduction.parameters, {} if self.copy is None else self.copy.copies
        return None if self.copy is None else self.copy.parameters()


class TrainStep:
    """``stats = step(x0, labels)``: one optimizer step of an objective.

    Every draw of step k depends on (seed, k, global row) alone. A run can therefore stop and resume, or be split over
    processes and micro-batches, without changing its numbers. The exception is what the network draws by itself from
    torch's generator, such as dropout. Progress and the step live on the device; nothing is read on the host. Where the
    gradient is not finite, the EMA and an optimizer that can leave a step out stay as they were; that too is decided on
    the device.

    The objective's attributes, such as ``model.velocity_share = 0.5``, may be changed between steps; a compiled loss is
    then compiled anew. A CUDA graph has them as they were at its capture and ignores later changes.

    Args:
        model: an objective such as :class:`~soflow_fast.SoFlow`, already on its device.
        optimizer: over ``model.parameters()``, best :class:`~soflow_fast.optim.AdamW` or ``RAdam``. For others, see
            :func:`~soflow_fast.optim.can_leave_out`; only those with ``capturable=True`` go into a CUDA graph.
        ema: updated after each step, or None. averages: further ones, such as :class:`~soflow_fast.ema.PowerEMA`; each
            is a pass of its own over the parameters, 12 bytes of traffic per parameter.
        total_steps: of the run; progress is step/total_steps. seed: of all draws.
        accumulation: micro-batches per step; it divides the batch. grad_clip: largest global gradient norm, or None.
        latent_scale: x0 holds latent moments (B, 2C, H, W), see
            :func:`soflow_fast.kernels.reference.noisy_sample`; None: x0 are samples.
        precision: ``bf16`` computes a DiT on bfloat16 copies of its float32 parameters, what the objective has beside
            it on its own parameters, and other networks wholly under autocast; ``tf32`` computes on the parameters with
            TensorFloat-32 products, ``fp32`` on the parameters as they are. By default bf16 on a GPU, else fp32. Where
            the objective's ``needs_float32`` is true, no product is rounded to TensorFloat-32.
        compile: whether the loss is compiled, by default on a GPU; see :func:`~soflow_fast.capture.compiled`.
        cuda_graph: replay the whole step as one CUDA graph, by default on a GPU with one process and an optimizer that
            allows it: one of soflow_fast.optim, or a capturable one whose learning rate is a tensor. The first steps
            run without it, then it is captured; batches must keep their shape.
        augment: of the samples, before anything else; the network is told of it, see :mod:`soflow_fast.augment`.
        rank, world_size: this process holds rows ``rank·B .. (rank+1)·B-1`` of the global batch; by default as
            torch.distributed says, if initialised. With several processes gradients are averaged: inside the backward
            of a compiled DiT without micro-batches, see :mod:`soflow_fast.reduction`, and otherwise by
            DistributedDataParallel. Weights, and averages without an update, begin as the first process's weights.

    Raises:
        ValueError: for a setting that cannot run here.
        RuntimeError: if the capture fails, with its cause.
    """

    def __init__(
        self,
        model: Objective,
        *,
        optimizer: torch.optim.Optimizer,
        ema: EMA | None = None,
        averages: Sequence[EMA] = (),
        total_steps: int,
        seed: int = 0,
        accumulation: int = 1,
        grad_clip: float | None = None,
        latent_scale: float | None = None,
        precision: str | None = None,
        compile: bool | str | None = None,
        cuda_graph: bool | None = None,
        augment: Augment | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ):
        if not is_objective(model):
            raise ValueError(f"this {type(model).__name__} is no objective; give one over it, such as SoFlow(net)")
        for name, value in (("total_steps", total_steps), ("accumulation", accumulation)):
            require_count(name, value)
        if grad_clip is not None and not grad_clip > 0:
            raise ValueError(
                f"grad_clip={grad_clip} is not a norm to clip at; give one above 0, or None for no clipping"
            )
        if world_size is None:
            started = dist.is_available() and dist.is_initialized()
            rank, world_size = (dist.get_rank(), dist.get_world_size()) if started else (0, 1)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is none of world_size={world_size} processes, which count from 0")
        for dit in (part for part in model.modules() if isinstance(part, DiT)):
            dit.require_own_layers()
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        if not self._parameters:
            raise ValueError(
                "no parameter of the model has requires_grad, so that there is nothing to train; set it on some"
            )
        optim.require_all(optimizer, model, f"the optimizer is a {type(optimizer).__name__}")
        for average in [*([] if ema is None else [ema]), *averages]:
            if not average.is_of(self._parameters):
                raise ValueError("an average is of another network than the one that is trained; make it as EMA(model)")
        device = self._parameters[0].device
        if augment is not None:
            augment.check(model.network, latent_scale)
        on_gpu = device.type == "cuda"
        follows = follows_parameters(model.network)
        only_float32 = model.needs_float32 and follows
        self.precision = precision or ("bf16" if on_gpu and not only_float32 else "fp32")
        require_choice("precision", self.precision, PRECISIONS)
        if only_float32 and self.precision == "bf16":
            raise ValueError(
                f"precision='bf16' loses the difference of two outputs that this {type(model).__name__} takes: "
                "use precision='fp32', or a derivative that is no finite difference"
            )
        require_float8(model.network, device, self.precision)
        on_copies = self.precision == "bf16" and follows
        if on_copies and hasattr(model.network, "_orig_mod"):
            raise ValueError(
                "the network is compiled already, and bf16 computes on copies of its weights; give the network itself: "
                "the step compiles all of the loss"
            )
        self.compile = on_gpu if compile is None else compile
        self.cuda_graph = optim.choose_cuda_graph(cuda_graph, optimizer, device, world_size)
        subtracts = model.velocity_share < 1 and getattr(model, "quotient", "") == "two_forwards"
        if on_copies and subtracts:
            _log.warning("quotient='two_forwards' is lost to rounding in bf16; use quotient='difference' or fp32")
        self.model, self.optimizer, self.ema, self.averages = model, optimizer, ema, averages
        self.total_steps, self.accumulation, self.grad_clip = total_steps, accumulation, grad_clip
        self.rank, self.world_size = rank, world_size
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self._seed = torch.full_like(self.step, seed)  # a number would be a constant of the compiled code
        self.copy = ComputeCopy(model, model.network) if on_copies else None
        # its order of gradients is known; in another order, products would be put off with all that they need
        is_dit = type(model.network) is DiT
        in_backward = world_size > 1 and self.compile and accumulation == 1 and is_dit
        self.reduction = CompiledReduction(model) if in_backward else None
        settings = {
            "latent_scale": latent_scale,
            "copy": self.copy,
            "autocast": self.precision == "bf16" and not follows,
        }
        self._loss = _Loss(model, augment=augment, compile=self.compile, reduction=self.reduction, **settings)
        self._loss_of_evaluation = partial(_Loss, augment=None, compile=False, reduction=None, **settings)
        if world_size > 1 and self.reduction is None:
            devices = [device] if on_gpu else None
            self._loss = DistributedDataParallel(
                self._loss, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        if world_size > 1:  # as the parameters
            broadcast(t for average in self._all_averages() for t in (*average.averages.values(), average.updates))
        self._orders: dict[tuple[int, float], list[tuple[Tensor, Tensor, int]]] = {}
        self._latent_scale, self._augment = latent_scale, augment
        self._steps_run = 0
        # One for all steps before the capture: the allocator keeps its blocks by stream.
        self._stream = torch.cuda.Stream(device) if self.cuda_graph else None
        self._graph: Captured | None = None

    def state_dict(self) -> dict:
        """What a run needs beside the model's weights to go on: its step, the optimizer's state and the averages."""
        averages = [{"weights": one.averages, "updates": int(one.updates)} for one in self._all_averages()]
        state = {"step": int(self.step), "optimizer": self.optimizer.state_dict(), "averages": averages}
        return {**state, "parameters": self._names_of_trained()}

    def load_state_dict(self, state: dict) -> None:
        """Restores :meth:`state_dict`; the weights are the model's own.

        Raises:
            ValueError: for the state of a step with more or fewer averages, or of other parameters; nothing is changed.
        """
        own = self._all_averages()
        if len(own) != len(state["averages"]):
            raise ValueError(
                f"the state has {len(state['averages'])} averages and this step {len(own)}; give it the same ema and "
                "averages"
            )
        trained = self._names_of_trained()
        for theirs, ours in zip_longest(state.get("parameters", trained), trained, fillvalue="nothing more"):
            if theirs != ours:  # an optimizer knows its state by the order of the parameters alone
                raise ValueError(
                    f"the state is of a step that trains {theirs} where this one trains {ours}; set requires_grad as "
                    "it was"
                )
        for one, saved in zip(own, state["averages"], strict=True):
            one.check_state(saved["weights"])
        constants = self._constants_of_a_graph()
        self.optimizer.load_state_dict(state["optimizer"])
        if self._constants_of_a_graph() != constants:
            self._graph, self._steps_run = None, 0
        for one, saved in zip(own, state["averages"], strict=True):
            one.load_state_dict(saved["weights"], saved["updates"])
        self.step.fill_(state["step"])
        self.forget_graph()

    def forget_graph(self) -> None:
        """Has the CUDA graph captured anew if the optimizer's state is now in other tensors, as when one was loaded."""
        if getattr(self.optimizer, "impl", "") != "triton":  # which keeps its tensors
            self._graph, self._steps_run = None, 0

    def _constants_of_a_graph(self) -> list[dict]:
        """The hyper-parameters that a captured update of one of soflow_fast.optim keeps as they were."""
        groups = self.optimizer.param_groups if isinstance(self.optimizer, optim.OnePass) else []
        return [{name: group[name] for name in ("betas", "eps", "weight_decay")} for group in groups]

    def _names_of_trained(self) -> list[str]:
        return [
            name.replace("network._orig_mod.", "network.")
            for name, p in self.model.named_parameters()
            if p.requires_grad
        ]

    def _all_averages(self) -> list[EMA]:
        return [*([] if self.ema is None else [self.ema]), *self.averages]

    def check_batch(self, batch: int) -> None:
        """ValueError unless this process's rows of a batch can be cut into equal micro-batches."""
        self._row_orders(batch)

    def __call__(self, x0: Tensor, labels: Tensor | None = None) -> StepStats:
        """One step.

        Args:
            x0: (B, C, H, W) this process's rows of the global batch, in their global order.
            labels: (B,) int64, (B, ...) conditions, or None.

        Raises:
            ValueError: for samples that are no floating point, another number of labels than of samples, a batch that
                :meth:`check_batch` refuses or, with a CUDA graph, of another shape than before; for a network that the
                objective's ``prepare`` refuses, and for an objective that returns no
                :class:`~soflow_fast.objectives.base.TotalLoss`, or one with a part that cannot be reported.
            RuntimeError: for a step that cannot be captured as a CUDA graph, with the cause.
        """
        require_batch(x0, labels)
        if self.copy is not None:
            self.copy.refresh()
        if isinstance(self.optimizer, optim.OnePass):
            self.optimizer.prepare()
        if not self.cuda_graph:
            return self._run(x0, labels)
        if self._graph is None and self._steps_run < _STEPS_BEFORE_CAPTURE:
            self._steps_run += 1
            return on_side_stream(self._stream, self._run, x0, labels)
        if self._graph is None:
            self.optimizer.zero_grad(set_to_none=True)  # the graph has a memory pool of its own for gradients
            self._graph = Captured("the training step", self._stream, self._run, x0, labels)
            if isinstance(self.optimizer, optim.OnePass):
                self.optimizer.prepare()
        stats = self._graph(x0, labels)
        # What a replay writes counts as no new version of the parameters, by which copies of them are kept up to date.
        torch.autograd.graph.increment_version(self._parameters)
        if self.copy is not None:
            self.copy.mark_written()
        return stats

    def _run(self, x0: Tensor, labels: Tensor | None) -> StepStats:
        self.optimizer.zero_grad(set_to_none=True)
        progress = self._progress()
        outputs = []
        orders = self._row_orders(x0.shape[0])
        self._prepare(self.model, x0, labels, len(orders[0][1]) - orders[0][2], self._augment)
        by_ddp = isinstance(self._loss, DistributedDataParallel)  # which averages, and only when it should
        share = self.accumulation if self.reduction is None else self.reduction.world_size
        with tensor_cores("fp32" if self.model.needs_float32 else self.precision):
            for i, (order, rows, n_velocity) in enumerate(orders):
                last = i == len(orders) - 1
                with contextlib.nullcontext() if last or not by_ddp else self._loss.no_sync():
                    out = self._loss(x0, labels, order, rows, n_velocity, progress, self._seed, self.step)
                    if not hasattr(out, "parts"):
                        raise ValueError(
                            f"{type(self.model).__name__}.loss_of_rows returns a {type(out).__name__}; it must return "
                            "a TotalLoss(loss, parts) of soflow_fast.objectives.base"
                        )
                    (out.loss / share).backward()
                outputs.append(out)
        is_ours = isinstance(self.optimizer, optim.OnePass)
        update = self.optimizer.update if is_ours else partial(optim.update, self.optimizer)
        grad_norm, finite = update(ema=self.ema, copy=self.copy, grad_clip=self.grad_clip)
        for average in self.averages:
            average.update(finite)
        self.step += 1
        loss = torch.stack([out.loss.detach() for out in outputs]).mean()
        return StepStats(loss, grad_norm, joined([out.parts for out in outputs]), finite)

    @torch.no_grad()
    def evaluate(self, x0: Tensor, labels: Tensor | None = None, *, first_row: int = 0, seed: int = 0) -> TotalLoss:
        """The loss, without gradient, of samples that are not trained on, at the training's progress.

        The network is in evaluation mode and has the weights that it has now, in the precision of the training; nothing
        is augmented or compiled. Every draw is of (seed, global row), whatever the step. It changes nothing.

        Args:
            x0, labels: as of a step, of any number of rows. first_row: index of x0[0] among all that is evaluated.
            seed: of the draws.
        """
        model, device = copy.copy(self.model), self.step.device  # a copy: what it keeps of this is not the training's
        if self.copy is not None:
            self.copy.refresh()
        order, n_velocity = row_order(len(x0), model.velocity_share, first_row)
        order = torch.tensor(order, device=device)
        with evaluating(model), left_as_it_was(model, device):
            torch.manual_seed(seed + first_row)  # of what a network draws by itself
            self._prepare(model, x0, labels, len(x0) - n_velocity)
            with tensor_cores("fp32" if model.needs_float32 else self.precision):
                draws = first_row + order, n_velocity, self._progress(), torch.full_like(self.step, seed)
                return self._loss_of_evaluation(model)(x0, labels, order, *draws, torch.zeros_like(self.step))

    def _progress(self) -> Tensor:
        return (self.step.float() / self.total_steps).clamp(max=1)

    def _prepare(self, model: Objective, x0: Tensor, labels: Tensor | None, rows: int, augment=None) -> None:
        """Has an objective make what cannot be made while its loss is compiled."""
        if rows:
            channels = x0.shape[1] if self._latent_scale is None else x0.shape[1] // 2
            samples = x0[:rows, :channels].to(torch.promote_types(x0.dtype, torch.float32))
            if augment is not None:
                labels = augment.conditions(samples, None)
            model.prepare(samples, labels)

    def _row_orders(self, batch: int) -> list[tuple[Tensor, Tensor, int]]:
        """For each micro-batch: offsets into the rows, velocity first; their global rows; how many are velocity."""
        key = batch, self.model.velocity_share
        if key not in self._orders:
            if batch % self.accumulation:
                raise ValueError(f"accumulation={self.accumulation} does not divide the batch of {batch} rows")
            n, device, share = batch // self.accumulation, self.step.device, key[1]
            counts = {row_order(n, share, first)[1] for first in range(0, batch * self.world_size, n)}
            if len(counts) > 1:
                raise ValueError(
                    f"batches of {n} rows do not all hold the same number of velocity rows at velocity_share={share}; "
                    f"choose a batch per process and micro-batch that is a multiple of {row_period(share)}"
                )
            orders = []
            for first in range(0, batch, n):
                order, n_velocity = row_order(n, share, self.rank * batch + first)
                order = torch.tensor(order, device=device) + first
                orders.append((order, order + self.rank * batch, n_velocity))
            self._orders[key] = orders
        return self._orders[key]
