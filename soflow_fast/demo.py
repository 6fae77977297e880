"""``soflow demo``: trains on scikit-learn's handwritten digits, samples in one and two steps, scores both."""

import json
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from soflow_fast.build import sample_shape
from soflow_fast.config import (
    DataConfig,
    EMAConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    SoFlowConfig,
    TrainConfig,
)
from soflow_fast.data import digits
from soflow_fast.evaluate import digit_scores
from soflow_fast.images import balanced_labels, grid, to_uint8
from soflow_fast.logs import METRICS_NAME
from soflow_fast.sample import Sampler
from soflow_fast.trainer import Trainer, load_run

STEPS = 1000
SAMPLES = 5000

#: What one-step samples must reach: at most, or at least.
AIMS = {"frechet_all": "<= 2.5", "frechet_held_out": "<= 3.5", "recognised": ">= 0.97", "memorisation": ">= 0.9"}

_COLUMNS = 10


def demo_config(run_dir: str, seed: int = 0, device: str = "auto") -> TrainConfig:
    """A DiT of 96 channels and 3 blocks on 8×8 digits of ten classes."""
    return TrainConfig(
        run_dir=run_dir,
        batch_size=256,
        total_steps=STEPS,
        seed=seed,
        device=device,
        model=ModelConfig(
            input_size=8,
            in_channels=1,
            num_classes=10,
            patch_size=2,
            hidden_size=96,
            depth=3,
            num_heads=4,
        ),
        data=DataConfig(kind="digits", workers=0),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        ema=EMAConfig(decay=0.999),
        soflow=SoFlowConfig(guidance_scale=2.0),
        output=OutputConfig(log_every=20, sample_every=200, sample_shape=(10, 10), checkpoint_every=200),
        evaluation=EvaluationConfig(samples=SAMPLES, batch_size=1000),
    )


def run_demo(run_dir: str, seed: int = 0, device: str = "auto") -> dict:
    """Trains, samples, scores; writes ``samples.png``, ``losses.png`` and ``metrics.json`` into ``run_dir``.

    Returns:
        What ``metrics.json`` holds: the scores of one and of two steps, and the seconds it took.
    """
    started = time.perf_counter()
    config = demo_config(run_dir, seed, device)
    last = Trainer(config).fit()
    trained = time.perf_counter()
    config, model, step = load_run(run_dir, device)
    results, samples, labels = score(model, config)
    _draw_samples(samples, labels, Path(run_dir))
    _draw_losses(Path(run_dir))
    results |= {
        "steps": step,
        "samples": SAMPLES,
        "seed": seed,
        "seconds_training": round(trained - started, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "checkpoint": str(last),
    }
    (Path(run_dir) / "metrics.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


def score(model: nn.Module, config: TrainConfig) -> tuple[dict[str, dict[str, float]], Tensor, Tensor | None]:
    """The scores of samples of one and of two steps by name, those of one step, and their labels, if any."""
    n = config.evaluation.samples
    labels, scores, drawn = balanced_labels(n, config.model.num_classes), {}, []
    for steps, name in ((1, "one_step"), (2, "two_steps")):
        sampler = Sampler(
            model,
            sample_shape(config),
            steps=steps,
            seed=config.seed,
            batch=min(config.evaluation.batch_size, n),
            precision="fp32",
            compile=False,
        )
        drawn.append(torch.cat(list(sampler.draw(labels, n))))
        scores[name] = digit_scores(drawn[-1], labels)
    return scores, drawn[0], labels


def _draw_samples(samples: Tensor, labels: Tensor, folder: Path) -> None:
    """One-step samples next to real digits, a row per class."""
    real, real_labels = digits("all").tensors
    figure, panels = plt.subplots(1, 2, figsize=(10, 5.4), layout="constrained")
    for panel, title, images, classes in (
        (panels[0], "one-step samples", samples, labels),
        (panels[1], "real digits", real, real_labels),
    ):
        rows = [images[classes == digit][:_COLUMNS] for digit in range(10)]
        panel.imshow(to_uint8(grid(torch.cat(rows), _COLUMNS))[0].numpy(), cmap="gray", interpolation="nearest")
        panel.set_title(title, pad=8)
        panel.axis("off")
    figure.savefig(folder / "samples.png", dpi=120)
    plt.close(figure)


def _draw_losses(folder: Path) -> None:
    """The losses over the steps, and the errors by time at the end."""
    lines = [json.loads(line) for line in (folder / METRICS_NAME).read_text().splitlines()]
    figure, (over_steps, by_time) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, label in (("velocity", "velocity"), ("consistency", "solution consistency")):
        over_steps.plot([x["step"] for x in lines], [x[f"{name}/mse"] for x in lines], label=label)
        bins = lines[-1][f"{name}/mse_by_time"]
        by_time.plot([(i + 0.5) / len(bins) for i in range(len(bins))], bins, marker="o", label=label)
    over_steps.set(xlabel="step", ylabel="mean squared error, unweighted", yscale="log", title="losses")
    by_time.set(xlabel="time t (0 data, 1 noise)", ylabel="mean squared error", yscale="log", title="at the last step")
    over_steps.legend()
    by_time.legend()
    figure.savefig(folder / "losses.png", dpi=120)
    plt.close(figure)
