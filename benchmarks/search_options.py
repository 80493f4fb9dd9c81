"""Command-line options that the benchmarks of searches share, and what is set up before one begins."""

import argparse
import math
import random
import time
from collections.abc import Callable

import torch

from benchmarks.collect_check import check_exact
from benchmarks.harness import CLOCKS, Check, end_in_time, gate
from benchmarks.search_model import SETS, SearchSet
from benchmarks.search_script import Script

GPU_SECONDS = 400  # a command has nine minutes there, and what is begun must end


def add_options(parser: argparse.ArgumentParser, repeats: int) -> None:
    """Device, set, size, clock, limit and record."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    parser.add_argument("--set", choices=sorted(SETS), help="model and searches; default by device")
    parser.add_argument("--num-questions", type=int, help="questions; default by set")
    parser.add_argument("--repeats", type=int, default=repeats, help="timed runs of ours")
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: for a machine shared with others")
    parser.add_argument("--max-seconds", type=float, help=f"begin nothing after; default: {GPU_SECONDS} on a GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-record", action="store_true", help="show only")


def begin(
    arguments: argparse.Namespace, script: Callable[[SearchSet], Script]
) -> tuple[SearchSet, Script, list[Check], float]:
    """Load the model, make the script and check ours on it.

    Returns:
        The set, the script, the checks, and the `time.monotonic()` after which nothing is begun.

    Raises:
        InexactError: ours is not exact.
    """
    limit = arguments.max_seconds or (GPU_SECONDS if arguments.device.type == "cuda" else math.inf)
    deadline = time.monotonic() + limit
    end_in_time()
    if arguments.device.type == "cuda" and arguments.device.index is not None:
        torch.cuda.set_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    chosen = SETS[arguments.set](arguments.device)
    played = script(chosen)
    checks = check_exact(chosen, played, random.Random(arguments.seed))
    gate(checks)
    return chosen, played, checks, deadline
