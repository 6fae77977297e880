"""The configuration of a run: nested dataclasses, read from YAML and ``--name value`` overrides.

The defaults are the published ImageNet 256 recipe (arXiv 2512.15657) with DiT-B/4 on 4×32×32 latents.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from soflow_fast import interop
from soflow_fast.config_data import DataConfig
from soflow_fast.config_io import (
    Section,
    as_path,
    dump_yaml,
    flatten,
    lists,
    mappings,
    parse,
    read_yaml,
    require_known_overrides,
)
from soflow_fast.config_model import GIVEN, ModelConfig
from soflow_fast.config_objective import (
    OBJECTIVE_SECTIONS,
    AlphaFlowConfig,
    FlowMatchingConfig,
    ImprovedMeanFlowConfig,
    MeanFlowConfig,
    SCMConfig,
    SoFlowConfig,
)
from soflow_fast.config_optimizer import OptimizerConfig
from soflow_fast.imported import check_arguments, is_import_path
from soflow_fast.require import require, require_count

_log = logging.getLogger(__name__)


@dataclass
class ComputeConfig(Section, section="compute."):
    """How a step is computed, see :class:`~soflow_fast.step.TrainStep`; ``auto`` is its own choice for the device.

    A run records the precision that was chosen, and keeps it. compile and cuda_graph may change during it, as the
    device may: they change how results are rounded and what a network draws by itself, such as dropout.

    Attributes:
        precision: ``bf16``, ``tf32`` or ``fp32``. compile: whether torch.compile is used; ``max-autotune`` also has it
            try implementations of the matrix products. cuda_graph: whether a step is one CUDA graph.
    """

    precision: Literal["auto", "bf16", "tf32", "fp32"] = "auto"
    compile: bool | Literal["auto", "max-autotune"] = "auto"
    cuda_graph: bool | Literal["auto"] = "auto"


@dataclass
class EMAConfig(Section, section="ema."):
    """The averaged weights that samples are drawn from, see :class:`~soflow_fast.ema.EMA`, and those from which others
    can be had after the training, see :mod:`soflow_fast.posthoc`.

    Attributes:
        decay: of the first, in [0, 1). warmup: whether it grows from 0.1 to that value. posthoc: relative standard
            deviations of the others, in (0, 12^-1/2): none, or at least two, such as the published 0.05 and 0.1; each
            costs, a parameter, 4 bytes of memory and 12 of traffic.
        snapshot_every: steps between their snapshots, which take 4 bytes a parameter on the disk and are kept.
    """

    decay: float = 0.9999
    warmup: bool = True
    posthoc: tuple[float, ...] = ()
    snapshot_every: int = 5000

    def __post_init__(self):
        super().__post_init__()
        require(0 <= self.decay < 1, f"ema.decay={self.decay} must be in [0, 1)")
        stds = self.posthoc
        require(
            len(stds) != 1 and len(set(stds)) == len(stds) and all(0 < std < 12**-0.5 for std in stds),
            f"ema.posthoc={list(stds)} must be two or more different values in (0, 0.2886), such as [0.05, 0.1], or []",
        )
        require_count("ema.snapshot_every", self.snapshot_every)


@dataclass
class OutputConfig(Section, section="output."):
    """What a run writes, and how often, in steps; 0 is never.

    Attributes:
        log_every: between lines of metrics. sample_every: between grids of samples. sample_shape: (rows, columns) of a
            grid. sample_steps: of the sampler. sample_labels: the classes, repeated in turn; by default evenly spread.
        checkpoint_every: between checkpoints. checkpoint_minutes: one is written, too, once so many minutes have passed
            since the last. keep_checkpoints: how many of the newest stay. keep_every: those whose step is a multiple of
            it stay too. keep_best: so does the one with the lowest Fréchet distance of the evaluations, ``frechet``, or
            of the digits ``frechet_all``, among those scored in the same way. save_frozen: whether checkpoints hold
            parameters that are not trained; else the network has to bring them itself, see
            :mod:`soflow_fast.frozen`.
        validate_every: between losses on the data of ``data.validation``, see :mod:`soflow_fast.validation`.
    """

    log_every: int = 100
    sample_every: int = 1000
    sample_shape: tuple[int, int] = (4, 8)
    sample_labels: tuple[int, ...] = ()
    sample_steps: int = 1
    checkpoint_every: int = 10_000
    checkpoint_minutes: int = 0
    keep_checkpoints: int = 3
    keep_every: int = 0
    keep_best: bool = False
    save_frozen: bool = True
    validate_every: int = 0

    def __post_init__(self):
        super().__post_init__()
        for name in ("sample_every", "checkpoint_every", "checkpoint_minutes", "keep_every", "validate_every"):
            require_count(f"output.{name}", getattr(self, name), least=0)
        for name in ("log_every", "sample_steps", "keep_checkpoints"):
            require_count(f"output.{name}", getattr(self, name))
        for size in self.sample_shape:
            require_count("output.sample_shape", size)
        require(
            self.keep_every == 0 or (self.checkpoint_every and self.keep_every % self.checkpoint_every == 0),
            f"output.keep_every={self.keep_every} is no multiple of output.checkpoint_every={self.checkpoint_every}; "
            "not all of its steps have a checkpoint; choose a multiple",
        )


@dataclass
class EvaluationConfig(Section, section="evaluation."):
    """How samples are scored, see :mod:`soflow_fast.evaluate`.

    Attributes:
        every: steps between evaluations during training, 0 for none. samples: how many are drawn, batch_size at a
            time, in ``steps`` sampling steps. features: an extractor of torch-fidelity, or ``pixels``; by default
            ``pixels`` for the digits and ``inception-v3-compat`` otherwise. weights: file of the extractor's weights.
        reference: folder of the real images, or ``.npz`` file of their features' mean ``mu`` and covariance ``sigma``
            as ADM and EDM publish them; by default the training data, where they are a folder or CIFAR-10.
        metrics: besides the Fréchet distance, see :func:`soflow_fast.fidelity.scores`; ``kid`` and ``prc`` need
            real images, in a folder or in the array ``arr_0`` of ADM's files.
    """

    every: int = 0
    samples: int = 50_000
    batch_size: int = 125
    steps: int = 1
    features: str | None = None
    weights: str | None = None
    reference: str | None = None
    metrics: tuple[Literal["isc", "kid", "prc"], ...] = ()

    def __post_init__(self):
        self.reference = as_path(self.reference)
        super().__post_init__()
        require_count("evaluation.every", self.every, least=0)
        for name in ("batch_size", "steps"):
            require_count(f"evaluation.{name}", getattr(self, name))
        # the Inception Score is of ten parts, and a point's third neighbour is not itself
        least = max({"isc": 10, "prc": 4}.get(name, 2) for name in ("", *self.metrics))
        require_count("evaluation.samples", self.samples, least=least)


# What may change between the parts of one run: it has no influence on the trained weights, but for the rounding of
# another device or compiler. What lies at data.path does; the run's record of its data is compared.
_FREE = {
    "run_dir",
    "device",
    "max_skipped_steps",
    "compute.compile",
    "compute.cuda_graph",
    "model.recompute",
    "data.on_device",
    "data.path",
    "data.prefetch",
    "data.vae",
    "data.validation",
    "data.validation_samples",
    "data.workers",
    "ema.snapshot_every",
    "improved_meanflow.sample_interval",
    "improved_meanflow.sample_scale",
}
_FREE_SECTIONS = ("output.", "evaluation.")


@dataclass
class TrainConfig(Section):
    """Everything a training run depends on.

    Attributes:
        run_dir: where the run is written and continued; here, in data.path, initial_weights and evaluation.reference
            ``~`` is the home. objective: the name of its section, such as ``soflow``; ``given`` (an object of another
            class given to the Trainer, see :mod:`soflow_fast.records`); or the import path of a class or function,
            such as ``my_package.Aligned``, that makes an :class:`~soflow_fast.objectives.base.Objective` of the network
            and of objective_args.
        batch_size: rows of a step, over all micro-batches and processes, which share them equally.
        total_steps: of the run. seed: of every draw.
        device: ``auto`` (a GPU where there is one), ``cpu``, ``cuda`` or ``cuda:1``.
        max_skipped_steps: how many steps with a loss or gradient that is not finite may be skipped before the run
            stops.
        initial_weights: what the first step starts from, network and averages: a file of weights or the folder of a
            run, see :func:`~soflow_fast.weights.load_weights`; drawn from the seed where there is none.
        initial_weights_except: parts of the network that are drawn all the same, such as ``y_embedder`` for other
            classes. initial_weights_form: ``own``; or ``sit``, ``repa``, ``meanflow`` or ``imf`` for weights of those
            trainings, see :mod:`soflow_fast.flow_weights`.
    """

    run_dir: str = "runs/soflow"
    objective: str = "soflow"
    objective_args: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 256
    total_steps: int = 400_000
    seed: int = 0
    device: str = "auto"
    max_skipped_steps: int = 0
    initial_weights: str | None = None
    initial_weights_except: tuple[str, ...] = ()
    initial_weights_form: Literal["own", "sit", "repa", "meanflow", "imf"] = "own"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    soflow: SoFlowConfig = field(default_factory=SoFlowConfig)
    meanflow: MeanFlowConfig = field(default_factory=MeanFlowConfig)
    improved_meanflow: ImprovedMeanFlowConfig = field(default_factory=ImprovedMeanFlowConfig)
    alphaflow: AlphaFlowConfig = field(default_factory=AlphaFlowConfig)
    scm: SCMConfig = field(default_factory=SCMConfig)
    flow_matching: FlowMatchingConfig = field(default_factory=FlowMatchingConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self):
        self.run_dir, self.initial_weights = as_path(self.run_dir), as_path(self.initial_weights)
        super().__post_init__()
        require(self.run_dir != "", "run_dir is empty; name the folder of the run, such as runs/soflow")
        require(
            self.objective in (*OBJECTIVE_SECTIONS, GIVEN) or is_import_path(self.objective),
            f"objective={self.objective!r} is not known; choose one of {', '.join(OBJECTIVE_SECTIONS)}, or "
            "package.module.Class",
        )
        check_arguments("objective_args", self.objective, self.objective_args)
        for name in ("batch_size", "total_steps"):
            require_count(name, getattr(self, name))
        require_count("max_skipped_steps", self.max_skipped_steps, least=0)
        for name, default in (("initial_weights_except", ()), ("initial_weights_form", "own")):
            value = getattr(self, name)
            require(
                self.initial_weights is not None or value == default,
                f"{name}={list(value) if isinstance(value, tuple) else value!r} does nothing without initial_weights; "
                "set that, or leave it out",
            )
        require(0 <= self.seed < 2**63, f"seed={self.seed} must be in [0, 2^63)")
        require(
            self.batch_size % self.optimizer.accumulation == 0,
            f"optimizer.accumulation={self.optimizer.accumulation} does not divide batch_size={self.batch_size}; "
            "choose one that does",
        )
        self.optimizer.check_total_steps(self.total_steps)
        for name, values in (("latent_mean", self.data.latent_mean), ("latent_std", self.data.latent_std)):
            require(
                len(values) in (0, self.model.in_channels),
                f"data.{name} has {len(values)} numbers and model.in_channels={self.model.in_channels}; give one a "
                "channel",
            )
        scored, saved = self.evaluation.every, self.output.checkpoint_every
        require(
            not self.output.keep_best or (scored and saved and scored % saved == 0),
            f"output.keep_best=True needs a checkpoint of every step that is evaluated: evaluation.every={scored} must "
            f"be a multiple of output.checkpoint_every={saved}, and both greater than 0",
        )

    def require_effect(self) -> None:
        """ValueError for what cannot act in so few steps; asked to train alone, as runs on record may have it."""
        self.optimizer.check_warmup(self.total_steps)
        require(
            not self.ema.posthoc or self.ema.snapshot_every <= self.total_steps,
            f"ema.snapshot_every={self.ema.snapshot_every} leaves ema.posthoc={list(self.ema.posthoc)} one snapshot in "
            f"total_steps={self.total_steps}, which gives hardly another average; choose fewer, such as "
            f"{max(1, self.total_steps // 20)}",
        )

    @property
    def has_imported_objective(self) -> bool:
        """Whether the objective is an import path."""
        return is_import_path(self.objective)

    @property
    def objective_section(self) -> Any:
        """The section of the chosen objective, which is one of this package's."""
        return getattr(self, self.objective)

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> "TrainConfig":
        """Reads a YAML file, nested as this class is, or a published SoFlow file as it is.

        Args:
            path: of the file. overrides: command line arguments such as ``["--optimizer.learning_rate", "3e-4"]``,
                which have the last word.

        Raises:
            ValueError: for a file that is missing, empty or malformed, an unknown key (with the nearest one) and a
                value that is impossible.
        """
        return cls.from_dict(read_yaml(Path(path)), overrides)

    @classmethod
    def from_dict(cls, raw: dict, overrides: Sequence[str] = ()) -> "TrainConfig":
        """:meth:`from_yaml` of a mapping already read."""
        require_known_overrides(cls, overrides)
        with interop.public_words(raw):
            nested = interop.from_public(raw, {f.name for f in fields(cls)}) if interop.is_public(raw) else raw
            config = cls(**parse(cls, nested, overrides))
        config._warn_of_other_objectives(nested, overrides)
        return config

    def _warn_of_other_objectives(self, nested: dict, overrides: Sequence[str]) -> None:
        on_command_line = {arg[2:].split(".")[0] for arg in overrides if arg.startswith("--") and "." in arg}
        for name in OBJECTIVE_SECTIONS:
            if self.objective not in (name, GIVEN) and (nested.get(name) or name in on_command_line):
                _log.warning("the section %s is ignored: the objective is %s", name, self.objective)

    def to_dict(self) -> dict:
        """The nested mapping that :meth:`from_dict` reads, without the sections of the other objectives."""
        nested = lists(asdict(self))
        return {
            name: value for name, value in nested.items() if name == self.objective or name not in OBJECTIVE_SECTIONS
        }

    def to_yaml(self) -> str:
        """The text of a file that :meth:`from_yaml` reads."""
        return dump_yaml(self.to_dict())

    def flat(self) -> dict[str, Any]:
        """Every value by its dotted name."""
        return flatten(asdict(self), whole=mappings(type(self)))

    def differences(self, other: "TrainConfig") -> list[str]:
        """The dotted names whose values differ in a way that changes the trained weights."""
        ours, theirs = self.flat(), other.flat()
        return [
            name
            for name in flatten(self.to_dict(), whole=mappings(type(self)))
            if name not in _FREE and not name.startswith(_FREE_SECTIONS) and ours[name] != theirs[name]
        ]
