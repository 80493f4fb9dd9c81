"""Training files to items in token ids: search trees, pairs, supervised rows, or any preference set of others.

What a row may hold: `prompt`, `chosen` and `rejected` as text or as conversations, the prompt left out where both
responses begin with it, ids in `*_token_ids`; for supervised fine-tuning `prompt` and `completion`. Bad rows are counted
by reason and written to `dropped.jsonl` with file:line; above `data.max_drop` they end the run.

How many questions each data set of a mixture gives.

    n_i = w_i * scale,   scale = min(total / sum of w, min over i of size_i / w_i)

The shares are those of the weights, exactly up to rounding; without a total the mixture is as large as the shares allow.

The data sets that a configuration names, and which of their questions are used.

`data.path` is one data set, `data.mixture` several with shares of the questions. Trees become rows by the rule of
section `pairs`; any other file holds its rows already. `pairs.num_questions` draws questions by the seed: among the
trees with a winning path, whatever the rule, so that every rule and supervised fine-tuning get the same ones.
"""

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from cpo_fast.config import Config, PairsConfig
from cpo_fast.data.batches import weigh_pairs
from cpo_fast.data.examples import PreferencePair, RowParser, SftExample, prompt_text, with_extracted_prompt
from cpo_fast.data.pair_files import TreeFileReader, write_dropped
from cpo_fast.data.pair_rules import draw
from cpo_fast.errors import ConfigError, DataError
from cpo_fast.files import canonical_json
from cpo_fast.rows import HUB_PREFIX, BadRow, RawRow, read_rows


def apportion(weights: Sequence[float], sizes: Sequence[int], total: int | None) -> list[int]:
    """Questions to take from each data set.

    Args:
        weights: relative shares, positive.
        sizes: questions that each data set has.
        total: questions in all, or None for as many as the shares allow. Where a data set is too small for its share,
            all give fewer, so that the shares hold.
    """
    largest = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    wanted = math.inf if total is None else total / sum(weights)
    if total is None or wanted > largest:
        # the data set that sets the limit gives everything; floor would lose a question to rounding
        return [min(size, math.floor(weight * largest + 1e-9)) for size, weight in zip(sizes, weights, strict=True)]
    exact = [weight * wanted for weight in weights]
    counts = [math.floor(value + 1e-9) for value in exact]
    # largest remainders get the rest; equal remainders in the order of the data sets
    order = sorted(range(len(exact)), key=lambda place: (counts[place] - exact[place], place))
    for place in order[: total - sum(counts)]:
        counts[place] += 1
    return counts


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


logger = logging.getLogger(__name__)

Item = TypeVar("Item", PreferencePair, SftExample)

MAX_REASONS_SHOWN = 5  # in a message; dropped.jsonl has them all


@dataclass
class LoadReport:
    """What was dropped and why, and how many prompts merged a token with a response."""

    dropped: list[dict[str, Any]] = field(default_factory=list)
    num_merged_boundaries: int = 0

    @property
    def dropped_by_reason(self) -> dict[str, int]:
        """Counts of dropped rows, most frequent first."""
        return dict(Counter(row["reason"] for row in self.dropped).most_common())


@dataclass
class LoadedPairs(LoadReport):
    """Pairs in file order, weighted, and what was dropped."""

    pairs: list[PreferencePair] = field(default_factory=list)


@dataclass
class LoadedSft(LoadReport):
    """Supervised examples in file order, and what was dropped."""

    examples: list[SftExample] = field(default_factory=list)


def load_pairs(config: Config, tokenizer: Any, dropped_path: str | Path | None = None) -> LoadedPairs:
    """Read the configured data into weighted pairs.

    Args:
        config: sections data and pairs, and the seed.
        tokenizer: a Hugging Face tokenizer; only text is tokenised, but its eos_token_id is used for all rows.
        dropped_path: where dropped rows are written with file:line and reason; removed when nothing was dropped.

    Raises:
        ConfigError: no data is configured. DataError: a file is unreadable or empty, no pair is left, or more than
            `data.max_drop` of the rows are bad. EnvironmentProblem: an optional library is missing.
    """
    parser = RowParser(config.data, tokenizer)
    report = LoadedPairs()
    _load(config, tokenizer, "pairs", parser.pair, _pair_key, report.pairs, report, dropped_path)
    report.pairs = weigh_pairs(report.pairs, config.pairs.weight)
    return report


def load_sft(config: Config, tokenizer: Any, dropped_path: str | Path | None = None) -> LoadedSft:
    """Read the configured data into supervised examples; trees give their winning paths. See `load_pairs`."""
    parser = RowParser(config.data, tokenizer)

    def parse(row: dict[str, Any], source: str, group: str, _: bool) -> tuple[SftExample, bool]:
        return parser.example(row, source, group)

    report = LoadedSft()
    _load(config, tokenizer, "sft", parse, _example_key, report.examples, report, dropped_path)
    return report


def _load(
    config: Config,
    tokenizer: Any,
    kind: Kind,
    parse: Callable[[dict[str, Any], str, str, bool], tuple[Item, bool]],
    key_of: Callable[[Item], tuple[tuple[int, ...], ...]],
    items: list[Item],
    report: LoadReport,
    dropped_path: str | Path | None,
) -> None:
    if config.data.eos != "never" and tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-sequence token; set data.eos=never")
    seen: dict[tuple[tuple[int, ...], ...], str] = {}
    for source, questions in open_sources(config, kind):
        for question, row in source.rows(questions):
            try:
                if row.value is None:
                    raise row.bad or BadRow("unreadable")
                group = group_name(question, row.value, source.path, bool(config.data.mixture))
                item, merged = parse(row.value, row.source, group, source.implicit_prompt)
                key = key_of(item)
                if key in seen:
                    raise BadRow("duplicate", f"of {seen[key]}")
                seen[key] = row.source
            except RecursionError:
                report.dropped.append(_record(row.source, BadRow("the JSON is nested too deeply"), ""))
            except BadRow as bad:
                report.dropped.append(_record(row.source, bad, row.text if row.value is None else row.value))
            else:
                items.append(item)
                report.num_merged_boundaries += merged
    _judge(config, kind, len(items), report, dropped_path)


def _record(source: str, bad: BadRow, content: Any) -> dict[str, Any]:
    """One line of `dropped.jsonl`; a row that canonical JSON cannot hold (NaN, a date) is kept as text."""
    try:
        try:
            canonical_json(content)
        except (TypeError, ValueError):
            content = json.dumps(content, default=str)
    except RecursionError:
        content = None  # the file and the line are named
    return {"source": source, "reason": bad.reason, "detail": bad.detail, "row": content}


def _judge(config: Config, kind: Kind, num_items: int, report: LoadReport, dropped_path: str | Path | None) -> None:
    label = config.data.path or "data.mixture"
    dropped, total = report.dropped, num_items + len(report.dropped)
    if dropped_path is not None:
        write_dropped(dropped_path, dropped)
    if total == 0:
        if kind == "sft":
            what = "example: no tree has a winning path"
        else:
            what = f"pair: by pairs.rule={config.pairs.rule} no winning path of its trees has a loser"
        raise DataError(f"{label}: no {what}; look at `cpo-fast pairs`, or collect more questions")
    if not num_items or len(dropped) > config.data.max_drop * total:
        raise DataError(
            f"{label}: {len(dropped)} of {total} rows are bad, more than data.max_drop={config.data.max_drop} allows: "
            f"{_reasons(report)}; mend the rows or raise the limit"
        )
    if dropped:
        logger.warning("%s: dropped %d of %d rows: %s", label, len(dropped), total, _reasons(report))
    if report.num_merged_boundaries:
        logger.warning(
            "%s: in %d rows the prompt's last token merges with the response and is trained with it",
            label,
            report.num_merged_boundaries,
        )


def _reasons(report: LoadReport) -> str:
    """`3 like rows.jsonl:7: missing key 'chosen'`, the most frequent first."""
    parts = []
    for reason, count in list(report.dropped_by_reason.items())[:MAX_REASONS_SHOWN]:
        first = next(row for row in report.dropped if row["reason"] == reason)
        detail = f" ({first['detail']})" if first["detail"] else ""
        parts.append(f"{count} like {first['source']}: {reason}{detail}")
    more = len(report.dropped_by_reason) - len(parts)
    return "; ".join(parts) + (f"; and {more} other reasons" if more else "")


def _pair_key(pair: PreferencePair) -> tuple[tuple[int, ...], ...]:
    return pair.prompt_ids, pair.chosen_ids, pair.rejected_ids


def _example_key(example: SftExample) -> tuple[tuple[int, ...], ...]:
    return example.prompt_ids, example.completion_ids
