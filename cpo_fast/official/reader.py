"""The raw tree file of the CPO paper's own program (github.com/sail-sg/CPO), read as it really is.

Each search was appended as one JSON object and a comma, without an opening bracket and often without the closing one.
Several runs may stand in one file, and a killed one ends in the middle of an object:

    {"<question>": {"0": {"candiate": [<chain>, ...], "values": [<number>, ...]}, "1": {...}, ..., "correct": [<chain>]}},

A candidate is the whole chain down to its level, lower-cased, and its value the sum of its verdicts. `correct` holds the
chains that won that program's vote. No gold answer is in the file. What is not such an object comes out as a `BadEntry`
with file and line. What an entry means is for `nodes` and `importer`.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpo_fast.errors import DataError

# between objects: commas, and the brackets of an array that was begun or ended somewhere
_GAP = re.compile(r"[\s,\[\]]*")
# objects were written with one blank of indentation, so only a new entry has its brace in the first column
_ENTRY_START = re.compile(r"^\{", re.MULTILINE)


@dataclass(frozen=True)
class Level:
    """One step of a search: chains of equal depth and, beside each, its summed verdicts."""

    candidates: tuple[str, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Entry:
    """One search: where it stands (file:line), its question, its levels from the first step, and the winning chains."""

    place: str
    question: str
    levels: tuple[Level, ...]
    winners: tuple[str, ...]


@dataclass(frozen=True)
class BadEntry:
    """A part of the file that is no search: where (file:line), and why."""

    place: str
    reason: str


def read_official(path: str | Path) -> Iterator[Entry | BadEntry]:
    """Every search of the file, in order, and every part that is none.

    Raises:
        DataError: the file cannot be read or is not UTF-8.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: the file is not UTF-8; save it as UTF-8") from None
    decoder = json.JSONDecoder()
    position, line, counted = 0, 1, 0
    while (position := _end_of_gap(text, position)) < len(text):
        # newlines are counted from the entry before: from the start of the file, each entry would read it again
        line, counted = line + text.count("\n", counted, position), position
        place = f"{path}:{line}"
        try:
            value, position = decoder.raw_decode(text, position)
        except (json.JSONDecodeError, RecursionError):
            yield BadEntry(place, "not complete JSON")
            start = _ENTRY_START.search(text, position + 1)
            position = start.start() if start else len(text)
            continue
        if isinstance(value, dict):
            yield from (_entry(place, question, search) for question, search in value.items())
        else:
            yield BadEntry(place, "not an object")


def _end_of_gap(text: str, position: int) -> int:
    match = _GAP.match(text, position)
    assert match is not None  # the pattern matches the empty string
    return match.end()


def _entry(place: str, question: str, search: Any) -> Entry | BadEntry:
    if not question.strip():
        return BadEntry(place, "empty question")
    if not isinstance(search, dict) or not isinstance(search.get("0"), dict):
        return BadEntry(place, "no search under the question")
    levels: list[Level] = []
    while str(len(levels)) in search:
        level = _level(search[str(len(levels))])
        if level is None:
            return BadEntry(place, f"level {len(levels)} is not a list of texts and a list of as many finite numbers")
        levels.append(level)
    if not _is_text([question, *(chain for level in levels for chain in level.candidates)]):
        return BadEntry(place, "half a surrogate pair, which no tokenizer reads")
    unknown = set(search) - {"correct", *(str(index) for index in range(len(levels)))}
    if unknown:  # a number among them is a level after a missing one
        return BadEntry(place, f"unknown or missing levels beside {', '.join(sorted(unknown))[:80]}")
    winners = search.get("correct", [])
    if not isinstance(winners, list) or not all(isinstance(winner, str) for winner in winners):
        return BadEntry(place, "'correct' is not a list of texts")
    return Entry(place, question, tuple(levels), tuple(winners))


def _level(value: Any) -> Level | None:
    if not isinstance(value, dict):
        return None
    candidates, values = value.get("candiate"), value.get("values")  # the program spells it so
    if not isinstance(candidates, list) or not all(isinstance(candidate, str) for candidate in candidates):
        return None
    if not isinstance(values, list) or len(values) != len(candidates) or not all(map(_is_finite, values)):
        return None
    return Level(tuple(candidates), tuple(map(float, values)))


def _is_text(texts: list[str]) -> bool:
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
