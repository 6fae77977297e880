"""Times of a step: on a GPU from a CUDA graph with a cold L2 cache; on a CPU by the clock, to try a benchmark."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from soflow_fast.capture import Captured, on_side_stream

_BUDGET_MS = 100.0
_REPEATS = (10, 100)
_RAMP_MS = 100.0


class Timing(NamedTuple):
    """Milliseconds: the median, the 20th and the 80th percentile of ``repeats`` runs."""

    median: float
    low: float
    high: float
    repeats: int


class Timer:
    """Times steps on one device.

    On a GPU a step is captured in a CUDA graph, so that launches cost what they cost inside a captured training step,
    and each run is timed by events after the L2 cache was filled with other data. That data is read, not written:
    written lines would have to leave the cache during the step.
    """

    def __init__(self, device: str):
        self.device = torch.device(device)
        if self.device.type == "cuda":
            size = 2 * torch.cuda.get_device_properties(self.device).L2_cache_size
            self._other = torch.ones(size // 4, dtype=torch.int32, device=self.device)

    def __call__(self, step: Callable[[], object]) -> Timing:
        """Runs the step often enough for a stable median."""
        run_ms = self._graph_runner(step) if self.device.type == "cuda" else self._clock_runner(step)
        fewest, most = _REPEATS if self.device.type == "cuda" else (1, 5)
        if self.device.type == "cuda":
            self._ramp_up(run_ms)
        repeats = int(min(max(_BUDGET_MS / max(run_ms(1)[0], 1e-3), fewest), most))
        times = sorted(run_ms(repeats))
        return Timing(statistics.median(times), times[repeats // 5], times[repeats - 1 - repeats // 5], repeats)

    @staticmethod
    def _ramp_up(run_ms) -> None:
        """Runs for a moment: while code was compiled the clocks went down."""
        end = time.perf_counter() + _RAMP_MS / 1e3
        while time.perf_counter() < end:
            run_ms(_REPEATS[0])

    def _graph_runner(self, step):
        stream = torch.cuda.Stream(self.device)
        for _ in range(3):
            on_side_stream(stream, step)
        captured = Captured("what is timed", stream, step)

        def run_ms(repeats: int) -> list[float]:
            events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
            for start, end in events:
                self._other.sum()
                start.record()
                captured()
                end.record()
            torch.cuda.synchronize()
            return [start.elapsed_time(end) for start, end in events]

        return run_ms

    def _clock_runner(self, step):
        def run_ms(repeats: int) -> list[float]:
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                step()
                times.append(1e3 * (time.perf_counter() - start))
            return times

        return run_ms


def copy_bandwidth(timer: Timer) -> float:
    """GB/s of copying a tensor much larger than the cache: bytes read and written over the median time."""
    elements = 2**29 if timer.device.type == "cuda" else 2**22
    source = torch.ones(elements, dtype=torch.int16, device=timer.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timer(lambda: target.copy_(source)).median / 1e6


def launch_floor_ms(timer: Timer) -> float:
    """The time of a graph with one kernel that does nothing: no step is faster than that."""
    x = torch.zeros(1, device=timer.device)
    return timer(lambda: x.add_(1)).median
