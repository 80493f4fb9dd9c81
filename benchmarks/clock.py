"""Seconds of interleaved runs on a CPU or a GPU, and the peak of memory that a run takes beyond its inputs.

On a GPU a run is timed by events, and the L2 cache is overwritten before each, so that no variant finds the inputs of
the run before it. On a CPU the wall clock is used. Memory is that of torch's allocator: on a GPU the caching
allocator's own peak, on a CPU the running sum of the allocations that the profiler saw.
"""

import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.harness import Timing

FLUSH_BYTES = 256 * 2**20  # several times the L2 of any card with CUDA (50 MiB on H100 and H200, 40 on A100)
NUM_WARMUPS = 2  # the first run compiles, the second sizes the allocator's pools
MAX_RUNS, MIN_RUNS = 30, 5
SECONDS_EACH = 1.0  # what a variant may take in all; a slower one gets fewer runs, never fewer than MIN_RUNS


class Clock:
    """Times single runs on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def seconds(self, run: Callable[[], Any]) -> float:
        """Seconds of one call, device work included."""
        if self._flush is None:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def measure(
    variants: Mapping[str, Callable[[], Any]],
    device: torch.device,
    max_runs: int = MAX_RUNS,
    seconds_each: float = SECONDS_EACH,
    deadline: float = math.inf,
) -> dict[str, Timing | str]:
    """Run all variants in turn; a Timing for each name, or a sentence on why it could not run.

    Args:
        variants: what is timed, by name.
        device: where the variants run.
        max_runs: timed runs of a variant.
        seconds_each: time after which a variant drops out of further rounds, once it has MIN_RUNS (or `max_runs`).
        deadline: `time.monotonic()` after which no variant is begun and, once each has run, no further round.
    """
    clock = Clock(device)
    failures: dict[str, str] = {}
    num_runs: dict[str, int] = {}
    for name, run in variants.items():
        if time.monotonic() > deadline:
            failures[name] = "left out: the time was up"
            continue
        try:
            last = [clock.seconds(run) for _ in range(NUM_WARMUPS)][-1]
        except Exception as error:  # a peer that breaks is a result
            failures[name] = reason(error)
            continue
        num_runs[name] = min(max_runs, max(MIN_RUNS, math.ceil(seconds_each / max(last, 1e-9))))
    seconds: dict[str, list[float]] = {name: [] for name in num_runs}
    for round_index in range(max(num_runs.values(), default=0)):
        if round_index > 0 and time.monotonic() > deadline:
            break
        for name in [name for name in seconds if round_index < num_runs[name]]:
            try:
                seconds[name].append(clock.seconds(variants[name]))
            except Exception as error:
                failures[name] = reason(error)
                del seconds[name]
    timings: dict[str, Timing | str] = {name: Timing(tuple(values)) for name, values in seconds.items()}
    return timings | failures


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Most bytes held at once during one call beyond what was held before it; its result counts."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    quiet_profiler()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    kineto: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in kineto.events() if e.name() == "[memory]")
    held = peak = 0
    for _, num_bytes in changes:
        held += num_bytes
        peak = max(peak, held)
    return peak


def quiet_profiler() -> None:
    """Keep the profiler's own notes, two lines a run, off the screen."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "10")


def reason(error: Exception) -> str:
    """One line on why a contestant could not run."""
    if isinstance(error, ImportError):
        return f"not installed: {error}"
    if isinstance(error, torch.OutOfMemoryError):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
