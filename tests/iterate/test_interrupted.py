"""Rounds that are stopped anywhere go on to the bytes of those that were not; on several ranks they are the same rounds."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from safetensors.torch import load_file

from cpo_fast.config import Config, validate_config
from cpo_fast.errors import EnvironmentProblem, Interrupted
from cpo_fast.iterate import Watch, iterate
from cpo_fast.report.rounds import round_cells
from cpo_fast.train.signals import EndSignals
from tests.cli.commands import run
from tests.iterate.rounds import results, values, write_config

ROOT = Path(__file__).parents[2]


def python(*arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3000
    )


def kill(folder: Path, method: str) -> dict[str, Any]:
    """What `kill_rounds` reports, in a process of its own: a fork of this one would inherit other tests' threads."""
    done = python("-m", "tests.iterate.kill_rounds", str(folder), method, "1")
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@pytest.mark.slow
def test_kills_before_any_write_change_no_byte(tmp_path: Path) -> None:
    report = kill(tmp_path, "cpo")
    assert report["differing"] == []
    assert report["files"] > 20
    assert {"collect", "train", "eval"} <= set(report["deaths"])


@pytest.mark.soak
def test_kills_change_no_byte_where_a_round_trains_twice(tmp_path: Path) -> None:
    report = kill(tmp_path, "sft_cpo")
    assert report["differing"] == []
    assert {"collect", "sft", "train", "eval"} <= set(report["deaths"])


def test_a_signal_in_training_saves_its_step_and_the_same_rounds_go_on(
    rounds_of_cpo: Config, inputs: Path, tmp_path: Path
) -> None:
    config = validate_config(values(inputs, tmp_path / "run"))
    steps: list[int] = []

    def interrupt(step: dict[str, Any], num_steps: int) -> None:
        steps.append(step["step"])
        if step["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            listening = [each for each in gc.get_objects() if isinstance(each, EndSignals)]
            while not any(each.received and not each._finished.is_set() for each in listening):
                time.sleep(0.01)  # a thread notes it

    for number in (1, 2):  # in each round
        steps.clear()
        with pytest.raises(Interrupted, match=rf"^round {number}, train: SIGTERM after step 3 of") as caught:
            iterate(config, Watch(on_step=interrupt))
        assert caught.value.exit_code == 143
        assert steps[-3:] == [1, 2, 3]
    steps.clear()
    summary = iterate(config, Watch(on_step=lambda step, _: steps.append(step["step"])))
    assert steps[0] == 4
    assert results(tmp_path / "run") == results(Path(rounds_of_cpo.run))
    assert [one["stages"]["train"]["num_starts"] for one in summary["rounds"][1:]] == [2, 2]
    assert round_cells(summary["rounds"][2])["seconds"].startswith("over ")
    assert not round_cells(summary["rounds"][0])["seconds"].startswith("over ")


SIGNAL = """
import os, signal, sys
from cpo_fast.config import load_config
from cpo_fast.iterate import Watch, iterate
iterate(load_config(sys.argv[1]), Watch(on_question=lambda *_: os.kill(os.getpid(), signal.SIGTERM)))
"""


def test_a_signal_in_the_search_keeps_its_trees(rounds_of_cpo: Config, inputs: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.yaml", values(inputs, tmp_path / "run"))
    done = python("-c", SIGNAL, str(path))
    assert "Interrupted: round 1, collect: SIGTERM: 1 of 2 questions are finished and kept in" in done.stderr
    trees = tmp_path / "run/round-1/trees.jsonl"
    assert len(trees.read_text().splitlines()) == 1
    iterate(validate_config(values(inputs, tmp_path / "run")))
    assert results(tmp_path / "run") == results(Path(rounds_of_cpo.run))


def test_two_processes_do_not_make_rounds_in_one_folder(inputs: Path, tmp_path: Path) -> None:
    config = validate_config(values(inputs, tmp_path / "run"))
    (tmp_path / "run").mkdir()
    with (
        FileLock(tmp_path / "run" / ".iterate.lock"),
        pytest.raises(EnvironmentProblem, match="another process makes rounds here"),
    ):
        iterate(config)


@pytest.mark.soak
def test_on_two_ranks_they_are_the_same_rounds(rounds_of_cpo: Config, inputs: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.yaml", values(inputs, tmp_path / "run", train={"max_tokens": 100}))
    failed = run("iterate", str(path), "--gpus", "2", "--json")
    assert failed.returncode == 3, failed.stderr
    assert "error: round 1, train: ended with exit code 3, for the reason that stands above" in failed.stderr
    assert "more than train.max_tokens=100" in failed.stderr
    done = run("iterate", str(path), "--gpus", "2", "--json", "train.max_tokens=8192")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert [one["round"] for one in summary["rounds"]] == [0, 1, 2]
    one, two = results(Path(rounds_of_cpo.run)), results(tmp_path / "run")
    for name in ("round-0/eval-base.jsonl", "round-1/trees.jsonl", "round-1/pairs.jsonl"):
        assert one[name] == two[name], name
    before, after = (
        load_file(Path(folder, "round-1/adapter/adapter_model.safetensors"))
        for folder in (rounds_of_cpo.run, tmp_path / "run")
    )
    # two ranks add up a gradient in another order, and Adam makes a step of the rounding where it is all there is
    assert max(float((before[name] - after[name]).abs().max()) for name in before) < 5e-5
