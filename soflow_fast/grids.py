"""Grids of samples during training, to be looked at."""

import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from soflow_fast.build import sample_shape
from soflow_fast.checkpoint import replaced
from soflow_fast.conditions import ItemConditions
from soflow_fast.config import TrainConfig
from soflow_fast.distributed import Processes
from soflow_fast.ema import EMA
from soflow_fast.images import are_images, save_samples, suffix_of_samples
from soflow_fast.logs import Quiet, RunLog, due, going_on
from soflow_fast.sample import Decoder, Sampler


class Grids:
    """Draws a grid of the averaged weights every ``output.sample_every`` steps; all processes call it alike, and the
    first alone draws.

    A failure costs that grid and not the training.

    Args:
        config: of the run. model: the objective that is trained. ema: its averages. labels: of the samples of a grid.
        decode: from latents to images.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        ema: EMA,
        labels: Tensor | ItemConditions | None,
        processes: Processes,
        decode: Decoder | None,
    ):
        self._config, self._model, self._ema, self._labels = config, model, ema, labels
        self._processes, self._decode = processes, decode
        self._folder = Path(config.run_dir) / "samples"

    def is_due(self, step: int) -> bool:
        """Whether a grid belongs to this step."""
        return due(step, self._config.output.sample_every)

    def is_missing(self, step: int) -> bool:
        """Whether the grid that belongs to this step is not there, as a kill may have come before it."""
        return self.is_due(step) and self._processes.of_first(
            lambda: not any(self._folder.glob(f"{self._stem(step).name}.*"))
        )

    def __call__(self, step: int, log: RunLog | Quiet) -> None:
        """Draws and writes one; a file that is there is whole."""
        self._processes.of_first(partial(self._try, step, log))

    def _try(self, step: int, log: RunLog | Quiet) -> None:
        # here, so that the other processes, which draw nothing, do not learn of a failure
        with going_on(f"the sample grid at step {step}", self._processes):
            self._draw(step, log)

    def _draw(self, step: int, log: RunLog | Quiet) -> None:
        config, output = self._config, self._config.output
        n = math.prod(output.sample_shape)
        with self._ema.applied():
            sampler = Sampler(
                self._model,
                sample_shape(config),
                steps=output.sample_steps,
                seed=config.seed,
                batch=min(config.evaluation.batch_size, n),
                compile=False,
            )
            samples = torch.cat(list(sampler.draw(self._labels, n, self._decode)))
        of_images = are_images(samples.shape[1])
        path = self._stem(step).with_suffix(suffix_of_samples(of_images))
        with replaced(path) as temporary:
            save_samples(samples, temporary.with_suffix(""), output.sample_shape[1])
        if of_images:
            log.show("samples", step, path)

    def _stem(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}"
