"""Where a step's time goes: some steps under `torch.profiler`, written as a Chrome trace with named ranges.

Ranges (`torch.profiler.record_function`, also NVTX ranges under `torch.autograd.profiler.emit_nvtx`) nest as

    step > pack | backbone reference | backbone policy | head | loss | backward | read | optimizer

`read` is the step's one wait for the device. The first step of a run is left out: it compiles kernels and fills caches.
Open `trace.json` in chrome://tracing or ui.perfetto.dev. A profiled step is slower than others by what recording costs.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from cpo_fast.errors import ConfigError
from cpo_fast.files import write_atomic

STEP = "step"
INSIDE_STEP = ("pack", "backbone reference", "backbone policy", "head", "loss", "backward", "read", "optimizer")
RANGES = (STEP, *INSIDE_STEP)
WARM_UP_STEPS = 1


@dataclass(frozen=True)
class RangeTotal:
    """One named range over all profiled steps. Ranges inside it are part of its seconds."""

    name: str
    count: int
    host_seconds: float
    device_seconds: float | None  # kernels launched inside it, None without a GPU
    share: float  # of the host seconds of the steps


class StepProfiler:
    """Profiles `num_steps` optimizer steps after the first and writes `trace.json` and `ranges.json`."""

    def __init__(self, num_steps: int, folder: Path, num_done: int, total_steps: int) -> None:
        """Profile `num_steps` steps after the first one that is taken, or to the last. `num_done` were taken before.

        Raises:
            ConfigError: the run has no step after the first.
        """
        self.first_step = num_done + WARM_UP_STEPS + 1
        if self.first_step > total_steps:
            raise ConfigError(
                f"--profile leaves out the first step, and this run has {total_steps - num_done}"
                f"{' left' if num_done else ''}; raise train.num_epochs or train.max_steps, or lower train.batch_pairs"
            )
        self.folder = folder
        self.last_step = min(self.first_step + num_steps - 1, total_steps)
        self.ranges: tuple[RangeTotal, ...] = ()
        self._profile: Any = None

    def before(self, step: int) -> None:
        if step == self.first_step:
            cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            # without it every profile writes two notes into the middle of the screen
            os.environ.setdefault("KINETO_LOG_LEVEL", "10")
            self._profile = profile(activities=[ProfilerActivity.CPU, *cuda])
            self._profile.start()

    def after(self, step: int) -> None:
        if step == self.last_step:
            self.finish()

    def finish(self) -> None:
        """Write what was recorded, also of a run that ends early, and nothing a second time."""
        if self._profile is None:
            return
        recorded, self._profile = self._profile, None
        recorded.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(self.folder / "trace.json"))
        self.ranges = _totals(recorded)
        write_atomic(self.folder / "ranges.json", json.dumps([asdict(total) for total in self.ranges], indent=1) + "\n")


def _totals(recorded: Any) -> tuple[RangeTotal, ...]:
    # with CUDA a range has a second entry, of the device's own timeline
    found = {total.key: total for total in recorded.key_averages() if total.device_type.name == "CPU"}
    step_microseconds = max(found[STEP].cpu_time_total, 1) if STEP in found else 1
    return tuple(
        RangeTotal(
            name,
            total.count,
            total.cpu_time_total / 1e6,
            total.device_time_total / 1e6 if torch.cuda.is_available() else None,
            total.cpu_time_total / step_microseconds,
        )
        for name in RANGES
        if (total := found.get(name)) is not None
    )
