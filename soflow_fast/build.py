"""From a configuration to its objects: device, network, objective, optimizer, data."""

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from soflow_fast import conditions, kernels, run_optimizer
from soflow_fast.attention import OF_A_GPU
from soflow_fast.augment import AUGMENT_DIM
from soflow_fast.config import GIVEN, ModelConfig, TrainConfig
from soflow_fast.config_model import UNET_PRESET
from soflow_fast.data import CIFAR10, ImageFolder, LatentMoments, MomentsFolder, digits, find_moments_folder
from soflow_fast.data.checks import require_labels_at_hand, require_pair, warn_of_other_range, warn_of_unused_classes
from soflow_fast.data.moments import normalised_by
from soflow_fast.dit import PRESET_NAMES, DiT
from soflow_fast.imported import import_maker, is_import_path
from soflow_fast.mit import PRESET_NAMES as MIT_PRESET_NAMES
from soflow_fast.mit import MiT
from soflow_fast.objectives.alphaflow import AlphaFlow
from soflow_fast.objectives.base import Objective, is_objective
from soflow_fast.objectives.flow_matching import FlowMatching
from soflow_fast.objectives.improved_meanflow import ImprovedMeanFlow
from soflow_fast.objectives.meanflow import MeanFlow
from soflow_fast.objectives.scm import SCM
from soflow_fast.objectives.soflow import SoFlow
from soflow_fast.optim import OPTIMIZERS, can_leave_out
from soflow_fast.require import brief
from soflow_fast.seeding import preserve_rng, seed_generators
from soflow_fast.size import height_and_width
from soflow_fast.unet import UNet

_log = logging.getLogger(__name__)

# There where the kernel has loaded NVIDIA's driver.
_DRIVER = Path("/proc/driver/nvidia/version")

# Items of the data whose standard deviations are looked at.
_LOOKED_AT = 8

#: The class of each objective; its section of the configuration holds its arguments.
OBJECTIVES = {
    "soflow": SoFlow,
    "meanflow": MeanFlow,
    "improved_meanflow": ImprovedMeanFlow,
    "alphaflow": AlphaFlow,
    "scm": SCM,
    "flow_matching": FlowMatching,
}


def resolve_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda`` or ``cuda:1`` stands for on this machine.

    Raises:
        ValueError: for another name, or a GPU that is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if _DRIVER.exists() and torch.version.cuda:
            _log.warning(
                "there is an NVIDIA driver, and torch, built for CUDA %s, finds no GPU that it can use: a driver too "
                "old, or CUDA_VISIBLE_DEVICES; computing on the CPU",
                torch.version.cuda,
            )
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise ValueError(f"device={name!r} is not known; choose auto, cpu, cuda or cuda:N")
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device={name!r} needs a CUDA GPU and none is visible; choose device=cpu or auto")
        if index and int(index) >= torch.cuda.device_count():
            raise ValueError(f"device={name!r} is not there: {torch.cuda.device_count()} GPUs are visible, from cuda:0")
    return torch.device(name)


def build_network(
    config: ModelConfig, label_drop: float, condition_dim: int = 0, velocity_head: bool = False
) -> DiT | MiT | UNet:
    """The network of a configuration.

    Args:
        label_drop: of the objective: where it is positive, or there are no classes, a transformer has a row for "no
            label".
        condition_dim: of the objective, which a transformer then has. velocity_head: whether the objective trains one,
            which a MiT then has.

    Raises:
        ValueError: for a preset that is not known.
    """
    if config.preset == GIVEN:
        raise ValueError(
            "this configuration's network was given to the Trainer as an object; give it again, to the Trainer or to "
            "soflow_fast.trainer.load_run(run_dir, model=...); a run whose model.preset is the import path of its "
            "class needs neither"
        )
    own = ("preset", "init_args")
    sizes = {name: value for name, value in asdict(config).items() if value is not None and name not in own}
    if config.preset == UNET_PRESET:
        taken = {name: value for name, value in sizes.items() if name in signature(UNet).parameters}
        return UNet(**taken, augment_dim=AUGMENT_DIM)  # its weights are of use with and without augmentation
    if not (config.is_dit or config.is_mit):
        raise ValueError(
            f"model.preset={config.preset!r} is not known; choose one of {PRESET_NAMES}, {MIT_PRESET_NAMES}, "
            f"{UNET_PRESET}, or the import path package.module.Class of a network of yours"
        )
    has_null = label_drop > 0 or config.num_classes == 0
    of_objective = {"class_dropout_prob": float(has_null), "condition_dim": condition_dim}
    if config.is_mit:
        taken = {name: value for name, value in sizes.items() if name in signature(MiT).parameters}
        return MiT.from_preset(config.preset, velocity_head=velocity_head, **of_objective, **taken)
    if config.recompute == "auto":
        sizes["recompute"] = "none"  # the trainer knows what fits
    return DiT.from_preset(config.preset, **of_objective, **sizes)


def build_model(config: TrainConfig, given: nn.Module | None = None) -> nn.Module:
    """The objective of a configuration over its network, or over the one given; initialised from the seed alone.

    A given objective is returned as it is. Otherwise it is built on the CPU (or the meta device, if that is the
    default), so that every device starts from the same weights, and the caller's random state stays as it was.

    Raises:
        ValueError: for a value that is impossible, and for an objective that needs classes where there are none.
    """
    if is_objective(given):
        _require_classes(config, given)
        return given
    if config.objective == GIVEN:
        raise ValueError(
            "this configuration's objective was given to the Trainer as an object; give it again, to the Trainer or to "
            "soflow_fast.trainer.load_run(run_dir, model=...); a run whose objective is the import path of its class "
            "needs neither"
        )
    impl = config.model.impl
    if impl == "auto" and resolve_device(config.device).type == "cpu":
        impl = "torch"  # the fused kernels are for GPUs, also where there is one that is not used
    if is_import_path(config.objective):
        return _imported_objective(config, given, impl)
    objective = OBJECTIVES[config.objective]
    _require_classes(config, objective)
    section = {**asdict(config.objective_section), "impl": impl}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        if given is None:
            model = replace(config.model, impl=impl)
            has_head = objective.velocity_head and section["velocity_head"] is not False
            given = build_network(model, section["label_drop"], objective.condition_dim, has_head)
        return objective(given, **section)


def _imported_objective(config: TrainConfig, network: nn.Module | None, impl: str) -> Objective:
    """The objective at an import path; its network is drawn as of any other, what it draws beside it is of the seed."""
    path, arguments = config.objective, config.objective_args
    with preserve_rng():
        objective = import_maker("objective", path, arguments, network).func
    _require_classes(config, objective)
    if network is None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            drops = float(arguments.get("label_drop") != 0)  # what is not said may be its default
            model = replace(config.model, impl=impl)
            has_head = getattr(objective, "velocity_head", False) and arguments.get("velocity_head") is not False
            network = build_network(model, drops, getattr(objective, "condition_dim", 0), has_head)
    made = imported("objective", path, arguments, config.seed, network)
    if not isinstance(made, Objective):
        raise ValueError(
            f"objective={path!r} makes an object of class {type(made).__name__}; make a "
            "soflow_fast.objectives.base.Objective"
        )
    if impl != "auto" and "impl" not in arguments:
        made.impl = kernels.resolve_impl(impl)
    return made


def build_optimizer(
    config: TrainConfig, model: nn.Module, make: Callable[..., torch.optim.Optimizer] | None = None
) -> torch.optim.Optimizer:
    """The optimizer of a configuration over what of an objective is trained.

    Args:
        make: in place of the configuration's, called with the list of (name, parameter) and ``lr``.

    Raises:
        ValueError: if it makes no optimizer, leaves a parameter out, or cannot leave steps out where the configuration
            allows them.
    """
    wanted, named = config.optimizer, [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if wanted.name in OPTIMIZERS:
        own = {name: getattr(wanted, name) for name in ("betas", "eps", "weight_decay")}
        return OPTIMIZERS[wanted.name]([p for _, p in named], lr=wanted.learning_rate, impl=model.impl, **own)
    if wanted.name != GIVEN:
        arguments = {"lr": wanted.learning_rate, **wanted.init_args}
        optimizer = imported("optimizer.name", wanted.name, arguments, config.seed, named)
    elif make is None:
        raise ValueError(
            "this configuration's optimizer was made by a function given to the Trainer; give it again, or its import "
            "path as optimizer.name"
        )
    else:
        optimizer = _seeded(partial(make, named, lr=wanted.learning_rate), config.seed, "optimizer.name")
    run_optimizer.require_optimizer(optimizer, model, f"optimizer.name={wanted.name!r} makes")
    if config.max_skipped_steps and not can_leave_out(optimizer):
        raise ValueError(
            f"max_skipped_steps={config.max_skipped_steps} needs an optimizer that can leave a step out, and "
            f"{type(optimizer).__name__} cannot; make it with fused=True where it has that, or set max_skipped_steps=0"
        )
    return optimizer


def runnable(config: TrainConfig) -> TrainConfig:
    """The configuration of a run, for its weights to be used: without a GPU nothing in it that needs one."""
    if resolve_device(config.device).type != "cpu":
        return config
    attention = "auto" if config.model.attention in OF_A_GPU else config.model.attention
    return replace(config, model=replace(config.model, impl="auto", attention=attention))


def _require_classes(config: TrainConfig, objective: nn.Module | type[nn.Module]) -> None:
    if config.model.num_classes == 0 and getattr(objective, "condition_dim", 0):
        name = getattr(objective, "__name__", type(objective).__name__)
        instead = "" if config.model.embedding_dim is None else ", and leave model.embedding_dim out"
        raise ValueError(
            f"model.num_classes=0 trains without labels, and {name} needs them to guide with; set model.num_classes to "
            f"the number of classes{instead}"
        )


def network_of(given: nn.Module) -> nn.Module:
    """The network given to the Trainer, alone or under an objective."""
    return given.network if is_objective(given) else given


def sample_shape(config: TrainConfig) -> tuple[int, int, int]:
    """(C, H, W) of a sample."""
    return config.model.in_channels, *height_and_width(config.model.input_size)


def build_dataset(config: TrainConfig, null_condition: Tensor | None = None) -> Dataset:
    """The training data of a configuration; latents with conditions in place of labels where there is a null one."""
    data, model = config.data, config.model
    if data.kind == GIVEN:
        raise ValueError("data.kind='given' stands for Trainer(config, dataset=...); choose another data.kind")
    if is_import_path(data.kind):
        path = {} if data.path is None else {"path": data.path}
        return imported("data.kind", data.kind, path | data.init_args, config.seed)
    if data.kind == "digits":
        return digits("train")
    if data.path is None:
        raise ValueError(f"data.path is missing, and data.kind={data.kind!r} needs one; set data.path")
    if data.kind == "cifar10":
        return CIFAR10(data.path, num_classes=model.num_classes)
    form = {"channels": model.in_channels, "size": model.input_size, "num_classes": model.num_classes}
    if data.kind == "folder":
        return ImageFolder(data.path, **form, flip=data.flip)
    form |= {"scale": data.latent_scale, "mean": data.latent_mean, "std": data.latent_std}
    form["dtype"] = torch.bfloat16 if data.latent_precision == "bf16" else torch.float32
    folder = find_moments_folder(data.path)
    if folder is not None:
        return MomentsFolder(folder, **form)
    return LatentMoments(data.path, **form, with_conditions=null_condition is not None)


def dataset_of_conditions(config: TrainConfig, network: nn.Module) -> Dataset | None:
    """The training data of a run, where its network is told the conditions that they hold.

    Raises:
        ValueError: if they were given to the Trainer as an object.
    """
    null = conditions.null_condition(network)
    if null is None:
        return None
    if config.data.kind == GIVEN:
        raise ValueError(
            "this run's samples have the conditions of its data set's items, and that was given to the Trainer as an "
            "object; name its class in data.kind, draw by soflow sample RUN --conditions FILE.npy, or in Python by "
            "model.sample(noise, conditions)"
        )
    return build_dataset(config, null)


def check_dataset(
    config: TrainConfig, dataset: Dataset, null_condition: Tensor | None = None, *, trained_on: bool = True
) -> float | None:
    """The scale of latent moments if that is what a data set holds, None if it holds samples.

    Of one that is trained on warns of classes that no sample is of, where the labels are at hand, and of the user's
    pixels that are not in [-1, 1].

    Raises:
        ValueError: if it has no length, no index, no sample or, to be trained on, no full batch, its items are not
            pairs of a floating-point tensor and a label, or where there is a null condition, a condition of its form,
            its labels are outside the classes, where they are at hand, or its samples are neither (C, H, W) nor
            latent moments (2C, H, W).
    """
    if isinstance(dataset, DataLoader):
        raise ValueError(
            "dataset is a DataLoader, and the Trainer makes the batches itself; give the data set in it, "
            "dataset=loader.dataset, whose __getitem__ may draw which sample it returns where a sampler did"
        )
    if not hasattr(dataset, "__len__"):
        raise ValueError(f"the data set {type(dataset).__name__} has no length; give a map-style one, with __len__")
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"the data set {type(dataset).__name__} cannot be indexed; give a map-style one, with __len__ and "
            "__getitem__"
        )
    if not len(dataset):
        raise ValueError(f"the data set {type(dataset).__name__} has no samples; give one that has")
    if trained_on and len(dataset) < config.batch_size:
        raise ValueError(
            f"batch_size={config.batch_size} is more than the {len(dataset)} samples of the data; "
            f"choose at most {len(dataset)}"
        )
    with preserve_rng():  # from which an item may draw
        item = dataset[0]
    shape = require_pair(item, config.model.num_classes, null_condition)
    data, (channels, *size) = config.data, sample_shape(config)
    require_labels_at_hand(dataset, config.model.num_classes)
    if trained_on:
        warn_of_unused_classes(dataset, config.model.num_classes)
    if shape == (channels, *size):
        if trained_on and data.vae is None and (data.kind == GIVEN or is_import_path(data.kind)):
            warn_of_other_range(dataset)
        return None
    if shape == (2 * channels, *size):
        with preserve_rng():
            items = [item, *(dataset[i] for i in range(1, min(len(dataset), _LOOKED_AT)))]
        if any((pair[0][channels:] < 0).any() for pair in items):
            raise ValueError(
                f"the data has {2 * channels} channels, twice model.in_channels={channels}, which stands for means and "
                "standard deviations of latents, and some of the latter are negative; for samples of so many channels "
                f"set model.in_channels={2 * channels}"
            )
        wanted, found = (data.latent_mean, data.latent_std), normalised_by(dataset)
        if wanted != found:
            raise ValueError(
                f"data.latent_mean and data.latent_std are {brief(wanted)}, and the moments of the data set "
                f"{type(dataset).__name__} are normalised by {brief(found)}; they are what files of data.kind=latents "
                "are normalised by, and decoding undoes: give the same, or normalise and undo it in the data set and "
                "in data.vae"
            )
        return data.latent_scale
    raise ValueError(
        f"the data has samples of shape {shape} and the model takes {(channels, *size)}; set model.in_channels and "
        "model.input_size to those of the data"
    )


def imported(setting: str, path: str, arguments: dict[str, Any], seed: int, *first: Any) -> Any:
    """What is at an import path; what it draws is a function of the seed, and the caller's generators stay."""
    with preserve_rng():
        make = import_maker(setting, path, arguments, *first)  # which may draw too, but once a process
    return _seeded(make, seed, setting)


def _seeded(make: Callable[[], Any], seed: int, setting: str) -> Any:
    with preserve_rng():
        seed_generators(f"{seed},{setting}")
        return make()
