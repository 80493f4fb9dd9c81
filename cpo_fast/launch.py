"""Processes that one command starts, signals and ends together: ranks of this host, launchers of ranks, agents on others.

torchrun answers every failure with exit code 1 and waits half a minute for a rank that hangs. `deepspeed` leaves its ranks
running when it gets SIGTERM. Here signals go to every rank, a failed rank takes the others with it within seconds, its exit
code is the command's and its error is shown last, and nothing that a command started is left when it ends.

`obey` is the agent of another host (`cpo_fast.cli.agent`): it reads what to start from its standard input, then numbers of
signals, and where that input ends, because the connection or the command that opened it is gone, its processes end too.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import IO, Any

import click

from cpo_fast.errors import EnvironmentProblem

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SECONDS_TO_FOLLOW = (
    5.0  # that the others get when a rank has failed: they wait for it in a collective, and nothing can be saved
)
POLL_SECONDS = 0.1
TRACEBACK_LINES = 30
NO_CONNECTION = 255  # exit code of ssh itself
_MARK = "CPO_FAST_LAUNCH"  # variable by which a command knows what it has started
# of Linux's prctl: the signal that a child gets when its parent dies, and who adopts children whose parent died
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass(frozen=True)
class Command:
    """A process to start.

    Attributes:
        arguments: program and arguments.
        label: what it is called in messages, like `rank 3`.
        environment: variables on top of this process's.
        is_shown: whether it writes to the terminal. Of others the last words are kept.
        order: what an agent on another host reads first; it then keeps reading for signals.
        signals: those that mean something else to it, and what it gets instead.
    """

    arguments: list[str]
    label: str
    environment: dict[str, str] = field(default_factory=dict)
    is_shown: bool = True
    order: str = ""
    signals: dict[int, int] = field(default_factory=dict)


class Child:
    """A command that runs, and what it has written to stderr where that is not shown."""

    def __init__(self, command: Command, mark: str) -> None:
        self.command = command
        self.errors: IO[bytes] | None = None
        if not command.is_shown:
            self.errors = tempfile.TemporaryFile()  # noqa: SIM115  (read when it has ended)
        self.killed_at: float | None = None  # by us
        self.process = subprocess.Popen(
            command.arguments,
            env=os.environ | command.environment | {_MARK: mark},
            stdin=subprocess.PIPE if command.order else subprocess.DEVNULL,
            stdout=None if command.is_shown else subprocess.DEVNULL,
            stderr=self.errors,
            start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
            preexec_fn=partial(_die_with_parent, command.signals.get(signal.SIGTERM, signal.SIGTERM)),
        )
        if command.order:
            self._say(command.order)

    @property
    def is_follower(self) -> bool:
        """Whether it may have ended because another did."""
        return self.process.returncode == EnvironmentProblem.exit_code

    def signal(self, number: int) -> None:
        """Pass a signal on: to the agent of another host, or to the ranks themselves and not to a launcher of theirs."""
        if self.process.poll() is not None:
            return
        is_overdue = False  # whether it was told to end its ranks, and has not
        if number == signal.SIGKILL:
            self.killed_at = self.killed_at or time.monotonic()
            is_overdue = time.monotonic() > self.killed_at + SECONDS_TO_FOLLOW
        if not is_overdue:
            number = self.command.signals.get(number, number)
        if self.command.order:
            self._say(str(int(number)))
        elif number == signal.SIGKILL:
            _kill_tree(self.process.pid)
        else:
            for rank in _ranks_below(self.process.pid) or [self.process]:
                with contextlib.suppress(OSError):
                    rank.send_signal(number)

    def last_words(self) -> str:
        """Its last line, or with `--debug` the end of its traceback."""
        if self.errors is None:
            return ""
        self.errors.seek(0)
        lines = [line for line in self.errors.read().decode(errors="replace").splitlines() if line.strip()]
        has_traceback = any(line.startswith("Traceback") for line in lines)
        return "\n".join(lines[-TRACEBACK_LINES if has_traceback else -1 :])

    def _say(self, line: str) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()


def own(commands: Sequence[Command], grace: float) -> int:
    """Run commands until all have ended, and return the exit code of the one that failed first, or 0.

    Args:
        grace: seconds that they may take to end after a signal, before they are killed.
    """
    mark = uuid.uuid4().hex
    children: list[Child] = []
    ended: list[Child] = []  # in the order in which it was seen
    ends_at: float | None = None
    asked = 0  # the signal that this process has got

    def forward(number: int, frame: object) -> None:
        nonlocal ends_at, asked
        asked = number
        ends_at = time.monotonic() + (0 if number == signal.SIGQUIT else grace + SECONDS_TO_FOLLOW)
        for child in children:
            child.signal(number)

    _adopt_orphans(True)
    before = [(number, signal.signal(number, forward)) for number in (*FORWARDED, signal.SIGQUIT)]
    try:
        for command in commands:
            children.append(Child(command, mark))
            if asked:  # while it was started
                children[-1].signal(asked)
        while len(ended) < len(children):
            for child in children:
                if child not in ended and child.process.poll() is not None:
                    ended.append(child)
                    if child.process.returncode and ends_at is None:
                        ends_at = time.monotonic() + SECONDS_TO_FOLLOW
            if ends_at is not None and time.monotonic() > ends_at:
                for child in children:
                    child.signal(signal.SIGKILL)
            time.sleep(POLL_SECONDS)
    finally:
        for child in children:
            child.signal(signal.SIGKILL)
            if child.command.order:
                _close(child)
        _kill_marked(mark)
        _adopt_orphans(False)
        for number, handler in before:
            signal.signal(number, handler)
    failed = [child for child in ended if child.process.returncode and child.killed_at is None]
    first = min(failed, key=lambda child: child.is_follower, default=None) or next(
        (child for child in ended if child.process.returncode), None
    )
    if first is None:
        return 0
    code, label = first.process.returncode, first.command.label
    if first.command.order and code == NO_CONNECTION:
        click.echo(f"error: {label} cannot be reached: {first.last_words() or 'the connection was lost'}", err=True)
        return EnvironmentProblem.exit_code
    if (first.errors is not None or code < 0) and not asked:  # else it has said so itself
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        click.echo(f"{label} {how}: {first.last_words() or 'it said nothing'}", err=True)
    if asked and first.command.signals and first.killed_at is None:
        # it answers for a signal that nobody has sent, or that its ranks did not yet know
        return 128 + (signal.SIGINT if asked == signal.SIGINT else signal.SIGTERM)
    return code if code > 0 else 128 - code


def order(commands: Sequence[Command], folder: str, grace: float) -> str:
    """What the agent of another host is told to start, in one line."""
    return json.dumps({"folder": folder, "grace": grace, "commands": [asdict(command) for command in commands]})


def obey(lines: Iterator[str]) -> int:
    """Be the agent of a host: start what the first line says, and pass on the signals of the others."""
    told = json.loads(next(lines))
    os.chdir(told["folder"])

    def listen() -> None:
        for line in lines:
            number = int(line)
            # a handler of `own` kills its processes at SIGQUIT; SIGKILL would leave them to the kernel
            os.kill(os.getpid(), signal.SIGQUIT if number == signal.SIGKILL else number)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=listen, daemon=True).start()
    return own([Command(**values) for values in told["commands"]], told["grace"])


def _die_with_parent(number: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))


def _adopt_orphans(is_wanted: bool) -> None:
    """Ranks whose launcher dies become children of this process, which can then end them."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(is_wanted))


def _ranks_below(pid: int) -> list[Any]:
    """The ranks among a process and its descendants, without what they have started themselves."""
    import psutil  # type: ignore[import-untyped]  # comes with DeepSpeed

    found: list[Any] = []
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if _is_rank(process):
            return [process]
        for child in process.children():
            found += _ranks_below(child.pid)
    return found


def _is_rank(process: Any) -> bool:
    environment: Mapping[str, str] = process.environ()
    return "RANK" in environment and "cpo_fast" in process.cmdline()


def _kill_tree(pid: int) -> None:
    import psutil

    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for each in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.Error):
                each.kill()


def _kill_marked(mark: str) -> None:
    """End what launchers have left behind."""
    import psutil

    for each in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if each.environ().get(_MARK) == mark:
                each.kill()
                each.wait(SECONDS_TO_FOLLOW)


def _close(child: Child) -> None:
    """End the agent of another host, and the connection to it."""
    assert child.process.stdin is not None
    with contextlib.suppress(OSError):
        child.process.stdin.close()
    try:
        child.process.wait(SECONDS_TO_FOLLOW)
    except subprocess.TimeoutExpired:
        child.process.kill()
        child.process.wait()
