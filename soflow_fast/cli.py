"""The command ``soflow``: encode, tune, train, sample, eval, export, demo, doctor.

Bad input ends in one sentence and exit code 2, a training run that does not stay finite in one sentence and 1, one that
a signal stops in 128 + its number; as of SIGPIPE, without a word, where nobody reads any longer.
"""

import argparse
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence

from soflow_fast import commands, distributed, doctor, sampling_options
from soflow_fast.imported import of_imported_code
from soflow_fast.precision import PRECISIONS
from soflow_fast.stopping import StoppedBySignal

_STEPS = "sampling steps, each of one network call, or of flow_matching.ode_steps for flow_matching"
_OVERRIDES = "any value of the configuration by its name, such as --optimizer.learning_rate 3e-4"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code."""
    parser = _parser()
    args, overrides = parser.parse_known_args(argv)
    if overrides and args.command not in (commands.train, commands.tune_step):
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
        resumable = args.command in (commands.train, commands.encode_images)
        goes_on = "; the same command goes on from what was last saved" if resumable else ""
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


class _Parser(argparse.ArgumentParser):
    """Takes its options with underscores too, as those of the configuration have them: ``--dry_run``."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        """As argparse's; what is no option of this parser's stays as it is spelled."""
        given = list(sys.argv[1:] if args is None else args)
        end = given.index("--") if "--" in given else len(given)
        return super().parse_known_args([*map(self._respelled, given[:end]), *given[end:]], namespace)

    def _respelled(self, argument: str) -> str:
        name, *value = argument.split("=", 1)
        dashed = name.replace("_", "-")
        is_ours = name.startswith("--") and any(dashed in action.option_strings for action in self._actions)
        return "=".join([dashed, *value]) if is_ours else argument


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="soflow", description="Train one-step image generators with Solution Flow Models.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=doctor.version())
    named = parser.add_subparsers(title="commands", required=True)

    def add(name: str, command: Callable, summary: str, **options) -> argparse.ArgumentParser:
        sub = named.add_parser(name, help=summary, description=summary, allow_abbrev=False, **options)
        sub.set_defaults(command=command)
        return sub

    epilog = f"--name value: {_OVERRIDES}"
    train = add("train", commands.train, "train, or go on with, the run of a configuration", epilog=epilog)
    train.add_argument("config", help="YAML file: nested, or a published SoFlow file as it is")
    train.add_argument("--dry-run", action="store_true", help="show configuration, sizes, FLOPs and memory, and stop")
    train.add_argument(
        "--accept-changes",
        action="store_true",
        help="go on with a run of other values or data where the weights fit; RUN/changes.jsonl records them",
    )

    tuner = add("tune", commands.tune_step, "time a configuration's step in the forms it can take here", epilog=epilog)
    tuner.add_argument("config", help="YAML file, as of train; with several GPUs give the batch_size of one")
    tuner.add_argument(
        "--try",
        dest="tried",
        default="attention,recompute",
        help="what to try, in this order: attention, recompute; impl, the fused kernels against plain torch; compile, "
        "which also has torch try implementations of the products, for many minutes; float8, which rounds the guidance "
        "(default attention,recompute)",
    )
    tuner.add_argument("--seconds", type=float, default=5.0, help="of timing for each form (default 5)")

    sample = add("sample", commands.sample, "draw samples from a run")
    sample.add_argument("run", help="folder of the run")
    sample.add_argument("--count", type=int, default=64, help="how many (default 64)")
    sample.add_argument("--steps", type=int, default=1, help=f"{_STEPS} (default 1)")
    told = sample.add_mutually_exclusive_group()
    told.add_argument(
        "--labels",
        help="classes, such as 3 or 1,5,7, repeated in turn (default: all in turn; of more classes than samples, as "
        "many, spread evenly); of a network that is told conditions, items of the data",
    )
    told.add_argument(
        "--conditions",
        metavar="FILE.npy",
        help="of a network that is told such, in place of those of the data: an array (N, ...) of numpy.save, whose "
        "rows, repeated in turn, are the conditions of the samples",
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

    score = add("eval", commands.score, "score a run's samples")
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

    exporter = add(
        "export", commands.export_run, "write the generator of a run as one file, for programs without this package"
    )
    exporter.add_argument("run", help="folder of the run")
    exporter.add_argument(
        "out", help="OUT.pt2: a program that torch.export.load reads; OUT.safetensors: the averaged weights alone"
    )
    exporter.add_argument("--steps", type=int, default=1, help=f"{_STEPS} (default 1)")

    demo = add("demo", commands.demo, "train on scikit-learn's digits and score the result, in minutes on a CPU")
    demo.add_argument("--run-dir", default="runs/demo", help="where to write (default runs/demo)")
    demo.add_argument("--seed", type=int, default=0, help="of every draw (default 0)")

    encoder = add("encode", commands.encode_images, "write, or go on writing, the latents of a folder of images")
    encoder.add_argument("images", help="folder of class folders, or of images without classes")
    encoder.add_argument("out", help="HDF5 file to write; OUT.partial until it is complete")
    encoder.add_argument(
        "--vae",
        required=True,
        help="the autoencoder: a published one of diffusers, owner/name or owner/name/vae, its folder, or your own, "
        "package.module.make",
    )
    encoder.add_argument("--size", default="256", help="of images, or height,width; cropped as by ADM (default 256)")
    encoder.add_argument("--batch", type=int, default=32, help="images at a time (default 32)")
    encoder.add_argument("--flip", action="store_true", help="each image's mirror image too, as samples of their own")
    encoder.add_argument(
        "--per-channel",
        action="store_true",
        help="measure mean and standard deviation of each channel, for data.latent_mean and data.latent_std",
    )
    encoder.add_argument("--precision", choices=PRECISIONS, help="of the encoder (default tf32 on a GPU, else fp32)")
    encoder.add_argument("--workers", type=int, help="processes that read images (default: the CPU cores, up to 16)")

    exporter.add_argument("--device", default="cpu", help="that the program is for: cpu, cuda or cuda:N (default cpu)")
    for sub in (encoder, sample, score, demo):
        sub.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    for sub in (sample, score, exporter):
        sampling_options.add(sub, draws=sub is not exporter)
    add("doctor", commands.doctor, "what is installed, which GPU there is, and what would be chosen")
    return parser


if __name__ == "__main__":
    sys.exit(main())
