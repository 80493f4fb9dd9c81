"""kill -9 at any moment: a restart yields the bytes of an undisturbed run and repeats what was in flight, no more."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _kill(folder: Path, engine: str, num_kills: int, seed: int, timeout: float) -> str:
    """The log of `kill_runs`, in a process of its own: a fork of this one would inherit other tests' threads."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.search.kill_runs", str(folder), engine, str(num_kills), str(seed)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall("^kill ", done.stdout, re.MULTILINE)) == num_kills
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["hf", "arena"])
def test_ten_kills_change_no_byte(tmp_path: Path, engine: str) -> None:
    _kill(tmp_path, engine, num_kills=10, seed=1, timeout=2400)


@pytest.mark.soak
@pytest.mark.parametrize("engine", ["hf", "arena"])
def test_fifty_kills_change_no_byte(tmp_path: Path, engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    log = _kill(tmp_path, engine, num_kills=50, seed=2, timeout=3600)
    with capsys.disabled():
        sys.stdout.write(f"\n{log}")
