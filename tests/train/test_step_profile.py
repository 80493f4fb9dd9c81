"""`cpo-fast train --profile N`, as a user runs it: the trace loads, its ranges nest, the run goes on."""

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.profiler import record_function

from cpo_fast.cli import cli
from cpo_fast.config import dump_config
from cpo_fast.errors import ConfigError
from cpo_fast.train.loop import train
from cpo_fast.train.profiler import INSIDE_STEP, RANGES
from tests.train.runs import MakeConfig


@pytest.fixture
def config_file(make_config: MakeConfig, tmp_path: Path) -> tuple[Path, Path]:
    """A YAML file of a run of eight steps, and the run's folder."""
    config = make_config(batch_pairs=9, reference="online", max_tokens=100)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    return path, Path(config.run)


def ranges_of(trace: dict[str, Any]) -> list[dict[str, Any]]:
    return [e for e in trace["traceEvents"] if e.get("cat") == "user_annotation" and e["name"] in RANGES]


def test_trace_holds_two_steps_whose_named_ranges_nest(config_file: tuple[Path, Path]) -> None:
    path, run = config_file
    result = CliRunner().invoke(cli, ["train", str(path), "--profile", "2"])
    assert result.exit_code == 0, result.output
    assert "2 profiled steps" in result.output
    assert "backbone policy" in result.output
    assert [p.name for p in sorted((run / "profile").iterdir())] == ["ranges.json", "trace.json"]
    found = ranges_of(json.loads((run / "profile" / "trace.json").read_text()))
    steps = [event for event in found if event["name"] == "step"]
    assert len(steps) == 2
    for event in found:
        inside = [s for s in steps if s["ts"] <= event["ts"] and event["ts"] + event["dur"] <= s["ts"] + s["dur"]]
        assert len(inside) == 1, event["name"]
    assert {event["name"] for event in found} == set(RANGES)
    pieces = sorted((e for e in found if e["name"] != "step"), key=lambda event: event["ts"])
    assert all(one["ts"] + one["dur"] <= two["ts"] for one, two in pairwise(pieces))
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 8  # the run went on to its end


def test_table_of_totals_says_where_the_step_went(config_file: tuple[Path, Path]) -> None:
    path, run = config_file
    result = CliRunner().invoke(cli, ["train", str(path), "--profile", "3", "--json"])
    assert json.loads(result.stdout.splitlines()[-1])["profile"] == str(run / "profile")
    totals = {row["name"]: row for row in json.loads((run / "profile" / "ranges.json").read_text())}
    assert list(totals) == list(RANGES)
    assert totals["step"]["count"] == totals["optimizer"]["count"] == totals["read"]["count"] == 3
    assert totals["backward"]["count"] == totals["pack"]["count"] > 3
    assert totals["step"]["share"] == 1
    inside = sum(totals[name]["share"] for name in INSIDE_STEP)
    assert 0.8 < inside <= 1.0001
    assert all(totals[name]["device_seconds"] is None for name in RANGES) or torch.cuda.is_available()


@pytest.mark.parametrize("value", ["0", "-3"])
def test_no_steps_to_profile_is_a_usage_error_of_one_sentence(config_file: tuple[Path, Path], value: str) -> None:
    result = CliRunner().invoke(cli, ["train", str(config_file[0]), "--profile", value])
    assert result.exit_code == 2
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error")]
    assert line == f"Error: Invalid value for '--profile': {value} is not in the range x>=1."


def test_profiling_a_run_of_one_step_is_refused_before_it_starts(make_config: MakeConfig) -> None:
    config = make_config(max_steps=1)
    with pytest.raises(ConfigError, match=r"this run has 1; raise train\.num_epochs"):
        train(config, profile_steps=2)
    assert not Path(config.run, "metrics.jsonl").exists()


def test_profiling_more_steps_than_there_are_writes_what_there_is(make_config: MakeConfig) -> None:
    config = make_config(max_steps=3)
    result = train(config, profile_steps=50)
    assert result.profile[0].count == 2
    assert ranges_of(json.loads((Path(config.run) / "profile" / "trace.json").read_text()))


def test_profiled_training_gives_the_same_adapter(make_config: MakeConfig) -> None:
    plain, profiled = (train(make_config(max_steps=3), profile_steps=steps) for steps in (None, 1))
    one, two = ((r.adapter_path / "adapter_model.safetensors").read_bytes() for r in (plain, profiled))
    assert one == two
    assert plain.profile == ()


def test_a_range_costs_next_to_nothing_while_nobody_profiles() -> None:
    """A step opens about ten of them; 6 microseconds each were measured."""
    started = time.process_time()
    for _ in range(2000):
        with record_function("pack"):
            pass
    assert (time.process_time() - started) / 2000 < 50e-6
