"""The options that ``soflow sample``, ``eval`` and ``export`` share: which weights of a run, how they are sampled."""

import argparse
from dataclasses import replace
from typing import Literal

from torch import nn

from soflow_fast.autoencoder import decoder_of
from soflow_fast.config import TrainConfig
from soflow_fast.images import in_file_name
from soflow_fast.sample import SAMPLE_PRECISIONS, Decoder

# What a run's samples can be drawn with beside its own, and how files of them are called.
EVAL_VARIANTS = {
    "ema_std": "ema",
    "guidance_scale": "guidance",
    "guidance_interval": "interval",
    "renoise": "renoise",
    "vae": "vae",
    "precision": "precision",
}
SAMPLE_VARIANTS = {"labels": "labels", "conditions": "conditions", **EVAL_VARIANTS}


def add(parser: argparse.ArgumentParser, *, draws: bool = True) -> None:
    """Adds the options that these commands take; of one that draws, also how it computes."""
    parser.add_argument(
        "--step",
        type=_step,
        help="of the training: an older checkpoint that was kept, or best, with output.keep_best (default: the newest)",
    )
    parser.add_argument(
        "--ema-std",
        type=float,
        help="of a run with ema.posthoc: the average of this relative standard deviation, such as 0.08 "
        "(default: the average of ema.decay)",
    )
    parser.add_argument("--guidance-scale", type=float, help="of a run of improved_meanflow (default: as configured)")
    parser.add_argument(
        "--guidance-interval",
        type=_two_times,
        help="the times that are guided, such as 0.3,0.8; likewise (default: as configured)",
    )
    parser.add_argument(
        "--renoise",
        action=argparse.BooleanOptionalAction,
        help="in several steps, jump to data and add noise again, or go from time to time (default: as published "
        "for the objective: soflow renoises)",
    )
    parser.add_argument("--vae", help="autoencoder that decodes latents (default: data.vae of the run)")
    parser.add_argument(
        "--precision", choices=SAMPLE_PRECISIONS, help=f"default {'bf16 on a GPU, else ' if draws else ''}fp32"
    )
    if not draws:
        return
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the sampling, and make it a CUDA graph on a GPU (default on a GPU)",
    )


def variant(args: argparse.Namespace, options: dict[str, str]) -> str:
    """What tells files of other options apart from those of the run's own."""
    given = {short: getattr(args, name) for name, short in options.items() if getattr(args, name) is not None}
    values = {short: "-".join(map(str, x)) if isinstance(x, tuple) else x for short, x in given.items()}
    return "".join(f"-{short}-{in_file_name(str(value))}" for short, value in values.items())


def set_sampling(model: nn.Module, objective: str, args: argparse.Namespace) -> None:
    """Sets how a model is sampled; ValueError for guidance of one that has none to choose."""
    if args.renoise is not None:
        model.renoises = args.renoise
    scale, interval = args.guidance_scale, args.guidance_interval
    if scale is None and interval is None:
        return
    if not hasattr(model, "set_sample_guidance"):
        name = "--guidance-interval" if scale is None else "--guidance-scale"
        raise ValueError(
            f"{name} is for runs of improved_meanflow; the guidance of this run, of {objective}, is in its weights"
        )
    model.require_trained(scale, interval, ("--guidance-scale ", "--guidance-interval "))
    model.set_sample_guidance(scale, interval)


def with_vae(config: TrainConfig, vae: str | None) -> TrainConfig:
    """A configuration with another autoencoder, if one is given."""
    return replace(config, data=replace(config.data, vae=vae or config.data.vae))


def decoder(config: TrainConfig, model: nn.Module) -> Decoder | None:
    """From latents to images, on the model's device, where there is an autoencoder."""
    return decoder_of(config.data, next(model.parameters()).device)


def _step(text: str) -> int | Literal["best"]:
    try:
        return text if text == "best" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a step, such as 50000, nor best") from None


def _two_times(text: str) -> tuple[float, float]:
    try:
        start, end = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not two times, such as 0.3,0.8") from None
    return start, end
