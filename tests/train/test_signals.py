"""A signal is noticed while the main thread sits in a call that never returns to Python, and obeyed in time."""

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from cpo_fast.adapters import copy_adapter
from cpo_fast.errors import Interrupted
from cpo_fast.interrupts import exit_code_of
from cpo_fast.train.loop import train
from cpo_fast.train.signals import EndSignals
from tests.train.runs import MakeConfig


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


def test_an_interrupt_leaves_the_adapter_of_its_step_and_the_end_removes_it(make_config: MakeConfig) -> None:
    config = make_config(num_epochs=3, save_every=100)
    run = Path(config.run)

    def interrupt(values: dict[str, Any], num_steps: int) -> None:
        if values["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)  # the thread that listens notes it before the next step

    with pytest.raises(
        Interrupted, match=r"SIGINT after step 3 .* the last complete adapter is .*adapter-last; "
    ) as end:
        train(config, progress=interrupt)
    assert end.value.exit_code == 130
    left = load_file(run / "adapter-last" / "adapter_model.safetensors")
    saved = load_file(run / "checkpoints" / "step-00000003" / "adapter.safetensors")
    assert {name.replace(".default", ""): value.tolist() for name, value in saved.items()} == {
        name: value.tolist() for name, value in left.items()
    }
    assert not [each for each in run.iterdir() if each.name.endswith(".tmp")]
    train(config)
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert not (run / "adapter-last").exists()


def test_an_interrupt_before_the_first_step_says_that_there_is_no_adapter(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1000)

    monkeypatch.setattr("cpo_fast.train.loop.load_policy", interrupted)
    with pytest.raises(Interrupted, match=r"SIGINT between steps; there is no adapter yet; the same command") as end:
        train(make_config())
    assert end.value.exit_code == 130


def test_an_adapter_that_cannot_be_replaced_stays_and_nothing_is_left_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("new", "adapter"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    real, calls = os.replace, []

    def replace(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        copy_adapter(tmp_path / "new", tmp_path / "adapter")
    assert (tmp_path / "adapter" / "weights").read_text() == "adapter"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["adapter", "new"]
