"""A signal is noticed while the main thread sits in a call that never returns to Python, and obeyed in time."""

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from cpo_fast.errors import Interrupted
from cpo_fast.train.signals import EndSignals, exit_code_of


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_noted_and_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with EndSignals(grace=1000) as signals:
        assert signals.received == 0
        os.kill(os.getpid(), number)
        while not signals.received:
            time.sleep(0.01)
        assert signals.received == number
    assert signal.getsignal(number) == before
    assert not [each for each in threading.enumerate() if each.name == "end-signals"]


def test_outside_the_main_thread_nothing_is_changed() -> None:
    before = signal.getsignal(signal.SIGTERM)
    found: list[int] = []

    def run() -> None:
        with EndSignals(grace=1000) as signals:
            found.append(signals.received)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [0]
    assert signal.getsignal(signal.SIGTERM) == before


# the main thread waits in C for a lock that nobody releases, as it would in a collective
STUCK = """
    import ctypes
    from cpo_fast.train.signals import EndSignals
    with EndSignals(grace={grace}) as signals:
        print("ready", flush=True)
        library = ctypes.CDLL(None)
        while True:
            library.sleep(1000)
"""


@pytest.mark.parametrize(
    ("number", "code", "grace", "num_signals"),
    [
        (signal.SIGTERM, 143, 0.2, 1),
        (signal.SIGUSR1, 143, 0.2, 1),
        (signal.SIGINT, 130, 0.2, 1),
        (signal.SIGINT, 130, 1000, 2),  # Ctrl-C again
        (signal.SIGTERM, 143, 2, 2),  # a launcher's and Slurm's: the second means nothing
    ],
)
def test_a_process_that_does_not_come_back_leaves_after_the_grace_or_a_second_interrupt(
    number: signal.Signals, code: int, grace: float, num_signals: int
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(STUCK.format(grace=grace))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for _ in range(num_signals):
        process.send_signal(number)
        time.sleep(1.2)  # two interrupts at once are one
    _, errors = process.communicate(timeout=600)
    assert process.returncode == code == exit_code_of(number)
    assert ("was not saved" in errors) == (grace < 1000)


def test_what_a_signal_raises_survives_the_way_to_other_ranks() -> None:
    copied = pickle.loads(pickle.dumps(Interrupted("SIGTERM after step 3", 143)))
    assert (str(copied), copied.exit_code) == ("SIGTERM after step 3", 143)


def test_a_signal_where_nothing_would_be_lost_raises_at_once() -> None:
    def interrupted() -> None:
        with EndSignals(grace=1000) as signals, signals.leaving_at_once():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1000)

    with pytest.raises(Interrupted, match="SIGTERM between steps") as caught:
        interrupted()
    assert caught.value.exit_code == 143
    with EndSignals(grace=1000) as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        while not signals.received:
            time.sleep(0.01)
        with pytest.raises(Interrupted), signals.leaving_at_once():
            raise AssertionError("not reached")
