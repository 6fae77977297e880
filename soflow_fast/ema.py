"""Moving averages of the parameters: exponential with a warm-up, and by a power of time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn


class EMA:
    """Float32 averages of a module's parameters: ``average ← decay_k·average + (1−decay_k)·parameter``.

    After k updates the warm-up is ``decay_k = min(decay, (1+k)/(10+k))``. It makes short runs useful: with 0.9999 alone
    the average would still be the initialisation after a thousand steps. Nothing is read on the host.

    Args:
        module: whose parameters are averaged, except those without gradient. Of these and of buffers :meth:`state_dict`
            has the values at the time of its call.
        decay: in [0, 1). warmup: whether the decay grows from 0.1 to its value.

    Raises:
        ValueError: for a decay outside [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float = 0.9999, warmup: bool = True):
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay={decay} is outside [0, 1); choose one in it, such as 0.9999")
        self._module, self.decay, self.warmup = module, decay, warmup
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().clone().float() for name, p in self._parameters.items()}
        first = {id(p): name for name, p in self._parameters.items()}
        every = module.named_parameters(remove_duplicate=False)
        self._names = {name: first[id(p)] for name, p in every if p.requires_grad}  # tied ones have several
        device = next(iter(self._parameters.values())).device
        self.updates = torch.zeros((), dtype=torch.int64, device=device)

    def current_decay(self) -> Tensor:
        """0-d float64 decay of the next update; in float32 its distance from 1 would be wrong by percents."""
        k = self.updates.double()
        ramp = (1 + k) / (10 + k) if self.warmup else torch.full_like(k, self.decay)
        return ramp.clamp(max=self.decay)

    @torch.no_grad()
    def update(self, taken: Tensor | bool = True) -> None:
        """One update, after an optimizer step.

        Nothing changes where ``taken``, a 0-d bool, says that there was none and the parameters stayed finite.
        """
        weight = (1 - self.current_decay()).float() * taken
        averages, parameters = list(self.averages.values()), [p.float() for p in self._parameters.values()]
        torch._foreach_lerp_(averages, parameters, [weight] * len(averages))  # one tensor would be read on the host
        self.updates += taken

    def is_of(self, parameters: Sequence[Tensor]) -> bool:
        """Whether any of these parameters is averaged."""
        own = {id(p) for p in self._parameters.values()}
        return any(id(p) in own for p in parameters)

    def averages_of(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The averages of the given parameters, for an optimizer that updates them itself.

        Raises:
            ValueError: for one that has none, as it was frozen when the averages were made.
        """
        by_parameter = {id(p): self.averages[name] for name, p in self._parameters.items()}
        for p in parameters:
            if id(p) not in by_parameter:
                raise ValueError(
                    f"there is no average of a parameter of shape {tuple(p.shape)} that is updated; make the averages "
                    "of the whole model, EMA(model), after requires_grad_(True) on all that is trained"
                )
        return [by_parameter[id(p)] for p in parameters]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the module computes with the averages; its own weights are set aside, not copied."""
        own = {name: p.data for name, p in self._parameters.items()}
        try:
            for name, p in self._parameters.items():
                p.data = self.averages[name].to(p.dtype)
            torch.autograd.graph.increment_version(self._parameters.values())  # for copies that are kept up to date
            yield
        finally:
            for name, p in self._parameters.items():
                p.data = own[name]
            torch.autograd.graph.increment_version(self._parameters.values())

    def named_averages(self) -> dict[str, Tensor]:
        """The averages by all names of their parameters."""
        return {name: self.averages[first] for name, first in self._names.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """A state_dict of the averaged module, with the module's own keys."""
        return {**self._module.state_dict(), **self.named_averages()}

    def check_state(self, state: dict[str, Tensor]) -> None:
        """ValueError for averages without one of a parameter, or with one of another shape."""
        for name, average in self.averages.items():
            if name not in state or state[name].shape != average.shape:
                found = tuple(state[name].shape) if name in state else "none"
                raise ValueError(
                    f"the averages to restore have {found} of {name}, which is {tuple(average.shape)}; give those of "
                    "the same parameters"
                )

    def load_state_dict(self, state: dict[str, Tensor], updates: int) -> None:
        """Restores :meth:`state_dict` and the number of updates behind it.

        Raises:
            ValueError: for what :meth:`check_state` refuses; nothing is restored.
        """
        self.check_state(state)
        for name, average in self.averages.items():
            average.copy_(state[name])
        self.updates.fill_(updates)


class PowerEMA(EMA):
    """Averages whose weights grow as a power of time: update k decays by ``(1 - 1/k)^(exponent+1)``.

    After n updates those of update k have the weight ``(k^(exponent+1) - (k-1)^(exponent+1)) / n^(exponent+1)``: a
    window that grows with the training and leaves the initial weights out. From two of them the averages over other
    windows can be had afterwards, see :mod:`soflow_fast.posthoc` (arXiv 2312.02696, section 3).

    Args:
        module: as for :class:`EMA`. std: standard deviation of the window over the training's length, in (0, 12^-1/2).

    Raises:
        ValueError: for another std.
    """

    def __init__(self, module: nn.Module, std: float):
        super().__init__(module)
        self.std, self.exponent = std, power_exponent(std)

    def current_decay(self) -> Tensor:
        """0-d float64 decay of the next update."""
        return (1 - 1 / (self.updates.double() + 1)) ** (self.exponent + 1)


def power_exponent(std: float) -> float:
    """The exponent of the power of time whose relative standard deviation is ``std``: 16.97 for 0.05, 6.94 for 0.1.

    The largest root γ of ``std² (γ+2)² (γ+3) = γ+1`` (arXiv 2312.02696, appendix C).

    Raises:
        ValueError: for a std outside of (0, 12^-1/2), where the exponent would not be a positive number.
    """
    if not 0 < std < 12**-0.5:
        raise ValueError(f"the relative standard deviation {std} of an average is outside (0, 0.2886); try 0.05 or 0.1")
    t = std**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())
