"""The published SoFlow YAML files (https://arxiv.org/abs/2512.15657): their flat keys, and what they mean here."""

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager

#: The published keys: what each is called here, and the value the published trainer takes where a file leaves it out.
#: eval_NFE is also evaluation.steps.
PUBLIC = {
    "working_dir": ("run_dir", "./your_working_dir"),
    "noising_type": ("soflow.path", "Linear"),
    "coefficient_type": ("soflow.parameterization", "Euler"),
    "model_type": ("model.preset", "DiT-B-4"),
    "dataset_type": ("data.kind", "Imagenet"),
    "data_size": ("model.input_size", 32),
    "dataset_path": ("data.path", "./imagenet_latent"),
    "velocity_loss_ratio": ("soflow.velocity_share", 0.75),
    "p": ("soflow.p", 1.0),
    "eps": ("soflow.eps", 0.01),
    "time_mean": ("soflow.time_mean", [-0.2, -1.0, 0.2]),
    "time_std": ("soflow.time_std", [1.0, 0.8, 0.8]),
    "cfg_scale": ("soflow.guidance_scale", 1.0),
    "mix_ratio": ("soflow.guidance_mix", 1.0),
    "cfg_drop_rate": ("soflow.label_drop", 0.0),
    "cfg_decay_time": ("soflow.guidance_decay_time", 1.0),
    "l_schedule": ("soflow.gap_schedule", "Exponent"),
    "l_init_ratio": ("soflow.gap_init", 0.1),
    "l_end_ratio": ("soflow.gap_end", 0.002),
    "total_steps": ("total_steps", 400_000),
    "ema_decay_rate": ("ema.decay", 0.9999),
    "learning_rate": ("optimizer.learning_rate", 1e-4),
    "betas": ("optimizer.betas", [0.9, 0.99]),
    "weight_decay": ("optimizer.weight_decay", 0.0),
    "batch_size": ("batch_size", 256),
    "num_workers": ("data.workers", 12),
    "prefetch_factor": ("data.prefetch", 6),
    "eval_steps": ("evaluation.every", 25_000),
    "eval_batch_size": ("evaluation.batch_size", 125),
    "eval_NFE": ("output.sample_steps", 1),
    "eval_demo_steps": ("output.sample_every", 1000),
    "eval_demo_shape": ("output.sample_shape", [4, 8]),
    "ckpt_saving_steps": ("output.checkpoint_every", 200_000),
    "logging_steps": ("output.log_every", 100),
    "seed": ("seed", 42),
}

# Published values, and what they are called here.
_VALUES = {
    "noising_type": {"Linear": "linear", "Trig": "trig", "Triangular": "trig"},
    "coefficient_type": {"Euler": "euler", "Trig": "trig", "Triangular": "trig"},
    "l_schedule": {"Const": "const", "Linear": "linear", "Cosine": "cosine", "Exponent": "exponential"},
    "model_type": {
        **{f"DiT-{size}": f"DiT-{size.replace('-', '/')}" for size in ("B-4", "B-2", "M-2", "L-2", "XL-2")},
        "UNet": "UNet",
    },
    "dataset_type": {"Imagenet": "latents", "CIFAR10": "cifar10"},
}

# What the published trainer takes for granted of a data set: of ImageNet the latents of 1000 classes, with 4 channels;
# of CIFAR-10 no classes, and RAdam. Its UNet comes with EDM's augmentation, here at EDM's probability.
_DATASETS = {
    "Imagenet": {"model": {"in_channels": 4, "num_classes": 1000}},
    "CIFAR10": {"model": {"in_channels": 3, "num_classes": 0}, "optimizer": {"name": "radam"}},
}
_CIFAR10_PATH, _AUGMENT = "./cifar10", 0.12
_EVALUATION_SAMPLES = 50_000

# Names that both forms use do not tell them apart.
_SHARED = {"batch_size", "total_steps", "seed", "learning_rate", "betas", "weight_decay", "p", "eps"}
_SHARED |= {"time_mean", "time_std"}

# Names here, with their section and, unless they are words of English, as objective and network have them.
_WORDS = {name: key for key, (name, _) in PUBLIC.items()} | {"evaluation.steps": "eval_NFE"}
_WORDS |= {name.split(".")[1]: key for name, key in _WORDS.items() if re.match(r"(soflow|model)\.\w+_", name)}


def is_public(raw: dict) -> bool:
    """Whether a mapping read from YAML has keys that only the published files have."""
    return bool((PUBLIC.keys() - _SHARED) & raw.keys())


@contextmanager
def public_words(raw: dict) -> Iterator[None]:
    """Within it, a ValueError about a configuration of the published form names things as that file does."""
    try:
        yield
    except ValueError as error:
        if not is_public(raw):
            raise
        words = re.sub(r"(?<![\w./'])[A-Za-z_]\w*(?:\.\w+)*", lambda word: _WORDS.get(word[0], word[0]), str(error))
        raise ValueError(words) from None


def from_public(raw: dict, nested_keys: set[str]) -> dict:
    """The nested mapping of :class:`~soflow_fast.TrainConfig` for a published file.

    Args:
        raw: the file's mapping. nested_keys: the outermost keys of the nested form.

    Raises:
        ValueError: for a key the published trainer does not have (with the nearest one), keys of both forms, or a value
            that is not known.
    """
    for key in map(str, raw):
        if key in PUBLIC:
            continue
        if key.split(".")[0] in nested_keys:
            raise ValueError(
                f"the file has the key {key!r} of the nested form among keys of the published form, and the two cannot "
                f"be mixed; give it on the command line, such as --data.vae NAME, or write the whole file nested"
            )
        near = difflib.get_close_matches(key, PUBLIC, n=1, cutoff=0)
        raise ValueError(f"unknown key {key!r} in a SoFlow file of the published form; the nearest is {near[0]!r}")
    is_cifar10 = raw.get("dataset_type") == "CIFAR10"
    defaults = {key: default for key, (_, default) in PUBLIC.items()}
    flat = {**defaults, **({"dataset_path": _CIFAR10_PATH} if is_cifar10 else {}), **raw}
    _translate("dataset_type", flat["dataset_type"], _VALUES["dataset_type"])
    if isinstance(flat["eval_demo_shape"], (int, str)):
        raise ValueError(f"eval_demo_shape: {flat['eval_demo_shape']!r} is not [rows, columns], such as [4, 8]")
    nested = {name: dict(section) for name, section in _DATASETS[flat["dataset_type"]].items()}
    nested["evaluation"] = {"samples": _EVALUATION_SAMPLES, "steps": flat["eval_NFE"]}
    if is_cifar10 and flat["model_type"] == "UNet":
        nested["data"] = {"augment": _AUGMENT}
    for key, value in flat.items():
        *section, name = PUBLIC[key][0].split(".")
        place = nested.setdefault(section[0], {}) if section else nested
        place[name] = _translate(key, value, _VALUES[key]) if key in _VALUES else value
    return nested


def _translate(key: str, value: object, names: dict[str, str]) -> str:
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{key}: {value!r} is not known; choose one of {', '.join(names)}")
    return names[value]
