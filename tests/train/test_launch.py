"""`cpo-fast train --gpus N` owns its ranks: signals, exit codes and deaths of either."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from cpo_fast.errors import ConfigError
from cpo_fast.launch import launch_ranks
from tests.train.runs import MakeConfig

pytestmark = pytest.mark.usefixtures("no_launcher")
FOLLOWED = 30.0  # seconds in which the others have to be down


class Launched:
    """A training on two ranks that would never end, and its processes, once it has taken steps."""

    def __init__(self, path: Path, run: Path) -> None:
        metrics = run / "metrics.jsonl"
        before = metrics.read_text().count("\n") if metrics.exists() else 0
        command = [sys.executable, "-m", "cpo_fast", "train", str(path), "--gpus", "2"]
        self.command = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while self.command.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < before + 2):
            time.sleep(0.1)
        assert self.command.poll() is None, self.command.communicate()[1]
        children = psutil.Process(self.command.pid).children()
        self.ranks = sorted(children, key=lambda child: int(child.environ()["RANK"]))

    def end(self) -> tuple[int, str]:
        """The exit code and what was said, when every rank is gone."""
        started = time.monotonic()
        _, errors = self.command.communicate(timeout=600)
        gone, alive = psutil.wait_procs(self.ranks, timeout=600)
        assert not alive
        assert len(gone) == 2
        self.seconds = time.monotonic() - started
        return self.command.returncode, errors


def test_signals_deaths_and_exit_codes(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(max_steps=100_000, num_epochs=100_000, reference="online", schedule="constant", save_every=1)
    run, path = Path(config.run), tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))

    launched = Launched(path, run)
    launched.command.send_signal(signal.SIGTERM)
    code, errors = launched.end()
    assert code == 143
    assert "the same command goes on from the newest checkpoint" in errors
    saved = (run / "checkpoints" / "LATEST").read_text()

    launched = Launched(path, run)  # it goes on
    launched.ranks[1].kill()
    code, errors = launched.end()
    assert code == 128 + 9
    assert "rank 0: error: the other ranks are gone or silent" in errors
    assert "rank 1 was killed by SIGKILL" in errors
    assert launched.seconds < FOLLOWED
    assert (run / "checkpoints" / "LATEST").read_text() > saved

    launched = Launched(path, run)
    launched.command.kill()
    launched.end()  # every rank is gone
    assert (run / "checkpoints" / "LATEST").read_text() > saved


def test_an_error_of_the_user_keeps_its_exit_code_and_is_said(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "cpo_fast", "train", str(path), "data.path=nowhere.jsonl", "--gpus", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 3
    assert "rank 0: error: nowhere.jsonl: cannot read" in done.stderr


def test_ranks_do_not_start_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--gpus starts ranks, and this process is one already"):
        launch_ranks(["doctor"], 2, 1.0)
