"""Ranks of one host as children of one command: started, signalled and ended together.

torchrun answers every failure with exit code 1 and waits half a minute for a rank that hangs. `deepspeed` leaves its ranks
running when it gets SIGTERM. Here signals go to every rank, a failed rank takes the others with it within seconds, its exit
code is the command's and its error is shown last, and no rank outlives the command, whatever kills that.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

import click

from cpo_fast.errors import ConfigError, EnvironmentProblem
from cpo_fast.ranks import find_ranks

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SECONDS_TO_FOLLOW = (
    5.0  # that the others get when a rank has failed: they wait for it in a collective, and nothing can be saved
)
POLL_SECONDS = 0.1
TRACEBACK_LINES = 30
_PR_SET_PDEATHSIG = 1  # of Linux: the signal that a child gets when its parent dies


@dataclass
class Rank:
    """One child, and what it has written to stderr (rank 0 writes to the terminal)."""

    number: int
    process: "subprocess.Popen[bytes]"
    errors: IO[bytes] | None

    def last_words(self) -> str:
        """Its last line, or the end of its traceback."""
        if self.errors is None:
            return ""
        self.errors.seek(0)
        lines = [line for line in self.errors.read().decode(errors="replace").splitlines() if line.strip()]
        return "\n".join(lines[-TRACEBACK_LINES if self.process.returncode == 1 else -1 :])


def launch_ranks(arguments: Sequence[str], num_ranks: int, grace: float) -> int:
    """Run `cpo-fast ARGUMENTS` as so many ranks of this host, and return the exit code of the first that fails, or 0.

    Args:
        arguments: of the command, without what asks for ranks.
        num_ranks: one a GPU.
        grace: seconds that ranks may take to end after a signal, before they are killed.

    Raises:
        ConfigError: this process is a rank of another launcher.
    """
    if find_ranks().world_size > 1:
        raise ConfigError("--gpus starts ranks, and this process is one already; leave it out under a launcher")
    ranks: list[Rank] = []
    ends_at: float | None = None
    was_asked = False

    def forward(number: int, frame: object) -> None:
        nonlocal ends_at, was_asked
        ends_at, was_asked = time.monotonic() + grace + SECONDS_TO_FOLLOW, True
        _signal_all(ranks, number)

    before = [signal.signal(number, forward) for number in FORWARDED]
    first_failed: Rank | None = None
    try:
        port = _free_port()
        for number in range(num_ranks):
            ranks.append(_start(arguments, number, num_ranks, port))
        while any(rank.process.poll() is None for rank in ranks):
            failed = [rank for rank in ranks if rank.process.returncode]
            if failed and first_failed is None:
                first_failed = min(failed, key=_is_follower)
                ends_at = ends_at or time.monotonic() + SECONDS_TO_FOLLOW
            if ends_at is not None and time.monotonic() > ends_at:
                _signal_all(ranks, signal.SIGKILL)
            time.sleep(POLL_SECONDS)
    finally:
        _signal_all(ranks, signal.SIGKILL)
        for number, handler in zip(FORWARDED, before, strict=True):
            signal.signal(number, handler)
    first_failed = first_failed or min(
        (rank for rank in ranks if rank.process.returncode), key=_is_follower, default=None
    )
    if first_failed is None:
        return 0
    code = first_failed.process.returncode
    if (first_failed.number > 0 or code < 0) and not was_asked:  # else rank 0 has said it itself
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        click.echo(f"rank {first_failed.number} {how}: {first_failed.last_words() or 'it said nothing'}", err=True)
    return code if code > 0 else 128 - code


def _is_follower(rank: Rank) -> bool:
    """Whether a rank may have ended because another did, where both were found at once."""
    return rank.process.returncode == EnvironmentProblem.exit_code


def _start(arguments: Sequence[str], number: int, num_ranks: int, port: int) -> Rank:
    threads = max(1, (os.cpu_count() or 1) // num_ranks)
    variables = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = (
        {"OMP_NUM_THREADS": str(threads)} | os.environ | {key: str(v) for key, v in variables.items()} | address
    )
    errors = tempfile.TemporaryFile() if number else None  # noqa: SIM115  (read when the rank has ended)
    process = subprocess.Popen(
        [sys.executable, "-m", "cpo_fast", *arguments],
        env=environment,
        stdout=subprocess.DEVNULL if number else None,
        stderr=errors,
        start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
        preexec_fn=_die_with_parent,
    )
    return Rank(number, process, errors)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _signal_all(ranks: Sequence[Rank], number: int) -> None:
    for rank in ranks:
        if rank.process.poll() is None:
            rank.process.send_signal(number)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
