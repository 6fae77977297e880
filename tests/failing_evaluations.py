"""Run by torchrun in two processes: a training of whose three evaluations the first fails in the second process, as it
writes samples, and the second in the first, as it scores them; then the first alone evaluates the averages once more.

Each process leaves ``<run>-<rank>.json``: the samples that it wrote, and a sum over the weights that it trained.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from runs import tiny_config

from soflow_fast import Trainer, distributed, evaluate, images
from soflow_fast.config import DataConfig, EvaluationConfig, TrainConfig


def image_config(run_dir: Path, folder: Path, every: int = 0) -> TrainConfig:
    """A run on a folder of images; 30 samples, in batches of 7, are scored by their pixels."""
    config = tiny_config(
        run_dir,
        data=DataConfig(kind="folder", path=str(folder), workers=0),
        evaluation=EvaluationConfig(every=every, samples=30, batch_size=7, features="pixels"),
    )
    model, output = replace(config.model, in_channels=3), replace(config.output, keep_best=every > 0)
    return replace(config, model=model, output=output)


def _failing_once(function):
    left = [OSError("the disk is full")]

    def call(*args, **options):
        if left:
            raise left.pop()
        return function(*args, **options)

    return call


def main(run_dir: Path, folder: Path) -> None:
    run = Trainer(image_config(run_dir, folder, every=2))
    rank, written, save_png = run.processes.rank, [], images.save_png
    images.save_png = lambda image, path, **how: written.append(path.name) or save_png(image, path, **how)
    owner, name = ((evaluate.Reference, "scores"), (evaluate, "save_folder"))[rank]
    setattr(owner, name, _failing_once(getattr(owner, name)))
    run.fit()
    weights = sum(float(value.double().abs().sum()) for value in run.model.state_dict().values())
    Path(f"{run_dir}-{rank}.json").write_text(json.dumps({"written": written, "weights": weights}))
    if rank == 0:
        with run.ema.applied():
            print(evaluate.evaluate(run.model, run.config, run_dir / "evaluation" / "alone")["frechet"])
    distributed.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
