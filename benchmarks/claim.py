"""What a claim is: a passage of a document, its figures, and where they come from. `benchmarks/numbers.py` checks them."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOG = Path("docs/log.md")
RATIO = 0.3  # a ratio of seconds may differ by so much, relatively, on another machine of the same kind


class Unfounded(Exception):
    """A claim's figures cannot be had: no record fits, or docs/log.md has no such line."""


@dataclass(frozen=True)
class Figure:
    """A figure that was measured, and how near a new measurement must come, relatively; None: not compared."""

    value: Any
    within: float | None = None


def exactly(value: Any) -> Figure:
    """A count or another figure that does not depend on the machine."""
    return Figure(value, 0.0)


def ratio(value: float, within: float = RATIO) -> Figure:
    """Two measurements of one process over each other."""
    return Figure(value, within)


def here(value: Any) -> Figure:
    """Seconds, bytes and what else belongs to a machine."""
    return Figure(value)


@dataclass(frozen=True)
class Recorded:
    """The last record of benchmarks/results/<file>.jsonl that has the values of `where`.

    Attributes:
        file: the benchmark's name.
        figures: from the record to the claim's figures, in order.
        where: dotted path in the record -> value, such as {"results.clock": "wall"}.
    """

    file: str
    figures: Callable[[Mapping[str, Any]], Sequence[Figure]]
    where: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What a reader finds it under."""
        return f"benchmarks/results/{self.file}.jsonl"

    def record(self, folder: Path) -> Mapping[str, Any]:
        """The record itself.

        Raises:
            Unfounded: no record fits.
        """
        path = folder / f"{self.file}.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in reversed(lines):
            record = json.loads(line)
            if all(_at(record, key) == value for key, value in self.where.items()):
                return record  # type: ignore[no-any-return]
        fits = " with " + ", ".join(f"{key} {value!r}" for key, value in self.where.items()) if self.where else ""
        raise Unfounded(f"{path.name} has no record{fits}")


@dataclass(frozen=True)
class Logged:
    """A passage of docs/log.md with `{}` where each figure stands; the figures are its own words, in order.

    Attributes:
        passage: of the log, with more or other words around the same figures.
        figures: from the numbers found to the claim's figures, where these are rounded or computed; else they are equal.
    """

    passage: str
    figures: Callable[..., Sequence[Figure]] | None = None
    name: str = str(LOG)


@dataclass(frozen=True)
class Claim:
    """A passage of a document whose figures were measured.

    Attributes:
        name: short, for messages and the table.
        passage: words of the document; a placeholder of `str.format` stands for each figure, with its rounding.
        source: where the figures come from.
        command: what measures them again.
        measured_here: whether a CPU can, in the time that a user would wait.
        document: path in the repository.
    """

    name: str
    passage: str
    source: Recorded | Logged
    command: str
    measured_here: bool = True
    document: str = "README.md"


def _at(record: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        record = record.get(part, {}) if isinstance(record, Mapping) else {}
    return record
