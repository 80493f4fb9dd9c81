"""Files of rows to Python values, whatever is in them: JSON lines, a JSON array, parquet, a data set of the hub.

A row that is no JSON object stays in the list with its reason, so that it is counted like any other bad row. Lines end
at a newline byte and nothing else: U+2028, form feeds and carriage returns are text. A byte-order mark may open a file.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpo_fast.data.parquet import read_parquet
from cpo_fast.errors import DataError
from cpo_fast.tasks.hub import HUB_PREFIX, read_hub


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
