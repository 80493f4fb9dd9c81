"""`cpo-fast pairs` as a user runs it: trees or a configuration, overrides, tables, JSON, and a terminal without UTF-8."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cpo_fast.cli.pairs import pairs_command
from cpo_fast.config import Config
from cpo_fast.data.load import load_examples
from cpo_fast.errors import ConfigError
from tests.data.hand_made import node, random_tree, tree, write_trees
from tests.tiny import tiny_tokenizer


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(pairs_command, [str(one) for one in arguments], catch_exceptions=False)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    return write_trees(tmp_path / "run" / "trees.jsonl", [random_tree(seed, f"q{seed}") for seed in range(20)])


def test_tables_and_json_say_the_same(many: Path) -> None:
    values = json.loads(run(many, "pairs.rule=lower", "--json").stdout)
    assert values["pairs"] == str(many.with_name("pairs.jsonl"))
    assert values["num_pairs"] == len(many.with_name("pairs.jsonl").read_text().splitlines())
    assert sum(values["pairs_by_step"].values()) == values["num_pairs"]
    shown = run(many, "pairs.rule=lower").stdout
    assert f"{values['num_pairs']} pairs from {values['num_trees']} trees" in shown
    for reason, count in values["dropped"].items():
        assert f"{count} not used: {reason}" in shown
    for reason, count in values["trees_without_pairs"].items():
        assert f"{count} trees without any: {reason}" in shown
    assert shown.rstrip().endswith(f"pairs: {many.with_name('pairs.jsonl')}")
    assert "under another question already" not in shown  # none does


def test_a_rule_that_few_trees_give_pairs_to_says_how_few_and_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whole chains have no losers where the judge prunes every bad step: thoughts have."""
    nodes = [node(0, -1, 1), node(1, -1, 1, value=1.0), node(2, 0, 2, "4")]
    alone, lost = [node(0, -1, 1, "4")], [node(0, -1, 1)]
    rival = [*nodes, node(3, 0, 2, "5", value=1.0)]
    kinds = [rival, nodes, nodes, alone, lost]
    made = [
        tree(each, (len(each) - 1 - (each is rival),) if each is not lost else (), f"q{n}", question_token_ids=(50, n))
        for n, each in enumerate(kinds)
    ]
    path = write_trees(tmp_path / "trees.jsonl", made)
    few = "1 of 5 trees (none in 3: no other complete path; 1: no_answer)"
    sentence = f"pairs.rule=fpo takes 1 rows from {few}; collect more questions, or choose another one"
    assert f"warning: {sentence}" in run(path, "pairs.rule=fpo").stdout
    assert json.loads(run(path, "pairs.rule=fpo", "--json").stdout)["warning"] == sentence
    for options in (["pairs.rule=all"], ["--sft"]):
        assert "warning" not in run(path, *options).stdout
    config = Config.model_validate({"data": {"path": str(path), "max_drop": 1.0}, "pairs": {"rule": "fpo"}})
    with caplog.at_level(logging.INFO, logger="cpo_fast.data"):
        load_examples(config, tiny_tokenizer())
    assert [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING] == [sentence]
    assert f"{path}: 1 rows from {few}" in caplog.messages


def test_overrides_choose_the_rule_and_the_seed(many: Path) -> None:
    numbers = {}
    for rule in ("all", "lower", "lowest", "fpo"):
        numbers[rule] = json.loads(run(many, f"pairs.rule={rule}", "--json").stdout)["num_pairs"]
    assert numbers["all"] > numbers["lower"] > numbers["lowest"] > 0
    assert numbers["fpo"] > 0
    written = []
    for seed in (0, 1, 0):
        run(many, "pairs.rejected_fraction=0.5", f"seed={seed}")
        written.append(many.with_name("pairs.jsonl").read_bytes())
    assert written[0] == written[2] != written[1]


def test_a_configuration_stands_for_the_trees_of_its_run(many: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"run: {many.parent}\npairs: {{rule: lowest}}\n")
    by_config = json.loads(run(tmp_path / "c.yaml", "-o", tmp_path / "a.jsonl", "--json").stdout)
    by_trees = json.loads(run(many, "pairs.rule=lowest", "-o", tmp_path / "b.jsonl", "--json").stdout)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert by_config["num_pairs"] == by_trees["num_pairs"]


def test_sft_and_parquet_outputs(many: Path, tmp_path: Path) -> None:
    values = json.loads(run(many, "--sft", "--json").stdout)
    rows = [json.loads(line) for line in many.with_name("sft.jsonl").read_text().splitlines()]
    assert values["num_examples"] == len(rows) > 0
    assert f"{len(rows)} winning paths from {values['num_trees']} trees" in run(many, "--sft").stdout
    run(many, "-o", tmp_path / "pairs.parquet")
    assert (tmp_path / "pairs.parquet").read_bytes()[:4] == b"PAR1"


def test_a_misspelt_rule_is_refused_before_anything_is_written(many: Path) -> None:
    with pytest.raises(ConfigError, match=r"pairs\.rule: Input should be 'all', 'lower', 'lowest' or 'fpo'"):
        run(many, "pairs.rule=lowet")
    assert not many.with_name("pairs.jsonl").exists()


def test_any_script_is_written_under_an_ascii_terminal(tmp_path: Path) -> None:
    searched = replace(
        next(t for t in map(random_tree, range(99)) if len(t.winning_nodes) > 2), question="é 数学 שלום ☕"
    )
    path = write_trees(tmp_path / "trees.jsonl", [searched])
    environment = {**os.environ, "LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    for output in ("pairs.jsonl", "数.jsonl"):
        done = subprocess.run(
            [sys.executable, "-c", "from cpo_fast.cli import main; main()", "pairs", str(path), "-o", output],
            capture_output=True,
            text=True,
            encoding="ascii",
            timeout=600,
            cwd=tmp_path,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        assert "é 数学 שלום ☕" in (tmp_path / output).read_text(encoding="utf-8")
