"""The command ``soflow``: encode, train, sample, eval, demo, doctor.

Bad input ends in one sentence and exit code 2, a training run that does not stay finite in one sentence and 1, one that
a signal stops in 128 + its number; as of SIGPIPE, without a word, where nobody reads any longer.
"""

import argparse
import json
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

from soflow_fast import build, distributed, doctor, sampling_options
from soflow_fast.build import resolve_device
from soflow_fast.conditions import OfItems
from soflow_fast.config import TrainConfig
from soflow_fast.config_io import read_yaml
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
from soflow_fast.imported import of_imported_code
from soflow_fast.interop import public_words
from soflow_fast.precision import PRECISIONS
from soflow_fast.sample import Sampler
from soflow_fast.sampling_options import EVAL_VARIANTS, SAMPLE_VARIANTS, decoder, set_sampling, variant, with_vae
from soflow_fast.size import parse_size
from soflow_fast.stopping import StoppedBySignal
from soflow_fast.trainer import Trainer, load_run

_STEPS = "sampling steps, each of one network call, or of flow_matching.ode_steps for flow_matching"
# Suffixes that --out may have by mistake; any other is part of a name.
_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".npy", ".npz", ".pdf", ".png", ".tif", ".tiff", ".webp")
_OVERRIDES = "any value of the configuration by its name, such as --optimizer.learning_rate 3e-4"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code."""
    parser = _parser()
    args, overrides = parser.parse_known_args(argv)
    if overrides and args.command is not _train:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    args.overrides = overrides
    if "" not in sys.path:
        sys.path.insert(0, "")  # as of `python -m`: networks and data sets that a configuration names
    try:
        args.command(args)
        sys.stdout.flush()  # else it fails after this, where Python ends
    except distributed.OtherProcessError:  # which says why
        return 2
    except (ValueError, OSError, FloatingPointError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 128 + signal.SIGPIPE
        if of_imported_code(error):
            raise
        print(f"soflow: {distributed.whose()}{' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:
        goes_on = "; the same command goes on from what was last saved" if args.command in (_train, _encode) else ""
        print(f"soflow: interrupted{goes_on}", file=sys.stderr)
        return 130
    except StoppedBySignal as stopped:
        distributed.leave()
        return stopped.code
    return 0


def _nobody_reads() -> bool:
    """Whether the other end of stdout or stderr is closed, as of ``soflow doctor | head -1``."""
    found = False
    for stream in (sys.stdout, sys.stderr):
        try:
            end = select.poll()
            end.register(stream.fileno(), 0)
            closed = any(event & select.POLLERR for _, event in end.poll(0))
        except (OSError, ValueError):  # no file
            continue
        if closed:
            with open(os.devnull, "w") as nowhere:  # where Python, as it ends, puts what is left
                os.dup2(nowhere.fileno(), stream.fileno())
            found = True
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="soflow", description="Train one-step image generators with Solution Flow Models.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=doctor.version())
    commands = parser.add_subparsers(title="commands", required=True)

    def add(name: str, command: Callable, summary: str, **options) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False, **options)
        sub.set_defaults(command=command)
        return sub

    train = add(
        "train", _train, "train, or go on with, the run of a configuration", epilog=f"--name value: {_OVERRIDES}"
    )
    train.add_argument("config", help="YAML file: nested, or a published SoFlow file as it is")
    train.add_argument(
        "--dry-run", "--dry_run", action="store_true", help="show configuration, sizes, FLOPs and memory, and stop"
    )
    train.add_argument(
        "--accept-changes",
        "--accept_changes",
        action="store_true",
        help="go on with a run of other values or data where the weights fit; RUN/changes.jsonl records them",
    )

    sample = add("sample", _sample, "draw samples from a run")
    sample.add_argument("run", help="folder of the run")
    sample.add_argument("--count", type=int, default=64, help="how many (default 64)")
    sample.add_argument("--steps", type=int, default=1, help=f"{_STEPS} (default 1)")
    sample.add_argument(
        "--labels",
        help="classes, such as 3 or 1,5,7, repeated in turn (default: all in turn; of more classes than samples, as "
        "many, spread evenly)",
    )
    sample.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    sample.add_argument(
        "--format",
        choices=("grid", "folder", "npz"),
        default="grid",
        help="one PNG of all (default), one PNG each in a folder, or the file of arrays that ADM's evaluation reads",
    )
    sample.add_argument(
        "--out",
        help="file, with or without suffix, or folder; nothing is overwritten (default: in RUN/samples, named by "
        "the steps, the count and what else differs from the defaults)",
    )

    score = add("eval", _eval, "score a run's samples")
    score.add_argument("run", help="folder of the run")
    score.add_argument("--count", type=int, help="how many samples (default: as configured)")
    score.add_argument("--steps", type=int, help=f"{_STEPS} (default: as configured)")
    score.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    score.add_argument("--reference", help="folder of real images or .npz of their statistics (default: as configured)")
    score.add_argument("--features", help="feature extractor of torch-fidelity, or pixels (default: as configured)")
    score.add_argument(
        "--metrics", help="besides the Fréchet distance, of isc,kid,prc; '' for none (default: as configured)"
    )
    score.add_argument("--weights", help="file of the extractor's weights (default: as configured, or downloaded)")

    demo = add("demo", _demo, "train on scikit-learn's digits and score the result, in minutes on a CPU")
    demo.add_argument("--run-dir", default="runs/demo", help="where to write (default runs/demo)")
    demo.add_argument("--seed", type=int, default=0, help="of every draw (default 0)")

    encoder = add("encode", _encode, "write, or go on writing, the latents of a folder of images")
    encoder.add_argument("images", help="folder of class folders, or of images without classes")
    encoder.add_argument("out", help="HDF5 file to write; OUT.partial until it is complete")
    encoder.add_argument("--vae", required=True, help="diffusers AutoencoderKL: name of a published one, or its folder")
    encoder.add_argument("--size", default="256", help="of images, or height,width; cropped as by ADM (default 256)")
    encoder.add_argument("--batch", type=int, default=32, help="images at a time (default 32)")
    encoder.add_argument("--flip", action="store_true", help="each image's mirror image too, as samples of their own")
    encoder.add_argument("--precision", choices=PRECISIONS, help="of the encoder (default tf32 on a GPU, else fp32)")
    encoder.add_argument("--workers", type=int, help="processes that read images (default: the CPU cores, up to 16)")

    for sub in (encoder, sample, score, demo):
        sub.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    for sub in (sample, score):
        sampling_options.add(sub)
    add("doctor", _doctor, "what is installed, which GPU there is, and what would be chosen")
    return parser


def _train(args: argparse.Namespace) -> None:
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


def _encode(args: argparse.Namespace) -> None:
    distributed.require_alone("soflow encode")
    names = ("vae", "size", "batch", "device", "precision", "workers", "flip")
    args.size = parse_size(args.size, "--size ")
    done = encode(args.images, args.out, **{name: getattr(args, name) for name in names})
    print(f"{done.rows} latents {done.shape} of {done.num_classes or 'no'} classes: {done.path}; in the configuration:")
    print(yaml.safe_dump(done.configuration(), default_flow_style=None, sort_keys=False, width=10_000), end="")


def _sample(args: argparse.Namespace) -> None:
    distributed.require_alone("soflow sample")
    _require_positive("--count", args.count)
    _require_positive("--steps", args.steps)
    config, model, loaded = load_run(args.run, args.device, ema_std=args.ema_std, step=args.step)
    set_sampling(model, config.objective, args)
    labels = _labels(args.labels, args.count, config, model)
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


def _eval(args: argparse.Namespace) -> None:
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


def _demo(args: argparse.Namespace) -> None:
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


def _doctor(args: argparse.Namespace) -> None:
    print(doctor.report())


def _labels(text: str | None, count: int, config: TrainConfig, model: torch.nn.Module) -> torch.Tensor | OfItems | None:
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    num_classes = config.model.num_classes
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"--labels {text!r} is not a list of numbers, such as 1,5,7")
    dataset, setting = build.dataset_of_conditions(config, model.network), f"--labels {text!r}"
    return labels_of_samples(model.network, dataset, [int(part) for part in parts], count, num_classes, setting)


class _Timed:
    """What it is given, one after the other, and the seconds that was waited for."""

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


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} {value} is not possible; it must be at least 1")


if __name__ == "__main__":
    sys.exit(main())
