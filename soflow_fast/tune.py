"""``soflow tune``: which of the forms that a step can take is the fastest on this machine.

Each form is measured in a process of its own, so that one which fails or runs out of memory costs only its own line.
"""

import ctypes
import itertools
import math
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from soflow_fast.attention import BACKENDS, missing_for
from soflow_fast.conditions import null_condition
from soflow_fast.config import TrainConfig
from soflow_fast.data import batches
from soflow_fast.dit import RECOMPUTE
from soflow_fast.step import TrainStep
from soflow_fast.trainer import Trainer

#: What can be tried, and the value of the configuration that says it. All but float8 only change how a step is rounded.
CHOICES = {
    "attention": "model.attention",
    "recompute": "model.recompute",
    "impl": "model.impl",
    "compile": "compute.compile",
    "float8": "model.float8_guidance",
}

# Steps before those that are timed: by then all is compiled, and a CUDA graph captured and replayed.
_WARM_UP = 6
# At least so many are timed.
_FEWEST = 5

# Of every weight matrix's gradient so many values are compared, and so much they may differ, relative to their norm:
# forms that round otherwise were under 1 % apart in bfloat16, 12 blocks deep.
_COMPARED, _TOLERANCE = 4096, 0.05


# The form that gradients are compared with, and that of another network than a DiT.
_PLAIN_OF_OTHERS = {"compute.compile": False, "compute.cuda_graph": False, "model.impl": "torch"}
_PLAIN = {
    **_PLAIN_OF_OTHERS,
    "model.attention": "sdpa",
    "model.recompute": "block",
    "model.float8_guidance": False,
}

_PR_SET_PDEATHSIG = 1  # of Linux's prctl


class Measured(NamedTuple):
    """A form of the step.

    Attributes:
        ms: of each step that was timed. bytes: most that were allocated on the GPU; None on a CPU. seconds: of the
            steps before, most of them compiling. values: of the configuration that were chosen, by their dotted names.
        gradient: of the first step, by the names of the weight matrices, some of each one's values; float32.
        device: its name. missing: by attention backend why it cannot run, None where it can.
    """

    ms: list[float]
    bytes: int | None
    seconds: float
    values: dict[str, Any]
    gradient: dict[str, np.ndarray]
    device: str
    missing: dict[str, str | None]


def tune(config: TrainConfig, tried: tuple[str, ...], seconds: float = 5.0, say: Callable = print) -> dict[str, Any]:
    """Measures the forms one after another, each choice with the best of those before it, and says what it finds.

    A form replaces the best so far if three quarters of its steps took less time than three quarters of that one's. One
    whose gradient differs from that of plain torch, as by a kernel that is wrong for a shape, is said and not taken.

    Args:
        config: of the run; a batch of its data is read. tried: of ``CHOICES``. seconds: of timing for each form.
        say: called with each line.

    Returns:
        The values that made the fastest form, by their dotted names, as far as the configuration has others.

    Raises:
        ValueError: if the step of the configuration itself cannot run, or there is nothing to try.
    """
    first = _measured(config, {}, seconds)
    if isinstance(first, str):
        raise ValueError(f"the configuration's own step cannot be measured: {first}")
    if not any(_forms(name, first) for name in tried):
        others = [name for name in CHOICES if _forms(name, first)]
        raise ValueError(
            f"there is nothing to try of {', '.join(tried)} with model.preset={config.model.preset!r} here; "
            f"choose --try {','.join(others)}"
        )
    own = ", ".join(f"{name}={value}" for name, value in first.values.items())
    say(f"batches of {config.batch_size} of {config.model.preset} on {first.device}: {own}")
    plain = _measured(config, _PLAIN if config.model.is_dit else _PLAIN_OF_OTHERS, None)
    if isinstance(plain, str):
        say(f"plain torch cannot be measured ({plain}); gradients are compared with the configuration's own")
        plain = first
    off = _difference(first.gradient, plain.gradient)
    say(_line("as configured", first, config.batch_size, off))
    best, chosen, limit = first, {}, _quartiles(first.ms)[0] if off <= _TOLERANCE else math.inf
    for name in tried:
        key, found = CHOICES[name], {}
        for value, missing in _forms(name, best):
            label = f"{key}={value}"
            form = missing or _measured(config, {**chosen, key: value}, seconds)
            if not isinstance(form, str) and form.values.get(key) != value:
                form = f"it ran as {form.values.get(key)}"
            if isinstance(form, str):
                say(f"{label:<36}not measured: {form}")
                continue
            off = _difference(form.gradient, plain.gradient)
            say(_line(label, form, config.batch_size, off, best))
            if off <= _TOLERANCE:
                found[value] = form
        value = min(found, key=lambda value: statistics.median(found[value].ms), default=None)
        if value is not None and _quartiles(found[value].ms)[1] < limit:
            best, chosen = found[value], {**chosen, key: value}
            limit = _quartiles(best.ms)[0]
    return chosen


def with_values(config: TrainConfig, values: dict[str, Any]) -> TrainConfig:
    """A configuration with others by their dotted names, such as ``model.attention``."""
    for key, value in values.items():
        section, name = key.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def _forms(name: str, of: Measured) -> list[tuple[Any, str | None]]:
    """The other values of a choice, and why one cannot run."""
    now = of.values.get(CHOICES[name])
    if now is None:  # of another network than a DiT, or for a CPU
        return []
    if name == "attention":
        return [(value, of.missing[value]) for value in BACKENDS if value not in ("auto", now)]
    others = {
        "recompute": RECOMPUTE,
        "impl": ("triton", "torch"),
        "compile": (True, "max-autotune"),
        "float8": (True,),
    }
    return [(value, None) for value in others[name] if value != now]


def _line(label: str, form: Measured, batch: int, off: float, before: Measured | None = None) -> str:
    low, high = _quartiles(form.ms)
    median = statistics.median(form.ms)
    memory = "" if form.bytes is None else f", {form.bytes / 2**30:.1f} GiB"
    note = "" if off <= _TOLERANCE else f"; its gradient is wrong, {off:.0%} from plain torch's"
    times = "" if before is None else f", {statistics.median(before.ms) / median:.3f} times as fast"
    told = f"{median:.2f} ms ({low:.2f} to {high:.2f}), {1000 * batch / median:.0f} images/s{memory}{times}"
    return f"{label:<36}{told}, {form.seconds:.0f} s to compile{note}"


def _quartiles(ms: list[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(ms, n=4)
    return low, high


def _difference(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The largest relative difference of a weight matrix's gradient; nan if one is not finite."""
    norm = np.linalg.norm
    return float(np.max([norm(found[name] - g) / norm(g) for name, g in expected.items() if g.any()], initial=0.0))


# ------------------------------------------------------------------------------------------- in a process of its own


def _measured(config: TrainConfig, values: dict[str, Any], seconds: float | None) -> Measured | str:
    """Of the configuration with those values, or why there is none; ``seconds`` None for its gradient alone."""
    try:
        config = with_values(config, values)
    except ValueError as error:
        return str(error)
    context = multiprocessing.get_context("spawn")  # a fork would share what this process has of the GPU
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, config, seconds))
    try:
        process.start()
        theirs.close()
        return ours.recv()
    except EOFError:
        process.join()
        return f"its process ended with exit code {process.exitcode}"
    except BaseException:  # Ctrl-C, which may have reached this process alone
        if process.pid is not None:
            process.kill()
        raise
    finally:
        ours.close()
        if process.pid is not None:
            process.join()


def _answer(to: Connection, config: TrainConfig, seconds: float | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the other process says it
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # and is not outlived
    os.dup2(2, 1)  # what the data or the network print is no part of the configuration
    try:
        found = measure(config, seconds)
    except torch.OutOfMemoryError:
        found = "out of GPU memory"
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        found = kind + " ".join(str(error).split())
    to.send(found)


def measure(config: TrainConfig, seconds: float | None) -> Measured:
    """The step of a configuration on the first batch of its data, for so many seconds; for None, its gradient alone.

    Raises:
        ValueError: as :class:`~soflow_fast.trainer.Trainer`.
    """
    trainer = Trainer(config)
    step, model, device = trainer.step, trainer.model, trainer.processes.device
    _leave_zero(model)
    batch = _batch(trainer)
    begin = time.perf_counter()
    step(*batch)
    gradient = {name: _some(p.grad) for name, p in model.named_parameters() if p.grad is not None and p.dim() > 1}
    for _ in range(0 if seconds is None else _WARM_UP - 1):
        step(*batch)
    _wait(device)
    warm = time.perf_counter()
    ms = [] if seconds is None else list(_times(step, batch, seconds, device))
    net = model.network
    chosen = {"compute.precision": step.precision, "compute.compile": step.compile, "model.impl": model.impl}
    missing = {}
    if config.model.is_dit:
        chosen |= {"model.attention": net.attention, "model.recompute": net.recompute}
        if device.type == "cuda":
            chosen["model.float8_guidance"] = net.float8_guidance
        dtype = torch.bfloat16 if step.precision == "bf16" else net.compute_dtype
        missing = {name: missing_for(name, net.hidden_size // net.num_heads, dtype) for name in BACKENDS}
    return Measured(
        ms=ms,
        bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        seconds=warm - begin,
        values=chosen,
        gradient=gradient,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU",
        missing=missing,
    )


@torch.no_grad()
def _leave_zero(model: nn.Module) -> None:
    """Weights that begin as 0, with which a DiT's blocks have no gradient, away from it."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if not p.any():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.02)


def _batch(trainer: Trainer) -> tuple[Tensor, Tensor | None]:
    config, null = trainer.config, null_condition(trainer.model.network)
    read = batches(
        trainer.dataset,
        batch=config.batch_size,
        steps=range(1),
        seed=config.seed,
        num_classes=config.model.num_classes,
        rows=trainer.rows,
        workers=0,
        device=trainer.processes.device,
        null_condition=null,
    )
    try:
        return next(iter(read))
    finally:
        read.close()


def _some(gradient: Tensor) -> np.ndarray:
    """Some values of a gradient, drawn, as a stride would pass over columns; one is nan if any of all is not finite."""
    flat = gradient.flatten()
    chosen = torch.randint(flat.numel(), (_COMPARED,), generator=torch.Generator().manual_seed(0))
    values = flat[chosen.to(flat.device)].float()
    values[0] = torch.where(flat.isfinite().all(), values[0], torch.nan)
    return values.cpu().numpy()


def _times(step: TrainStep, batch: tuple, seconds: float, device: torch.device) -> Iterator[float]:
    """Milliseconds of steps that follow each other, as on a GPU its queue does not run dry."""
    spent = timed = 0
    while spent < 1000 * seconds or timed < _FEWEST:
        if device.type == "cuda":
            events = [torch.cuda.Event(enable_timing=True) for _ in range(_FEWEST + 1)]
            step(*batch)
            events[0].record()
            for event in events[1:]:
                step(*batch)
                event.record()
            torch.cuda.synchronize(device)
            ms = [one.elapsed_time(other) for one, other in itertools.pairwise(events)]
        else:
            begin = time.perf_counter()
            step(*batch)
            ms = [1000 * (time.perf_counter() - begin)]
        spent, timed = spent + sum(ms), timed + len(ms)
        yield from ms


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
