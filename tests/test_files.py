"""JSON lines survive any text, any crash between lines, and name the line that does not."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpo_fast.errors import DataError
from cpo_fast.files import append_line, canonical_json, read_jsonl, write_atomic, write_jsonl


@settings(max_examples=500, deadline=None)
@given(text=st.text(st.characters(), max_size=40))
def test_text_of_any_script_survives_write_and_read(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    rows = [{"text": text}, {"text": text + "\ud800\r\n\u2028\x00"}]
    write_jsonl(path, rows)
    assert [row for _, row in read_jsonl(path)] == rows


def test_equal_values_give_equal_bytes() -> None:
    assert canonical_json({"b": 1, "a": "数"}) == canonical_json({"a": "数", "b": 1}) == '{"a":"数","b":1}'
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json({"x": float("nan")})


def test_appended_lines_and_a_torn_tail(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.jsonl"
    append_line(path, {"n": 1})
    append_line(path, {"n": 2})
    with open(path, "ab") as file:
        file.write(b'{"n": 3')
    assert [row["n"] for _, row in read_jsonl(path, drop_torn_tail=True)] == [1, 2]
    with pytest.raises(DataError, match=r"a\.jsonl:3: the line is not valid JSON"):
        list(read_jsonl(path))


def test_a_line_waits_for_the_disk_unless_it_may_be_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    append_line(tmp_path / "a.jsonl", {"n": 1})
    assert len(synced) == 1
    append_line(tmp_path / "a.jsonl", {"n": 2}, durable=False)
    assert len(synced) == 1
    assert (tmp_path / "a.jsonl").read_text() == '{"n":1}\n{"n":2}\n'


def test_byte_order_mark_and_blank_lines_are_read_over(tmp_path: Path) -> None:
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"n": 1}).encode() + b"\r\n\n" + b'{"n": 2}')
    assert list(read_jsonl(path)) == [(1, {"n": 1}), (3, {"n": 2})]


def test_deeply_nested_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "deep.jsonl"
    path.write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(DataError, match=r"deep\.jsonl:1"):
        list(read_jsonl(path))


def test_atomic_write_replaces_whole_files_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    write_atomic(path, "one")
    write_atomic(path, "two")
    assert path.read_text() == "two"
    assert [item.name for item in tmp_path.iterdir()] == ["x.txt"]
