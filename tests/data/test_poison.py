"""A file with one row of every kind of damage: exact counts, file:line, nothing cut, nothing silent, never a crash."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from cpo_fast.config import validate_config
from cpo_fast.data.load import LoadedExamples, load_examples
from cpo_fast.errors import DataError
from cpo_fast.files import read_jsonl, write_jsonl
from cpo_fast.rows import read_rows
from tests.tiny import tiny_tokenizer

MAX_LENGTH = 60  # the tokenizer has one token a byte
GOOD = {"prompt": "Q: why?\n", "chosen": "so\n", "rejected": "no\n"}
LONG_PROMPT = {"prompt": "p" * MAX_LENGTH, "chosen": "a", "rejected": "b"}
LONG_RESPONSE = {"prompt": "p", "chosen": "a", "rejected": "b" * MAX_LENGTH}
EXACT = {"prompt": "p" * 20, "chosen": "a" * (MAX_LENGTH - 21), "rejected": "b"}  # one more is end-of-sequence
DEEP = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
IDS = {"prompt_token_ids": [5], "chosen_token_ids": [6], "rejected_token_ids": [7]}


def line(*removed: str, **changes: Any) -> bytes:
    row = {key: value for key, value in (GOOD | changes).items() if key not in removed}
    return json.dumps(row).encode()


KEPT = ""
INVALID = "the line is not valid JSON"
# one line of the file each, with the reason it is dropped for
POISON: list[tuple[bytes, str]] = [
    (b"\xef\xbb\xbf" + line(), KEPT),  # a byte-order mark opens the file
    (line("prompt"), "missing key 'prompt'"),
    (line("chosen"), "missing key 'chosen'"),
    (line("rejected"), "missing key 'rejected'"),
    (line(prompt=None), "'prompt' is null"),
    (line(chosen=None), "'chosen' is null"),
    (line(prompt=7), "'prompt' is not text"),
    (line(rejected=["no"]), "'rejected' is not text"),
    (line(chosen={"text": "so"}), "'chosen' is not text"),
    (line(chosen=""), "empty response"),
    (line(rejected=" \t\r\n\u2003"), "empty response"),
    (line(prompt=""), "empty prompt"),
    (line(chosen="no\n"), "chosen equals rejected"),
    (line(chosen="\u00e9", rejected="e\u0301"), "chosen equals rejected after tokenisation"),
    (json.dumps(LONG_PROMPT).encode(), "the prompt alone reaches data.max_length"),
    (json.dumps(LONG_RESPONSE).encode(), "longer than data.max_length"),
    (json.dumps(EXACT).encode(), KEPT),
    (line(), "duplicate"),
    (line().replace(b"why", b"wh\xff"), "the line is not UTF-8"),
    (DEEP, "the JSON is nested too deeply"),
    (line()[:-5], INVALID),
    (b"\x00" * 8, INVALID),
    (line(prompt="a tab").replace(b"a tab", b"a\ttab"), INVALID),  # control characters must be escaped in JSON
    (b"\xef\xbb\xbf" + line(prompt="second mark"), INVALID),
    (b'{"n": ' + b"9" * 5000 + b"}", INVALID),
    (b'["prompt", "chosen", "rejected"]', "expected a JSON object, got list"),
    (b'"prompt"', "expected a JSON object, got str"),
    (line()[:-1] + b', "chosen": "twice"}', "a key appears twice"),
    (line(chosen="\ud83d half a pair"), "a text holds a lone surrogate"),
    (line(prompt=None)[:-1] + b', "score": NaN}', "'prompt' is null"),
    (json.dumps({**IDS, "chosen_token_ids": [6, True]}).encode(), "'chosen_token_ids' is not a list of token ids"),
    (json.dumps({**IDS, "rejected_token_ids": [-1]}).encode(), "'rejected_token_ids' is not a list of token ids"),
    (json.dumps({**IDS, "chosen_token_ids": []}).encode(), "empty response"),
    (json.dumps({**IDS, "prompt_token_ids": []}).encode(), "empty prompt"),
    (line(prompt="nul \x00 \x1b[31m \x7f\n"), KEPT),
    (line(prompt="carriage\r\nreturns\r\n") + b"\r", KEPT),
    (line(prompt="a lone one between the keys").replace(b", ", b",\r"), KEPT),  # white space in JSON, no end of line
    (json.dumps(GOOD | {"prompt": "a\u2028b\u2029c\u0085d\x0ce\n"}, ensure_ascii=False).encode(), KEPT),
    (json.dumps(GOOD | {"prompt": "☕ 数学 שלום क्ष 👩‍🔬\n"}, ensure_ascii=False).encode(), KEPT),
    (line(prompt="extra", more=json.loads("[" * 200 + "]" * 200)), KEPT),
    (b" \t ", KEPT),  # a blank line is no row
]
ROWS = [(number, reason) for number, (raw, reason) in enumerate(POISON, start=1) if raw.strip()]
DROPPED = [(number, reason) for number, reason in ROWS if reason]


@pytest.fixture
def poison(tmp_path: Path) -> Path:
    path = tmp_path / "poison.jsonl"
    path.write_bytes(b"\n".join(raw for raw, _ in POISON))
    return path


def load(path: Path, **options: Any) -> LoadedExamples:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    config = validate_config({"data": {"path": str(path), "max_drop": 1.0, "max_length": MAX_LENGTH} | options})
    return load_examples(config, tokenizer, path.parent / "dropped.jsonl")


def test_every_kind_of_damage_is_counted_under_its_reason_at_its_line(poison: Path) -> None:
    loaded = load(poison)
    assert len(DROPPED) >= 30
    expected = [(f"{poison}:{number}", reason) for number, reason in DROPPED]
    assert [(row["source"], row["reason"]) for row in loaded.dropped] == expected
    assert [pair.source for pair in loaded.examples] == [f"{poison}:{number}" for number, reason in ROWS if not reason]
    written = [row for _, row in read_jsonl(poison.parent / "dropped.jsonl")]
    assert [(row["source"], row["reason"]) for row in written] == expected
    assert written[0]["row"] == {"chosen": "so\n", "rejected": "no\n"}
    assert loaded.dropped_by_reason[INVALID] == 5
    assert loaded.dropped_by_reason["'prompt' is null"] == 2


def test_odd_text_that_is_legal_is_trained_as_it_stands(poison: Path) -> None:
    tokenizer = tiny_tokenizer()
    for pair in load(poison).examples:
        raw, _ = POISON[int(pair.source.rpartition(":")[2]) - 1]
        row = json.loads(raw.decode("utf-8-sig"))
        assert tokenizer.decode(pair.prompt_ids) == row["prompt"]
        assert tokenizer.decode(pair.responses[0]) == row["chosen"] + "<eos>"


def test_above_the_limit_it_ends_with_exit_code_3_and_the_places(poison: Path, caplog: Any) -> None:
    num_bad = len(DROPPED) - 1  # a copy is dropped and is not bad
    share = num_bad / (len(ROWS) - 1)
    with pytest.raises(DataError) as raised:
        load(poison, max_drop=share - 0.001)
    assert raised.value.exit_code == 3
    message = str(raised.value)
    assert f"{num_bad} of {len(ROWS) - 1} rows are bad" in message
    assert f"5 like {poison}:21: {INVALID} (" in message
    assert f"and {len({reason for _, reason in DROPPED}) - 6} other reasons" in message
    assert (poison.parent / "dropped.jsonl").is_file()
    with caplog.at_level(logging.WARNING):
        load(poison, max_drop=share + 0.001)
    assert f"dropped {num_bad} of {len(ROWS) - 1} rows: 5 like {poison}:21" in caplog.text


def test_a_clean_file_removes_the_dropped_rows_of_an_earlier_run(poison: Path) -> None:
    load(poison)
    write_jsonl(poison, [GOOD])
    assert load(poison, max_drop=0.0).dropped == []
    assert not (poison.parent / "dropped.jsonl").exists()


@pytest.mark.parametrize("length", [MAX_LENGTH - 1, MAX_LENGTH, MAX_LENGTH + 1, 10 * MAX_LENGTH])
@pytest.mark.parametrize("where", ["prompt", "chosen", "rejected"])
def test_rows_are_kept_whole_or_dropped(tmp_path: Path, where: str, length: int) -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    row[where] = "x" * (length - 2)  # the other part and end-of-sequence
    write_jsonl(tmp_path / "rows.jsonl", [row, GOOD])
    loaded = load(tmp_path / "rows.jsonl")
    if length <= MAX_LENGTH:
        longest = max(len(sequence) for sequence in loaded.examples[0].sequences)
        assert (len(loaded.examples), longest) == (2, length)
    else:
        whole_prompt = where == "prompt" and length - 2 >= MAX_LENGTH
        reason = "the prompt alone reaches data.max_length" if whole_prompt else "longer than data.max_length"
        assert loaded.dropped_by_reason == {reason: 1}


def test_a_json_array_names_items_and_a_damaged_one_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([GOOD, {"prompt": "p"}, 3], indent=1), encoding="utf-8-sig")
    loaded = load(path)
    assert [pair.source for pair in loaded.examples] == [f"{path}: item 1"]
    assert [(row["source"], row["reason"]) for row in loaded.dropped] == [
        (f"{path}: item 2", "missing key 'chosen'"),
        (f"{path}: item 3", "expected a JSON object, got int"),
    ]
    path.write_text(json.dumps([GOOD, GOOD], indent=1)[:-3])
    with pytest.raises(DataError, match=r"rows\.json: not a readable JSON array .*line \d+"):
        load(path)
    path.write_text("[]")
    with pytest.raises(DataError, match="the file has no rows"):
        load(path)


# every code point, surrogates included
anything = st.text(st.characters(exclude_categories=()), max_size=30)


@settings(max_examples=300, deadline=None)
@given(anything)
def test_text_of_any_script_survives_write_and_read(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    rows = [{"prompt": text, "chosen": text + "a", text: "b"}]
    write_jsonl(path, rows)
    assert [row for _, row in read_rows(str(path))] == rows


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30), st.text(max_size=30))
def test_text_of_any_script_survives_tokenisation(
    tmp_path_factory: pytest.TempPathFactory, prompt: str, chosen: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "tokens.jsonl"
    write_jsonl(path, [{"prompt": "." + prompt, "chosen": "." + chosen, "rejected": "!"}])
    config = validate_config({"data": {"path": str(path), "eos": "never"}})
    (pair,) = load_examples(config, tiny_tokenizer()).examples
    assert tiny_tokenizer().decode(pair.sequences[0]) == "." + prompt + "." + chosen
