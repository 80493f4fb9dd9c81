"""Question files to rows: a JSON list, JSON lines, a CSV with a header, or a data set of the Hugging Face hub.

A CSV is told by its name, a JSON list by its first character. Every row comes with the place that a message names:
file:line, or the row's number where the format has no lines. Fields are not interpreted here, except for the ones that
every family has: `row_id` and `first_value`.
"""

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cpo_fast.errors import DataError
from cpo_fast.files import read_jsonl
from cpo_fast.tasks.hub import HUB_PREFIX, read_hub

ID_FIELDS = ("id", "_id", "ID", "unique_id", "uid", "qid")


def is_hub(path: str | Path) -> bool:
    """Whether `path` names a hub data set and no file."""
    return str(path).startswith(HUB_PREFIX)


def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place for messages, row) in order.

    Raises:
        DataError: the source cannot be read, is not UTF-8, or a row is not an object; names the place.
        EnvironmentProblem: a hub id is given and `datasets` is missing.
    """
    if is_hub(path):
        for number, row in enumerate(read_hub(str(path)), start=1):
            yield f"{path}: row {number}", row
        return
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read ({error.strerror}); check task.path") from None
    if path.suffix.lower() == ".csv":
        yield from _csv_rows(path, content)
    elif content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _list_rows(path, content)
    else:
        for number, row in read_jsonl(path):
            yield f"{path}:{number}", row


def first_value(row: dict[str, Any], fields: Sequence[str]) -> Any:
    """The value of the first of `fields` that the row has and that is not null; None if there is none."""
    return next((row[field] for field in fields if row.get(field) is not None), None)


def row_id(row: dict[str, Any], text: str, place: str) -> str:
    """The id a row carries, or 16 hex digits of the SHA-256 of its text. Raises DataError for an id of another kind."""
    identity = first_value(row, ID_FIELDS)
    if identity is None or identity == "":
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    if not isinstance(identity, str | int) or isinstance(identity, bool):
        raise DataError(f"{place}: the id must be text or an integer, got {identity!r}")
    return str(identity)


def row_text(row: dict[str, Any], fields: Sequence[str], place: str) -> str:
    """The text of the first of `fields`, without surrounding whitespace. Raises DataError if missing or empty."""
    value = first_value(row, fields)
    if not isinstance(value, str):
        raise DataError(f"{place}: expected text in {' or '.join(repr(field) for field in fields)}")
    if not value.strip():
        raise DataError(f"{place}: the {fields[0].lower()} is empty; delete the row")
    return value.strip()


def _list_rows(path: Path, content: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise DataError(f"{path}: the file is not UTF-8; save it as UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise DataError(f"{path}:{line}: the file is not valid JSON ({error}); download it again") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {number}: expected a JSON object, got {type(row).__name__}")
        yield f"{path}: row {number}", row


def _csv_rows(path: Path, content: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
    except UnicodeDecodeError:
        raise DataError(f"{path}: the file is not UTF-8; save it as UTF-8") from None
    try:
        for row in reader:
            place = f"{path}:{reader.line_num}"
            if None in row:
                raise DataError(f"{place}: more fields than the header names; put text with commas into quotes")
            yield place, {key.strip(): value for key, value in row.items()}
    except csv.Error as error:  # raised before the line is counted
        raise DataError(
            f"{path}:{reader.line_num + 1}: the line is not valid CSV ({error}); mend or delete it"
        ) from None
