"""Trackers show what metrics.jsonl holds, name by name and value by value, and can neither slow nor end a training."""

import json
import logging
import os
import sqlite3
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpo_fast.config import Config, dump_config, validate_config
from cpo_fast.errors import ConfigError, EnvironmentProblem
from cpo_fast.files import append_line, read_jsonl, write_atomic
from cpo_fast.train import tracker_process, trackers
from cpo_fast.train.loop import train
from cpo_fast.train.trackers import check_trackers, tracking
from tests.train.runs import MakeConfig

Line = dict[str, Any]
LINES: list[Line] = [
    {"step": 0, "epoch": 0.0, "seconds": 0.5, "eval_loss": 0.693147182},
    {"step": 1, "loss": 0.1, "pairs": 12, "alarm": False, "impl/tree_attention": "eager", "nothing": None},
    {"step": 2, "loss": 1e-9, "pairs": 12, "alarm": True, "impl/tree_attention": "eager", "rewards/margins": -3.5},
]


@pytest.fixture
def no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for everything at the end, however busy the machine is."""
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 600.0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with its configuration."""
    folder = tmp_path / "run"
    write_atomic(folder / "config.yaml", dump_config(Config(run=str(folder))))
    return folder


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`library(code)`: a package `wandb` of this code, in place of the real one."""

    def make(code: str) -> None:
        (tmp_path / "library").mkdir(exist_ok=True)
        (tmp_path / "library" / "wandb.py").write_text("from types import SimpleNamespace as Settings\n" + code)
        monkeypatch.syspath_prepend(str(tmp_path / "library"))

    return make


def of_tensorboard(folder: Path) -> tuple[list[Line], str]:
    """Lines as TensorBoard's own reader gives them, and the configuration."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    reader.Reload()
    by_step: dict[int, Line] = {}
    for name in reader.Tags()["scalars"]:
        for event in reader.Scalars(name):
            line = by_step.setdefault(event.step, {})
            assert name not in line
            line[name] = event.value
    (config,) = (event.tensor_proto.string_val[0].decode() for event in reader.Tensors("config"))
    return [by_step[step] for step in sorted(by_step)], config


def of_wandb(folder: Path) -> tuple[list[Line], Line, set[str]]:
    """History, configuration and run ids of the one offline run, read from its log's records."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("offline-run-*/*.wandb")
    content, place, block = path.read_bytes(), 7, 1 << 15
    assert content[:4] == b":W&B"
    history: list[Line] = []
    config: Line = {}
    ids, parts = set(), b""
    while place + 7 <= len(content):
        if block - place % block < 7:
            place += block - place % block
            continue
        _, size, kind = struct.unpack("<IHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record.FromString(parts)
            parts = b""
            if record.HasField("history"):
                items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                history.append({name: value for name, value in items.items() if not name.startswith("_")})
            if record.HasField("run"):
                ids.add(record.run.run_id)
                config |= {each.key: json.loads(each.value_json) for each in record.run.config.update}
    return history, config, ids


def of_trackio(folder: Path) -> tuple[list[Line], set[str]]:
    """Lines and run names of trackio's data base."""
    (path,) = folder.glob("*.db")
    with sqlite3.connect(path) as base:
        rows = base.execute("select step, metrics, run_name from metrics order by step").fetchall()
    return [{"step": step, **json.loads(text)} for step, text, _ in rows], {name for *_, name in rows}


def numbers(line: Line) -> Line:
    return {name: float(np.float32(value)) for name, value in line.items() if isinstance(value, int | float)}


def present(line: Line) -> Line:
    return {name: value for name, value in line.items() if value is not None}


def track_lines(names: list[str], run: Path, lines: list[Line], resumes: bool = False) -> None:
    with tracking(names, run, resumes):
        for line in lines:
            append_line(run / "metrics.jsonl", line)


@pytest.mark.usefixtures("no_bound")
def test_every_tracker_has_the_lines_of_the_metrics_and_a_resume_keeps_one_run_without_doubles(run: Path) -> None:
    names = ["tensorboard", "wandb", "trackio"]
    track_lines(names, run, LINES[:2])
    run_id = (run / "trackers" / "run_id").read_text()
    text = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(text[0])  # back to a checkpoint after step 0: step 1 is taken again
    again = [LINES[1] | {"loss": 0.25}, LINES[2]]
    track_lines(names, run, again, resumes=True)
    expected = [LINES[0], *again]
    assert [line for _, line in read_jsonl(run / "metrics.jsonl")] == expected
    lines, config = of_tensorboard(run / "trackers" / "tensorboard")
    assert lines == [numbers(line) for line in expected]
    assert f"run: {run}" in config
    history, settings, ids = of_wandb(run / "trackers" / "wandb")
    assert history == [present(line) for line in expected]
    assert ids == {run_id}
    assert settings["train"]["lr"] == 5e-6
    assert of_trackio(run / "trackers" / "trackio") == ([present(line) for line in expected], {run_id})
    track_lines([], run, [])  # from the start: another training
    assert not (run / "trackers").exists()


@pytest.mark.usefixtures("no_bound")
def test_training_tracks_what_it_writes_and_goes_on_after_a_kill(make_config: MakeConfig) -> None:
    config = make_config(trackers=["tensorboard"], save_every=2, data={"held_out": 0.3}, log_every=2)

    def stop(values: Line, num_steps: int) -> None:
        if values["step"] == 3:
            raise MemoryError

    with pytest.raises(MemoryError):
        train(config, progress=stop)
    folder = Path(config.run, "trackers")
    run_id = (folder / "run_id").read_text()
    lines, _ = of_tensorboard(folder / "tensorboard")
    assert lines[-1]["step"] == 3.0  # whose validation ends an epoch
    result = train(config)
    written = [line for _, line in read_jsonl(result.metrics_path)]
    assert [line["step"] for line in written][:4] == [0, 2, 3, 4]
    assert of_tensorboard(folder / "tensorboard")[0] == [numbers(line) for line in written]
    assert (folder / "run_id").read_text() == run_id
    with_none = make_config(save_every=2, data={"held_out": 0.3}, log_every=2)
    weights = [Path(each.run, "adapter", "adapter_model.safetensors") for each in (config, with_none)]
    train(with_none)
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not Path(with_none.run, "trackers").exists()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise OSError('no room\\nfor this')", "for this"),
        ("def init(**options): raise ValueError('what `is` this')", "ValueError: what `is` this"),
        ("import os\nos.kill(os.getpid(), 9)", "exit code -9"),
        ("import os\nos.close(0); raise KeyError('a')", "KeyError: 'a'"),
    ],
)
def test_a_tracker_that_fails_is_one_sentence(
    run: Path, library: Any, code: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    library(code)
    with caplog.at_level(logging.WARNING), tracking(["wandb"], run, False):
        end = time.monotonic() + 300
        while not caplog.messages and time.monotonic() < end:
            time.sleep(0.1)  # said while the training goes on
    (message,) = caplog.messages
    assert message.startswith(f"tracker wandb failed and is left out ({reason}); metrics.jsonl has everything, and")


def test_a_slow_tracker_costs_a_step_nothing_and_the_end_a_bound(
    run: Path, library: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It takes seconds for every line. All the training does meanwhile is to write its metrics."""
    library("import time\ndef init(**options): return Settings(log=lambda *a, **o: time.sleep(5), finish=time.time)")
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.5)
    monkeypatch.setattr(trackers.subprocess, "Popen", keep := _Keeping())
    with caplog.at_level(logging.WARNING), tracking(["wandb"], run, False):
        began = time.thread_time()
        for step in range(200):
            append_line(run / "metrics.jsonl", {"step": step, "loss": 0.5})
        with_tracker = time.thread_time() - began
        end = time.monotonic()
    closing = time.monotonic() - end
    try:
        assert with_tracker < 2.0  # 200 steps; a wait for one line alone were 5
        assert 0.5 <= closing < 4.5
        assert "wandb is still writing into" in caplog.text
        assert keep.process.poll() is None
    finally:
        keep.process.kill()
        keep.process.wait()


_popen = subprocess.Popen


class _Keeping:
    """Starts a process as subprocess does, and keeps it."""

    def __call__(self, *args: Any, **options: Any) -> "subprocess.Popen[bytes]":
        self.process = _popen(*args, **options)
        return self.process


@pytest.mark.usefixtures("no_bound")
def test_what_a_killed_training_has_written_can_be_read(run: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from cpo_fast.files import append_line\n"
        "from cpo_fast.train.trackers import tracking\n"
        "run = Path(sys.argv[1])\n"
        "with tracking(['tensorboard'], run, False):\n"
        "    for step in range(3): append_line(run / 'metrics.jsonl', {'step': step, 'loss': step / 2})\n"
        "    (run / 'metrics.jsonl').open('a').write('{\"step\": 3, \"lo')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(run)], env=os.environ, timeout=600).returncode == -9
    end = time.monotonic() + 300
    folder = run / "trackers" / "tensorboard"
    while (len(of_tensorboard(folder)[0]) if folder.is_dir() else 0) < 3 and time.monotonic() < end:
        time.sleep(0.5)
    assert of_tensorboard(folder)[0] == [{"step": float(step), "loss": step / 2} for step in range(3)]


def test_follow_gives_whole_lines_once_and_the_rest_after_the_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    looks = iter([None, '{"a": 1}\n{"a"', ": 2}\n", '{"a": 3}\n{"a": 4'])

    def is_over() -> bool:
        text = next(looks)
        if text is not None:
            with open(path, "a") as file:
                file.write(text)
        return text is not None and text.endswith("4")

    assert list(tracker_process.follow(path, is_over)) == [[{"a": 1}], [{"a": 2}], [{"a": 3}]]


def test_a_library_that_is_missing_is_said_before_anything_is_loaded(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = trackers.find_spec
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "trackio" else find(name))
    with pytest.raises(EnvironmentProblem, match=r"trackio, which is not installed.*cpo-fast\[trackio\]") as raised:
        train(make_config(trackers=["tensorboard", "trackio"], model={"path": "/no/such/model"}))
    assert raised.value.exit_code == 5
    check_trackers(["tensorboard"])


def test_an_unknown_tracker_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"train\.trackers\.0: .*got 'tensorbord'; did you mean 'tensorboard'\?"):
        validate_config({"train": {"trackers": ["tensorbord"]}})


def test_another_rank_starts_none(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `train` asks for is of the rank that writes."""
    asked: list[Any] = []
    monkeypatch.setattr("cpo_fast.train.loop.check_trackers", lambda names: asked.append(names) or 1 / 0)
    for rank, expected in (("0", ("tensorboard",)), ("1", ())):
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
            monkeypatch.setenv(name, value)
        with pytest.raises(ZeroDivisionError):
            train(make_config(trackers=["tensorboard"]))
        assert asked.pop() == expected
