"""The optimizer's section of the configuration, and the learning rate of each step."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from soflow_fast.config_io import Section
from soflow_fast.config_model import GIVEN
from soflow_fast.imported import check_arguments, is_import_path
from soflow_fast.require import require, require_count

OPTIMIZER_NAMES = ("adamw", "radam", GIVEN)


@dataclass
class OptimizerConfig(Section, section="optimizer."):
    """The optimizer, see :mod:`soflow_fast.optim`, and its learning rate.

    Attributes:
        name: ``adamw``; ``radam`` (Rectified Adam, arXiv 1908.03265, with AdamW's weight decay); ``given`` (made by a
            function given to the Trainer); or the import path of a class or function, such as ``torch.optim.SGD``, that
            makes a torch optimizer from the list of (name, parameter) that are trained, from lr and from init_args.
        learning_rate: the highest; a group of parameters that was made with another keeps its ratio to this one.
        betas, eps, weight_decay: of adamw and radam. grad_clip: largest global gradient norm, or None.
        accumulation: micro-batches a batch is split into; it divides the batch.
        warmup_steps: in which the learning rate rises linearly, from learning_rate/warmup_steps.
        schedule: after that: ``constant``; ``linear`` and ``cosine`` fall to final_share of it, in [0, 1], at the end
            of the run; ``inverse_sqrt`` is ``1/sqrt(step/decay_start)`` of it (EDM2, arXiv 2312.02696).
        decay_start: step, counted from 0, after which it falls; by default warmup_steps.
    """

    name: str = "adamw"
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float | None = None
    accumulation: int = 1
    warmup_steps: int = 0
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "constant"
    decay_start: int | None = None
    final_share: float = 0.0
    init_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        require(
            self.name in OPTIMIZER_NAMES or self.is_imported,
            f"optimizer.name={self.name!r} is not known; choose one of {', '.join(OPTIMIZER_NAMES)}, or "
            "package.module.Class",
        )
        check_arguments("optimizer.init_args", self.name, self.init_args)
        require(
            "lr" not in self.init_args,
            f"optimizer.init_args has lr={self.init_args.get('lr')!r}; give it as optimizer.learning_rate",
        )
        is_own = self.name not in ("adamw", "radam")
        for name in ("betas", "eps", "weight_decay") if is_own else ():
            require(
                getattr(self, name) == getattr(type(self), name),
                f"optimizer.{name}={getattr(self, name)} does nothing with optimizer.name={self.name!r}; leave it out, "
                "and give what makes the optimizer its own (optimizer.init_args)",
            )
        require(self.learning_rate > 0, f"optimizer.learning_rate={self.learning_rate} must be greater than 0")
        require(
            all(0 <= beta < 1 for beta in self.betas), f"optimizer.betas={tuple(self.betas)} must both be in [0, 1)"
        )
        require(self.eps > 0, f"optimizer.eps={self.eps} must be greater than 0")
        require(self.weight_decay >= 0, f"optimizer.weight_decay={self.weight_decay} must not be negative")
        require(
            self.grad_clip is None or self.grad_clip > 0,
            f"optimizer.grad_clip={self.grad_clip} must be greater than 0, or null for no clipping",
        )
        require_count("optimizer.accumulation", self.accumulation)
        require_count("optimizer.warmup_steps", self.warmup_steps, least=0)
        require(0 <= self.final_share <= 1, f"optimizer.final_share={self.final_share} must be in [0, 1]")
        without_effect = {
            "decay_start": self.decay_start is not None and self.schedule == "constant",
            "final_share": self.final_share > 0 and not self._falls_to_the_end,
        }
        for name, is_so in without_effect.items():
            require(
                not is_so,
                f"optimizer.{name}={getattr(self, name)} does nothing with optimizer.schedule={self.schedule!r}; "
                "leave it out, or choose another schedule",
            )
        require(
            self._start >= self.warmup_steps,
            f"optimizer.decay_start={self.decay_start} must be at least optimizer.warmup_steps={self.warmup_steps}",
        )
        require(
            self.schedule != "inverse_sqrt" or self._start > 0,
            "optimizer.schedule='inverse_sqrt' falls from a step greater than 0; set optimizer.decay_start, such as "
            "70000, or optimizer.warmup_steps",
        )

    @property
    def is_imported(self) -> bool:
        """Whether the name is an import path."""
        return is_import_path(self.name)

    @property
    def _falls_to_the_end(self) -> bool:
        return self.schedule in ("linear", "cosine")

    @property
    def _start(self) -> int:
        return self.warmup_steps if self.decay_start is None else self.decay_start

    def check_total_steps(self, total_steps: int) -> None:
        """ValueError where a run of so many steps would end before a fall that ends with it begins."""
        name = "warmup_steps" if self.decay_start is None else "decay_start"
        require(
            not self._falls_to_the_end or self._start < total_steps,
            f"optimizer.{name}={self._start} leaves optimizer.schedule={self.schedule!r} no step of "
            f"total_steps={total_steps}; choose fewer",
        )

    def check_warmup(self, total_steps: int) -> None:
        """ValueError where a run of so many steps would end before the learning rate is reached."""
        require(
            self.warmup_steps <= total_steps,
            f"optimizer.warmup_steps={self.warmup_steps} is more than total_steps={total_steps}, and "
            f"optimizer.learning_rate={self.learning_rate} is never reached; choose fewer",
        )

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """The learning rate of a step, counted from 0, of a run of ``total_steps``; none is 0.

        A function of its arguments alone, so that a stopped run goes on exactly.
        """
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant" or step <= self._start:
            return self.learning_rate
        if self.schedule == "inverse_sqrt":
            return self.learning_rate * math.sqrt(self._start / step)
        fallen = (step - self._start) / (total_steps - self._start)
        if self.schedule == "cosine":
            fallen = (1 - math.cos(math.pi * fallen)) / 2
        return self.learning_rate * (1 - (1 - self.final_share) * fallen)
