"""Evaluation during training, by all processes, and the score by which a checkpoint is the best."""

import logging
import math
from contextlib import ExitStack
from pathlib import Path

from torch import nn
from torch.utils.data import Dataset

from soflow_fast import checkpoint
from soflow_fast.config import TrainConfig
from soflow_fast.distributed import OtherProcessError, Processes
from soflow_fast.ema import EMA
from soflow_fast.evaluate import evaluate, why_unscored
from soflow_fast.logs import Quiet, RunLog
from soflow_fast.sample import Decoder

_log = logging.getLogger(__name__)


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
        self._drawing = {"dataset": dataset, "decode": decode, "processes": processes}
        self._run_dir = Path(config.run_dir)
        self.lacking = why_unscored(config) if config.evaluation.every else None

    def due(self, step: int) -> bool:
        """Whether there is an evaluation after this step."""
        every = self._config.evaluation.every
        return step > 0 and every > 0 and step % every == 0 and self.lacking is None

    def owed(self, step: int) -> bool:
        """Whether the best is to be known and this step's checkpoint, from which the run goes on, has no score yet."""
        if not (self._config.output.keep_best and self.due(step)):
            return False
        return self._processes.of_first(lambda: checkpoint.score_of(self._checkpoint(step)) is None)

    def __call__(self, step: int, log: RunLog | Quiet) -> None:
        """Draws, scores, writes the scores among the metrics, and keeps the best checkpoint where that is asked for."""
        folder = self._run_dir / "evaluation" / "during-training"  # the next one overwrites its samples
        try:
            with ExitStack() as stack:
                self._processes.of_all(lambda: stack.enter_context(self._ema.applied()))
                scores = evaluate(self._model, self._config, folder, **self._drawing)
            if self._config.output.keep_best:
                self._processes.of_all(lambda: self._keep_best(step, scores))
        except OtherProcessError as error:
            if self._processes.is_first:  # the one that failed says more
                _log.warning("the evaluation at step %d failed, and training goes on: %s", step, error)
        except Exception as error:
            _log.warning("the evaluation at step %d failed, and training goes on: %s", step, error, exc_info=error)
        else:
            log.append({"step": step, **{f"evaluation/{name}": value for name, value in scores.items()}})

    def _keep_best(self, step: int, scores: dict[str, float | str]) -> None:
        distance = scores.get("frechet", scores.get("frechet_all", math.nan))
        if self._processes.is_first and math.isfinite(distance):
            checkpoint.add_score(self._checkpoint(step), distance, self._config.output.keep_checkpoints)

    def _checkpoint(self, step: int) -> Path:
        return checkpoint.path_of(self._run_dir / checkpoint.CHECKPOINTS, step)
