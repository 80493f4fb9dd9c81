"""Every kind of training file, and every way a row can be bad, counted and named."""

import json
from pathlib import Path
from typing import Any

import pytest

from cpo_fast.config import validate_config
from cpo_fast.data.load import LoadedExamples, load_examples
from cpo_fast.data.pair_files import write_rows
from cpo_fast.errors import DataError
from tests.tiny import tiny_tokenizer

EOS = 2


def load(path: Path, **options: Any) -> LoadedExamples:
    config = validate_config({"data": {"path": str(path), "max_drop": 1.0} | options})
    return load_examples(config, tiny_tokenizer(), path.parent / "dropped.jsonl")


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_text_rows_are_the_ids_of_prompt_and_response_together(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    path = write(tmp_path / "text.jsonl", [{"prompt": "1 + 1 = ", "chosen": "2", "rejected": "é数3"}])
    (pair,) = load(path).examples
    chosen, rejected = pair.sequences
    assert list(chosen) == [*tokenizer("1 + 1 = 2").input_ids, EOS]
    assert list(rejected) == [*tokenizer("1 + 1 = é数3").input_ids, EOS]
    assert list(pair.prompt_ids) == tokenizer("1 + 1 = ").input_ids


def test_token_that_merges_across_the_boundary_belongs_to_the_response(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {"<e>": 0, "a": 1, " ": 2, "b": 3, " b": 4, "c": 5, " c": 6}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[(" ", "b"), (" ", "c")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>", pad_token="<e>")
    rows = [{"prompt": "a ", "chosen": "b", "rejected": "c"}, {"prompt": "a ", "chosen": "b", "rejected": "a"}]
    path = write(tmp_path / "merge.jsonl", rows)
    loaded = load_examples(validate_config({"data": {"path": str(path)}}), tokenizer)
    both, one = [(pair.prompt_ids, *pair.responses) for pair in loaded.examples]
    assert both == ((1,), (4, 0), (6, 0))
    assert one == ((1,), (4, 0), (2, 1, 0))  # what one response takes from the prompt, the other gets too
    assert loaded.num_merged_boundaries == 2
    assert loaded.examples[0].group == loaded.examples[1].group


def test_trees_and_their_pairs_file_are_the_same_training_data(trees_path: Path) -> None:
    write_rows(trees_path, trees_path.with_name("pairs.jsonl"))
    strip = [
        [(p.prompt_ids, *p.responses, p.group, p.step) for p in load(path).examples]
        for path in (trees_path, trees_path.with_name("pairs.jsonl"))
    ]
    assert strip[0] == strip[1]
    assert strip[0][0] == ((1, 2, 50, 51), (100, 10), (101, 10), "a", 1)
    assert strip[0][1] == ((1, 2, 50, 51, 100, 10), (102, 10, EOS), (103, 10, EOS), "a", 2)


@pytest.mark.parametrize(
    ("eos", "first", "second"), [("never", (100, 10), (102, 10)), ("every", (100, 10, EOS), (102, 10, EOS))]
)
def test_end_of_sequence_rule(trees_path: Path, eos: str, first: tuple, second: tuple) -> None:
    pairs = load(trees_path, eos=eos).examples
    assert (pairs[0].responses[0], pairs[1].responses[0]) == (first, second)


def test_bad_rows_are_counted_by_reason_and_kept_aside(tmp_path: Path) -> None:
    good = {"prompt": "p", "chosen": "c", "rejected": "r"}
    rows = [
        good,
        {"prompt": "p", "chosen": "c"},
        {**good, "chosen": None},
        {**good, "rejected": " \n"},
        {**good, "rejected": "c"},
        good,
        {**good, "chosen": "x" * 50},
        {**good, "prompt": ""},
    ]
    loaded = load(write(tmp_path / "bad.jsonl", rows), max_length=40)
    assert len(loaded.examples) == 1
    assert loaded.dropped_by_reason == {
        "missing key 'rejected'": 1,
        "'chosen' is null": 1,
        "empty response": 1,
        "chosen equals rejected": 1,
        "duplicate": 1,
        "longer than data.max_length": 1,
        "empty prompt": 1,
    }
    dropped = [json.loads(line) for line in (tmp_path / "dropped.jsonl").read_text().splitlines()]
    assert dropped[0]["source"].endswith("bad.jsonl:2")
    assert dropped[0]["reason"] == "missing key 'rejected'"


def test_too_many_bad_rows_end_with_exit_code_3(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "c", "rejected": str(i)} for i in range(9)] + [{"prompt": "p"}]
    with pytest.raises(
        DataError,
        match=r"1 of 10 rows are bad, .*max_drop=0\.05 allows: 1 like .*rows\.jsonl:10: missing key 'chosen'",
    ) as raised:
        load(write(tmp_path / "rows.jsonl", rows), max_drop=0.05)
    assert raised.value.exit_code == 3
    assert len(load(tmp_path / "rows.jsonl", max_drop=0.1).examples) == 9


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "p"}\n{"prompt": \n', r"1 like .*x\.jsonl:2: the line is not valid JSON"),
        (b"[1]\n", r"x\.jsonl:1: expected a JSON object, got list"),
        (b'{"prompt": "\xff"}\n', r"x\.jsonl:1: the line is not UTF-8"),
        (b"", r"x\.jsonl: the file has no rows"),
    ],
)
def test_broken_file_names_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "x.jsonl")
