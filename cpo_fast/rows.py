"""Who reads my file: every file of rows to Python values, whatever its kind.

    hub:org/name[:config][:split]   a data set of the Hugging Face hub, through the library `datasets`
    *.parquet                       through pyarrow
    *.csv                           with a header
    a JSON list                     told by its first character
    JSON lines                      everything else; training data may also be objects over several lines each

Two readers share all of it. `read_question_rows` is strict: a file of questions is mended, so its first bad row raises.
`read_rows` counts: in training data a bad row keeps its place and has a reason, so that it is counted with the others.
Both give every row the place that a message names: file:line, or the row's number where the format has no lines.

pyarrow and datasets are optional, and imported when such a file is met.
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cpo_fast.errors import DataError, EnvironmentProblem, first_line
from cpo_fast.files import read_jsonl, replacing, short_hash, unreadable

Row = dict[str, Any]

HUB_PREFIX = "hub:"
ID_FIELDS = ("id", "_id", "ID", "unique_id", "uid", "qid")
_VALUE = re.compile(r"\S")  # where the next JSON value of a text begins
_SPLIT = re.compile(r"(train|validation|dev|test)\w*(\[.*\])?")


class BadRow(Exception):
    """A row that cannot be used.

    Attributes:
        reason: what it is counted under, one of a few dozen sentences without this row's particulars.
        detail: the particulars.
        text: what stands in the file where there is no object, undecodable bytes as backslash escapes.
    """

    def __init__(self, reason: str, detail: str = "", text: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail, self.text = reason, detail, text


def read_question_rows(path: str | Path) -> Iterator[tuple[str, Row]]:
    """Yield (place, row) in order.

    Raises:
        DataError: the source cannot be read, is not UTF-8, or a row is not an object. It names the place.
        EnvironmentProblem: an optional library is missing.
    """
    for place, row in _read(str(path), strict=True):
        if isinstance(row, BadRow):
            raise DataError(f"{place}: {row.reason}")
        yield place, row


def read_rows(path: str) -> Iterator[tuple[str, Row | BadRow]]:
    """Yield (place, row or what is wrong with it) in order.

    Raises:
        DataError: the file cannot be read as a whole. EnvironmentProblem: an optional library is missing.
    """
    return _read(path, strict=False)


def is_hub(path: str | Path) -> bool:
    """Whether `path` names a hub data set and no file."""
    return str(path).startswith(HUB_PREFIX)


def _read(path: str, strict: bool) -> Iterator[tuple[str, Row | BadRow]]:
    if is_hub(path) or path.lower().endswith(".parquet"):
        rows = read_hub(path) if is_hub(path) else iter(read_parquet(path))
        yield from ((f"{path}: row {n}" if strict else f"{path}:{n}", row) for n, row in enumerate(rows, start=1))
        return
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None
    _check_content(path, content)
    opens_list = content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if path.lower().endswith(".csv"):
        yield from _csv_rows(path, content)
    # in training data a .jsonl is lines, unless its first line is no value and the whole file is
    elif opens_list and (strict or not path.endswith(".jsonl")):
        yield from _list_rows(path, content, strict)
    elif strict:
        _refuse_objects_over_lines(path, content)
        yield from ((f"{path}:{number}", row) for number, row in read_jsonl(path, members=_unique_or_error))
    else:
        yield from _line_rows(path, content)


def _line_rows(path: str, content: bytes) -> Iterator[tuple[str, Row | BadRow]]:
    values = _values_over_lines(content)
    if values is not None:
        listed = len(values) == 1 and isinstance(values[0][1], list)
        items = list(enumerate(values[0][1], start=1)) if listed else values
        for number, value in items:
            yield f"{path}: item {number}" if listed else f"{path}:{number}", _object(value)
        return
    # a line ends at a newline byte and nothing else: U+2028, form feeds and carriage returns are text
    for number, raw in enumerate(content.split(b"\n"), start=1):
        if raw.strip():
            try:
                yield f"{path}:{number}", _object(_parse(raw, first=number == 1))
            except BadRow as bad:
                bad.text = raw.decode("utf-8", "backslashreplace")
                yield f"{path}:{number}", bad


def _refuse_objects_over_lines(path: str, content: bytes) -> None:
    """Raise DataError for JSON objects over several lines each, of which only the first line would be blamed."""
    values = _values_over_lines(content)
    if values:
        line, first = values[0]
        wrapped = _rows_under(first) if len(values) == 1 else ""
        remedy = wrapped or "write each object on a line of its own, or all of them as one list"
        raise DataError(f"{path}:{line}: a JSON object over several lines; {remedy}")


def _values_over_lines(content: bytes) -> list[tuple[int, Any]] | None:
    """(line it begins on, value) of every JSON value of a pretty-printed file, or None for anything else."""
    first = next((line for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()), b"")
    if not first.lstrip().startswith((b"{", b"[")):
        return None
    try:
        json.JSONDecoder().decode(first.decode("utf-8", "replace"))
        return None  # the first line is a value of its own: the file is lines
    except (ValueError, RecursionError):
        pass
    decoder, values, line, place = json.JSONDecoder(object_pairs_hook=_unique), [], 1, 0
    try:
        text = content.decode("utf-8-sig")
        while begin := _VALUE.search(text, place):
            line += text.count("\n", place, begin.start())
            value, end = decoder.raw_decode(text, begin.start())
            values.append((line, value))
            line, place = line + text.count("\n", begin.start(), end), end
    except (BadRow, ValueError, RecursionError):
        return None
    # a broken line may be followed by the values that it would have held
    return values if all(isinstance(value, dict | list) for _, value in values) else None


def _list_rows(path: str, content: bytes, strict: bool) -> Iterator[tuple[str, Row | BadRow]]:
    try:
        text = content.decode("utf-8-sig") if strict else ""
        values = json.loads(text, object_pairs_hook=_unique_or_error) if strict else _parse(content, first=True)
    except BadRow as bad:
        raise DataError(f"{path}: not a readable JSON array ({bad.reason}: {bad.detail}); mend the file") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: the file is not UTF-8; save it as UTF-8") from None
    except (ValueError, RecursionError) as error:  # also an integer of thousands of digits
        line = getattr(error, "lineno", 1)
        raise DataError(f"{path}:{line}: the file is not valid JSON ({error}); download it again") from None
    for number, value in enumerate(values, start=1):  # json tells no lines of the members
        yield f"{path}: {'row' if strict else 'item'} {number}", _object(value)


def _csv_rows(path: str, content: bytes) -> Iterator[tuple[str, Row | BadRow]]:
    try:
        # newline="": a field in quotes keeps the line ends that it holds
        # strict: a quotation mark that is not closed would take the rows below it in
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
    except UnicodeDecodeError:
        raise DataError(f"{path}: the file is not UTF-8; save it as UTF-8") from None
    try:
        names = [name.strip() for name in reader.fieldnames or ()]
        if twice := [name for name in names if names.count(name) > 1]:
            raise DataError(f"{path}:1: two columns are called '{twice[0]}'; rename one of them")
        for row in reader:
            if None in row:  # DictReader's key for the fields that have no name
                bad = BadRow("more fields than the header names; put text with commas into quotes", text=str(row))
                yield f"{path}:{reader.line_num}", bad
            else:
                yield f"{path}:{reader.line_num}", {key.strip(): value for key, value in row.items()}
    except csv.Error as error:  # raised before the line is counted
        raise DataError(
            f"{path}:{reader.line_num + 1}: the line is not valid CSV ({error}); mend or delete it"
        ) from None


def _object(value: Any) -> Row | BadRow:
    if isinstance(value, dict):
        return value
    return BadRow(f"expected a JSON object, got {type(value).__name__}", text=json.dumps(value))


def _parse(raw: bytes, first: bool) -> Any:
    """The value of one line or file. `first` allows a byte-order mark. Raises BadRow."""
    try:
        # an integer too long for Python raises a plain ValueError, a key that stands twice BadRow
        return json.loads(raw.decode("utf-8-sig" if first else "utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise BadRow("the line is not UTF-8", f"byte {error.start + 1}") from None
    except RecursionError:
        raise BadRow("the JSON is nested too deeply") from None
    except ValueError as error:
        raise BadRow("the line is not valid JSON", str(error)) from None


def _unique(members: list[tuple[str, Any]]) -> Row:
    values = dict(members)
    if len(values) != len(members):  # of two values under one key neither is the right one
        repeated = [key for key, count in Counter(key for key, _ in members).items() if count > 1]
        raise BadRow("a key appears twice", ", ".join(repeated))
    return values


def _unique_or_error(members: list[tuple[str, Any]]) -> Row:
    try:
        return _unique(members)
    except BadRow as bad:
        raise ValueError(f"{bad.reason}: {bad.detail}") from None


# how files begin that hold no rows as they are; what they are, and what to do
_OTHER_FILES = (
    (b"\x1f\x8b", "is compressed by gzip; unpack it"),
    (b"PK\x03\x04", "is a zip archive or a workbook; unpack it, or save the sheet as CSV"),
    (b"BZh", "is compressed by bzip2; unpack it"),
    (b"\xfd7zXZ", "is compressed by xz; unpack it"),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd; unpack it"),
    (b"PAR1", "is parquet; let its name end in .parquet"),
    (b"\xff\xfe", "is UTF-16; save it as UTF-8"),
    (b"\xfe\xff", "is UTF-16; save it as UTF-8"),
    (b"version https://git-lfs", "is a pointer of Git LFS; fetch the file itself by git lfs pull"),
    (b"<", "is a web page or XML; download the file itself"),
)


def _check_content(path: str, content: bytes) -> None:
    """Raise DataError for a file of another kind, which each of its lines would be blamed for."""
    for beginning, remedy in _OTHER_FILES:
        if content[:1000].lstrip().startswith(beginning):
            raise DataError(f"{path}: the file {remedy}")


def read_parquet(path: str | Path) -> list[Row]:
    """Every row, in file order.

    Raises:
        EnvironmentProblem: pyarrow is not installed. DataError: the file is missing or no parquet.
    """
    pyarrow = _pyarrow(path)
    try:
        rows: list[Row] = pyarrow.parquet.read_table(str(path)).to_pylist()
    except OSError as error:
        raise unreadable(path, error) from None
    except (pyarrow.ArrowInvalid, UnicodeDecodeError) as error:
        with open(path, "rb") as file:
            begin = file.read(64)
        if not begin.startswith(b"PAR1"):
            _check_content(str(path), begin)
        raise DataError(f"{path}: not a readable parquet file ({error}); make it again") from None
    return rows


def write_parquet(path: str | Path, rows: Sequence[Row]) -> None:
    """Write rows with equal keys, atomically. Equal rows give equal bytes with the same version of pyarrow.

    Raises:
        EnvironmentProblem: pyarrow is not installed. DataError: a text holds what UTF-8 cannot.
    """
    pyarrow = _pyarrow(path)
    try:
        table = pyarrow.Table.from_pylist(list(rows))
    except UnicodeEncodeError as error:
        raise DataError(f"{path}: a text is not valid Unicode ({error}); write .jsonl, which can escape it") from None
    with replacing(path) as file:
        pyarrow.parquet.write_table(table, file)


def _pyarrow(path: str | Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise EnvironmentProblem(f'{path}: parquet needs pyarrow; pip install "cpo-fast[data]"') from None
    return pyarrow


def parse_hub_path(path: str) -> tuple[str, str | None, str | None]:
    """(id, configuration, split) of `hub:org/name[:config][:split]`. Raises DataError for anything else.

    One part after the id is a split if it is called train, validation, dev or test (a slice such as test[:100] may
    follow), else a configuration.
    """
    # a colon inside the brackets of a slice, test[:100], separates nothing
    parts = re.split(r":(?![^\[]*\])", path.removeprefix(HUB_PREFIX))
    if not path.startswith(HUB_PREFIX) or len(parts) > 3 or not all(parts):
        raise DataError(f"{path}: not a hub id; write hub:org/name, hub:org/name:split or hub:org/name:config:split")
    if len(parts) == 2 and _SPLIT.fullmatch(parts[1]):
        return parts[0], None, parts[1]
    name, config, split = [*parts, None, None][:3]
    assert name is not None
    return name, config, split


def read_hub(path: str) -> Iterator[Row]:
    """Yield the rows of a hub data set in order, class labels by their names. Code that comes with a set is never run.

    Raises:
        DataError: no hub path, or the data set, configuration or split cannot be read (also: no network and no cached
            copy), or there are several splits and none is named.
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
        raise DataError(
            f"{path}: cannot be read from the Hugging Face hub ({first_line(error)}); check id, configuration and split, "
            "download it while online, or give a file"
        ) from error
    if isinstance(table, dict):
        if len(table) != 1:  # which data is used is never guessed
            named = f"{HUB_PREFIX}{name}" + (f":{config}" if config else "")
            raise DataError(f"{path}: choose a split, {' or '.join(f'{named}:{key}' for key in table)}")
        table = next(iter(table.values()))
    names = {key: feature.names for key, feature in table.features.items() if hasattr(feature, "names")}
    for row in table:
        yield {key: _label(value, names[key]) if key in names else value for key, value in row.items()}


def _label(value: int | None, names: list[str]) -> str | None:
    return None if value is None or value < 0 else names[value]  # -1 marks a hidden label, as in test sets


def first_value(row: Row, fields: Sequence[str]) -> Any:
    """The value of the first of `fields` that the row has and that is not null, or None."""
    return next((row[field] for field in fields if row.get(field) is not None), None)


def columns_hint(row: Row, key: str) -> str:
    """What a row has where a column is missing, and what to do. `key` is the setting that names the column."""
    found = ", ".join(f"'{column}'" for column in list(row)[:8])
    return _rows_under(row) or (f"the row has {found}; name the column by {key}" if row else "the row is empty")


def _rows_under(row: Row) -> str:
    """What to do about an object that holds nothing but lists of rows, or ""."""
    is_wrapper = all(isinstance(value, list) and value and isinstance(value[0], dict) for value in row.values())
    return f"the rows stand under '{next(iter(row))}': save that list alone" if row and is_wrapper else ""


def row_id(row: Row, text: str, place: str) -> str:
    """The id a row carries, or 16 hex digits of the SHA-256 of its text. Raises DataError for an id of another kind."""
    identity = first_value(row, ID_FIELDS)
    if identity is None or identity == "":
        return short_hash(text)
    if not isinstance(identity, str | int) or isinstance(identity, bool):
        raise DataError(f"{place}: the id must be text or an integer, got {identity!r}")
    return str(identity)


def row_text(row: Row, fields: Sequence[str], place: str, key: str) -> str:
    """The text of the first of `fields`, without surrounding whitespace. `key` is the setting that names them.

    Raises:
        DataError: it is missing, no text, or empty.
    """
    value, names = first_value(row, fields), " or ".join(map(repr, fields))
    if value is None:
        raise DataError(f"{place}: expected text in {names} ({columns_hint(row, key)})")
    if not isinstance(value, str):
        raise DataError(f"{place}: expected text in {names}, got {type(value).__name__}; a row is one question")
    if not value.strip():
        raise DataError(f"{place}: the {fields[0].lower()} is empty; delete the row")
    return value.strip()
