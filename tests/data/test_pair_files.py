"""The files written from trees: as other libraries read them, as an audit sees them, and the same bytes every time."""

import json
import random
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from cpo_fast.config import PairsConfig
from cpo_fast.data.pair_files import REPEATED, TreeFileReader, audit_pairs, write_rows
from cpo_fast.errors import EnvironmentProblem
from cpo_fast.files import write_jsonl
from tests.data.hand_made import PROMPT, node, random_tree, tree, write_trees


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_carry_the_ids_of_the_search(trees_path: Path) -> None:
    made = write_rows(trees_path, trees_path.with_name("pairs.jsonl"))
    rows = read(trees_path.with_name("pairs.jsonl"))
    assert rows == made.rows
    assert [row["step"] for row in rows] == [1, 2]
    assert made.trees_without == {"b": "no_answer"}
    first, second = rows
    assert first["prompt_token_ids"] == [1, 2, 50, 51]
    assert (first["chosen_token_ids"], first["rejected_token_ids"]) == ([100, 10], [101, 10])
    assert second["prompt_token_ids"] == [1, 2, 50, 51, 100, 10]
    assert second["prompt"] == "few shot\n\nQuestion: How many?\nStep 1: thought 0.\n"
    assert (first["chosen_final"], second["chosen_final"], second["rejected_final"]) == (False, True, True)


def test_fpo_rows_hold_whole_paths_under_the_question(trees_path: Path) -> None:
    write_rows(trees_path, trees_path.with_name("pairs.jsonl"), PairsConfig(rule="fpo"))
    (row,) = read(trees_path.with_name("pairs.jsonl"))
    assert row["prompt"] == "few shot\n\nQuestion: How many?\n"
    assert row["chosen"] == "Step 1: thought 0.\nAnswer: 4\n"
    assert row["rejected"] == "Step 1: thought 0.\nAnswer: 5\n"
    assert row["prompt_token_ids"] == [1, 2, 50, 51]
    assert row["chosen_token_ids"] == [100, 10, 102, 10]
    assert row["rejected_token_ids"] == [100, 10, 103, 10]
    assert (row["step"], row["chosen_final"], row["rejected_final"]) == (0, True, True)


def test_sft_rows_hold_prompt_and_winning_path(trees_path: Path) -> None:
    made = write_rows(trees_path, trees_path.with_name("sft.jsonl"), method="sft")
    (row,) = read(trees_path.with_name("sft.jsonl"))
    assert row["prompt"] + row["completion"] == "few shot\n\nQuestion: How many?\nStep 1: thought 0.\nAnswer: 4\n"
    assert row["prompt_token_ids"] + row["completion_token_ids"] == [1, 2, 50, 51, 100, 10, 102, 10]
    assert (len(made.rows), made.num_trees) == (1, 1)
    assert made.trees_without_by_reason == {"no_answer": 1}


def test_a_question_that_abstained_gives_no_row_and_is_counted(tmp_path: Path) -> None:
    trees = [random_tree(seed, f"q{seed}") for seed in range(4)]
    trees = [replace(one, nodes=tuple(replace(each, visits=0) for each in one.nodes)) for one in trees]
    path = write_trees(tmp_path / "trees.jsonl", [replace(one, winning_nodes=(), status="abstained") for one in trees])
    made = write_rows(path, tmp_path / "pairs.jsonl")
    assert (made.rows, made.trees_without_by_reason) == ([], {"abstained": 4})


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_same_trees_give_the_same_bytes_whatever_their_gold(tmp_path: Path, suffix: str) -> None:
    trees = [random_tree(seed, f"q{seed}") for seed in range(20)]
    golds = [str(seed) for seed in range(20)]
    settings = PairsConfig(rule="lower", rejected_fraction=0.7, num_questions=9)
    written = []
    for attempt in range(3):
        random.Random(attempt).shuffle(golds)
        path = write_trees(
            tmp_path / str(attempt) / "trees.jsonl",
            [replace(one, gold=gold) for one, gold in zip(trees, golds, strict=True)],
        )
        write_rows(path, path.with_name(f"pairs.{suffix}"), settings, seed=3)
        write_rows(path, path.with_name(f"sft.{suffix}"), settings, seed=3, method="sft")
        names = (f"pairs.{suffix}", "pairs.dropped.jsonl", f"sft.{suffix}")
        written.append([path.with_name(name).read_bytes() for name in names])
    assert written[0] == written[1] == written[2]
    assert all(written[0])


def test_parquet_and_json_lines_hold_the_same_rows(tmp_path: Path) -> None:
    from cpo_fast.rows import read_parquet

    path = write_trees(tmp_path / "trees.jsonl", [random_tree(seed, f"q{seed}") for seed in range(20)])
    write_rows(path, tmp_path / "pairs.jsonl")
    write_rows(path, tmp_path / "pairs.parquet")
    assert read_parquet(tmp_path / "pairs.parquet") == read(tmp_path / "pairs.jsonl")


def test_parquet_without_pyarrow_names_the_line_that_installs_it(
    trees_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(EnvironmentProblem, match=r'pip install "cpo-fast\[data\]"') as raised:
        write_rows(trees_path, trees_path.with_name("pairs.parquet"))
    assert raised.value.exit_code == 5


def test_same_questions_are_drawn_for_every_rule_in_any_file_order(tmp_path: Path) -> None:
    trees = [random_tree(seed, f"q{seed}") for seed in range(30)]
    path = write_trees(tmp_path / "trees.jsonl", trees)
    other = write_trees(tmp_path / "other" / "trees.jsonl", trees[::-1])
    won = {one.id for one in trees if one.winning_nodes}
    drawn = TreeFileReader(path).draw_questions(8, seed=1)
    assert len(drawn) == 8
    assert drawn < won
    assert drawn == TreeFileReader(other).draw_questions(8, seed=1)
    assert drawn < TreeFileReader(path).draw_questions(12, seed=1)
    assert drawn != TreeFileReader(path).draw_questions(8, seed=2)
    write_rows(path, tmp_path / "sft.jsonl", PairsConfig(num_questions=8), seed=1, method="sft")
    assert {row["tree"] for row in read(tmp_path / "sft.jsonl")} == drawn
    for rule in ("all", "lower", "lowest", "fpo"):
        write_rows(path, tmp_path / "pairs.jsonl", PairsConfig(rule=rule, num_questions=8), seed=1)  # type: ignore[arg-type]
        assert {row["tree"] for row in read(tmp_path / "pairs.jsonl")} <= drawn


def test_audit_counts_values_lengths_and_what_was_left_out(tmp_path: Path) -> None:
    nodes = [
        node(0, -1, 1, value=4.0, token_ids=(100, 101, 10)),
        node(1, -1, 1, value=1.0),
        node(2, -1, 1, value=None, token_ids=(104, 105, 106, 107, 10)),
        node(3, -1, 1, value=9.0),
        node(4, 0, 2, "4", value=8.0),
        node(5, 0, 2, "5", value=2.0),
        node(6, 0, 2, "5", token_ids=(104, 10)),  # the very tokens of the winner
    ]
    trees = [
        tree(nodes, (4,), "a"),
        tree(nodes, (4,), "b"),  # the same question under another id
        tree([node(0, -1, 1, "4")], (0,), "c"),
        tree(nodes, (), "d"),
    ]
    path = write_trees(tmp_path / "trees.jsonl", trees)
    made = write_rows(path, tmp_path / "pairs.jsonl", PairsConfig(rule="lower"))
    assert (len(made.rows), made.num_trees) == (3, 1)
    assert made.trees_without_by_reason == {REPEATED: 1, "no losing sibling": 1, "no_answer": 1}
    assert made.unused_by_reason == {REPEATED: 3, "value not below the winner's": 2, "chosen equals rejected": 2}
    steps = audit_pairs(made.rows)
    assert asdict(steps[1]) == {
        "num_pairs": 2,
        "num_states": 1,
        "chosen_value": 4.0,
        "rejected_value": 1.0,
        "num_without_value": 1,
        "chosen_tokens": 3.0,
        "rejected_tokens": 3.5,
        "max_tokens": 4 + 5,
    }
    assert (steps[2].num_pairs, steps[2].chosen_value, steps[2].rejected_value) == (1, 8.0, 2.0)
    dropped = read(tmp_path / "pairs.dropped.jsonl")
    assert dropped[0] == {"tree": "a", "step": 1, "nodes": [0, 3], "reason": "value not below the winner's"}
    assert len(dropped) == 7
    write_rows(write_trees(tmp_path / "trees.jsonl", [trees[2]]), tmp_path / "pairs.jsonl")
    assert not (tmp_path / "pairs.dropped.jsonl").exists()


def test_prompt_text_is_the_one_that_was_searched_with(tmp_path: Path) -> None:
    """Shuffled demonstrations change the few-shot text; what a row says must be what its ids say."""
    plain = tree([node(0, -1, 1, "4"), node(1, -1, 1, "5")], (0,), "a")
    chat = replace(plain, id="b", question_token_ids=(51,), question_prompt="How many?<|im_end|>\n")
    write_rows(write_trees(tmp_path / "trees.jsonl", [plain, chat]), tmp_path / "pairs.jsonl")
    prompts = [row["prompt"] for row in read(tmp_path / "pairs.jsonl")]
    assert prompts == [PROMPT.text + "Question: How many?\n", PROMPT.text + "How many?<|im_end|>\n"]


def test_trees_that_are_damaged_name_file_and_line(trees_path: Path) -> None:
    from cpo_fast.errors import DataError

    lines = trees_path.read_text().splitlines()
    write_jsonl(trees_path, [json.loads(lines[0]), {**json.loads(lines[1]), "nodes": 3}])
    with pytest.raises(DataError, match=r"trees\.jsonl:2: not a search tree"):
        write_rows(trees_path, trees_path.with_name("pairs.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_datasets_and_trl_read_the_file_unmodified(trees_path: Path, tmp_path: Path, suffix: str) -> None:
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer

    from tests.tiny import tiny_llama, tiny_tokenizer, with_lora

    path = trees_path.with_name(f"pairs.{suffix}")
    write_rows(trees_path, path)
    kind = "json" if suffix == "jsonl" else suffix
    data = load_dataset(kind, data_files=str(path), split="train", cache_dir=str(tmp_path))
    options = DPOConfig(
        output_dir=str(tmp_path / "trl"), max_steps=1, per_device_train_batch_size=2, use_cpu=True, bf16=False,
        gradient_checkpointing=False, max_length=None, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    tokenizer = tiny_tokenizer()
    model = with_lora(tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=4096))
    trainer = DPOTrainer(model=model, args=options, train_dataset=data, processing_class=tokenizer)
    row = trainer.train_dataset[0]
    assert tokenizer.decode(row["prompt_ids"]) == data[0]["prompt"]
    assert tokenizer.decode(row["chosen_ids"]) == data[0]["chosen"] + "<eos>"
    trainer.train()
