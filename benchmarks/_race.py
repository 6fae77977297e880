"""Rows prepared one after the other and timed side by side.

To prepare a row is to build it, run it until it is compiled and captured, and check it against the plain objective.
The rows that are ready are timed in turns: in each of ``ROUNDS`` rounds, in an order drawn anew, each runs a few
steps, preceded by a fixed matrix product whose time tells whether the machine itself was as fast as before.
"""

import gc
import itertools
import math
import random
import re
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from _baselines import JvpFlashDiT, PlainDiT, PublishedMeanFlow, SixCalls
from _check import CHECKED_STEP, Truth
from _pieces import gpu_lost
from _public_source import PublicSourceSoFlow
from _rows import Row, Workload, build
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from soflow_fast import SoFlow
from soflow_fast.dropping import fewest
from soflow_fast.objectives.base import Objective
from soflow_fast.objectives.meanflow import MeanFlow
from soflow_fast.paths import row_order
from soflow_fast.step import TrainStep

ROUNDS = 10

# Rows for counting.
_COUNTED_BATCH = 4

# Public code, which asks its network for the guidance of every row.
_SPARE_NONE = (SixCalls, PublicSourceSoFlow, PublishedMeanFlow)


class NotRun(Exception):  # noqa: N818 - an outcome, with the reason as its message
    """A row that cannot run here, or must not be timed.

    Args:
        reason: in words. failed: whether that is a fault; ``details`` go into the report.
    """

    def __init__(self, reason: str, *, failed: bool = False, **details):
        super().__init__(reason)
        self.report = {"skipped": reason, "failed": failed, **details}


# How cuBLAS and Triton tell it, neither with a class of its own.
_OUT_OF_MEMORY = re.compile(r"CUBLAS_STATUS_ALLOC_FAILED|CUDA.*out of memory")


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error is, or came of, a lack of GPU memory."""
    if error is None:
        return False
    if isinstance(error, torch.OutOfMemoryError) or _OUT_OF_MEMORY.search(str(error)):
        return True
    return out_of_memory(error.__cause__ or error.__context__)


def broken(error: Exception) -> dict:
    """The report of a row that raised."""
    return {"skipped": f"{type(error).__name__}: {error}"[:2000], "failed": True}


@dataclass
class Contestant:
    """A row that is ready to be timed.

    Attributes:
        step, data: what is run. batch: of the data. report: what is known of the row. ms: of one step, roughly.
        times, probes: ms of the timed steps and of the probe before each turn. steps_run: with those that are not
            timed. samples: of the GPU monitor. joules: drawn by all steps run.
    """

    step: TrainStep
    data: tuple[Tensor, Tensor]
    report: dict
    ms: float
    times: list[float] = field(default_factory=list)
    probes: list[float] = field(default_factory=list)
    steps_run: int = 0
    samples: list[dict] = field(default_factory=list)
    joules: float | None = 0.0

    @property
    def batch(self) -> int:
        return len(self.data[1])


class Track:
    """Prepares and times rows on one workload.

    Args:
        workload: what the rows run on. seconds: of timing for each row.
    """

    def __init__(self, workload: Workload, seconds: float):
        self.workload, self.seconds = workload, seconds
        self.on_gpu = workload.device == "cuda"
        self.truth = Truth(workload)
        self.monitor = None
        if self.on_gpu:
            from _nvml import GpuMonitor

            self.monitor = GpuMonitor()
        size, dtype = (8192, torch.bfloat16) if self.on_gpu else (1024, torch.float32)
        self._factors = [torch.randn(size, size, device=workload.device, dtype=dtype) for _ in range(2)]
        self.probe_flops = 2 * size**3

    def probe_ms(self) -> float:
        """Time of one large matrix product: bfloat16 on a GPU, float32 on a CPU; a median, as a step's is."""
        left, right = self._factors
        return statistics.median(self._times(lambda: left @ right, 5))

    # -------------------------------------------------------------------------------------------------- prepare

    def prepare(self, row: Row) -> Contestant:
        """The row, compiled, captured and checked.

        Raises:
            NotRun: where it cannot run here or is not right. torch.OutOfMemoryError: or an error caused by one.
        """
        if not self.on_gpu and row.no_cpu:
            raise NotRun(row.no_cpu)
        try:
            self.truth.compute(row)  # first, while there is memory for it
            report = {"what": row.what, "flops_per_sample": flops_per_sample(row, self.workload)}
            used = self._begin_memory()
            step, data = build(row, self.workload), self.workload.data()
        except ValueError as error:  # by which a network or a backend says what it needs
            raise NotRun(str(error)) from error
        begin = time.perf_counter()
        for i in range(CHECKED_STEP):
            step(*data)
            if self.on_gpu and i == 0:  # what compiling has taken meanwhile is not the row's
                torch.cuda.reset_peak_memory_stats()
        with step.model.given_noise() if isinstance(step.model, PublicSourceSoFlow) else nullcontext():
            stats = step(*data)
        self._synchronize()
        seconds = time.perf_counter() - begin
        peak = torch.cuda.max_memory_allocated() - used if self.on_gpu else None
        errors = self.truth.errors(row, step, stats)
        report |= errors
        wrong = [name for name, value in errors.items() if not value <= row.tolerance]
        if wrong:
            told = ", ".join(f"{name} {errors[name]:.3g}" for name in wrong)
            raise NotRun(f"its check failed: {told}, allowed {row.tolerance}", failed=True, **report)
        ms = min(self._times(lambda: step(*data), 2))
        report["state_bytes"] = state_bytes(step)
        report["peak_memory_bytes"] = peak if self.on_gpu else _peak_on_cpu(step, data)
        report["compile_seconds"] = max(0.0, seconds - (CHECKED_STEP + 1) * ms / 1000)
        return Contestant(step, data, report, ms)

    def has_room(self, contestants: list[Contestant]) -> bool:
        """Whether the free memory would hold another row as large as the largest of these."""
        if not self.on_gpu or not contestants:
            return True
        release()
        return torch.cuda.mem_get_info()[0] >= max(c.report["peak_memory_bytes"] for c in contestants)

    def _begin_memory(self) -> int:
        if not self.on_gpu:
            return 0
        release()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    # ----------------------------------------------------------------------------------------------------- time

    def race(self, contestants: list[Contestant]) -> None:
        """Times the rows in turns; then each one's report is complete. A row that breaks drops out.

        What ends a race before its last round leaves the reports of the turns until then.
        """
        order, draw = list(contestants), random.Random(0)
        try:
            for _ in range(ROUNDS):
                draw.shuffle(order)
                for contestant in list(order):
                    contestant.probes.append(self.probe_ms())
                    try:
                        self._turn(contestant, max(1, round(1000 * self.seconds / ROUNDS / contestant.ms)))
                    except Exception as error:  # a row that breaks must not cost the others
                        contestant.report = broken(error)
                        order.remove(contestant)
                        if gpu_lost():
                            raise
        finally:
            for contestant in order:
                if contestant.times:
                    self._finish(contestant)

    def count_kernels(self, contestants: list[Contestant]) -> None:
        """Adds ``kernels_launched`` to the reports of those that were timed, apart as a profiler can end a process."""
        for contestant in contestants:
            if "ms_per_step" in contestant.report:
                contestant.report["kernels_launched"] = self._kernels(contestant)

    def race_seconds(self, contestants: list[Contestant]) -> float:
        """How long :meth:`race` will take, roughly."""
        return sum(max(self.seconds, ROUNDS * contestant.ms / 1000) for contestant in contestants)

    def _turn(self, contestant: Contestant, steps: int) -> None:
        before = self.monitor.energy_j() if self.monitor else None
        contestant.times += self._times(lambda: contestant.step(*contestant.data), steps, contestant.samples)
        contestant.steps_run += steps + self.on_gpu
        after = self.monitor.energy_j() if self.monitor else None
        if before is None or after is None:
            contestant.joules = None
        elif contestant.joules is not None:
            contestant.joules += after - before

    def _times(self, run, steps: int, samples: list[dict] | None = None) -> list[float]:
        """Milliseconds of each step; on a GPU by events, after one step that is not timed and fills the queue."""
        if not self.on_gpu:
            times = []
            for _ in range(steps):
                begin = time.perf_counter()
                run()
                times.append(1000 * (time.perf_counter() - begin))
            return times
        run()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        if samples is not None:
            samples.append(self.monitor.sample())
        torch.cuda.synchronize()
        return [first.elapsed_time(second) for first, second in itertools.pairwise(events)]

    def _finish(self, contestant: Contestant) -> None:
        times, batch, report = sorted(contestant.times), contestant.batch, contestant.report
        median = statistics.median(times)
        low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
        probe = statistics.median(contestant.probes)
        rate = report["flops_per_sample"] * batch / median / 1e9
        report |= {
            "ms_per_step": median,
            "ms_quartiles": [low, high],
            "ms_p99": times[math.ceil(0.99 * len(times)) - 1],
            "steps": len(times),
            "images_per_s": 1000 * batch / median,
            "ms_per_image": median / batch,
            "tflops": rate,
            "probe_tflops": self.probe_flops / probe / 1e9,
            "mfu": rate / (self.probe_flops / probe / 1e9),
            "kernels_launched": None,
            "joules_per_image": contestant.joules and contestant.joules / contestant.steps_run / batch,
        }
        if contestant.samples:
            from _nvml import summary

            report |= summary(contestant.samples)

    def _kernels(self, contestant: Contestant) -> int | None:
        """GPU kernels of one step, without copies and fills; None where the profiler fails or sees nothing."""
        if not self.on_gpu:
            return None
        try:
            with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
                contestant.step(*contestant.data)
                torch.cuda.synchronize()
            names = [event.name for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        except Exception as error:
            print(f"its kernels are not counted: {error}", file=sys.stderr, flush=True)
            return None
        return sum(not name.startswith(("Memcpy", "Memset")) for name in names) or None

    # ------------------------------------------------------------------------------------------- largest batch

    def at_largest_batch(self, row: Row, report: dict) -> dict:
        """The row at the largest batch found to fit: a multiple of 32, from what it held at the common one."""
        release()
        held, state = report["peak_memory_bytes"], report["state_bytes"]
        per_image = (held - state) / self.workload.batch
        batch = int((0.95 * torch.cuda.mem_get_info()[0] - state) / per_image) // 32 * 32
        while batch > self.workload.batch:
            try:
                ms = self._ms_at(row, batch)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
            else:
                return {"largest_batch": batch, "ms_per_image_at_largest_batch": ms / batch}
            finally:
                torch.compiler.reset()
                release()
            batch = batch * 15 // 16 // 32 * 32
        return {"largest_batch": self.workload.batch, "ms_per_image_at_largest_batch": report["ms_per_image"]}

    def _ms_at(self, row: Row, batch: int) -> float:
        workload = replace(self.workload, batch=batch)
        step, data = build(row, workload), workload.data()
        for _ in range(CHECKED_STEP + 1):
            step(*data)
        return statistics.median(self._times(lambda: step(*data), 10))

    def _synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def flops_per_sample(row: Row, workload: Workload) -> int:
    """Floating-point operations of one step's products and attention per sample, counted on its eager form.

    Counted on a few samples, less what of the guidance the whole batch is spared and they are not.
    """
    of_step, of_forward, model = count_flops(row, workload, _COUNTED_BATCH)
    spared = spared_forwards(model, workload.batch) / workload.batch
    spared -= spared_forwards(model, _COUNTED_BATCH) / _COUNTED_BATCH
    return round((of_step - spared * of_forward) / _COUNTED_BATCH)


def count_flops(row: Row, workload: Workload, batch: int) -> tuple[int, int, Objective]:
    """Of a step with so many samples, and of their forward; and the objective."""
    dit = PlainDiT if row.dit is JvpFlashDiT else row.dit  # the same operations; custom kernels count none
    plain = replace(row, dit=dit, impl="torch", compile=False, cuda_graph=False)
    counted = replace(workload, batch=batch, fused=False, half=False, attention="math")
    step, data = build(plain, counted), counted.data()
    (x0, labels), t = data, torch.ones(batch, device=counted.device)
    with sdpa_kernel(SDPBackend.MATH):
        step(*data)  # a network whose difference is derived runs once for that
        with FlopCounterMode(display=False) as of_step:
            step(*data)
        with FlopCounterMode(display=False) as of_forward, torch.no_grad():
            step.model.network(x0, t, t, labels)
    return of_step.get_total_flops(), of_forward.get_total_flops(), step.model


def spared_forwards(model: Objective, batch: int) -> int:
    """How many rows' forwards the guidance of a batch is spared, see :mod:`soflow_fast.dropping`."""
    if not isinstance(model, (SoFlow, MeanFlow)) or isinstance(model, _SPARE_NONE):
        return 0
    if not (model.guided if isinstance(model, MeanFlow) else model.guidance_scale != 1):
        return 0
    if getattr(model, "direction", "target") == "prediction":
        return 0
    n_velocity = row_order(batch, model.velocity_share)[1]
    velocity, others = (fewest(n, model.label_drop) for n in (n_velocity, batch - n_velocity))
    return velocity + 2 * others


def state_bytes(step: TrainStep) -> int:
    """Weights, gradients, optimizer state, averages and low-precision copies."""
    tensors = [*step.model.parameters(), *step.model.buffers(), *(p.grad for p in step.model.parameters())]
    tensors += [value for state in step.optimizer.state.values() for value in state.values()]
    tensors += [*step.ema.averages.values(), *(step.copy.copies.values() if step.copy else ())]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if torch.is_tensor(t)}
    return sum(storages.values())


def _peak_on_cpu(step: TrainStep, data: tuple[Tensor, Tensor]) -> int:
    """Most bytes held at once, from the state before a step and what the step allocates and frees."""
    step.optimizer.zero_grad()  # the profiler does not see that memory freed which it did not see allocated
    held = peak = state_bytes(step)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        step(*data)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def release() -> None:
    """Returns the memory of steps that are no longer referred to; if it cannot, it says so, and rows go on without."""
    gc.collect()
    if torch.cuda.is_available():
        try:
            torch.cuda.empty_cache()
        except torch.AcceleratorError:  # the GPU does nothing more in this process
            raise
        except RuntimeError as error:  # what a broken row has left must not cost the others
            print(f"memory is kept: {error}", file=sys.stderr, flush=True)
