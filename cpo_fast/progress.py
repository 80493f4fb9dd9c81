"""What long work is at: one line for whoever waits, and the place that the sentence of an error names.

Work opens a `stage` and says from time to time what it is doing and how far it is, which sets a few attributes. Whether
and how that is shown is the command line's affair (`show`). On a terminal the newest stage is one line at the bottom,
drawn anew four times a second. Elsewhere it is a plain line whenever nothing was said for `every` seconds. A
thread does both, so that it goes on while a step computes, and reads what engines count anyway: a step does no more work.

    search 3/8 questions, 96 thoughts, 212 tokens/s, 0:41, about 1:20 left
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import click

from cpo_fast.errors import AT

PIPED_SECONDS = 30.0  # without a word before a plain line is due: a log of an hour gets 120 at most
REFRESHES = 4  # a second, on a terminal
# lines (thoughts, of a search) and tokens that were generated so far
Counts = Callable[[], tuple[int, int]]


@dataclass(eq=False)
class Stage:
    """A part of a command's work. `total` 0: nobody knows how much there is."""

    what: str
    total: int = 0
    unit: str = ""
    done: int = 0
    note: str = ""  # what is being done
    figures: str = ""  # what came out last
    counts: Counts | None = None
    counts_from: float = 0.0  # when they began
    max_thoughts: int = 0  # of a unit, where thoughts say how far it is
    began: float = field(default_factory=lambda: time.monotonic())
    # when, and after how much, the counting of what is left began
    counted_from: tuple[float, int] | None = None

    def at(self, done: int, total: int, unit: str = "") -> None:
        """How far the work is. The first call begins to count the time that is left."""
        if self.counted_from is None:
            self.counted_from = (time.monotonic(), done)
        self.done, self.total, self.unit = done, total, unit or self.unit

    def line(self) -> str:
        """The stage in words."""
        now = time.monotonic()
        share = f" {self.done}/{self.total} {self.unit}".rstrip() if self.total else ""
        parts = [self.what + share, self.figures, self.note]
        num_thoughts = 0
        if self.counts is not None:
            num_thoughts, num_tokens = self.counts()
            name = "thoughts" if self.max_thoughts else "lines"
            speed = num_tokens / max(now - self.counts_from, 1e-3)
            parts += [f"{num_thoughts} {name}" if num_thoughts else "", f"{speed:.0f} tokens/s" if num_tokens else ""]
        parts.append(_clock(now - self.began))
        left = self._seconds_left(now, num_thoughts)
        parts.append(f"about {_clock(left)} left" if left is not None else "")
        return ", ".join(filter(None, parts))

    def place(self) -> str:
        """Where it is, without what changes by the clock."""
        share = f" {self.done}/{self.total} {self.unit}".rstrip() if self.total else ""
        return ", ".join(filter(None, (self.what + share, self.note)))

    def _seconds_left(self, now: float, num_thoughts: int) -> float | None:
        if self.counted_from is None or self.done >= self.total:
            return None
        since, first = self.counted_from
        num_left = self.total - first
        # searches end late and all at once: until then their thoughts tell more than how many have ended
        by_thoughts = min(0.95, num_thoughts / (self.max_thoughts * num_left)) if self.max_thoughts else 0.0
        share = max((self.done - first) / num_left, by_thoughts)
        return (now - since) * (1 - share) / share if share > 0.02 else None


class _Screen:
    """Shows the newest stage while there is one."""

    def __init__(self, every: float, err: bool) -> None:
        self.every, self.err = every, err
        self.spoken = time.monotonic()  # when something was said last
        self.live: Any = None
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()

    def start(self) -> None:
        if (sys.stderr if self.err else sys.stdout).isatty():
            from rich.console import Console
            from rich.live import Live
            from rich.text import Text

            self.live = Live(
                get_renderable=lambda: Text(current_line(), no_wrap=True, overflow="ellipsis"),
                console=Console(stderr=self.err),
                refresh_per_second=REFRESHES,
                transient=True,
                redirect_stdout=sys.stdout.isatty(),
                redirect_stderr=sys.stderr.isatty(),
            )
            self.live.start()
        else:
            self._ended.clear()
            self._thread = threading.Thread(target=self._write, name="progress", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            self._thread = None

    def _write(self) -> None:
        while not self._ended.wait(max(0.05, self.spoken + self.every - time.monotonic())):
            if time.monotonic() >= self.spoken + self.every and (line := current_line()):
                try:
                    say(f"  {line}", err=self.err)
                except OSError:  # nobody reads it
                    return


_stages: list[Stage] = []
_screen: _Screen | None = None


@contextmanager
def shown(every: float = PIPED_SECONDS, err: bool = True) -> Iterator[None]:
    """Show stages inside, on stderr or stdout. The innermost `shown` decides, how often on no terminal too."""
    global _screen
    before, _screen = _screen, _Screen(every, err)
    try:
        yield
    finally:
        _screen.stop()
        _screen = before


def is_shown() -> bool:
    """Whether libraries' own bars would be in the way."""
    return _screen is not None


@contextmanager
def stage(what: str, total: int = 0, unit: str = "") -> Iterator[Stage]:
    """Work that takes long, inside of the stage before it. An exception that leaves it gets a note of the place."""
    new = Stage(what, total, unit)
    _stages.append(new)
    screen = _screen if len(_stages) == 1 else None
    if screen is not None:
        screen.start()
    try:
        yield new
    except BaseException as error:
        if not any(note.startswith(AT) for note in getattr(error, "__notes__", ())):
            error.add_note(AT + new.place())
        raise
    finally:
        _stages.remove(new)
        if screen is not None:
            screen.stop()


def doing(note: str) -> None:
    """Say what the newest stage is at."""
    if _stages:
        _stages[-1].note = note


def at(done: int, total: int, unit: str) -> None:
    """Say how far the newest stage is."""
    if _stages:
        _stages[-1].at(done, total, unit)


def figures(text: str) -> None:
    """Say what the newest stage has found."""
    if _stages:
        _stages[-1].figures = text


def counted_by(counts: Counts | None) -> None:
    """Let the newest stage show what an engine counts, which has counted nothing yet."""
    if _stages:
        _stages[-1].counts, _stages[-1].counts_from = counts, time.monotonic()


def current_line() -> str:
    """The newest stage in words, or nothing."""
    try:
        return _stages[-1].line()
    except IndexError:  # it has just ended
        return ""


def say(text: str, err: bool = False) -> None:
    """Print a line that stays, above the one that moves."""
    if _screen is not None:
        _screen.spoken = time.monotonic()
        if _screen.live is not None and (sys.stderr if err else sys.stdout).isatty():
            _screen.live.console.print(text, markup=False, highlight=False, soft_wrap=True)
            return
    click.echo(text, err=err)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
