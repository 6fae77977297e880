"""What the objectives share: the interface the trainer uses, and what they return."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _BatchNorm

from soflow_fast import dropping, kernels, paths
from soflow_fast.conditions import null_condition, require_arguments, require_classes, told
from soflow_fast.differencing import ForwardDifference, draws
from soflow_fast.kernels.reference import Stream
from soflow_fast.objectives.losses import LossOutput, TotalLoss, combine
from soflow_fast.objectives.prediction import Prediction
from soflow_fast.require import require_range
from soflow_fast.sample import evaluating, sample

#: What to do about a network that :func:`by_batch` finds.
NORMS_REMEDY = "use GroupNorm, or norms with running statistics in evaluation mode (norm.eval())"


class Objective(nn.Module):
    """A loss over any network ``F = net(x, t, s, labels)``; the state_dict holds the network, and what a subclass
    trains beside it.

    A subclass sets ``path`` and implements :meth:`solution` and :meth:`loss_of_rows`, which may end in
    :meth:`combined`. One that adds terms to another's loss overrides :meth:`further_terms`. Modules set as attributes
    are trained, averaged and saved with the network; those that only serve the loss, such as a teacher, are given by
    :meth:`add_companion`.

    Args:
        net: module with ``net(x, t, s, labels)`` and ``net.num_classes``, the index that means "no label"; or with
            ``net.null_condition``, see :mod:`soflow_fast.conditions`. If no labels are given, it gets "no label" for
            each row, or None where ``num_classes = 0``.
        velocity_share: share of rows that train the velocity, ordered first.
        impl: of the fused ops; by default the network's own, see :func:`soflow_fast.kernels.resolve_impl`.

    Raises:
        ValueError: for a network that has neither of these two, or does not take these four arguments.

    Attributes:
        path: from data to noise, ``linear`` or ``trig``. velocity_head: whether a second head of the network, for the
            velocity, is trained too; of a class, whether it is where the network has one: with ``has_velocity_head =
            True``, ``forward_with_velocity(x, t, s, labels)``, both heads' outputs as a tuple ``(F, v)``, and
            ``forward_velocity(x, t, labels)``, v alone at s = t.
        condition_dim: how many numbers the network is told of a row beside its label. renoises: whether sampling in
            several steps jumps to data and adds noise again, or goes from time to time. needs_float32: whether it
            subtracts two nearly equal outputs of the network, for which float32 alone is precise enough.
    """

    path: str
    renoises = True
    condition_dim = 0
    velocity_head = False

    def __init__(self, net: nn.Module, velocity_share: float, impl: str | None):
        super().__init__()
        require_range("velocity_share", velocity_share, 0, 1)
        require_classes(net)
        require_arguments(net)
        self.network, self.velocity_share = net, velocity_share
        self._derived: dict[bool, ForwardDifference | None] = {True: None, False: None}  # of the training mode or not
        self._drawless: set[bool] = set()
        self._companions: list[nn.Module] = []
        self.needs_float32 = False
        self.impl = kernels.resolve_impl(impl or getattr(net, "impl", "auto"))

    def add_companion(self, name: str, module: nn.Module) -> None:
        """Gives the loss a frozen module, such as a teacher or a feature extractor, as the attribute of that name.

        It moves with the objective, to another device or dtype, and is in evaluation mode, without gradients. It is no
        part of the model: it is in no state_dict and among no parameters, so that it is neither trained, averaged nor
        saved, and has no copy in low precision. Each process, and each run that goes on, makes its own.

        Raises:
            ValueError: for what is no module, a name that is taken, and a module that shares parameters with this
                objective, which would be frozen.
        """
        if not isinstance(module, nn.Module):
            raise ValueError(f"the companion {name!r} is a {type(module).__name__}; give a torch.nn.Module")
        if hasattr(self, name):
            raise ValueError(f"this {type(self).__name__} has {name!r} already; give the companion another name")
        own = {id(p) for p in self.parameters()}
        if any(id(p) in own for p in module.parameters()):
            raise ValueError(
                f"the companion {name!r} has parameters of this {type(self).__name__}, and would freeze them; give a "
                "copy, such as copy.deepcopy(net)"
            )
        self._companions.append(module.eval().requires_grad_(False))
        self.__dict__[name] = module  # not by setattr, which would make it a part of the model

    def _apply(self, fn, recurse=True):
        for companion in self._companions:
            companion._apply(fn)
        return super()._apply(fn, recurse)

    @property
    def ops(self):
        """The module of ops that ``impl`` stands for."""
        return kernels.ops(self.impl)

    @property
    def forward_difference(self):
        """The network's own, or after :meth:`prepare` the one derived from its operators in the mode that it has.

        Where the velocity's head is trained it is always derived, and its F is the outputs of both heads.
        """
        return self._derived[self.network.training] or self.network.forward_difference

    def derive(self, x: Tensor, labels: Tensor | None, mode: str) -> None:
        """Derives the difference forward of a network that has none, for rows of this form.

        Raises:
            ValueError: where it cannot be derived.
        """
        training = self.network.training
        derived = self._derived[training]
        if hasattr(self.network, "forward_difference") and not self.velocity_head:
            self._derived[training] = None
            return
        if derived is None or derived.net is not self.network:
            method = "forward_with_velocity" if self.velocity_head else "forward"
            derived = self._derived[training] = ForwardDifference(self.network, self.impl, method)
        derived.prepare(x, told(self.network, labels, x), mode)

    def prepare(self, x: Tensor, labels: Tensor | None) -> None:
        """Readies what cannot be made while the loss is compiled, for rows of this form; before every step.

        Args:
            x: (n, C, H, W) samples that do not only train the velocity; their values do not matter. labels: of a batch.
        """

    def require_subtractable(self, x: Tensor, labels: Tensor | None, setting: str) -> None:
        """ValueError for a setting that subtracts two outputs of a network whose outputs differ at any step: one that
        draws numbers, see :meth:`network_draws`, or that normalises by the batch."""
        if self.network_draws(x, labels):
            raise ValueError(
                f"{setting} subtracts two outputs of the network, which draws random numbers: of its dropout they have "
                "different masks, by which they differ at any step; turn its dropout off (model.dropout=0), or carry "
                "the difference through it"
            )
        norm = by_batch(self.network)
        if norm is not None:
            raise ValueError(
                f"{setting} subtracts two outputs of the network, and its {norm} takes the statistics of a batch, "
                f"which are of other rows in each, so that they differ at any step; {NORMS_REMEDY}"
            )

    def network_draws(self, x: Tensor, labels: Tensor | None) -> bool:
        """Whether the network draws random numbers, as dropout does.

        Looked at until it does not, in each mode, and not where the network has a difference forward written for it.
        """
        mode, known = self.network.training, hasattr(self.network, "forward_difference")
        if known or mode in self._drawless or x.is_meta or isinstance(x, FakeTensor):
            return False
        if draws(self.network, x, told(self.network, labels, x)):
            return True
        self._drawless.add(mode)
        return False

    def forward(self, *args, **kwargs) -> TotalLoss:
        """:meth:`loss_of_rows`, so that wrappers of modules apply to the loss."""
        return self.loss_of_rows(*args, **kwargs)

    def loss(
        self,
        x0: Tensor,
        labels: Tensor | None,
        progress: float | Tensor,
        *,
        step: int | Tensor,
        seed: int | Tensor = 0,
        first_row: int = 0,
    ) -> TotalLoss:
        """The loss of a batch; draws everything from (seed, step, global row).

        Args:
            x0: (B, C, H, W). progress: of the training, ``step / total_steps`` in [0, 1]; a tensor is not read.
            labels: (B,) int64; (B, 1+k) floating point, the label and what else the network is told of a row, such as
                how it was augmented; (B, ...) conditions, of a network that takes these; or None, for "no label" of
                every row.
            step, seed: of the draws, which are those of another step only if ``step`` is.
            first_row: index of x0[0] in the global batch. Parts of a batch, on other processes or as micro-batches,
                need theirs, or they draw the same numbers.

        Raises:
            ValueError: for a progress outside [0, 1], and what :func:`require_batch` refuses.
        """
        require_batch(x0, labels)
        if not torch.is_tensor(progress) and not 0 <= progress <= 1:
            raise ValueError(f"progress={progress} is outside [0, 1]; give step / total_steps")
        order, n_velocity = paths.row_order(x0.shape[0], self.velocity_share, first_row)
        order = torch.tensor(order, device=x0.device)
        labels = None if labels is None else labels[order]
        return self.loss_of_rows(x0[order], labels, first_row + order, n_velocity, progress, seed, step)

    def loss_of_rows(
        self,
        x0: Tensor,
        labels: Tensor | None,
        rows: Tensor,
        n_velocity: int,
        progress: float | Tensor,
        seed: int | Tensor,
        step: int | Tensor,
        latent_scale: float | None = None,
    ) -> TotalLoss:
        """:meth:`loss` of rows already ordered velocity first, see :func:`soflow_fast.paths.row_order`.

        Args:
            rows: (B,) int64 global row indices. n_velocity: how many train the velocity. latent_scale: x0 holds latent
                moments (B, 2C, H, W), see :func:`soflow_fast.kernels.reference.noisy_sample`.
        """
        raise NotImplementedError

    def further_terms(self, batch: Prediction) -> dict[str, Tensor]:
        """Terms that are added to the loss, by name: 0-d, with gradient, times their weights; by default none.

        Called once for a loss, of a micro-batch or of samples that are evaluated, after the network. Each is logged as
        ``<name>/loss``. They are compiled with the loss: no reads on the host, and no ``if`` on ``batch.progress``.
        """
        return {}

    def combined(
        self, parts: dict[str, LossOutput], v_t: Tensor, added: dict[str, LossOutput] | None = None, **given
    ) -> TotalLoss:
        """The mean over all rows of all parts, and :meth:`further_terms`.

        Args:
            parts: of the loss. v_t: (B, C, H, W) the velocity of the path. added: further losses of all these rows,
                added to that mean. given: what a :class:`~soflow_fast.objectives.prediction.Prediction` has beside x0.

        Raises:
            ValueError: for a further term that is not 0-d, or has the name of a part.
        """
        total = combine(parts)
        if added:
            total = TotalLoss(total.loss + sum(part.loss for part in added.values()), parts | added)
        if getattr(self.further_terms, "__func__", None) is Objective.further_terms:
            return total  # nobody asks for x0
        x0 = paths.clean_sample(given["x_t"], v_t, given["t"], self.path)
        loss, parts = total.loss, dict(total.parts)
        for name, term in self.further_terms(Prediction(x0=x0, **given)).items():
            if name in parts:
                raise ValueError(f"the loss has a part {name!r} already; give the further term another name")
            if not torch.is_tensor(term) or term.dim():
                what = f"of shape {tuple(term.shape)}" if torch.is_tensor(term) else f"a {type(term).__name__}"
                raise ValueError(
                    f"the further term {name!r} of the loss is {what}; give a 0-d tensor, such as its mean"
                )
            loss, parts[name] = loss + term, term
        return TotalLoss(loss, parts)

    def solution(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        """Where a sample x at time t is at time s.

        Args:
            x: (B, C, H, W). t, s: (B,) in [0, 1], s <= t. labels: (B,) int64 or (B, ...) conditions, or None for "no
                label".

        Returns:
            (B, C, H, W).
        """
        raise NotImplementedError

    def sample(
        self,
        noise: Tensor,
        labels: Tensor | None = None,
        steps: int = 1,
        *,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        first_row: int | Tensor = 0,
    ) -> Tensor:
        """Samples from noise in ``steps`` jumps, without dropout, see :func:`soflow_fast.sample.sample`."""
        with evaluating(self):
            return sample(self, noise, labels, steps, generator=generator, seed=seed, first_row=first_row)

    def draw_drop(self, rows: Tensor, labels: Tensor | None, seed: int | Tensor, step: int | Tensor) -> Tensor:
        """(B,) bool, the rows trained without label: those drawn, see :mod:`soflow_fast.dropping`, and those that have
        none."""
        group, place = dropping.groups(rows, self.velocity_share, self.label_drop)
        draw = self.ops.uniform(group, 1, seed=seed, step=step, stream=Stream.DROP)[:, 0]
        drop = dropping.dropped(place, draw, self.label_drop)
        if labels is None:
            return drop
        if null_condition(self.network) is not None:
            return drop | (labels == self.no_label(labels)).reshape(len(labels), -1).all(1)
        return drop | ((labels if labels.dim() == 1 else labels[:, 0]) == self.network.num_classes)

    def trained_forward(self) -> Callable:
        """The network as it is called with gradient: for F, or for the outputs of both heads."""
        return self.network.forward_with_velocity if self.velocity_head else self.network

    def call_network(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        """The network's output, of rows without labels that for "no label"."""
        return self.network(x, t, s, told(self.network, labels, x))

    @torch.no_grad()
    def guidance_forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """``F(x,t,t,labels)`` without gradient, for a target; in float8 if the network's ``float8_guidance`` is set."""
        rounded = getattr(self.network, "float8_guidance", False)
        return (self.network.forward_float8 if rounded else self.network)(x, t, t, labels)

    @torch.no_grad()
    def guidance_outputs(
        self, x: Tensor, t: Tensor, labels: Tensor, n: int, drop: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """``F(x,t,t,∅)`` of all rows and ``F(x,t,t,labels)`` of those from n on, by one call without gradient.

        Args:
            n: how many rows train the velocity, the first. drop: (B,) bool, rows that need no guidance; as many as are
                known to drop their label, see :mod:`soflow_fast.dropping`, are left out, and theirs is nan. Or None.
        """
        size, null = len(t), self.no_label(labels)
        known = drop is not None and type(self).draw_drop is Objective.draw_drop  # one of a subclass's may drop fewer
        share = self.label_drop if known else 0
        drop = torch.zeros_like(t, dtype=torch.bool) if drop is None else drop
        first, own = dropping.to_guide(drop[:n], share), n + dropping.to_guide(drop[n:], share)
        if len(first) + len(own) == size:
            F = self.guidance_forward(torch.cat([x, x[n:]]), torch.cat([t, t[n:]]), torch.cat([null, labels[n:]]))
            return F[:size], F[size:]
        guided = torch.cat([first, own])
        rows = torch.cat([guided, own])
        F = self.guidance_forward(x[rows], t[rows], torch.cat([null[guided], labels[own]]))
        whole = F.new_full((2 * size - n, *F.shape[1:]), torch.nan)
        whole = whole.index_copy(0, torch.cat([guided, size - n + own]), F)
        return whole[:size], whole[size:]

    def two_forwards(self, x, t, s, labels, v, rows: slice, step: Tensor) -> tuple:
        """``F(x,t,s)`` of all rows (of two heads both outputs), and without gradient ``F(x − step·v, t − step, s) −
        F(x,t,s)`` of the b given ones, subtracted; both in the precision of the parameters. x: (B, C, H, W). t, s:
        (B,). v: (b, C, H, W). step: (b,).
        """
        with torch.autocast(x.device.type, enabled=False):
            out = self.trained_forward()(x, t, s, labels)
            F = out[0] if self.velocity_head else out
            with torch.no_grad():
                labels = None if labels is None else labels[rows]
                moved = self.network(x[rows] - step.view(-1, 1, 1, 1) * v, t[rows] - step, s[rows], labels)
                return out, moved.to(x.dtype) - F[rows].to(x.dtype)

    def input_labels(self, labels: Tensor | None, drop: Tensor | None, x: Tensor) -> Tensor | None:
        """The labels the network sees of samples x: "no label" on the dropped rows, and where there are none."""
        if labels is None or drop is None:
            return told(self.network, labels, x)
        return torch.where(drop.view(-1, *(1,) * (labels.dim() - 1)), self.no_label(labels), labels)

    def no_label(self, labels: Tensor) -> Tensor:
        """ "No label" in place of every label; what else the network is told of a row stays."""
        null = null_condition(self.network)
        if null is not None:
            if (labels.shape[1:], labels.is_floating_point()) != (null.shape, null.is_floating_point()):
                raise ValueError(
                    f"conditions of shape {tuple(labels.shape)} and {labels.dtype} do not fit a null_condition of "
                    f"shape {tuple(null.shape)} and {null.dtype}; give (B, *shape) of such"
                )
            # a view of a parameter that is made without gradient would still say that it requires one
            null = null if torch.is_grad_enabled() else null.detach()
            return null.to(labels).expand_as(labels)
        if labels.dim() == 1:
            return torch.full_like(labels, self.network.num_classes)
        return torch.cat([torch.full_like(labels[:, :1], self.network.num_classes), labels[:, 1:]], 1)


def is_objective(module: nn.Module | None) -> bool:
    """Whether a module is an objective, as it is or as torch.compile wraps it, and not a network to put one over."""
    return isinstance(getattr(module, "_orig_mod", module), Objective)


def by_batch(net: nn.Module) -> str | None:
    """The first norm of a network that takes the statistics of a batch, in words; None where no norm does."""
    for name, module in net.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            return f"{type(module).__name__} {name!r}"
    return None


def require_batch(x0: Tensor, labels: Tensor | None) -> None:
    """ValueError unless x0 are samples, and there is a label for each, or none at all."""
    if not x0.is_floating_point():
        raise ValueError(f"x0 has dtype {x0.dtype}; give samples in floating point, about in [-1, 1]")
    if not len(x0):
        raise ValueError("x0 has no samples; give at least one")
    if labels is not None and len(labels) != len(x0):
        raise ValueError(f"there are {len(labels)} labels for {len(x0)} samples; give one for each")


def require_null_label(net: nn.Module, guidance: str | None, label_drop: float) -> None:
    """ValueError where labels are dropped or guided (by that setting) and "no label" is untrained or has no row."""
    if guidance and label_drop == 0:
        raise ValueError(
            f"{guidance} needs a 'no label' prediction, which label_drop=0 never trains; "
            "set label_drop > 0 or guidance_scale=1"
        )
    if guidance or label_drop > 0:
        getattr(net, "null_label", None)
