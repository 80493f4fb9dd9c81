"""The data sets that a configuration names, and which of their questions are used.

`data.path` is one data set, `data.mixture` several with shares of the questions. Trees become rows by the rule of
section `pairs`; any other file holds its rows already. `pairs.num_questions` draws questions by the seed: among the
trees with a winning path, whatever the rule, so that every rule and supervised fine-tuning get the same ones.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import Any, Literal, Protocol

from cpo_fast.config import Config, PairsConfig
from cpo_fast.data.draw import draw
from cpo_fast.data.encode import prompt_text, with_extracted_prompt
from cpo_fast.data.mixture import apportion
from cpo_fast.data.rows import BadRow, RawRow, read_rows
from cpo_fast.data.tree_rows import TreeFileReader
from cpo_fast.errors import ConfigError
from cpo_fast.tasks.hub import HUB_PREFIX

logger = logging.getLogger(__name__)

Kind = Literal["pairs", "sft"]
NamedRow = tuple[str, RawRow]  # (question, row); the question of a bad row is ""


class Source(Protocol):
    """One data set."""

    path: str
    questions: list[str]  # distinct, in file order

    def rows(self, questions: AbstractSet[str]) -> Iterator[NamedRow]:
        """The rows of these questions, and every row that names none because it is bad."""


class RowFile:
    """A file whose rows can be trained on as they are.

    Attributes:
        implicit_prompt: no row has a prompt: it is the common beginning of chosen and rejected.
    """

    def __init__(self, path: str, rows: list[RawRow]) -> None:
        """Name the question of every row."""
        self.path = path
        values = [row.value for row in rows if row.value is not None]
        self.implicit_prompt = not any("prompt" in value or "prompt_token_ids" in value for value in values)
        self._named = [(_question(row.value, self.implicit_prompt), row) for row in rows]
        self.questions = [name for name in dict.fromkeys(name for name, _ in self._named) if name]

    def rows(self, questions: AbstractSet[str]) -> Iterator[NamedRow]:
        """See `Source`."""
        return ((name, row) for name, row in self._named if not name or name in questions)


class TreeFile:
    """Search trees, turned into rows of one kind."""

    implicit_prompt = False

    def __init__(self, path: str, settings: PairsConfig, seed: int, kind: Kind) -> None:
        """Read the trees. Raises DataError with file:line."""
        self.path, self.settings, self.seed, self.kind = path, settings, seed, kind
        self.reader = TreeFileReader(path)
        self.questions = self.reader.questions

    def rows(self, questions: AbstractSet[str]) -> Iterator[NamedRow]:
        """See `Source`."""
        if self.kind == "sft":
            made = self.reader.sft_rows(questions)
        else:
            made = self.reader.pair_rows(self.settings, self.seed, questions)
        reasons = Counter(record["reason"] for record in made.unused) + Counter(made.trees_without.values())
        if reasons:
            logger.info(
                "%s: not used: %s", self.path, "; ".join(f"{n} {reason}" for reason, n in reasons.most_common())
            )
        return ((row["tree"], RawRow(f"{self.path}:{row['tree']}", row)) for row in made.rows)


def open_source(path: str, config: Config, kind: Kind) -> RowFile | TreeFile:
    """Read one data set; it holds trees if its first readable row has nodes.

    Raises:
        DataError: the file cannot be read, is empty, or is a damaged file of trees.
    """
    rows = read_rows(path)
    first = next((row.value for row in rows if row.value is not None), {})
    if "nodes" in first and not path.startswith(HUB_PREFIX):
        return TreeFile(path, config.pairs, config.seed, kind)
    shaping = {"rule": config.pairs.rule, "rejected_fraction": config.pairs.rejected_fraction}
    defaults = PairsConfig()
    ignored = [f"pairs.{name}={value}" for name, value in shaping.items() if value != getattr(defaults, name)]
    if ignored:
        logger.warning(
            "%s holds no trees but rows, which are used as they are: no effect of %s", path, ", ".join(ignored)
        )
    return RowFile(path, rows)


def open_sources(config: Config, kind: Kind) -> list[tuple[RowFile | TreeFile, set[str]]]:
    """Every data set of the configuration with the questions to use of it.

    Raises:
        ConfigError: no data is configured, or a share leaves a data set without a question.
        DataError: a file is not usable.
    """
    mixture = config.data.mixture
    if not mixture and not config.data.path:
        raise ConfigError("data.path is empty; set it to trees, pairs or a preference set")
    paths = [item.path for item in mixture] or [config.data.path]
    sources = [open_source(path, config, kind) for path in paths]
    total = config.pairs.num_questions
    if not mixture and total is None:
        return [(sources[0], set(sources[0].questions))]
    sizes = [len(source.questions) for source in sources]
    counts = apportion([item.weight for item in mixture] or [1.0], sizes, total)
    left_out = [(size, source.path) for source, size, count in zip(sources, sizes, counts, strict=True) if count == 0]
    if mixture and left_out:
        size, path = min(left_out)  # an empty data set leaves none of any
        raise ConfigError(
            f"data.mixture leaves no question of {path} (it has {size}); change the weights or raise pairs.num_questions"
        )
    logger.info("questions: %s", ", ".join(f"{n} of {source.path}" for source, n in zip(sources, counts, strict=True)))
    if total is not None and sum(counts) < total:
        logger.warning("pairs.num_questions=%d, but the data gives only %d", total, sum(counts))
    return [
        (source, draw(source.questions, count, config.seed, "questions"))
        for source, count in zip(sources, counts, strict=True)
    ]


def group_name(question: str, row: dict[str, Any], path: str, in_mixture: bool) -> str:
    """The question across data sets: ids of trees are unique in their file only, hashes of prompts everywhere."""
    if not in_mixture or "tree" not in row:
        return question
    return f"{row.get('task') or path}:{question}"


def _question(row: dict[str, Any] | None, implicit_prompt: bool) -> str:
    """The tree that a row names, else a hash of its prompt; "" for a row too bad to tell."""
    if row is None:
        return ""
    if isinstance(row.get("tree"), str | int) and row["tree"] != "":
        return str(row["tree"])
    try:
        if "prompt_token_ids" in row:
            content = repr(row["prompt_token_ids"])
        else:
            content = prompt_text(with_extracted_prompt(row) if implicit_prompt else row)
    except (BadRow, KeyError, TypeError, RecursionError):
        return ""
    return hashlib.sha256(content.encode()).hexdigest()[:16]
