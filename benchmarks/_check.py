"""Whether a row computes what it should: its loss and gradient against the plain objective in float64."""

import torch
from _baselines import SixCalls
from _rows import SEED, Row, Workload
from torch import Tensor

from soflow_fast import DiT, SoFlow
from soflow_fast.objectives.flow_matching import FlowMatching
from soflow_fast.objectives.meanflow import MeanFlow
from soflow_fast.step import StepStats, TrainStep

#: The step that is checked, from 0: by then a CUDA graph is captured and replayed.
CHECKED_STEP = 4

# Rows of the float64 objective at once, which decides its memory only.
_CHUNK = 16

# How a row takes its quotient or derivative is what is checked.
_METHOD = {"quotient", "derivative", "difference_step", "source", "model_type"}


class Truth:
    """Loss and gradient of the plain objectives on one workload: eager, float64, math attention, each loss with its own
    network calls, the quotient by two forwards, the derivative by torch.func.jvp. Each is computed once."""

    def __init__(self, workload: Workload):
        self.workload = workload
        self._known: dict[tuple, tuple[float, dict[str, Tensor]]] = {}

    def errors(self, row: Row, step: TrainStep, stats: StepStats) -> dict[str, float]:
        """Relative errors ``{"loss_error": ..., "gradient_error": ...}`` of the row's step ``CHECKED_STEP``."""
        loss, gradients = self.compute(row)
        total = sum(len(part.t) for part in stats.parts.values())
        ours = sum(part.loss.item() * len(part.t) / total for part in stats.parts.values())
        squares = torch.zeros(2, dtype=torch.float64)
        for name, p in step.model.named_parameters():
            if p.requires_grad:
                expected = gradients[name].to(p.device)
                both = torch.stack([(p.grad - expected).square().sum(), expected.square().sum()])
                squares += both.double().cpu()
        return {"loss_error": abs(ours / loss - 1), "gradient_error": (squares[0] / squares[1]).sqrt().item()}

    def compute(self, row: Row) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients by name, on the CPU in float32, of the row's plain objective."""
        kind = next(kind for kind in (FlowMatching, SoFlow, MeanFlow) if issubclass(row.objective, kind))
        settings = {name: value for name, value in row.settings.items() if name not in _METHOD}
        key = (kind, *sorted(settings.items()))
        if key not in self._known:
            self._known[key] = self._evaluate(kind, settings)
        return self._known[key]

    def _evaluate(self, kind, settings: dict) -> tuple[float, dict[str, Tensor]]:
        method = {SoFlow: {"quotient": "two_forwards"}, MeanFlow: {"derivative": "jvp"}}.get(kind, {})
        net = self.workload.network(DiT, impl="torch", attention="math").double()
        objective = {SoFlow: SixCalls}.get(kind, kind)(net, **self.workload.recipe(kind), **settings, **method)
        (x0, labels), loss = self.workload.data(), 0.0
        for first in range(0, len(x0), _CHUNK):
            rows = slice(first, first + _CHUNK)
            part = objective.loss(
                x0[rows].double(), labels[rows], 1.0, seed=SEED, step=CHECKED_STEP, first_row=first
            ).loss * (len(labels[rows]) / len(labels))
            part.backward()
            loss += part.item()
        return loss, {name: p.grad.float().cpu() for name, p in objective.named_parameters() if p.requires_grad}
