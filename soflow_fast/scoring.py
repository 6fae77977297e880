"""Evaluation during training, by all processes, and the score by which a checkpoint is the best."""

import logging
import math
from pathlib import Path

from torch import nn
from torch.utils.data import Dataset

from soflow_fast import checkpoint
from soflow_fast.config import TrainConfig
from soflow_fast.distributed import Processes
from soflow_fast.ema import EMA
from soflow_fast.evaluate import Reference, compared_with, evaluate, why_unscored
from soflow_fast.logs import Quiet, RunLog, due, going_on, is_logged
from soflow_fast.sample import Decoder

_log = logging.getLogger(__name__)

_PREFIX = "evaluation/"


class Scoring:
    """Scores the averaged weights of a run every ``evaluation.every`` steps; all its processes call it alike.

    A failure, in whichever process, costs that score and not the training.

    Args:
        config: of the run. model: the objective that is trained. ema: its averages. dataset: that it is trained on.
        decode: from latents to images.

    Attributes:
        lacking: why evaluations that are asked for give no score, or None.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        ema: EMA,
        dataset: Dataset,
        processes: Processes,
        decode: Decoder | None,
    ):
        self._config, self._model, self._ema, self._processes = config, model, ema, processes
        self._run_dir = Path(config.run_dir)
        self._folder = self._run_dir / "evaluation" / "during-training"  # each overwrites the samples of the one before
        reference = Reference(config, self._folder.parent / "reference")
        self._options = {"dataset": dataset, "decode": decode, "processes": processes, "reference": reference}
        self.lacking = why_unscored(config) if config.evaluation.every else None

    def is_due(self, step: int) -> bool:
        """Whether a score belongs to this step."""
        return not self.lacking and due(step, self._config.evaluation.every)

    def is_missing(self, step: int) -> bool:
        """Whether the score that belongs to this step is not there, as a kill may have come before it."""
        return self.is_due(step) and self._processes.of_first(lambda: not is_logged(self._run_dir, step, _PREFIX))

    def __call__(self, step: int, log: RunLog | Quiet) -> None:
        """Draws, scores, writes the scores among the metrics, and keeps the best checkpoint where that is asked for."""
        scores = None
        with going_on(f"the evaluation at step {step}", self._processes), self._ema.applied():
            scores = evaluate(self._model, self._config, self._folder, **self._options)
        if scores is None:
            return
        # First: what the metrics have is not scored again.
        if self._config.output.keep_best and self._processes.is_first:
            self._keep_best(step, scores)
        log.append({"step": step, **{f"{_PREFIX}{name}": value for name, value in scores.items()}})

    def _keep_best(self, step: int, scores: dict[str, float | str]) -> None:
        distance = scores.get("frechet", scores.get("frechet_all", math.nan))
        if not math.isfinite(distance):
            return
        settings = {name: getattr(self._config.evaluation, name) for name in ("samples", "steps", "weights")}
        of = {**settings, **compared_with(self._config)}
        path = checkpoint.path_of(self._run_dir / checkpoint.CHECKPOINTS, step)
        try:
            checkpoint.add_score(path, distance, of, self._config.output.keep_checkpoints)
        except OSError as error:
            _log.warning("the score of step %d could not be kept, and training goes on: %s", step, error)
