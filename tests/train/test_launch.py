"""`cpo-fast train --launch` owns its ranks, whatever starts them: signals, exit codes, deaths of either, silence."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cpo_fast.config import Config
from cpo_fast.errors import ConfigError
from cpo_fast.launchers import Host, launch
from tests.train.runs import MakeConfig

pytestmark = pytest.mark.usefixtures("no_launcher")
FOLLOWED = 30.0  # seconds in which the others have to be down
SILENT = 15.0  # seconds: imports on a busy machine take some of them
LEFT = 10.0  # seconds after the command in which no child may be left
ENDLESS: dict[str, Any] = {"max_steps": 100_000, "num_epochs": 100_000, "reference": "online", "schedule": "constant"}


class Launched:
    """A training on two ranks that would never end, and its processes, once `is_there` says so."""

    def __init__(
        self, path: Path, is_there: Callable[[], bool], options: Sequence[str] = ("--gpus", "2"), **variables: str
    ) -> None:
        command = [sys.executable, "-m", "cpo_fast", "train", str(path), *options]
        self.command = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | variables
        )
        while self.command.poll() is None and not is_there():
            time.sleep(0.1)
        assert self.command.poll() is None, self.command.communicate()[1]
        self.children = psutil.Process(self.command.pid).children(recursive=True)
        ranks = [child for child in self.children if "RANK" in child.environ() and "cpo_fast" in child.cmdline()]
        self.ranks = sorted(ranks, key=lambda child: int(child.environ()["RANK"]))

    def end(self) -> tuple[int, str]:
        """The exit code and what was said, when no child is left."""
        started = time.monotonic()
        _, errors = self.command.communicate(timeout=600)
        self.seconds = time.monotonic() - started
        _, alive = psutil.wait_procs(self.children, timeout=LEFT)
        assert not alive
        return self.command.returncode, errors


def written(config: Config, tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


def two_more_steps(run: Path) -> Callable[[], bool]:
    metrics = run / "metrics.jsonl"
    before = metrics.read_text().count("\n") if metrics.exists() else 0
    return lambda: metrics.exists() and metrics.read_text().count("\n") >= before + 2


def test_signals_deaths_and_silence(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(**ENDLESS, save_every=1, heartbeat=SILENT)
    run, path = Path(config.run), written(config, tmp_path)

    launched = Launched(path, two_more_steps(run))
    launched.command.send_signal(signal.SIGTERM)
    code, errors = launched.end()
    assert code == 143, errors
    assert "after step" in errors
    assert "the same command goes on from the newest checkpoint" in errors
    saved = (run / "checkpoints" / "LATEST").read_text()

    launched = Launched(path, two_more_steps(run))  # it goes on
    launched.ranks[1].kill()
    code, errors = launched.end()
    assert code == 128 + 9
    assert "rank 0: error: the other ranks are gone or silent" in errors
    assert "This rank was at: step" in errors
    assert "rank 1 was killed by SIGKILL" in errors
    assert launched.seconds < FOLLOWED
    assert (run / "checkpoints" / "LATEST").read_text() > saved

    launched = Launched(path, two_more_steps(run))
    launched.command.kill()
    launched.end()  # every rank is gone

    for silent, other in ((1, 0), (0, 1)):  # rank 0 holds the store through which ranks are heard
        launched = Launched(path, two_more_steps(run))
        launched.ranks[silent].suspend()
        code, errors = launched.end()
        assert code == 5
        sentence = f"rank {silent} (process {launched.ranks[silent].pid} on "
        assert f"rank {other}: error: {sentence}" in errors, errors
        assert "has given no sign of life for 15 s" in errors
        assert "It was at: " in errors
        assert launched.seconds < SILENT + 35
    assert not list(run.glob(".launch-*"))


def test_a_signal_before_the_first_step_and_one_in_a_validation_end_all_at_once(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    # nearly all of the time is validation
    config = make_config(data={"held_out": 0.75}, **ENDLESS, save_every=1_000_000, eval_every=1, batch_pairs=1)
    run, path = Path(config.run), written(config, tmp_path)
    launched = Launched(path, lambda: (run / ".train.lock").exists())
    launched.command.send_signal(signal.SIGTERM)
    code, errors = launched.end()
    assert code == 143
    assert "SIGTERM between steps" in errors
    assert not (run / "checkpoints").exists()

    launched = Launched(path, two_more_steps(run))
    launched.command.send_signal(signal.SIGTERM)
    code, errors = launched.end()
    assert code == 143
    assert "the same command goes on from the newest checkpoint" in errors
    # though no checkpoint was due, none of the steps is lost
    saved = int((run / "checkpoints" / "LATEST").read_text().removeprefix("step-"))
    assert saved + 1 >= (run / "metrics.jsonl").read_text().count("\n")  # with the line of the starting point

    longer = [f"train.max_steps={saved + 2}", "--allow-mismatch", "train.max_steps"]
    command = [sys.executable, "-m", "cpo_fast", "train", str(path), *longer]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == saved + 3
    assert all("eval_loss" in line for line in lines)  # of the interrupted one too


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.soak)])
def test_other_launchers_are_owned_too(make_config: MakeConfig, tmp_path: Path, launcher: str) -> None:
    config = make_config(**ENDLESS, save_every=1)
    run, path = Path(config.run), written(config, tmp_path)
    options = ["--gpus", "2", "--launch", launcher]
    launched = Launched(path, two_more_steps(run), options, DS_ACCELERATOR="cpu")
    assert len(launched.ranks) == 2
    launched.command.send_signal(signal.SIGTERM)
    code, errors = launched.end()
    assert code == 143
    assert "started as: " in errors
    assert launcher.replace("torchrun", "torch.distributed.run") in errors.splitlines()[0]
    assert errors.splitlines()[-1].startswith(
        ("rank 0 failed first: SIGTERM after", "rank 1 failed first: SIGTERM after")
    )
    # the exit code of the user's error, which torchrun makes 1
    command = [sys.executable, "-m", "cpo_fast", "train", str(path), "data.path=nowhere.jsonl", *options]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=600, env=os.environ | {"DS_ACCELERATOR": "cpu"}
    )
    assert done.returncode == 3
    assert "failed first: nowhere.jsonl: cannot read" in done.stderr


def test_an_error_of_the_user_keeps_its_exit_code_and_is_said(make_config: MakeConfig, tmp_path: Path) -> None:
    path = written(make_config(), tmp_path)
    command = [sys.executable, "-m", "cpo_fast", "train", str(path), "data.path=nowhere.jsonl", "--gpus", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 3
    assert "rank 0: error: nowhere.jsonl: cannot read" in done.stderr


def test_ranks_do_not_start_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--gpus starts ranks, and this process is one already"):
        launch(["doctor"], "auto", [Host("", 2)], Path("runs"), 1.0)
