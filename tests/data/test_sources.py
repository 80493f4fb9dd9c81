"""Where data comes from: one file, several in a mixture, parquet, the hub; trees directly or through their files."""

import logging
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cpo_fast.config import Config, validate_config
from cpo_fast.data.batches import split_by_question
from cpo_fast.data.load import load_pairs, load_sft
from cpo_fast.data.pair_files import write_pairs, write_sft
from cpo_fast.errors import ConfigError, DataError, EnvironmentProblem
from cpo_fast.files import write_jsonl
from cpo_fast.rows import write_parquet
from tests.data.hand_made import random_tree, write_trees
from tests.tiny import tiny_tokenizer

ROWS = [{"prompt": f"Q{i}?\n", "chosen": f"yes {j}\n", "rejected": "no\n"} for i in range(6) for j in range(2)]


def config(path: Path | str, pairs: dict[str, Any] | None = None, seed: int = 0, **data: Any) -> Config:
    return validate_config({"seed": seed, "data": {"path": str(path), **data}, "pairs": pairs or {}})


def mixture(*items: tuple[Path, float], **pairs: Any) -> Config:
    listed = [{"path": str(path), "weight": weight} for path, weight in items]
    return validate_config({"data": {"mixture": listed}, "pairs": pairs})


def bare(items: list[Any]) -> list[tuple]:
    """Everything but the place in the file."""
    return [tuple(value for name, value in vars(item).items() if name != "source") for item in items]


def trees(tmp_path: Path, name: str = "trees", count: int = 25) -> Path:
    return write_trees(tmp_path / name / "trees.jsonl", [random_tree(seed, f"{name}-{seed}") for seed in range(count)])


@pytest.mark.parametrize("rule", ["all", "lower", "lowest", "fpo"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_trees_and_the_files_written_from_them_are_the_same_training_data(
    tmp_path: Path, rule: str, suffix: str
) -> None:
    settings = {"rule": rule, "rejected_fraction": 0.8, "num_questions": 9, "max_fpo_pairs": 3, "weight": "node"}
    direct = config(trees(tmp_path), settings, seed=4)
    written = tmp_path / f"pairs.{suffix}"
    write_pairs(direct.data.path, written, direct.pairs, direct.seed)
    from_file = config(written, {"weight": "node"}, seed=4)
    pairs = load_pairs(direct, tiny_tokenizer()).pairs
    assert len(pairs) > 3
    assert bare(pairs) == bare(load_pairs(from_file, tiny_tokenizer()).pairs)


def test_sft_from_trees_and_from_their_file_are_the_same(tmp_path: Path) -> None:
    direct = config(trees(tmp_path), {"num_questions": 5})
    write_sft(direct.data.path, tmp_path / "sft.jsonl", direct.pairs, direct.seed)
    examples = load_sft(direct, tiny_tokenizer()).examples
    assert len({example.group for example in examples}) == 5
    assert bare(examples) == bare(load_sft(config(tmp_path / "sft.jsonl"), tiny_tokenizer()).examples)
    assert all(example.completion_ids[-1] == tiny_tokenizer().eos_token_id for example in examples)
    never = load_sft(config(tmp_path / "sft.jsonl", eos="never"), tiny_tokenizer()).examples
    assert [example.completion_ids[:-1] for example in examples] == [example.completion_ids for example in never]


def test_loaded_pairs_are_weighted_and_gold_changes_nothing(tmp_path: Path) -> None:
    """Each question counts equally: its weights sum to pairs / questions."""
    path = trees(tmp_path)
    asked = config(path, {"weight": "question", "rule": "fpo"}, held_out=0.3)
    pairs = load_pairs(asked, tiny_tokenizer()).pairs
    totals: Counter[str] = Counter()
    for pair in pairs:
        totals[pair.group] += pair.weight  # type: ignore[assignment]
    assert list(totals.values()) == pytest.approx([len(pairs) / len(totals)] * len(totals))
    assert len({pair.weight for pair in pairs}) > 2
    write_trees(path, [replace(random_tree(seed, f"trees-{seed}"), gold=str(seed * 7 % 5)) for seed in range(25)])
    again = load_pairs(asked, tiny_tokenizer()).pairs
    assert again == pairs
    assert split_by_question(again, 0.3, 0) == split_by_question(pairs, 0.3, 0)


def test_sft_counts_bad_rows_as_pairs_do(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "completion": "c"},
        {"prompt": "p", "completion": "c"},
        {"prompt": "p", "completion": " "},
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        {"prompt": "p" * 50, "completion": "c"},
    ]
    write_jsonl(tmp_path / "sft.jsonl", rows)
    loaded = load_sft(config(tmp_path / "sft.jsonl", max_drop=1.0, max_length=20), tiny_tokenizer())
    assert len(loaded.examples) == 1
    assert loaded.dropped_by_reason == {
        "duplicate": 1,
        "empty response": 1,
        "missing key 'completion'": 1,
        "the prompt alone reaches data.max_length": 1,
    }


def test_parquet_of_others_is_read_and_a_damaged_one_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "rows.parquet", ROWS)
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    one, two = (load_pairs(config(tmp_path / f"rows.{kind}"), tiny_tokenizer()) for kind in ("parquet", "jsonl"))
    assert bare(one.pairs) == bare(two.pairs)
    assert one.pairs[2].source == f"{tmp_path}/rows.parquet:3"
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"rows\.parquet: not a readable parquet file"):
        load_pairs(config(tmp_path / "rows.parquet"), tiny_tokenizer())
    with pytest.raises(DataError, match=r"none\.parquet: cannot read"):
        load_pairs(config(tmp_path / "none.parquet"), tiny_tokenizer())


def test_questions_are_drawn_from_any_file_by_the_seed(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    write_jsonl(tmp_path / "back.jsonl", ROWS[::-1])
    drawn = {}
    for name, seed in (("rows", 0), ("back", 0), ("rows", 1)):
        loaded = load_pairs(config(tmp_path / f"{name}.jsonl", {"num_questions": 3}, seed=seed), tiny_tokenizer())
        drawn[name, seed] = {pair.group for pair in loaded.pairs}
        assert (len(drawn[name, seed]), len(loaded.pairs)) == (3, 6)
    assert drawn["rows", 0] == drawn["back", 0] != drawn["rows", 1]


def test_a_mixture_takes_its_shares_of_questions(tmp_path: Path) -> None:
    first, second = trees(tmp_path, "one"), trees(tmp_path, "two")
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    used = mixture((first, 1), (second, 2), (tmp_path / "rows.jsonl", 1), num_questions=12)
    examples = load_sft(mixture((first, 1), (second, 2), num_questions=12), tiny_tokenizer()).examples
    names = {example.group for example in examples}
    assert [sum(f"{name}-" in group for group in names) for name in ("one", "two")] == [4, 8]
    pairs = load_pairs(used, tiny_tokenizer()).pairs
    assert len({pair.group for pair in pairs if "rows.jsonl" in pair.source}) == 3
    train, held_out = split_by_question(pairs, 0.3, 0)
    assert {pair.group for pair in train}.isdisjoint(pair.group for pair in held_out)


def test_equal_ids_of_two_tasks_are_two_questions_and_of_one_task_one(tmp_path: Path) -> None:
    rows = [{**row, "tree": f"q{place // 4}", "task": "svamp"} for place, row in enumerate(ROWS)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "b.jsonl", [{**row, "task": "fever", "prompt": row["prompt"] + "?"} for row in rows])
    write_jsonl(tmp_path / "c.jsonl", [{**row, "prompt": row["prompt"] + "!"} for row in rows])
    for other, num_questions in (("b", 6), ("c", 3)):
        loaded = load_pairs(mixture((tmp_path / "a.jsonl", 1), (tmp_path / f"{other}.jsonl", 1)), tiny_tokenizer())
        assert (len(loaded.pairs), len({pair.group for pair in loaded.pairs})) == (24, num_questions)


def test_a_mixture_that_leaves_a_set_without_questions_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    empty = write_trees(tmp_path / "trees.jsonl", [replace(random_tree(0), winning_nodes=(), status="no_answer")])
    with pytest.raises(ConfigError, match=r"leaves no question of .*trees\.jsonl \(it has 0\)"):
        load_pairs(mixture((tmp_path / "rows.jsonl", 1), (empty, 1)), tiny_tokenizer())
    filled = trees(tmp_path)
    with pytest.raises(ConfigError, match=r"leaves no question of .*rows\.jsonl \(it has 6\)"):
        load_pairs(mixture((tmp_path / "rows.jsonl", 1), (filled, 100)), tiny_tokenizer())


def test_no_data_and_no_pair_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path is empty"):
        load_pairs(config(""), tiny_tokenizer())
    with pytest.raises(DataError, match=r"none\.jsonl: cannot read \(No such file or directory\)"):
        load_pairs(config(tmp_path / "none.jsonl"), tiny_tokenizer())
    lonely = write_trees(tmp_path / "trees.jsonl", [random_tree(seed) for seed in range(1)])
    with pytest.raises(DataError, match=r"no pair: by pairs\.rule=lowest no winning path of its trees has a loser"):
        load_pairs(config(lonely, {"rule": "lowest", "rejected_fraction": 1e-9}), tiny_tokenizer())


def test_a_rule_that_has_no_effect_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    with caplog.at_level(logging.WARNING):
        load_pairs(config(tmp_path / "rows.jsonl", {"rule": "lower"}), tiny_tokenizer())
    assert "no effect of pairs.rule=lower" in caplog.text


def test_hub_data_is_read_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder of that name stands in for the hub: `datasets` takes both, and nothing leaves the machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_jsonl(tmp_path / "org" / "name" / "train.jsonl", ROWS)
    loaded = load_pairs(config("hub:org/name"), tiny_tokenizer())
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    assert bare(loaded.pairs) == bare(load_pairs(config(tmp_path / "rows.jsonl"), tiny_tokenizer()).pairs)
    assert loaded.pairs[3].source == "hub:org/name:4"
    with pytest.raises(DataError, match="hub:org/other: cannot be read"):
        load_pairs(config("hub:org/other"), tiny_tokenizer())


def test_hub_without_datasets_names_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'cpo-fast\[data\]'"):
        load_pairs(config("hub:org/name"), tiny_tokenizer())
