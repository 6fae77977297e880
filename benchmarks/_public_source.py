"""The published SoFlow code, unmodified, as one more row: its ``models.py`` runs in the benchmark's training step.

What is expected of ``models.py`` is that of github.com/zlab-princeton/SoFlow::

    Soflow(data_channels, data_size, num_classes, cfg_drop_rate, model_type)   # a module with .network and .forward
    soflow(get_velocity_loss=True, samples, t, labels, cfg_mask, cfg_scale, cfg_decay_time, p, eps, mix_ratio,
           augment_labels)                            # (loss, mean squared error, mean weight), each 0-d
    soflow(get_velocity_loss=False, ..., l, s, ...)   # the same

with times (n, 1, 1, 1), as its ``train.py`` passes them, and noise drawn inside by ``torch.randn_like``.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from _baselines import EagerSoFlow
from _rows import ROWS, Row, replace
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from soflow_fast.kernels.reference import Stream
from soflow_fast.objectives.base import LossOutput, TotalLoss, combine

ID = "soflow/public-source"


def public_source_row(directory: Path, model: str) -> Row:
    """The row of the published code in a folder, trained as ``soflow/public`` is.

    Raises:
        ValueError: where the folder has no ``models.py``.
    """
    if not (directory / "models.py").is_file():
        raise ValueError(f"--public-source {directory} holds no models.py; give a checkout of the published code")
    settings = {"quotient": "two_forwards", "source": directory, "model_type": model.replace("/", "-")}
    what = "the published models.py, unmodified: eager, TF32, torch's AdamW, EMA in a Python loop"
    return replace(ROWS["soflow/public"], what=what, objective=PublicSourceSoFlow, settings=settings)


class PublicSourceSoFlow(EagerSoFlow):
    """The published losses on the published network with our weights, at the times and label drops of every row.

    Raises:
        ValueError: where the published network of that name does not have our weights.
    """

    def __init__(self, net: nn.Module, *, source: Path, model_type: str, **settings):
        super().__init__(net, **settings)
        published = (
            _models(source)
            .Soflow(
                data_channels=net.in_channels,
                data_size=net.input_size,
                num_classes=net.num_classes,
                cfg_drop_rate=self.label_drop,
                model_type=model_type,
            )
            .to(next(net.parameters()).device)
        )
        try:
            published.load_state_dict(self.state_dict())
        except RuntimeError as error:
            raise ValueError(f"the published {model_type} does not have the weights of this model") from error
        self.network = published.network
        self._published = (published,)  # in a tuple, so that its parameters are not registered twice
        self._noise_is_given = False

    @contextmanager
    def given_noise(self) -> Iterator[None]:
        """Within it the published code gets the noise of the other rows, so that it can be checked."""
        self._noise_is_given = True
        try:
            yield
        finally:
            self._noise_is_given = False

    def loss_of_rows(self, x0, labels, rows, n_velocity, progress, seed, step, latent_scale=None) -> TotalLoss:
        n, (published,) = n_velocity, self._published
        times = self.draw_times(rows, n, progress, seed, step)
        drop = self.draw_drop(rows, None, seed, step)
        t, s, gap = (time.view(-1, 1, 1, 1) for time in times)
        shared = {
            "cfg_scale": self.guidance_scale,
            "cfg_decay_time": self.guidance_decay_time,
            "p": self.p,
            "eps": self.eps,
            "mix_ratio": self.guidance_mix,
            "augment_labels": None,
        }
        noise = nullcontext()
        if self._noise_is_given:
            z = self.ops.normal(rows, x0[0].numel(), seed=seed, step=step, stream=Stream.NOISE).view_as(x0)
            noise = _Noise([z[:n], z[n:]])
        with noise:
            velocity = published(
                get_velocity_loss=True, samples=x0[:n], t=t[:n], labels=labels[:n], cfg_mask=drop[:n], **shared
            )
            consistency = published(
                get_velocity_loss=False,
                samples=x0[n:],
                t=t[n:],
                l=t[n:] - gap,
                s=s,
                labels=labels[n:],
                cfg_mask=drop[n:],
                **shared,
            )
        return combine({"velocity": _output(velocity, times.t[:n]), "consistency": _output(consistency, times.t[n:])})


class _Noise(TorchFunctionMode):
    """``torch.randn_like`` returns the given tensors in turn."""

    def __init__(self, noise: list[Tensor]):
        super().__init__()
        self._noise = iter(noise)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return next(self._noise) if function is torch.randn_like else function(*args, **(kwargs or {}))


def _output(means: tuple[Tensor, Tensor, Tensor], t: Tensor) -> LossOutput:
    loss, mse, weight = means
    return LossOutput(loss, mse.detach().expand_as(t), weight.detach().expand_as(t), t)


def _models(directory: Path):
    sys.path.insert(0, str(directory.resolve()))
    try:
        return importlib.import_module("models")
    finally:
        sys.path.pop(0)
