"""One reader of rows: every kind of file holds the same ones, and a bad one raises or is counted."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

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
