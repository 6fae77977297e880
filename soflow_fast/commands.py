"""What each command of ``soflow`` does with its arguments, which ``cli.py`` has read."""

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

from soflow_fast import build, distributed, export, tune
from soflow_fast.build import resolve_device
from soflow_fast.conditions import ConditionsFile, ItemConditions
from soflow_fast.config import TrainConfig
from soflow_fast.config_io import read_yaml
from soflow_fast.doctor import report, version
from soflow_fast.dry_run import describe
from soflow_fast.encode import encode
from soflow_fast.evaluate import (
    check_evaluation,
    compared_with,
    evaluate,
    evaluation_name,
    require_scored,
    samples_name,
)
from soflow_fast.images import (
    are_images,
    labels_of_samples,
    save_folder,
    save_npz,
    save_samples,
    suffix_of_samples,
)
from soflow_fast.interop import public_words
from soflow_fast.require import require_count
from soflow_fast.sample import Sampler
from soflow_fast.sampling_options import EVAL_VARIANTS, SAMPLE_VARIANTS, decoder, set_sampling, variant, with_vae
from soflow_fast.size import parse_size
from soflow_fast.trainer import Trainer, load_run

# Suffixes that --out may have by mistake; any other is part of a name.
_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".npy", ".npz", ".pdf", ".png", ".tif", ".tiff", ".webp")


def train(args: argparse.Namespace) -> None:
    """``soflow train``: trains, or goes on with, the run of a configuration; with ``--dry-run`` prints its plan."""
    raw = read_yaml(Path(args.config))
    config = TrainConfig.from_dict(raw, args.overrides)
    with public_words(raw):
        if args.dry_run:
            print(describe(config, args.accept_changes))
            return
        trainer = Trainer(config, accept_changes=args.accept_changes)
        last = trainer.fit()
    if trainer.processes.is_first:
        print(f"done: {last}")
    distributed.leave()


def tune_step(args: argparse.Namespace) -> None:
    """``soflow tune``: times the forms of a configuration's step; prints the values that make the fastest."""
    distributed.require_alone("soflow tune")
    tried = tuple(args.tried.split(","))
    for name in tried:
        if name not in tune.CHOICES:
            raise ValueError(f"--try {args.tried} has {name!r}; choose of {', '.join(tune.CHOICES)}")
    if not 0 < args.seconds < float("inf"):
        raise ValueError(f"--seconds {args.seconds} is no time to measure for; give more than 0, such as 5")
    raw = read_yaml(Path(args.config))
    with public_words(raw):
        config = TrainConfig.from_dict(raw, args.overrides)
        chosen = tune.tune(config, tried, args.seconds, lambda line: print(f"# {line}", flush=True))
    sections = {}
    for key, value in chosen.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    print(yaml.safe_dump(sections, sort_keys=False) if sections else "# nothing is faster than what is configured")


def encode_images(args: argparse.Namespace) -> None:
    """``soflow encode``: writes the latents of a folder of images, and prints the configuration that trains on them."""
    distributed.require_alone("soflow encode")
    names = ("vae", "size", "batch", "device", "precision", "workers", "flip", "per_channel")
    args.size = parse_size(args.size, "--size ")
    done = encode(args.images, args.out, **{name: getattr(args, name) for name in names})
    print(f"# {done.rows} latents {done.shape} of {done.num_classes or 'no'} classes: {done.path}")
    print(yaml.safe_dump(done.configuration(), default_flow_style=None, sort_keys=False, width=10_000), end="")


def sample(args: argparse.Namespace) -> None:
    """``soflow sample``: draws samples of a run to a grid, a folder of images or a ``.npz`` file."""
    distributed.require_alone("soflow sample")
    require_count("--count", args.count)
    require_count("--steps", args.steps)
    config, model, loaded = load_run(args.run, args.device, ema_std=args.ema_std, step=args.step)
    set_sampling(model, config.objective, args)
    if args.conditions is not None:
        args.conditions = ConditionsFile(args.conditions, model.network)
    labels = _labels(args, config, model)
    sampler = Sampler(
        model,
        build.sample_shape(config),
        steps=args.steps,
        seed=args.seed,
        batch=min(config.evaluation.batch_size, args.count),
        precision=args.precision,
        compile=args.compile,
    )
    decode = decoder(with_vae(config, args.vae), model)
    of_images = decode is not None or are_images(config.model.in_channels)
    path = _destination(args, loaded, of_images)
    untimed = ""
    if sampler.compile:
        started = time.perf_counter()
        list(sampler.draw(labels, 1))
        untimed = f", {time.perf_counter() - started:.3g} s of compiling not counted"
    parts = _Timed(sampler.draw(labels, args.count, decode))
    if args.format == "grid":
        save_samples(torch.cat(list(parts)), path.with_suffix(""), config.output.sample_shape[1])
    elif args.format == "npz":
        save_npz(parts, args.count, labels, path)
    else:
        unfinished = path.with_name(f".{path.name}.writing")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            save_folder(parts, unfinished)
            os.replace(unfinished, path)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    what = "samples" if of_images else "latents (no autoencoder is set: --vae)"
    rate = f"{args.count / parts.seconds:.4g} images/s in {sampler.precision}{untimed}"
    print(f"{args.count} {what} in {args.steps} step(s), {rate}: {path}")


def _destination(args: argparse.Namespace, step: int, of_images: bool) -> Path:
    """Where samples of a training's step are to be written; ValueError, before any is drawn, if they cannot be."""
    name = f"{samples_name(step, args.steps, args.count, args.seed)}{variant(args, SAMPLE_VARIANTS)}"
    path = Path(args.out) if args.out else Path(args.run) / "samples" / name
    if args.format != "grid" and not of_images:
        raise ValueError(f"--format {args.format} is for images, and these are latents; give --vae, or leave it out")
    if path.name in ("", ".."):
        raise ValueError(f"--out {args.out!r} is no name of a file or folder; give one")
    if args.format != "folder":
        suffix = ".npz" if args.format == "npz" else suffix_of_samples(of_images)
        if path.suffix != suffix and path.suffix.lower() in _SUFFIXES:
            raise ValueError(f"--out {args.out!r} ends in {path.suffix}, and what is written is {suffix}; give that")
        path = path.with_name(f"{path.name.removesuffix(suffix)}{suffix}")
    if path.exists() and (args.format != "folder" or path.is_file() or any(path.iterdir())):
        raise ValueError(f"{path} exists already; choose another by --out, or remove it")
    return path


def score(args: argparse.Namespace) -> None:
    """``soflow eval``: scores samples of a run; the first process prints the scores and writes them as JSON."""
    processes = distributed.join(resolve_device(args.device))
    config, model, step = load_run(args.run, str(processes.device), ema_std=args.ema_std, step=args.step)
    if len(set(processes.of_all(lambda: step))) > 1:
        raise ValueError(
            f"the run {args.run} went on while its weights were read, and not all processes have the same step; "
            "choose it by --step"
        )
    set_sampling(model, config.objective, args)
    given = {
        "samples": args.count,
        "steps": args.steps,
        "reference": args.reference,
        "features": args.features,
        "weights": args.weights,
        "metrics": None if args.metrics is None else tuple(name.strip() for name in args.metrics.split(",") if name),
    }
    wanted = replace(config.evaluation, **{name: value for name, value in given.items() if value is not None})
    config = replace(with_vae(config, args.vae), evaluation=wanted)
    processes.of_first(partial(require_scored, config))
    processes.of_first(partial(check_evaluation, config))
    name = f"{evaluation_name(config, step, args.seed)}{variant(args, EVAL_VARIANTS)}"
    folder = Path(args.run) / "evaluation" / name
    precision = args.precision or ("bf16" if next(model.parameters()).is_cuda else "fp32")
    scores = evaluate(
        model,
        config,
        folder,
        dataset=build.dataset_of_conditions(config, model.network),
        decode=decoder(config, model),
        seed=args.seed,
        precision=precision,
        compile=args.compile,
        processes=processes,
    )
    distributed.leave()
    if not processes.is_first:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_suffix(".json")
    about = {
        "step": step,
        "count": wanted.samples,
        "steps": wanted.steps,
        "seed": args.seed,
        **compared_with(config),
        "weights": wanted.weights,
        "vae": config.data.vae,
        "precision": precision,
        "ema_std": args.ema_std,
        "renoise": model.renoises,
    }
    if hasattr(model, "set_sample_guidance"):
        about |= {"guidance_scale": model.sample_scale, "guidance_interval": model.sample_interval}
    path.write_text(json.dumps({**about, **scores}, indent=2) + "\n")
    for name, value in scores.items():
        print(f"{name:<20}{value if isinstance(value, str) else f'{value:.4f}'}")
    print(f"{'written to':<20}{path}")


def export_run(args: argparse.Namespace) -> None:
    """``soflow export``: writes a run's generator as a program for torch alone, or its averaged weights."""
    distributed.require_alone("soflow export")
    require_count("--steps", args.steps)
    path = Path(args.out)
    if path.suffix not in (export.PROGRAM, export.WEIGHTS):
        raise ValueError(
            f"{args.out!r} ends in neither {export.PROGRAM}, a program, nor {export.WEIGHTS}, the weights; give one"
        )
    if path.exists():
        raise ValueError(f"{path} exists already; choose another, or remove it")
    config, model, step = load_run(args.run, args.device, ema_std=args.ema_std, step=args.step)
    about = {"version": version(), "step": step, "ema_std": args.ema_std, "config": config.to_dict()}
    if path.suffix == export.WEIGHTS:
        export.write_weights(model, path, about)
        print(f"averaged weights of step {step}: {path}")
        return
    set_sampling(model, config.objective, args)
    config, precision = with_vae(config, args.vae), args.precision or "fp32"
    about |= {"steps": args.steps, "precision": precision, "vae": config.data.vae, "renoise": model.renoises}
    decode, shape = decoder(config, model), build.sample_shape(config)
    usage = export.write_program(model, shape, path, about, steps=args.steps, decode=decode, precision=precision)
    print(f"generator of step {step}, {args.steps} step(s), in {precision}: {path}; with torch alone:\n{usage}")


def demo(args: argparse.Namespace) -> None:
    """``soflow demo``: trains on the digits, and prints the scores beside their aims."""
    distributed.require_alone("soflow demo")
    missing = [name for name in ("matplotlib", "sklearn", "torch_fidelity") if find_spec(name) is None]
    if missing:
        raise ValueError(f"the demo needs {', '.join(missing)}, not installed; run pip install 'soflow-fast[demo]'")
    from soflow_fast.demo import AIMS, run_demo

    results = run_demo(args.run_dir, args.seed, args.device)
    print(f"\n{'':<20}{'one step':>10}{'aim':>10}{'two steps':>12}")
    for name, aim in AIMS.items():
        print(f"{name:<20}{results['one_step'][name]:>10.3f}{aim:>10}{results['two_steps'][name]:>12.3f}")
    print(f"\nwrote {args.run_dir}/samples.png, losses.png, metrics.json and {results['checkpoint']}")
    print(f"{results['seconds']:.0f} s, of which {results['seconds_training']:.0f} s of training")


def doctor(args: argparse.Namespace) -> None:
    """``soflow doctor``: prints :func:`~soflow_fast.doctor.report`."""
    print(report())


def _labels(
    args: argparse.Namespace, config: TrainConfig, model: torch.nn.Module
) -> torch.Tensor | ItemConditions | None:
    text, count = args.labels, args.count
    if args.conditions is not None:
        return ItemConditions(args.conditions, torch.arange(count) % len(args.conditions))
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    num_classes = config.model.num_classes
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"--labels {text!r} is not a list of numbers, such as 1,5,7")
    dataset, setting = build.dataset_of_conditions(config, model.network), f"--labels {text!r}"
    return labels_of_samples(model.network, dataset, [int(part) for part in parts], count, num_classes, setting)


class _Timed:
    """Iterates and adds up the seconds spent waiting."""

    def __init__(self, items: Iterator[Any]):
        self._items, self.seconds = items, 0.0

    def __iter__(self) -> "_Timed":
        return self

    def __next__(self) -> Any:
        started = time.perf_counter()
        try:
            return next(self._items)
        finally:
            self.seconds += time.perf_counter() - started
