"""One reader of rows: every kind of file holds the same ones, and a bad one raises or is counted."""

import csv
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpo_fast.errors import DataError
from cpo_fast.rows import BadRow, read_question_rows, read_rows, write_parquet

ROWS = [{"id": "1", "question": "a, b\nc"}, {"id": "2", "question": "☕"}]


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


WRITERS: dict[str, Callable[[Path, list[dict[str, str]]], object]] = {
    "jsonl": lambda path, rows: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
    "json": lambda path, rows: path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8-sig"),
    "csv": write_csv,
    "parquet": write_parquet,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_file_has_the_same_rows_for_both_readers(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, ROWS)
    assert [row for _, row in read_question_rows(path)] == ROWS
    assert [row for _, row in read_rows(str(path))] == ROWS
    assert all(place.startswith(str(path)) for place, _ in read_rows(str(path)))


@pytest.mark.parametrize(
    ("name", "content", "place", "reason"),
    [
        ("rows.json", '[{"a": 1}, 3]', ": row 2", "expected a JSON object, got int"),
        ("rows.jsonl", '{"a": 1}\n\n{"a": \n', ":3", "the line is not valid JSON"),
        ("rows.csv", "a\n1\n2,3\n", ":3", "more fields than the header names; put text with commas into quotes"),
    ],
)
def test_a_bad_row_ends_a_file_of_questions_and_is_counted_in_training_data(
    tmp_path: Path, name: str, content: str, place: str, reason: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError) as raised:
        list(read_question_rows(path))
    assert str(raised.value).startswith(f"{path}{place}: {reason}")
    (_, good), (_, bad) = read_rows(str(path))
    assert not isinstance(good, BadRow)
    assert isinstance(bad, BadRow)
    assert bad.reason == reason
    assert bad.text


def lines_of(*rows: dict[str, str]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


OTHERS: dict[str, tuple[bytes, str]] = {
    "rows.jsonl.gz": (gzip.compress(lines_of(*ROWS)), "is compressed by gzip; unpack it"),
    "rows.jsonl": (b"PK\x03\x04" + lines_of(*ROWS), "is a zip archive or a workbook"),
    "utf16.jsonl": (lines_of(*ROWS).decode().encode("utf-16"), "is UTF-16; save it as UTF-8"),
    "utf16.csv": ("a,b\n1,2\n".encode("utf-16"), "is UTF-16; save it as UTF-8"),
    "pointer.jsonl": (b"version https://git-lfs.github.com/spec/v1\nsize 1\n", "is a pointer of Git LFS"),
    "pointer.parquet": (b"version https://git-lfs.github.com/spec/v1\nsize 1\n", "is a pointer of Git LFS"),
    "page.json": (b"\n<!DOCTYPE html><html>[]</html>", "is a web page or XML"),
    "table.json": (b"PAR1 and more", "is parquet; let its name end in .parquet"),
    "BROKEN.PARQUET": (b"PAR1 and no more", "not a readable parquet file"),
    "twice.csv": (b"question,answer, question\na,1,b\n", "two columns are called 'question'"),
    "open.csv": (b'question,answer\n"a,1\nb,2\nc,3\n', "the line is not valid CSV (unexpected end of data)"),
    "inside.csv": (b'question,answer\n"a" b,1\n', "the line is not valid CSV"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("read", [read_rows, read_question_rows])
def test_a_file_of_another_kind_is_named_once(tmp_path: Path, name: str, read: Any) -> None:
    content, words = OTHERS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(words)) as raised:
        list(read(str(tmp_path / name)))
    assert str(raised.value).startswith(f"{tmp_path / name}:")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_key_that_stands_twice_in_a_question_is_named(tmp_path: Path, name: str) -> None:
    content = '{"question": "a", "question": "b", "answer": 1}'
    (tmp_path / name).write_text(content if name.endswith("l") else f"[{content}]")
    with pytest.raises(DataError, match=rf"{name}:1: .*a key appears twice: question"):
        list(read_question_rows(tmp_path / name))
