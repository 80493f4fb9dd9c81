"""Signals that ask work to end which keeps what is finished as it goes: a sentence on what there is, and an exit code.

A search has every tree on disk when it is found, so nothing is waited for. SIGTERM, and SIGUSR1, by which Slurm warns and
launchers pass a SIGTERM on, end it as an interrupt from the keyboard does. That is no `Exception`, so that no question is
recorded as failed for it.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from cpo_fast.errors import KEPT, Interrupted

ENDING = (signal.SIGTERM, signal.SIGUSR1)


def exit_code_of(number: int) -> int:
    """130 for an interrupt, and 143 for SIGTERM and for Slurm's early warning SIGUSR1."""
    return 130 if number == signal.SIGINT else 143


@dataclass
class Kept:
    """What a stopped command leaves to work with: `say` gives it in words."""

    say: Callable[[], str]


@contextmanager
def stopped_by_signals(before_any: str) -> Iterator[Kept]:
    """Let a signal end the block at once, with a sentence that says what is kept.

    Outside the main thread, where Python takes no signals, an interrupt alone does.

    Args:
        before_any: what is said until the block has set `say` of what it is given.

    Raises:
        Interrupted: SIGTERM or SIGUSR1 came. An interrupt from the keyboard stays one, with a note for `errors.outcome`.
    """
    kept = Kept(lambda: before_any)
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if not received:  # launchers send one several times, and what ends here must come to its end
            received.append(number)
            raise KeyboardInterrupt

    takes_signals = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handle) for number in ENDING} if takes_signals else {}
    try:
        yield kept
    except KeyboardInterrupt as error:
        if received:
            name = signal.Signals(received[0]).name
            raise Interrupted(f"{name}: {kept.say()}", exit_code_of(received[0])) from error
        error.add_note(KEPT + kept.say())
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
