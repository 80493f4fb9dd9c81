"""The whole line against `generate`, TRL and PEFT, at its smallest: it agrees, and each of its checks can fail."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import end_to_end
from benchmarks.end_to_end import OURS, STAGES, THEIRS, in_process, main, table_rows, within_one_pass
from benchmarks.end_to_end_check import check, distance
from benchmarks.harness import Check, InexactError, gate
from cpo_fast.config import load_config, validate_config

SIZES = ["--num-questions", "5", "--num-asked", "6", "--steps", "2", "--batch-pairs", "8", "--num-checked", "2"]


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of one run, and `end_to_end.jsonl` beside them."""
    place = tmp_path_factory.mktemp("line")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CPO_FAST_RESULTS", str(place))
        assert main([*SIZES, "--together", "--folder", str(place / "runs")]) == 0
    return place


def recorded(line: Path) -> dict[str, Any]:
    (found,) = map(json.loads, (line / "end_to_end.jsonl").read_text().splitlines())
    return found


def test_every_stage_of_both_sides_is_recorded_with_its_tokens_and_accuracy(line: Path) -> None:
    found = recorded(line)
    results = found["results"]
    assert [row["stage"] for row in results["rows"]] == [*STAGES, "all"]
    by_stage = {row["stage"]: row for row in results["rows"]}
    for side in (OURS, THEIRS):
        assert by_stage["pairs"][side]["tokens"] == 0 < by_stage["train"][side]["tokens"]
        assert all(row[side]["seconds"] > 0 for row in results["rows"])
        assert by_stage["eval base"][side]["accuracy"] == by_stage["eval base"][OURS]["accuracy"]
    # two steps of eight pairs: a policy's and a reference's pass over two rows each
    assert by_stage["train"][THEIRS]["tokens"] > 2 * 8 * 2 * 2 * 10
    assert (results["steps"], results["num_asked"], results["separate_processes"]) == (2, 6, False)
    errors = {one["name"]: one["error"] for one in found["checks"]}
    assert len(errors) == 8
    assert {error for name, error in errors.items() if "TRL" not in name} == {0.0}
    assert found["environment"]["command"].startswith("python -m benchmarks.end_to_end --num-questions 5")


def test_a_process_measures_memory(line: Path) -> None:
    folder = line / "runs" / "0"
    in_process(folder, "end_to_end_stages", OURS, "pairs", threads=1)
    found = json.loads((folder / "ours-pairs.json").read_text())
    assert found["peak_bytes"] > 0 < found["cpu"]
    with pytest.raises(end_to_end.StageError, match="KeyError"):
        in_process(folder, "end_to_end_stages", OURS, "no stage", threads=1)


def edit(path: Path, pattern: str, replacement: str) -> None:
    text = path.read_text()
    changed = re.sub(pattern, replacement, text, count=1)
    assert changed != text, f"{pattern} is not in {path}"
    path.write_text(changed)


def test_each_check_fails_where_a_fault_is_planted(line: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    folder = line / "runs" / "0"
    edit(folder / "collect.yaml", r"\n  temperature: 0.9", "\n  temperature: 0.5")  # of both searches
    edit(folder / THEIRS / "eval base.json", r'": \[\d+', '": [0')
    edit(folder / OURS / "eval-adapter.jsonl", r'"num_tokens":\d', '"num_tokens":9')
    adapter = folder / THEIRS / "adapter" / "adapter_model.safetensors"
    weights = load_file(adapter)
    next(iter(weights.values())).add_(1e-3)
    save_file(weights, adapter)
    checks = check(folder, 2)
    failed = {one.name for one in checks if not one.error <= one.bound}
    assert failed == {
        "trees unlike those of the reference engine",
        "trees unlike those of generate at the same numbers",
        "adapter unlike TRL's, over its movement",
        "adapter unlike TRL's, over its movement, with what rounding decides",
        "chains of the base unlike generate's",
        "chains of the adapter unlike those measured",
    }
    with pytest.raises(InexactError, match="exactness check failed"):
        gate(checks)


def test_rounding_may_decide_a_few_weights_and_no_more() -> None:
    one = {"a": torch.zeros(40, 50), "b": torch.ones(3)}
    few = {"a": one["a"].clone(), "b": one["b"]}
    few["a"][7, 3] = few["a"][20, 4] = 3.0  # a thousandth of 2,003 weights
    assert (distance(one, few, left_out=1e-3), distance(one, few)) == (0.0, 18**0.5)
    few["a"][30, 5] = 2.0
    assert distance(one, few, left_out=1e-3) == 2.0
    assert distance(one, {"a": one["a"]}) == float("inf")


def test_nothing_is_shown_or_recorded_where_a_check_fails(
    line: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CPO_FAST_RESULTS", str(tmp_path))
    monkeypatch.setattr(end_to_end, "measure", lambda *_: recorded(line)["results"]["stages"][0])
    monkeypatch.setattr(end_to_end, "checks_of", lambda *_: [Check("trees", 0.5, 0.0)])
    assert main([*SIZES, "--together"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "exactness check failed, nothing was measured: trees: 0.5 > 0" in said.err
    assert not (tmp_path / "end_to_end.jsonl").exists()


def measured(side: str, stage: str, tokens: int, cpu: float, peak: int) -> dict[str, Any]:
    return {
        "side": side, "stage": stage, "tokens": tokens, "cpu": cpu, "wall": 9.0, "import_cpu": 1.0, "peak_bytes": peak,
    }  # fmt: skip


def test_seconds_are_medians_bytes_the_largest_and_ratios_those_of_the_alternative_over_ours() -> None:
    rounds = [
        [
            measured(side, stage, tokens, seconds * factor, peak * (round_index + 1))
            for stage in STAGES
            for side, tokens, factor, peak in ((OURS, 10, 1, 100), (THEIRS, 30, 2, 50))
        ]
        for round_index, seconds in enumerate((1.0, 5.0, 2.0))
    ]
    first, *_, last = table_rows(rounds, "cpu")
    assert (first[OURS]["seconds"], first[THEIRS]["seconds"], first[OURS]["bytes"]) == (2.0, 4.0, 300)
    assert first["ratio"] == {"tokens": 3.0, "seconds": 2.0, "bytes": 0.5}
    assert (last[OURS]["tokens"], last[THEIRS]["seconds"], last[OURS]["bytes"]) == (50, 20.0, 300)


def test_training_stays_within_one_pass_over_the_pairs() -> None:
    config = validate_config({"train": {"max_steps": 30, "batch_pairs": 32}})
    assert within_one_pass(config, 5000).train.max_steps == 30
    assert within_one_pass(config, 100).train.max_steps == 3
    with pytest.raises(end_to_end.StageError, match="31 pairs make no batch of 32"):
        within_one_pass(config, 31)


def test_settings_of_the_reasoner_are_those_of_the_example(tmp_path: Path) -> None:
    chosen = end_to_end.reasoner(tmp_path)
    example = load_config(end_to_end.ROOT / "examples/reasoner/config.yaml")
    assert chosen.config.train == example.train
    assert chosen.config.search.result_settings() == example.search.result_settings()
    assert chosen.config.lora == example.lora
