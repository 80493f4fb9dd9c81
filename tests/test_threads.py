"""A command computes a tiny model with one thread, and sets how threads wait before torch loads; a library does neither."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cpo_fast import threads
from cpo_fast.cli import main
from cpo_fast.config import ModelConfig
from cpo_fast.models import load_model
from tests.tiny import save_tiny_model, tiny_llama


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_command_loads_a_tiny_model_for_one_thread_and_puts_the_number_back(
    tmp_path: Path, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(path=str(save_tiny_model(tmp_path)), device="cpu", dtype="float32")
    load_model(config)
    assert torch.get_num_threads() == 2  # as a library
    with threads.one_for_tiny_models():
        load_model(config)
        load_model(config)
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with threads.one_for_tiny_models():
        load_model(config)
        assert torch.get_num_threads() == 2  # as somebody has said


def test_a_larger_model_keeps_its_threads(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    size = sum(each.numel() for each in model.parameters())
    for limit, number in ((size, 2), (size + 1, 1)):
        monkeypatch.setattr(threads, "TINY", limit)
        with threads.one_for_tiny_models():
            threads.choose_threads(model)
            assert torch.get_num_threads() == number


def test_the_command_line_opens_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("cpo_fast.cli.doctor.doctor_command.callback", lambda **_: seen.append(threads._in_command))
    monkeypatch.setattr(sys, "argv", ["cpo-fast", "doctor"])
    with pytest.raises(SystemExit):
        main()
    assert seen == [True]
    assert not threads._in_command


@pytest.mark.parametrize(("set_before", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_leave_their_core_in_a_command_only(set_before: str | None, expected: str) -> None:
    """Set while torch is not loaded yet, because OpenMP reads it then."""
    program = (
        "import os, sys; from cpo_fast import cli; import cpo_fast.models;"
        "before = os.environ.get('OMP_WAIT_POLICY'); cli.guarded = lambda run: 'torch' in sys.modules\n"
        "try: cli.main()\n"
        "except SystemExit as end: sys.stdout.write(f\"{before} {os.environ['OMP_WAIT_POLICY']} {end.code}\")"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": set_before} if set_before else {}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=600
    )
    assert done.stdout == f"{set_before} {expected} False"
