"""The validation loss: the objective's own losses, of samples that are not trained on."""

import logging
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from soflow_fast import build, distributed
from soflow_fast.conditions import null_condition
from soflow_fast.config import GIVEN, TrainConfig
from soflow_fast.data import CIFAR10, ImageFolder, batches, digits, resident_bytes
from soflow_fast.data.order import permutation
from soflow_fast.distributed import Processes
from soflow_fast.ema import EMA
from soflow_fast.logs import Quiet, RunLog, due, going_on, is_logged, means_of, sums_of
from soflow_fast.step import TrainStep

_log = logging.getLogger(__name__)

HELD_OUT = "held_out"
_PREFIX = "validation"
# Of the order of the samples and of all draws: not the run's, so that runs of other seeds can be compared.
_SEED = int.from_bytes(b"validate", "big")


class Validation:
    """Computes the losses of held-out samples every ``output.validate_every`` steps; all processes call it alike.

    Two validations have the same samples, noise, times and dropped labels, and differ by the weights alone, and by what
    of the objective follows the training's progress. Each is of the trained weights and of the averages: among the
    metrics are ``validation/loss`` and ``validation/<part>/mse``, ``/weighted`` and ``/mse_by_time``, as of the
    training, and ``validation/ema/loss`` and so on. A failure costs that validation and not the training.

    Args:
        config: of the run. step: that it trains by. ema: its averages.
        dataset: of :func:`build_validation`. workers: that read it where it cannot be read in pieces.
        shield: makes them deaf to signals, see :meth:`~soflow_fast.stopping.StopSignal.shield_workers`.
    """

    def __init__(
        self,
        config: TrainConfig,
        step: TrainStep,
        ema: EMA,
        dataset: Dataset | None,
        processes: Processes,
        workers: int = 0,
        shield: Callable[[Iterator], Iterator] = lambda batches: batches,
    ):
        self._config, self._step, self._ema, self._dataset = config, step, ema, dataset
        self._processes, self._workers, self._shield = processes, workers, shield
        n = 0 if dataset is None else len(dataset)
        self._items = permutation(n, _SEED, 0)[: config.data.validation_samples].tolist()
        self._rows = config.batch_size // processes.world_size // config.optimizer.accumulation  # of a micro-batch

    def is_due(self, step: int) -> bool:
        """Whether a validation belongs to this step."""
        return self._dataset is not None and due(step, self._config.output.validate_every)

    def is_missing(self, step: int) -> bool:
        """Whether the validation that belongs to this step is not there, as a kill may have come before it."""
        folder = Path(self._config.run_dir)
        return self.is_due(step) and self._processes.of_first(lambda: not is_logged(folder, step, f"{_PREFIX}/"))

    def __call__(self, step: int, log: RunLog | Quiet) -> None:
        """Computes the losses and writes them among the metrics; the training has done so many steps."""
        found = None
        with going_on(f"the validation at step {step}", self._processes):
            found = self._processes.of_all(self._sums_of_share)
        if found is not None:
            log.append({"step": step, **_means(found)})

    def _sums_of_share(self) -> dict[tuple[str, str], list[float]]:
        """Sums over this process's samples, by ``ema`` or nothing, and the part, nothing for all of it."""
        config, device = self._config, self._processes.device
        share = self._processes.share(len(self._items), self._rows)
        steps = range(share.start // self._rows, -(-share.stop // self._rows)) if share else range(0)
        read = batches(
            self._dataset,
            batch=self._rows,
            steps=steps,
            seed=_SEED,
            num_classes=config.model.num_classes,
            items=self._items,
            workers=self._workers if resident_bytes(self._dataset) is None else 0,
            prefetch=config.data.prefetch,
            device=device,
            null_condition=null_condition(self._step.model.network),
        )
        sums: dict[tuple[str, str], Tensor] = {}
        with closing(self._shield(read)) as read:
            for step, (x, labels) in zip(steps, read, strict=True):
                for weights, applied in (("", nullcontext()), ("ema", self._ema.applied())):
                    with applied:
                        total = self._step.evaluate(x, labels, first_row=step * self._rows, seed=_SEED)
                    for name, part in {"": total.loss, **total.parts}.items():
                        values = sums_of(part).double()
                        if torch.is_tensor(part):  # a mean over the rows
                            values *= len(x)
                        sums[weights, name] = values + sums.get((weights, name), 0)
        return {key: values.tolist() for key, values in sums.items()}


def describe_validation(config: TrainConfig, dataset: Dataset) -> str:
    """How many samples are validated on and how often, in words."""
    n = min(config.data.validation_samples, len(dataset))
    return f"{n:,} of {len(dataset):,} samples every {config.output.validate_every:,} steps"


def build_validation(
    config: TrainConfig,
    trained_on: Dataset,
    latent_scale: float | None,
    null_condition: Tensor | None = None,
    given: Dataset | None = None,
) -> Dataset | None:
    """The validation data of a configuration, or those given, checked; None where nothing is validated.

    Args:
        trained_on: the training data. latent_scale: of them, None where they are samples.

    Raises:
        ValueError: for data that are not there, or are of another form, of other classes or no data to train on.
    """
    data, every = config.data, config.output.validate_every
    if every and data.validation is None:
        raise ValueError(
            f"output.validate_every={every} needs data that are not trained on; set data.validation, or in Python give "
            "Trainer(config, validation=dataset)"
        )
    if not every:
        if data.validation is not None and distributed.rank() == 0:
            _log.warning("data.validation=%r is not used: output.validate_every is 0, never", data.validation)
        return None
    with _as_of_validation(data.validation):
        dataset = _held_out(config, null_condition) if given is None else given
        found = build.check_dataset(config, dataset, null_condition, trained_on=False)
        if (found is None) != (latent_scale is None):
            forms = ("latent moments", "samples")
            raise ValueError(f"it holds {forms[found is None]}, and the training data {forms[latent_scale is None]}")
        both = isinstance(dataset, ImageFolder) and isinstance(trained_on, ImageFolder)
        if both and dataset.classes != trained_on.classes:
            other = next(iter(set(dataset.classes) ^ set(trained_on.classes)))
            raise ValueError(
                f"its {len(dataset.classes)} class folders are not the {len(trained_on.classes)} of the training data, "
                f"whose order numbers the classes ({other!r} is in one of them only); give it the same"
            )
    return dataset


def _held_out(config: TrainConfig, null_condition: Tensor | None) -> Dataset:
    data = config.data
    if data.validation == GIVEN:
        raise ValueError("that stands for Trainer(config, validation=dataset); give it again, or choose a path")
    if data.kind == GIVEN:
        raise ValueError(
            "the training data were given to the Trainer as an object, so that what lies at a path is not known; give "
            "Trainer(config, validation=dataset)"
        )
    if data.kind in ("digits", "cifar10") and data.validation != HELD_OUT:
        raise ValueError(f"data.kind={data.kind!r} has one part that is not trained on; set {HELD_OUT}")
    if data.kind == "digits":
        return digits(HELD_OUT)
    if data.kind == "cifar10":
        return CIFAR10(data.path, num_classes=config.model.num_classes, train=False)
    arguments = {name: value for name, value in data.init_args.items() if name != "path"}
    of_path = replace(data, path=data.validation, init_args=arguments, flip=False)
    return build.build_dataset(replace(config, data=of_path), null_condition)


@contextmanager
def _as_of_validation(setting: str) -> Iterator[None]:
    """Has the sentences of what is checked as training data are say what they are about."""
    try:
        yield
    except ValueError as error:
        sentence = str(error).replace("data.path", "data.validation").replace("dataset=", "validation=")
        raise ValueError(f"data.validation={setting!r}: {sentence}") from error


def _means(found: list[dict[tuple[str, str], list[float]]]) -> dict[str, float | list[float | None]]:
    """The metrics, from the sums of each process."""
    sums: dict[tuple[str, str], list[float]] = {}
    for theirs in found:
        for key, values in theirs.items():
            before = sums.get(key, [0.0] * len(values))
            sums[key] = [a + b for a, b in zip(before, values, strict=True)]
    values = {}
    for (weights, name), of_part in sums.items():
        path = "/".join(part for part in (_PREFIX, weights, name) if part)
        values |= means_of(path, of_part)
    return values
