"""The configuration of a run: nested dataclasses, read from YAML and ``--name value`` overrides.

The defaults are the published ImageNet 256 recipe (arXiv 2512.15657) with DiT-B/4 on 4×32×32 latents.
"""

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from soflow_fast import interop

DATA_KINDS = ("digits", "latents", "folder", "given")


@dataclass
class ModelConfig:
    """The network, see :class:`~soflow_fast.DiT`; a size given here replaces the preset's.

    Attributes:
        preset: such as ``DiT-B/4``. input_size, in_channels, num_classes: of the data. patch_size, hidden_size, depth,
            num_heads, mlp_ratio, impl, attention: see :class:`~soflow_fast.DiT`.
    """

    preset: str = "DiT-B/4"
    input_size: int = 32
    in_channels: int = 4
    num_classes: int = 1000
    patch_size: int | None = None
    hidden_size: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    mlp_ratio: float = 4.0
    impl: str = "auto"
    attention: str = "auto"

    def __post_init__(self):
        for name in ("input_size", "in_channels"):
            _require_count(f"model.{name}", getattr(self, name))
        for name in ("patch_size", "hidden_size", "depth", "num_heads"):
            if getattr(self, name) is not None:
                _require_count(f"model.{name}", getattr(self, name))
        _require_count("model.num_classes", self.num_classes, least=0)
        _require(self.mlp_ratio > 0, f"model.mlp_ratio={self.mlp_ratio} must be greater than 0")


@dataclass
class DataConfig:
    """The training data.

    Attributes:
        kind: ``digits`` (scikit-learn's handwritten digits), ``latents`` (an HDF5 file of latent moments), ``folder``
            (images by class) or ``given`` (an object given to the Trainer). path: of the file or folder.
        latent_scale: what unscaled latents are multiplied by. vae: name or folder of the diffusers ``AutoencoderKL``
            that decodes latents; without it samples stay latents.
        workers: loader processes, 0 for none. prefetch: batches each of them reads ahead.
    """

    kind: str = "latents"
    path: str | None = None
    latent_scale: float = 0.18215
    vae: str | None = None
    workers: int = 4
    prefetch: int = 4

    def __post_init__(self):
        _require(
            self.kind in DATA_KINDS, f"data.kind={self.kind!r} is not known; choose one of {', '.join(DATA_KINDS)}"
        )
        _require(0 < self.latent_scale < math.inf, f"data.latent_scale={self.latent_scale} must be greater than 0")
        _require_count("data.workers", self.workers, least=0)
        _require_count("data.prefetch", self.prefetch)


@dataclass
class OptimizerConfig:
    """AdamW.

    Attributes:
        learning_rate: constant. betas, eps, weight_decay: of AdamW. grad_clip: largest global gradient norm, or None.
        accumulation: micro-batches a batch is split into; it divides the batch.
    """

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float | None = None
    accumulation: int = 1

    def __post_init__(self):
        _require(
            0 < self.learning_rate < math.inf,
            f"optimizer.learning_rate={self.learning_rate} must be greater than 0",
        )
        _require(
            all(0 <= beta < 1 for beta in self.betas), f"optimizer.betas={tuple(self.betas)} must both be in [0, 1)"
        )
        _require(0 < self.eps < math.inf, f"optimizer.eps={self.eps} must be greater than 0")
        _require(0 <= self.weight_decay < math.inf, f"optimizer.weight_decay={self.weight_decay} must not be negative")
        _require(
            self.grad_clip is None or self.grad_clip > 0,
            f"optimizer.grad_clip={self.grad_clip} must be greater than 0, or null for no clipping",
        )
        _require_count("optimizer.accumulation", self.accumulation)


@dataclass
class ComputeConfig:
    """How a step is computed, see :class:`~soflow_fast.step.TrainStep`; None is its own choice for the device.

    Attributes:
        precision: ``bf16``, ``tf32`` or ``fp32``. compile: whether torch.compile is used. cuda_graph: whether a step is
            one CUDA graph.
    """

    precision: str | None = None
    compile: bool | None = None
    cuda_graph: bool | None = None


@dataclass
class EMAConfig:
    """The averaged weights that samples are drawn from, see :class:`~soflow_fast.ema.EMA`."""

    decay: float = 0.9999
    warmup: bool = True

    def __post_init__(self):
        _require(0 <= self.decay < 1, f"ema.decay={self.decay} must be in [0, 1)")


@dataclass
class SoFlowConfig:
    """The objective ``soflow``; every attribute is an argument of :class:`~soflow_fast.SoFlow`, which checks it."""

    path: str = "linear"
    parameterization: str = "euler"
    guidance_scale: float = 3.0
    guidance_mix: float = 0.25
    guidance_decay_time: float = 0.8
    label_drop: float = 0.1
    p: float = 1.0
    eps: float = 0.01
    velocity_share: float = 0.75
    time_mean: tuple[float, float, float] = (-0.2, -1.0, 0.2)
    time_std: tuple[float, float, float] = (1.0, 0.8, 0.8)
    gap_schedule: str = "exponential"
    gap_init: float = 0.1
    gap_end: float = 0.002
    min_gap: float = 1e-4
    quotient: str = "difference"


#: The section of each objective; the section's name in the file is the objective's.
OBJECTIVE_SECTIONS = {"soflow": SoFlowConfig}


@dataclass
class OutputConfig:
    """What a run writes, and how often, in steps; 0 is never.

    Attributes:
        log_every: metrics. sample_every: sample grids, of sample_shape (rows, columns) in sample_steps network calls.
        checkpoint_every: checkpoints, of which the newest keep_checkpoints stay.
    """

    log_every: int = 100
    sample_every: int = 1000
    sample_shape: tuple[int, int] = (4, 8)
    sample_steps: int = 1
    checkpoint_every: int = 10_000
    keep_checkpoints: int = 3

    def __post_init__(self):
        for name in ("sample_every", "checkpoint_every"):
            _require_count(f"output.{name}", getattr(self, name), least=0)
        for name in ("log_every", "sample_steps", "keep_checkpoints"):
            _require_count(f"output.{name}", getattr(self, name))
        for size in self.sample_shape:
            _require_count("output.sample_shape", size)


@dataclass
class EvaluationConfig:
    """How samples are scored, see :mod:`soflow_fast.evaluate`.

    Attributes:
        every: steps between evaluations during training, 0 for none. samples: how many are drawn, batch_size at a
            time, in ``steps`` network calls. features: a feature extractor of torch-fidelity, or ``pixels``; by default
            ``pixels`` for the digits and ``inception-v3-compat`` otherwise. weights: file of the extractor's weights.
        reference: folder of the real images, where the training data is not one.
    """

    every: int = 0
    samples: int = 50_000
    batch_size: int = 125
    steps: int = 1
    features: str | None = None
    weights: str | None = None
    reference: str | None = None

    def __post_init__(self):
        _require_count("evaluation.every", self.every, least=0)
        for name in ("batch_size", "steps"):
            _require_count(f"evaluation.{name}", getattr(self, name))
        _require_count("evaluation.samples", self.samples, least=2)


# What may change between the parts of one run: it has no influence on the trained weights.
_FREE = {"run_dir", "device", "max_skipped_steps", "data.workers", "data.prefetch", "data.vae"}
_FREE_SECTIONS = ("output.", "evaluation.")


@dataclass
class TrainConfig:
    """Everything a training run depends on.

    Attributes:
        run_dir: where the run is written and continued. objective: the name of its section, such as ``soflow``.
        batch_size: rows of a step, over all processes and micro-batches. total_steps: of the run. seed: of every draw.
        device: ``auto`` (a GPU where there is one), ``cpu``, ``cuda`` or ``cuda:1``.
        max_skipped_steps: how many steps with a loss or gradient that is not finite may be skipped before the run
            stops.
    """

    run_dir: str = "runs/soflow"
    objective: str = "soflow"
    batch_size: int = 256
    total_steps: int = 400_000
    seed: int = 0
    device: str = "auto"
    max_skipped_steps: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    soflow: SoFlowConfig = field(default_factory=SoFlowConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self):
        for name, value in self.flat().items():
            _require(not (isinstance(value, float) and math.isnan(value)), f"{name}={value} is not a number; give one")
        _require(
            self.objective in OBJECTIVE_SECTIONS,
            f"objective={self.objective!r} is not known; choose one of {', '.join(OBJECTIVE_SECTIONS)}",
        )
        for name in ("batch_size", "total_steps"):
            _require_count(name, getattr(self, name))
        _require_count("max_skipped_steps", self.max_skipped_steps, least=0)
        _require(0 <= self.seed < 2**63, f"seed={self.seed} must be in [0, 2^63)")
        _require(
            self.batch_size % self.optimizer.accumulation == 0,
            f"optimizer.accumulation={self.optimizer.accumulation} does not divide batch_size={self.batch_size}; "
            "choose one that does",
        )

    @property
    def objective_section(self) -> Any:
        """The section of the chosen objective."""
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
        return cls.from_dict(_read_yaml(Path(path)), overrides)

    @classmethod
    def from_dict(cls, raw: dict, overrides: Sequence[str] = ()) -> "TrainConfig":
        """:meth:`from_yaml` of a mapping already read."""
        raw = interop.from_public(raw) if interop.is_public(raw) else raw
        known = set(_leaves(cls))
        _require_known(_flatten(raw), known)
        _require_known({arg[2:].split("=")[0]: None for arg in overrides if arg.startswith("--")}, known)
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls)
        try:
            namespace = parser.parse_object(raw)
            if overrides:
                namespace = parser.parse_args(list(overrides), namespace=namespace)
        except ArgumentError as error:
            raise ValueError(_one_sentence(str(error))) from None
        optional = {name for name, annotation in _leaves(cls).items() if type(None) in get_args(annotation)}
        for name in known - optional:
            _require(namespace[name] is not None, f"{name} has no value; give one, or leave the key out")
        return cls(**{f.name: parser.instantiate(namespace)[f.name] for f in fields(cls)})

    def to_dict(self) -> dict:
        """The nested mapping that :meth:`from_dict` reads; tuples are lists, as YAML has them."""
        return _lists(asdict(self))

    def to_yaml(self) -> str:
        """The text of a file that :meth:`from_yaml` reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def flat(self) -> dict[str, Any]:
        """Every value by its dotted name."""
        return _flatten(asdict(self))

    def first_difference(self, other: "TrainConfig") -> str | None:
        """The first dotted name whose values differ in a way that changes the trained weights, or None."""
        theirs = other.flat()
        for name, value in self.flat().items():
            objective = name.split(".")[0]
            unused = objective in OBJECTIVE_SECTIONS and objective != self.objective
            if name in _FREE or name.startswith(_FREE_SECTIONS) or unused:
                continue
            if value != theirs[name]:
                return name
        return None


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


def _require_count(name: str, value: int, least: int = 1) -> None:
    _require(value >= least, f"{name}={value} is not possible; it must be at least {least}")


def _read_yaml(path: Path) -> dict:
    _require(path.is_file(), f"the config file {path} does not exist; give the path of a YAML file")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(
            f"the config file {path} is not valid YAML{where}: {getattr(error, 'problem', error)}"
        ) from None
    except UnicodeDecodeError:
        raise ValueError(f"the config file {path} is not a text file; give the path of a YAML file") from None
    _require(raw is not None, f"the config file {path} is empty; it needs at least one 'key: value'")
    _require(isinstance(raw, dict), f"the config file {path} holds a {type(raw).__name__}; it needs 'key: value' lines")
    return raw


def _leaves(cls: type, prefix: str = "") -> dict[str, Any]:
    """Dotted name to annotation of every value of a config class."""
    found = {}
    for f in fields(cls):
        if is_dataclass(f.type):
            found.update(_leaves(f.type, f"{prefix}{f.name}."))
        else:
            found[prefix + f.name] = f.type
    return found


def _flatten(nested: dict, prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            found.update(_flatten(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def _require_known(given: dict[str, Any], known: set[str]) -> None:
    sections = {name.rsplit(".", 1)[0] for name in known if "." in name}
    for name, value in given.items():
        if name in sections:
            _require(value == {}, f"{name}={value!r} is not a section; write {name}: followed by indented keys")
        elif name not in known:
            raise ValueError(f"unknown key {name!r}; the nearest is {_nearest(name, known)!r}")


def _nearest(name: str, known: set[str]) -> str:
    """The known name most like this one, whole or by its last part."""

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, name, candidate).ratio()
        return max(whole, difflib.SequenceMatcher(None, name.split(".")[-1], candidate.split(".")[-1]).ratio())

    return max(sorted(known), key=likeness)


def _one_sentence(message: str) -> str:
    """jsonargparse's message about one key, on one line and without Python's type syntax."""
    message = re.sub(r"<class '(\w+)'>", r"\1", message)
    found = re.search(r'Parser key "([^"]+)":\s*(.*)', message, re.DOTALL)
    if found is None:
        return " ".join(message.split())
    name, rest = found.groups()
    annotation = _leaves(TrainConfig).get(name)
    expected = annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
    value = re.search(r"(?:Got|Given) value: (.*)", rest)
    return f"{name}={value.group(1) if value else '?'} does not fit; it must be: {expected}"


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
