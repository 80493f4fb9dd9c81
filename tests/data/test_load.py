"""Where data comes from: one file, several in a mixture, parquet, the hub; trees directly or through their files."""

import json
import logging
import random
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cpo_fast.config import Config, validate_config
from cpo_fast.data.batches import split_by_question, weigh
from cpo_fast.data.examples import Example
from cpo_fast.data.load import apportion, check_data, load_examples
from cpo_fast.data.pair_files import write_rows
from cpo_fast.errors import ConfigError, DataError, EnvironmentProblem
from cpo_fast.files import write_jsonl
from cpo_fast.rows import write_parquet
from tests.data.hand_made import random_tree, write_trees
from tests.tiny import tiny_tokenizer

ROWS = [{"prompt": f"Q{i}?\n", "chosen": f"yes {j}\n", "rejected": "no\n"} for i in range(6) for j in range(2)]


def config(
    path: Path | str, pairs: dict[str, Any] | None = None, seed: int = 0, method: str = "preference", **data: Any
) -> Config:
    sections = {"data": {"path": str(path), **data}, "pairs": pairs or {}, "train": {"method": method}}
    return validate_config({"seed": seed, **sections})


def mixture(*items: tuple[Path, float], method: str = "preference", **pairs: Any) -> Config:
    listed = [{"path": str(path), "weight": weight} for path, weight in items]
    return validate_config({"data": {"mixture": listed}, "pairs": pairs, "train": {"method": method}})


def bare(examples: list[Example]) -> list[Example]:
    """Everything but the place in the file."""
    return [replace(example, source="") for example in examples]


def trees(tmp_path: Path, name: str = "trees", count: int = 25) -> Path:
    return write_trees(tmp_path / name / "trees.jsonl", [random_tree(seed, f"{name}-{seed}") for seed in range(count)])


@pytest.mark.parametrize("rule", ["all", "lower", "lowest", "fpo"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_trees_and_the_files_written_from_them_are_the_same_training_data(
    tmp_path: Path, rule: str, suffix: str
) -> None:
    shaping = {"rule": rule, "rejected_fraction": 0.8, "num_questions": 9, "max_fpo_pairs": 3}
    direct = config(trees(tmp_path), shaping, seed=4)
    written = tmp_path / f"pairs.{suffix}"
    write_rows(direct.data.path, written, direct.pairs, direct.seed)
    pairs = load_examples(direct, tiny_tokenizer()).examples
    assert len(pairs) > 3
    assert bare(pairs) == bare(load_examples(config(written, seed=4), tiny_tokenizer()).examples)


def test_sft_from_trees_and_from_their_file_are_the_same(tmp_path: Path) -> None:
    direct, written = config(trees(tmp_path), {"num_questions": 5}, method="sft"), tmp_path / "sft.jsonl"
    write_rows(direct.data.path, written, direct.pairs, direct.seed, "sft")
    examples = load_examples(direct, tiny_tokenizer()).examples
    assert len({example.group for example in examples}) == 5
    assert bare(examples) == bare(load_examples(config(written, method="sft"), tiny_tokenizer()).examples)
    completions = [completion for example in examples for completion in example.responses]
    assert all(completion[-1] == tiny_tokenizer().eos_token_id for completion in completions)
    never = load_examples(config(written, method="sft", eos="never"), tiny_tokenizer()).examples
    assert [(completion[:-1],) for completion in completions] == [example.responses for example in never]


def test_a_line_of_trees_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, parsed, real = trees(tmp_path), [], json.loads

    def counting(text: str, **options: Any) -> Any:
        parsed.append(text)
        return real(text, **options)

    monkeypatch.setattr(json, "loads", counting)
    load_examples(config(path), tiny_tokenizer())
    lines = Counter(text for text in parsed if "nodes" in text)
    assert len(lines) == 25
    assert lines.total() == 25 + 1  # the first tells that the file holds trees


def test_questions_of_loaded_pairs_count_equally_and_gold_changes_nothing(tmp_path: Path) -> None:
    """Each question counts equally: its weights sum to pairs / questions."""
    path = trees(tmp_path)
    asked = config(path, {"rule": "fpo"}, held_out=0.3)
    pairs = weigh(load_examples(asked, tiny_tokenizer()).examples, "question")
    totals: Counter[str] = Counter()
    for pair in pairs:
        totals[pair.group] += pair.weight  # type: ignore[assignment]
    assert list(totals.values()) == pytest.approx([len(pairs) / len(totals)] * len(totals))
    assert len({pair.weight for pair in pairs}) > 2
    write_trees(path, [replace(random_tree(seed, f"trees-{seed}"), gold=str(seed * 7 % 5)) for seed in range(25)])
    again = weigh(load_examples(asked, tiny_tokenizer()).examples, "question")
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
    loaded = load_examples(config(tmp_path / "sft.jsonl", method="sft", max_drop=1.0, max_length=20), tiny_tokenizer())
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
    one, two = (load_examples(config(tmp_path / f"rows.{kind}"), tiny_tokenizer()) for kind in ("parquet", "jsonl"))
    assert bare(one.examples) == bare(two.examples)
    assert one.examples[2].source == f"{tmp_path}/rows.parquet:3"
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"rows\.parquet: not a readable parquet file"):
        load_examples(config(tmp_path / "rows.parquet"), tiny_tokenizer())
    with pytest.raises(DataError, match=r"none\.parquet: cannot read"):
        load_examples(config(tmp_path / "none.parquet"), tiny_tokenizer())


def test_questions_are_drawn_from_any_file_by_the_seed(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    write_jsonl(tmp_path / "back.jsonl", ROWS[::-1])
    drawn = {}
    for name, seed in (("rows", 0), ("back", 0), ("rows", 1)):
        loaded = load_examples(config(tmp_path / f"{name}.jsonl", {"num_questions": 3}, seed=seed), tiny_tokenizer())
        drawn[name, seed] = {pair.group for pair in loaded.examples}
        assert (len(drawn[name, seed]), len(loaded.examples)) == (3, 6)
    assert drawn["rows", 0] == drawn["back", 0] != drawn["rows", 1]


def test_a_mixture_takes_its_shares_of_questions(tmp_path: Path) -> None:
    first, second = trees(tmp_path, "one"), trees(tmp_path, "two")
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    used = mixture((first, 1), (second, 2), (tmp_path / "rows.jsonl", 1), num_questions=12)
    of_trees = mixture((first, 1), (second, 2), method="sft", num_questions=12)
    examples = load_examples(of_trees, tiny_tokenizer()).examples
    names = {example.group for example in examples}
    assert [sum(f"{name}-" in group for group in names) for name in ("one", "two")] == [4, 8]
    pairs = load_examples(used, tiny_tokenizer()).examples
    assert len({pair.group for pair in pairs if "rows.jsonl" in pair.source}) == 3
    train, held_out = split_by_question(pairs, 0.3, 0)
    assert {pair.group for pair in train}.isdisjoint(pair.group for pair in held_out)


def test_equal_ids_of_two_tasks_are_two_questions_and_of_one_task_one(tmp_path: Path) -> None:
    rows = [{**row, "tree": f"q{place // 4}", "task": "svamp"} for place, row in enumerate(ROWS)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "b.jsonl", [{**row, "task": "fever", "prompt": row["prompt"] + "?"} for row in rows])
    write_jsonl(tmp_path / "c.jsonl", [{**row, "prompt": row["prompt"] + "!"} for row in rows])
    for other, num_questions in (("b", 6), ("c", 3)):
        loaded = load_examples(mixture((tmp_path / "a.jsonl", 1), (tmp_path / f"{other}.jsonl", 1)), tiny_tokenizer())
        assert (len(loaded.examples), len({pair.group for pair in loaded.examples})) == (24, num_questions)


def test_a_mixture_that_leaves_a_set_without_questions_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    empty = write_trees(tmp_path / "trees.jsonl", [replace(random_tree(0), winning_nodes=(), status="no_answer")])
    with pytest.raises(ConfigError, match=r"leaves no question of .*trees\.jsonl \(it has 0\)"):
        load_examples(mixture((tmp_path / "rows.jsonl", 1), (empty, 1)), tiny_tokenizer())
    filled = trees(tmp_path)
    with pytest.raises(ConfigError, match=r"leaves no question of .*rows\.jsonl \(it has 6\)"):
        load_examples(mixture((tmp_path / "rows.jsonl", 1), (filled, 100)), tiny_tokenizer())


def test_no_data_and_no_pair_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path is empty"):
        load_examples(config(""), tiny_tokenizer())
    with pytest.raises(DataError, match=r"none\.jsonl: cannot read \(No such file or directory\)"):
        load_examples(config(tmp_path / "none.jsonl"), tiny_tokenizer())
    lonely = write_trees(tmp_path / "trees.jsonl", [random_tree(seed) for seed in range(1)])
    with pytest.raises(DataError, match=r"no pair: by pairs\.rule=lowest no winning path of its trees has a loser"):
        load_examples(config(lonely, {"rule": "lowest", "rejected_fraction": 1e-9}), tiny_tokenizer())


def test_a_rule_that_has_no_effect_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    with caplog.at_level(logging.WARNING):
        load_examples(config(tmp_path / "rows.jsonl", {"rule": "lower"}), tiny_tokenizer())
    assert "no effect of pairs.rule=lower" in caplog.text


def test_hub_data_is_read_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder of that name stands in for the hub: `datasets` takes both, and nothing leaves the machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_jsonl(tmp_path / "org" / "name" / "train.jsonl", ROWS)
    loaded = load_examples(config("hub:org/name"), tiny_tokenizer())
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    assert bare(loaded.examples) == bare(load_examples(config(tmp_path / "rows.jsonl"), tiny_tokenizer()).examples)
    assert loaded.examples[3].source == "hub:org/name:4"
    with pytest.raises(DataError, match="hub:org/other: cannot be read"):
        load_examples(config("hub:org/other"), tiny_tokenizer())


def test_hub_without_datasets_names_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'cpo-fast\[data\]'"):
        load_examples(config("hub:org/name"), tiny_tokenizer())


@pytest.mark.parametrize(
    ("weights", "sizes", "total", "counts"),
    [
        ([1], [7], None, [7]),
        ([1], [7], 3, [3]),
        ([1], [7], 9, [7]),
        ([1, 1], [10, 4], None, [4, 4]),  # as large as equal shares allow
        ([3, 1], [30, 20], None, [30, 10]),
        ([0.7, 1], [3, 9], None, [3, 4]),  # 0.7 * (3 / 0.7) is 2.9999... in floating point
        ([1, 1, 1], [9, 9, 9], 10, [4, 3, 3]),
        ([2, 1], [9, 9], 9, [6, 3]),
        ([2, 1], [4, 9], 9, [4, 2]),  # the first is too small for six of nine: the shares hold
        ([1, 100], [5, 50], 10, [0, 10]),
    ],
)
def test_a_mixture_keeps_its_shares(
    weights: list[float], sizes: list[int], total: int | None, counts: list[int]
) -> None:
    assert apportion(weights, sizes, total) == counts


def test_mixtures_never_take_more_than_there_is_or_was_asked_for() -> None:
    generator = random.Random(0)
    for _ in range(500):
        sizes = [generator.randint(0, 30) for _ in range(generator.randint(1, 5))]
        weights = [generator.uniform(0.1, 5) for _ in sizes]
        total = generator.choice([None, generator.randint(1, 60)])
        counts = apportion(weights, sizes, total)
        assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
        assert total is None or sum(counts) <= total
        largest = min(size / weight for size, weight in zip(sizes, weights, strict=True))
        if total is not None and total <= largest * sum(weights):
            assert sum(counts) == total


BAD = {"prompt": "Q?", "chosen": "yes"}


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([], {}, "the file has no rows; check data.path"),
        (
            [BAD, BAD],
            {},
            "2 of 2 rows are bad, more than data.max_drop=0.05 allows: 2 like .*:1: missing key 'rejected'",
        ),
        (ROWS[:2], {"columns": {"prompt": "aks"}}, "no row has the column 'aks' that data.columns.prompt names"),
        (ROWS[:2], {"method": "full_step"}, "holds no trees but rows"),
        ([BAD, *ROWS[:1]], {"max_drop": 0.6}, None),
        ([{**ROWS[0], "prompt": None, "ask": "Q?"}, ROWS[0]], {"columns": {"prompt": "ask"}, "max_drop": 0.6}, None),
    ],
)
def test_what_no_row_of_can_be_used_is_refused_without_a_model(
    tmp_path: Path, rows: list[Any], settings: dict[str, Any], message: str | None
) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, rows)
    if message is None:
        check_data(config(path, **settings))
        load_examples(config(path, **settings), tiny_tokenizer())
        return
    for check in (check_data, partial(load_examples, tokenizer=tiny_tokenizer())):
        with pytest.raises(DataError, match=message):
            check(config(path, **settings))


def test_a_run_without_trees_says_what_makes_them(tmp_path: Path) -> None:
    for name, hint in (("trees", "run cpo-fast collect first, or check the path"), ("pairs", "check the path")):
        path = tmp_path / f"{name}.jsonl"
        with pytest.raises(DataError, match=rf"{name}\.jsonl: cannot read \(No such file or directory\); {hint}"):
            check_data(config(path))
        with pytest.raises(DataError, match=rf"cannot read \(No such file or directory\); {hint}"):
            write_rows(path, tmp_path / "out.jsonl")
    with pytest.raises(DataError, match=r"pairs\.parquet: cannot read"):
        check_data(config(tmp_path / "pairs.parquet"))
    check_data(config(trees(tmp_path)))
    with pytest.raises(ConfigError, match=r"data\.path is empty"):
        check_data(config(""))
