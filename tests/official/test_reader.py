"""The raw file as it is found: without brackets, appended to, torn, interleaved; nothing bad goes unnamed."""

import json

import pytest

from cpo_fast.errors import DataError
from cpo_fast.official.reader import BadEntry, Entry, read_official
from tests.official.official_sample import MATH, MATH_QUESTION, QUESTION, SEARCH, written

FIRST, SECOND = {QUESTION: SEARCH}, {MATH_QUESTION: MATH}


def _read(tmp_path, text):
    path = tmp_path / "raw.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    return list(read_official(path))


@pytest.mark.parametrize(
    "text",
    [
        written(FIRST, SECOND),
        written(FIRST, SECOND, closing="\n]"),
        written(FIRST, opening="[\n", closing="\n]") + written(SECOND, closing="\n]"),
        json.dumps([FIRST, SECOND]),
        "\ufeff" + written(FIRST, SECOND).rstrip(",\n"),
    ],
    ids=["unterminated", "closed", "two runs", "a real array", "no last comma"],
)
def test_every_form_of_the_array_gives_the_same_searches(tmp_path, text):
    first, second = _read(tmp_path, text)
    assert (first.question, second.question) == (QUESTION, MATH_QUESTION)
    assert first.levels[0].candidates == tuple(SEARCH["0"]["candiate"])
    assert second.levels[2].values == (5.0, 2.003, 1.004)
    assert first.winners == tuple(SEARCH["correct"])


def test_a_torn_entry_is_named_by_line_and_the_next_one_is_read(tmp_path):
    whole = written(FIRST)
    torn = whole[: len(whole) // 2]
    parts = _read(tmp_path, whole + torn + "\n" + written(SECOND) + torn)
    assert [type(part) for part in parts] == [Entry, BadEntry, Entry, BadEntry]
    start = whole.count("\n") + 1
    assert parts[1].place.endswith(f"raw.json:{start}")
    assert parts[1].reason == "not complete JSON"
    assert parts[2].question == MATH_QUESTION


def _without(key):
    return {name: value for name, value in SEARCH.items() if name != key}


@pytest.mark.parametrize(
    ("search", "reason"),
    [
        ({}, "no search under the question"),
        ([1], "no search under the question"),
        (_without("0"), "no search under the question"),
        (_without("1"), "unknown or missing levels beside 2"),
        ({**SEARCH, "1": {"candiate": ["a"], "values": [1, 2]}}, "level 1 is not"),
        ({**SEARCH, "2": {"candiate": ["a"], "values": [float("nan")]}}, "level 2 is not"),
        ({**SEARCH, "2": {"candiate": ["a"], "values": ["1"]}}, "level 2 is not"),
        ({**SEARCH, "2": {"candiate": [3], "values": [1]}}, "level 2 is not"),
        ({**SEARCH, "0": {"candiate": ["\ud800"], "values": [1]}}, "surrogate"),
        ({**SEARCH, "correct": "step 1"}, "'correct' is not a list"),
        ({**SEARCH, "extra": 1}, "unknown or missing levels beside extra"),
    ],
)
def test_what_is_no_search_is_damage_with_its_reason(tmp_path, search, reason):
    bad, good = _read(tmp_path, json.dumps({"q": search}) + ",\n" + written(FIRST))
    assert isinstance(bad, BadEntry)
    assert reason in bad.reason
    assert bad.place.endswith("raw.json:1")
    assert isinstance(good, Entry)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('"a text"', "not an object"),
        ('{" ": {}}', "empty question"),
        ("{" * 5, "not complete JSON"),
        ("nul", "not comp"),
    ],
)
def test_other_json_is_damage(tmp_path, text, reason):
    (part,) = _read(tmp_path, text)
    assert part.reason.startswith(reason)


def test_depth_beyond_the_parser_is_damage_and_an_empty_file_is_empty(tmp_path):
    (part,) = _read(tmp_path, '{"q": ' + "[" * 200_000)
    assert part.reason == "not complete JSON"
    assert _read(tmp_path, "[\n\n]") == []


def test_a_file_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(DataError, match="cannot read"):
        list(read_official(tmp_path / "absent"))
    with pytest.raises(DataError, match="not UTF-8"):
        _read(tmp_path, b"\xff{}")
