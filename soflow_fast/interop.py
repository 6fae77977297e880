"""The published SoFlow YAML files (https://arxiv.org/abs/2512.15657): their flat keys, and what they mean here."""

import difflib

#: The published keys and the values the published trainer takes where a file leaves one out.
PUBLIC_DEFAULTS = {
    "working_dir": "./your_working_dir",
    "noising_type": "Linear",
    "coefficient_type": "Euler",
    "model_type": "DiT-B-4",
    "dataset_type": "Imagenet",
    "data_size": 32,
    "dataset_path": "./imagenet_latent",
    "velocity_loss_ratio": 0.75,
    "p": 1.0,
    "eps": 0.01,
    "time_mean": [-0.2, -1.0, 0.2],
    "time_std": [1.0, 0.8, 0.8],
    "cfg_scale": 1.0,
    "mix_ratio": 1.0,
    "cfg_drop_rate": 0.0,
    "cfg_decay_time": 1.0,
    "l_schedule": "Exponent",
    "l_init_ratio": 0.1,
    "l_end_ratio": 0.002,
    "total_steps": 400_000,
    "ema_decay_rate": 0.9999,
    "learning_rate": 1e-4,
    "betas": [0.9, 0.99],
    "weight_decay": 0.0,
    "batch_size": 256,
    "num_workers": 12,
    "prefetch_factor": 6,
    "eval_steps": 25_000,
    "eval_batch_size": 125,
    "eval_NFE": 1,
    "eval_demo_steps": 1000,
    "eval_demo_shape": [4, 8],
    "ckpt_saving_steps": 200_000,
    "logging_steps": 100,
    "seed": 42,
}

_PATHS = {"Linear": "linear", "Trig": "trig", "Triangular": "trig"}
_PARAMETERIZATIONS = {"Euler": "euler", "Trig": "trig", "Triangular": "trig"}
_SCHEDULES = {"Const": "const", "Linear": "linear", "Cosine": "cosine", "Exponent": "exponential"}
_MODELS = {f"DiT-{size}": f"DiT-{size.replace('-', '/')}" for size in ("B-4", "B-2", "M-2", "L-2", "XL-2")}

# The published ImageNet file trains on the latents of 1000 classes, 4 channels of mean and 4 of standard deviation.
_IMAGENET_CLASSES, _LATENT_CHANNELS = 1000, 4
_EVALUATION_SAMPLES = 50_000

# Names that both forms use do not tell them apart.
_SHARED = {"batch_size", "total_steps", "seed", "learning_rate", "betas", "weight_decay", "p", "eps"}
_SHARED |= {"time_mean", "time_std"}


def is_public(raw: dict) -> bool:
    """Whether a mapping read from YAML is flat and has keys that only the published files have."""
    flat = not any(isinstance(value, dict) for value in raw.values())
    return flat and bool((PUBLIC_DEFAULTS.keys() - _SHARED) & raw.keys())


def from_public(raw: dict) -> dict:
    """The nested mapping of :class:`~soflow_fast.TrainConfig` for a published file.

    Raises:
        ValueError: for a key the published trainer does not have (with the nearest one), or for a value that is not
            known or not built yet.
    """
    for key in raw:
        if key not in PUBLIC_DEFAULTS:
            near = difflib.get_close_matches(str(key), PUBLIC_DEFAULTS, n=1, cutoff=0)
            raise ValueError(f"unknown key {key!r} in a SoFlow file of the published form; the nearest is {near[0]!r}")
    flat = {**PUBLIC_DEFAULTS, **raw}
    if flat["model_type"] == "UNet":
        raise ValueError("model_type: UNet is not built yet; choose one of " + ", ".join(_MODELS))
    if flat["dataset_type"] == "CIFAR10":
        raise ValueError(
            "dataset_type: CIFAR10 is not built yet; use the nested form with data.kind: folder and images by class"
        )
    _translate("dataset_type", flat["dataset_type"], {"Imagenet": "latents"})
    if isinstance(flat["eval_demo_shape"], (int, str)):
        raise ValueError(f"eval_demo_shape: {flat['eval_demo_shape']!r} is not [rows, columns], such as [4, 8]")
    return {
        "run_dir": flat["working_dir"],
        "batch_size": flat["batch_size"],
        "total_steps": flat["total_steps"],
        "seed": flat["seed"],
        "model": {
            "preset": _translate("model_type", flat["model_type"], _MODELS),
            "input_size": flat["data_size"],
            "in_channels": _LATENT_CHANNELS,
            "num_classes": _IMAGENET_CLASSES,
        },
        "data": {
            "kind": "latents",
            "path": flat["dataset_path"],
            "workers": flat["num_workers"],
            "prefetch": flat["prefetch_factor"],
        },
        "optimizer": {key: flat[key] for key in ("learning_rate", "betas", "weight_decay")},
        "ema": {"decay": flat["ema_decay_rate"]},
        "soflow": {
            "path": _translate("noising_type", flat["noising_type"], _PATHS),
            "parameterization": _translate("coefficient_type", flat["coefficient_type"], _PARAMETERIZATIONS),
            "guidance_scale": flat["cfg_scale"],
            "guidance_mix": flat["mix_ratio"],
            "guidance_decay_time": flat["cfg_decay_time"],
            "label_drop": flat["cfg_drop_rate"],
            "p": flat["p"],
            "eps": flat["eps"],
            "velocity_share": flat["velocity_loss_ratio"],
            "time_mean": flat["time_mean"],
            "time_std": flat["time_std"],
            "gap_schedule": _translate("l_schedule", flat["l_schedule"], _SCHEDULES),
            "gap_init": flat["l_init_ratio"],
            "gap_end": flat["l_end_ratio"],
        },
        "output": {
            "log_every": flat["logging_steps"],
            "checkpoint_every": flat["ckpt_saving_steps"],
            "sample_every": flat["eval_demo_steps"],
            "sample_shape": flat["eval_demo_shape"],
            "sample_steps": flat["eval_NFE"],
        },
        "evaluation": {
            "every": flat["eval_steps"],
            "samples": _EVALUATION_SAMPLES,
            "batch_size": flat["eval_batch_size"],
            "steps": flat["eval_NFE"],
        },
    }


def _translate(key: str, value: object, names: dict[str, str]) -> str:
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{key}: {value!r} is not known; choose one of {', '.join(names)}")
    return names[value]
