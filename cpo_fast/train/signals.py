"""Signals that ask a training to end: noticed at once, obeyed at the next step boundary, enforced after a grace period.

A Python signal handler runs between two bytecodes of the main thread, which may sit in a collective for minutes. The
interpreter writes a signal's number to a descriptor as soon as it arrives, and a thread reads it there.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from cpo_fast.errors import Interrupted, note_failure
from cpo_fast.interrupts import exit_code_of

LEAVE_SECONDS = 3.0  # in which a process ends that has nothing to save
REPEAT_SECONDS = 1.0  # in which a second interrupt is taken for the same one
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class EndSignals:
    """A context that notes SIGTERM, SIGINT and SIGUSR1 in `received`, 0 until then.

    `grace` seconds after the first, or a second interrupt from the keyboard, ends the process with `exit_code_of`. Other
    repeats mean nothing: Slurm, systemd and launchers send one signal to a rank several times. Outside the main thread,
    where Python takes no signals, it notes none.
    """

    def __init__(self, grace: float, remains: Callable[[], str] = lambda: "") -> None:
        """`remains` says what a run that ends between steps leaves to work with."""
        self.grace, self.remains = grace, remains
        self.received = 0
        self._is_saved = False
        self._first_at = 0.0
        self._finished = threading.Event()

    def __enter__(self) -> "EndSignals":
        self._active = threading.current_thread() is threading.main_thread()
        if not self._active:
            return self
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._handlers: list[Any] = [signal.signal(number, self._handle) for number in SIGNALS]
        self._thread = threading.Thread(target=self._watch, name="end-signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._active:
            return
        self._finished.set()
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in zip(SIGNALS, self._handlers, strict=True):
            signal.signal(number, handler)
        self._writer.close()
        self._thread.join()
        self._reader.close()

    @contextmanager
    def leaving_at_once(self) -> Iterator[None]:
        """A signal inside ends the run without a wait for a step: nothing would be lost. It raises Interrupted, and the
        process ends `LEAVE_SECONDS` later where the main thread does not come to that."""
        self._is_saved = True
        try:
            if self.received:
                raise self._left(self.received)
            yield
        finally:
            self._is_saved = False

    def _watch(self) -> None:
        while numbers := self._reader.recv(64):
            for number in numbers:
                if number not in SIGNALS:
                    continue
                if self.received:
                    if number == signal.SIGINT and time.monotonic() > self._first_at + REPEAT_SECONDS:
                        self._leave()
                    continue
                self.received, self._first_at = number, time.monotonic()
                threading.Thread(target=self._enforce, daemon=True).start()

    def _enforce(self) -> None:
        if self._is_saved:
            if not self._finished.wait(min(LEAVE_SECONDS, self.grace)):
                self._leave(str(self._left(self.received)))
        elif not self._finished.wait(self.grace):
            self._leave(f"error: the run was not saved within {self.grace:g} s of the signal; leaving at once")

    def _leave(self, text: str = "") -> None:
        note_failure(exit_code_of(self.received), text)
        if text:
            sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
        os._exit(exit_code_of(self.received))  # the main thread may never come back from a collective

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Runs in the main thread, when that comes to it. Otherwise the thread does what is to be done."""
        if self._is_saved and not self._finished.is_set():
            self._is_saved = False  # raised once
            raise self._left(number)

    def _left(self, number: int) -> Interrupted:
        remains = self.remains()
        return Interrupted(
            f"{signal.Signals(number).name} between steps; {remains}{'; ' if remains else ''}the same command goes on from "
            "the newest checkpoint, or from the start",
            exit_code_of(number),
        )
