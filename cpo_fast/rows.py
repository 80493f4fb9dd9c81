"""Files of rows to Python values, whatever is in them: JSON lines, a JSON array, parquet, a data set of the hub.

A row that is no JSON object stays in the list with its reason, so that it is counted like any other bad row. Lines end
at a newline byte and nothing else: U+2028, form feeds and carriage returns are text. A byte-order mark may open a file.

Rows to parquet and back. pyarrow is optional and imported when a parquet file is met.

Rows of a data set on the Hugging Face hub: `hub:org/name[:config][:split]`, through the `datasets` library.

One part after the id is a split if it is called train, validation, dev or test (a slice such as test[:100] may follow),
else a configuration. Without a split, a data set that has several is refused: which questions a run asks is never
guessed. Class labels become their names. Code that comes with a data set is never run. The library is imported when it
is needed.

Question files to rows: a JSON list, JSON lines, a CSV with a header, or a data set of the Hugging Face hub.

A CSV is told by its name, a JSON list by its first character. Every row comes with the place that a message names:
file:line, or the row's number where the format has no lines. Fields are not interpreted here, except for the ones that
every family has: `row_id` and `first_value`.
"""

import csv
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpo_fast.errors import DataError, EnvironmentProblem
from cpo_fast.files import read_jsonl


def write_parquet(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows with equal keys, atomically; equal rows give equal bytes with the same version of pyarrow.

    Raises:
        EnvironmentProblem: pyarrow is not installed. DataError: a text holds what UTF-8 cannot.
    """
    pyarrow = _pyarrow(path)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        table = pyarrow.Table.from_pylist(list(rows))
    except UnicodeEncodeError as error:
        raise DataError(f"{path}: a text is not valid Unicode ({error}); write .jsonl, which can escape it") from None
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(aside, "wb") as file:
        pyarrow.parquet.write_table(table, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def read_parquet(path: str | Path) -> list[dict[str, Any]]:
    """Every row, in file order.

    Raises:
        EnvironmentProblem: pyarrow is not installed. DataError: the file is missing or no parquet.
    """
    pyarrow = _pyarrow(path)
    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(str(path)).to_pylist()
    except OSError as error:
        raise DataError(f"{path}: cannot read ({error.strerror or error}); check the path") from None
    except (pyarrow.ArrowInvalid, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error}); make it again") from None
    return rows


def _pyarrow(path: str | Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise EnvironmentProblem(f'{path}: parquet needs pyarrow; pip install "cpo-fast[data]"') from None
    return pyarrow


HUB_PREFIX = "hub:"
_SPLIT = re.compile(r"(train|validation|dev|test)\w*(\[.*\])?")


def parse_hub_path(path: str) -> tuple[str, str | None, str | None]:
    """(id, configuration, split) of `hub:org/name[:config][:split]`. Raises DataError for anything else."""
    # a colon inside the brackets of a slice, test[:100], separates nothing
    parts = re.split(r":(?![^\[]*\])", path.removeprefix(HUB_PREFIX))
    if not path.startswith(HUB_PREFIX) or len(parts) > 3 or not all(parts):
        raise DataError(f"{path}: not a hub id; write hub:org/name, hub:org/name:split or hub:org/name:config:split")
    if len(parts) == 2 and _SPLIT.fullmatch(parts[1]):
        return parts[0], None, parts[1]
    name, config, split = [*parts, None, None][:3]
    assert name is not None
    return name, config, split


def read_hub(path: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a hub data set in order.

    Args:
        path: `hub:org/name[:config][:split]`.

    Raises:
        DataError: not such a path, or the data set, configuration or split cannot be read (also: no network and no
            cached copy), or there are several splits and none is named.
        EnvironmentProblem: `datasets` is not installed.
    """
    name, config, split = parse_hub_path(path)
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise EnvironmentProblem(
            f"{path} needs the library datasets ({error}); install it with: pip install 'cpo-fast[data]'"
        ) from None
    try:
        table = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError, KeyError, DatasetsError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0][:240].rstrip(".")
        raise DataError(
            f"{path}: cannot be read from the Hugging Face hub ({first_line}); check id, configuration and split, "
            "download it while online, or give a file"
        ) from error
    if isinstance(table, dict):
        if len(table) != 1:
            named = f"{HUB_PREFIX}{name}" + (f":{config}" if config else "")
            raise DataError(f"{path}: choose a split, {' or '.join(f'{named}:{key}' for key in table)}")
        table = next(iter(table.values()))
    names = {key: feature.names for key, feature in table.features.items() if hasattr(feature, "names")}
    for row in table:
        yield {key: _label(value, names[key]) if key in names else value for key, value in row.items()}


def _label(value: int | None, names: list[str]) -> str | None:
    """The name of a class label, which is stored as an integer; -1 marks a hidden one."""
    return None if value is None or value < 0 else names[value]


class BadRow(Exception):
    """A row that cannot be trained on.

    Attributes:
        reason: what it is counted under; one of a few dozen sentences, without this row's particulars.
        detail: the particulars.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        """Take the reason and the particulars."""
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class RawRow:
    """One row of a file: its place, and its value or why it has none.

    Attributes:
        source: file:line, or file:number of the row for formats without lines.
        value: the object, or None.
        bad: the reason when there is no value.
        text: what stands there instead, for rows without a value; undecodable bytes as backslash escapes.
    """

    source: str
    value: dict[str, Any] | None
    bad: BadRow | None = None
    text: str = ""


def read_rows(path: str) -> list[RawRow]:
    """Every row of a file that is not blank, in order.

    Args:
        path: `*.parquet`, `hub:org/name[:config][:split]`, a JSON array, or JSON lines (always for `*.jsonl`).

    Raises:
        DataError: the file cannot be read, or has no rows. EnvironmentProblem: an optional library is missing.
    """
    if path.startswith(HUB_PREFIX):
        rows = _plain(path, read_hub(path))
    elif path.endswith(".parquet"):
        rows = _plain(path, read_parquet(path))
    else:
        rows = list(_text_rows(path))
    if not rows:
        raise DataError(f"{path}: the file has no rows; check data.path")
    return rows


def _plain(path: str, values: Iterable[dict[str, Any]]) -> list[RawRow]:
    return [RawRow(f"{path}:{number}", value) for number, value in enumerate(values, start=1)]


def _text_rows(path: str) -> Iterator[RawRow]:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read ({error.strerror}); check the path") from None
    if not path.endswith(".jsonl") and content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _array_rows(path, content)
        return
    for number, raw in enumerate(content.split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            yield _object(f"{path}:{number}", _parse(raw, first=number == 1))
        except BadRow as bad:
            yield RawRow(f"{path}:{number}", None, bad, raw.decode("utf-8", "backslashreplace"))


def _array_rows(path: str, content: bytes) -> Iterator[RawRow]:
    try:
        values = _parse(content, first=True)
    except BadRow as bad:
        raise DataError(f"{path}: not a readable JSON array ({bad.reason}: {bad.detail}); mend the file") from None
    yield from (_object(f"{path}: item {number}", value) for number, value in enumerate(values, start=1))


def _object(source: str, value: Any) -> RawRow:
    if isinstance(value, dict):
        return RawRow(source, value)
    bad = BadRow(f"expected a JSON object, got {type(value).__name__}")
    return RawRow(source, None, bad, json.dumps(value))


def _parse(raw: bytes, first: bool) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig" if first else "utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise BadRow("the line is not UTF-8", f"byte {error.start + 1}") from None
    except RecursionError:
        raise BadRow("the JSON is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, and integers of thousands of digits
        raise BadRow("the line is not valid JSON", str(error)) from None


def _unique(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key that stands twice has two values, and neither is the right one."""
    values = dict(members)
    if len(values) != len(members):
        repeated = [key for key, count in Counter(key for key, _ in members).items() if count > 1]
        raise BadRow("a key appears twice", ", ".join(repeated))
    return values


ID_FIELDS = ("id", "_id", "ID", "unique_id", "uid", "qid")


def is_hub(path: str | Path) -> bool:
    """Whether `path` names a hub data set and no file."""
    return str(path).startswith(HUB_PREFIX)


def read_question_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
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
