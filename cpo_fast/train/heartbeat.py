"""Which rank is silent, and what it was at: signs of life through the ranks' store, beside the collectives that hang.

A rank that is stopped, swapped out or cut off keeps all others waiting in a collective until that times out, and then each
of them knows only that somebody was late. Here every rank says a few times a minute what it is at. Rank 0 listens to all,
and they listen to it. Whoever hears nothing for `train.heartbeat` seconds says who is silent and ends this process, and
the launcher ends the others.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist

from cpo_fast.errors import EnvironmentProblem, note_failure
from cpo_fast.train.communication import Communicator

BEATS = 6  # in the seconds after which a rank counts as silent
STORE_SECONDS = 5.0  # that an answer of the store may take
_END = "end"


class Heartbeat:
    """A context in which this rank gives signs of life and waits for those of others. Nothing without a store."""

    def __init__(
        self, communicator: Communicator, store: dist.Store | None, seconds: float, stuck_seconds: float | None = None
    ) -> None:
        """`seconds` is how long a rank may be silent, and `stuck_seconds` how long this one may be at one part of a step.

        None leaves that to the collectives, which raise. NCCL's end the process without a word instead.
        """
        self.communicator, self.seconds, self.stuck_seconds = communicator, seconds, stuck_seconds
        self.interval = seconds / BEATS
        rank, world_size = communicator.rank, communicator.world_size
        self.watched = [other for other in range(world_size) if other != rank] if rank == 0 else [0]
        self.last: dict[int, dict[str, Any]] = {}  # words by rank
        self._ages = dict.fromkeys(self.watched, 0.0)
        self._heard: dict[int, int] = {}  # how often a rank had spoken
        self._count = 0
        self._finished = threading.Event()
        self._talker = threading.Thread(target=self._talk, name="heartbeat talk", daemon=True)
        self._reason = ""  # why rank 0 ends all
        self._store = None if store is None else store.clone()  # type: ignore[attr-defined]  # torch's stub lacks it
        if self._store is not None:
            self._store.set_timeout(timedelta(seconds=STORE_SECONDS))
            self._speak()

    def __enter__(self) -> "Heartbeat":
        if self._store is not None:
            # all have spoken, for their hosts have been compared: from here on each is known by its process and host
            self._exchange()
            self._talker.start()
            threading.Thread(target=self._watch, name="heartbeat watch", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finished.set()
        if self._talker.is_alive():
            # a thread that comes back from torch's C++ while the interpreter ends aborts the process
            self._talker.join(2 * STORE_SECONDS)

    def others(self) -> str:
        """What the other ranks said last, a sentence each, with a space behind."""
        if self.communicator.rank:  # which hears rank 0 alone
            return ""
        words = (f"{_name(rank, words)} was at: {words['doing']}. " for rank, words in sorted(self.last.items())[:8])
        text = "".join(words)
        return text[:1].upper() + text[1:]

    def _speak(self) -> None:
        assert self._store is not None
        words = {"host": socket.gethostname(), "process": os.getpid(), "doing": self.communicator.doing}
        self._store.set(f"beat/{self.communicator.rank}", json.dumps([self._count, words]))
        self._count += 1

    def _talk(self) -> None:
        """Speak and listen. An answer of the store may never come, so the clock runs in another thread."""
        while not self._finished.wait(self.interval):
            self._exchange()

    def _exchange(self) -> None:
        assert self._store is not None
        with contextlib.suppress(RuntimeError):  # rank 0 is gone or cut off, and its silence counts
            self._speak()
            words = self._store.multi_get([f"beat/{rank}" for rank in self.watched])
            for rank, text in zip(self.watched, words, strict=True):
                count, self.last[rank] = json.loads(text)
                if self._heard.get(rank) != count:
                    self._heard[rank], self._ages[rank] = count, 0.0
            if self._store.check([_END]):
                self._reason = self._store.get(_END).decode()

    def _watch(self) -> None:
        before = time.monotonic()
        at, since = "", 0.0  # what this rank is at, and for how long
        while not self._finished.wait(self.interval / 2):
            now = time.monotonic()
            # a process that was itself stopped for a while learns nothing about the others from its clock
            passed, before = min(now - before, self.interval), now
            for rank in self.watched:
                self._ages[rank] += passed
            doing = self.communicator.doing
            at, since = doing, since + passed if doing == at else 0.0
            if self.stuck_seconds is not None and doing.startswith("step") and since > self.stuck_seconds:
                self._leave(
                    f"this rank is at {doing} for {since:.0f} s (train.collective_timeout). {self.others()}Look at the "
                    "rank that is behind; the same command goes on from the newest checkpoint"
                )
            silent = [rank for rank in self.watched if self._ages[rank] > self.seconds]
            if self._reason:
                self._leave(self._reason)
            elif silent:
                reason = self._sentence(silent)
                if self.communicator.rank == 0:
                    threading.Thread(target=self._tell, args=(reason,), daemon=True).start()
                    time.sleep(self.interval + 1)  # the others come to read it before the store is gone
                self._leave(reason)

    def _tell(self, reason: str) -> None:
        assert self._store is not None
        with contextlib.suppress(RuntimeError):
            self._store.set(_END, reason)

    def _sentence(self, silent: list[int]) -> str:
        words = self.last.get(silent[0], {"host": "?", "process": "?", "doing": "starting"})
        also = f" (and {len(silent) - 1} more: {', '.join(map(str, silent[1:9]))})" if len(silent) > 1 else ""
        return (
            f"{_name(silent[0], words)}{also} has given no sign of life for {self.seconds:g} s (train.heartbeat). It "
            f"was at: {words['doing']}. Rank {self.communicator.rank} was at: "
            f"{self.communicator.doing}. Look at that host and its network; the same command goes on from the newest "
            "checkpoint"
        )

    def _leave(self, reason: str) -> None:
        note_failure(EnvironmentProblem.exit_code, reason)
        sys.stderr.write(f"rank {self.communicator.rank}: error: {reason}\n")
        sys.stderr.flush()
        os._exit(EnvironmentProblem.exit_code)  # the main thread may never come back from a collective


def _name(rank: int, words: dict[str, Any]) -> str:
    return f"rank {rank} (process {words['process']} on {words['host']})"
