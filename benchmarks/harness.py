"""What every benchmark of this project shares: an exactness gate, interleaved timing, a stamped record, a table, a plot.

Variants of one benchmark run in turn within one process, so that a change of clock or of the machine's load hits all of
them. Nothing is recorded or shown before the gate has passed: a fast wrong answer has no speed.
"""

import functools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

_STAMPED_PACKAGES = (
    "torch", "transformers", "peft", "trl", "deepspeed", "triton", "liger-kernel", "cut-cross-entropy", "flash-attn",
)  # fmt: skip
_GPU_FIELDS = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "memory.total")
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond the table the last is an upper bound
_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
          2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060)  # fmt: skip


class InexactError(Exception):
    """A variant does not compute what the others compute; its time means nothing."""


class TimeUp(Exception):
    """The process was asked to end (SIGTERM, as `timeout` sends it): what is measured is to be recorded."""


def end_in_time() -> None:
    """Raise TimeUp in the main thread when the process is asked to end."""

    def end(number: int, frame: Any) -> None:
        raise TimeUp("the time was up")

    signal.signal(signal.SIGTERM, end)


@dataclass(frozen=True)
class Check:
    """One comparison of the gate: a relative error and the bound it must meet."""

    name: str
    error: float
    bound: float


def gate(checks: Sequence[Check]) -> None:
    """Raise InexactError, naming every failure, unless each error is a number within its bound."""
    failed = [f"{c.name}: {c.error:.3g} > {c.bound:.3g}" for c in checks if not c.error <= c.bound]
    if failed:
        raise InexactError("exactness check failed, nothing was measured: " + "; ".join(failed))


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated runs of one variant, in the order they ran."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    def quantile(self, q: float) -> float:
        """Seconds below which a share q of the runs lies, linear between neighbours."""
        ordered = sorted(self.seconds)
        place = q * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    @property
    def spread(self) -> float:
        """Largest minus smallest, as a fraction of the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


# "wall" is what a user waits; "cpu" sums the process's threads and hardly moves when the machine is shared
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def timed(run: Callable[[], Any], clock: str = "wall") -> float:
    """Seconds of one call by a clock of CLOCKS."""
    now = CLOCKS[clock]
    start = now()
    run()
    return now() - start


@dataclass(frozen=True)
class StratifiedTotal:
    """A total estimated from a random sample in each stratum, with a 95 % interval (Student's t)."""

    total: float
    low: float
    high: float
    num_sampled: int
    num_total: int


def stratified_total(samples: Mapping[Any, Sequence[float]], sizes: Mapping[Any, int]) -> StratifiedTotal:
    """Estimate the sum over all members of all strata: sum of size x sample mean.

    Args:
        samples: measured values by stratum, at least two each.
        sizes: how many members each stratum has.

    Raises:
        ValueError: the strata differ or one has fewer than two samples.
    """
    if samples.keys() != sizes.keys() or any(len(values) < 2 for values in samples.values()):
        raise ValueError("expected the same strata in both, with at least two samples each")
    total = sum(sizes[key] * statistics.fmean(values) for key, values in samples.items())
    variance = sum(sizes[key] ** 2 * statistics.variance(values) / len(values) for key, values in samples.items())
    degrees = sum(len(values) - 1 for values in samples.values())
    half = _T_975[min(degrees, len(_T_975)) - 1] * variance**0.5
    num_sampled = sum(len(values) for values in samples.values())
    return StratifiedTotal(total, max(0.0, total - half), total + half, num_sampled, sum(sizes.values()))


def environment(command: str) -> dict[str, Any]:
    """Versions, commit, processor, GPU with clocks and driver, threads, load (one minute), date and command."""
    import torch

    versions = {}
    for package in _STAMPED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": processor_name(),
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "gpu": _gpu() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _answer(*command: str) -> str | None:
    """Standard output of a command, or None where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


@functools.cache  # as the first record of a process finds it: asking takes longer than some of what is measured
def _gpu() -> dict[str, str] | None:
    import torch

    index = str(torch.cuda.current_device())
    answer = _answer("nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader", "-i", index)
    return None if answer is None else dict(zip(_GPU_FIELDS, answer.split(", "), strict=False))


@functools.cache
def _commit() -> str | None:
    """Revision of the checkout, with `+` when files differ from it; None outside a checkout."""
    folder = str(Path(__file__).parent)
    revision = _answer("git", "-C", folder, "rev-parse", "HEAD")
    if revision is None:
        return None
    return revision + ("+" if _answer("git", "-C", folder, "status", "--porcelain", "-uno") else "")


def processor_name() -> str:
    """The processor's model name, or the machine type where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def results_folder() -> Path:
    """Where records and plots go: `CPO_FAST_RESULTS`, or benchmarks/results."""
    return Path(os.environ.get("CPO_FAST_RESULTS") or Path(__file__).parent / "results")


def record(benchmark: str, command: str, checks: Sequence[Check], results: Mapping[str, Any]) -> Path:
    """Append one line with results, checks and environment to <benchmark>.jsonl in `results_folder`; returns the file.

    Raises:
        InexactError: a check fails; nothing is written.
    """
    gate(checks)
    path = results_folder() / f"{benchmark}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    line = {
        "benchmark": benchmark,
        "environment": environment(command),
        "checks": [asdict(check) for check in checks],
        "results": dict(results),
    }
    with open(path, "ab", buffering=0) as file:  # one write: processes side by side do not mix their lines
        file.write((json.dumps(line, sort_keys=True) + "\n").encode())
    return path


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell: the first to the left, the others, which are numbers, to the right."""
    lines = [columns, *rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]

    def text(line: Sequence[str]) -> str:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    return "\n".join([text(columns), "  ".join("-" * width for width in widths), *map(text, rows)])


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> None:
    """Write a table to standard output, in plain text: a pipe has no width, and a machine may have torch and no more."""
    sys.stdout.write(f"{title}\n{table(columns, rows)}\n{caption}\n")
    sys.stdout.flush()


def plot(
    path: Path,
    title: str,
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    x_label: str,
    y_label: str = "ms, median",
) -> Path | None:
    """Draw milliseconds, or what `y_label` says, over size, a panel a key, a line a contestant, both axes logarithmic.

    Args:
        path: PNG to write.
        title: above all panels.
        panels: panel -> contestant -> (size, milliseconds or another value).
        x_label: what the sizes are.

    Returns:
        `path`, or None where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 5), squeeze=False, layout="constrained")
    for axes, (panel, lines) in zip(grid[0], panels.items(), strict=True):
        for name, points in lines.items():
            sizes, milliseconds = zip(*sorted(points), strict=True)
            axes.loglog(sizes, milliseconds, marker="o", label=name, linewidth=2.5 if name.startswith("ours") else 1.0)
        axes.set(title=panel, xlabel=x_label, ylabel=y_label)
        axes.legend(fontsize=7)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
