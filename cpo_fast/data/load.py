"""Training files to examples: search trees, pairs, completions, or any preference set of others.

`data.path` is one data set, `data.mixture` several with shares of the questions. Trees become rows by the rule of
section `pairs`, any other file holds its rows already, and `train.method` says which responses a row must have. Bad rows
are counted by reason and written to `dropped.jsonl` with file:line. Above `data.max_drop` they end the run.
"""

import itertools
import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpo_fast.config import TREE_METHODS, Config, PairsConfig
from cpo_fast.data.examples import RESPONSES, Example, RowParser, prompt_text, with_extracted_prompt
from cpo_fast.data.layouts import Layout
from cpo_fast.data.pair_files import TreeFileReader, write_dropped
from cpo_fast.data.pair_rules import draw
from cpo_fast.errors import ConfigError, DataError
from cpo_fast.files import canonical_json, short_hash, unreadable
from cpo_fast.rows import BadRow, Row, is_hub, read_rows
from cpo_fast.tasks.unknown_text import unknown_sentence

logger = logging.getLogger(__name__)

TOO_DEEP = BadRow("the JSON is nested too deeply")
MAX_REASONS_SHOWN = 5  # in a message, while dropped.jsonl has them all

DUPLICATE = "duplicate"  # dropped and counted, but not bad

# (question or "" for a bad row, place, the row as it stands in the file, the row as its layout reads it)
SourceRow = tuple[str, str, Row | BadRow, Row | BadRow]


@dataclass
class LoadedExamples:
    """What was read.

    Attributes:
        examples: in file order, each with weight 1.
        dropped: a record of every row that became none, as `dropped.jsonl` has them.
        num_merged_boundaries: rows whose prompt merged its last token with a response.
        unknown: place and first piece of rows with text that the tokenizer does not know.
        samplers: hashes of model and adapter that the trees read were searched with.
    """

    examples: list[Example] = field(default_factory=list)
    dropped: list[Row] = field(default_factory=list)
    num_merged_boundaries: int = 0
    unknown: list[tuple[str, str]] = field(default_factory=list)
    samplers: set[tuple[str, str]] = field(default_factory=set)

    @property
    def dropped_by_reason(self) -> dict[str, int]:
        return dict(Counter(row["reason"] for row in self.dropped).most_common())


def load_examples(config: Config, tokenizer: Any, dropped_path: str | Path | None = None) -> LoadedExamples:
    """Read the configured data into the examples that `train.method` trains on.

    Args:
        config: sections data and pairs, `train.method` and the seed.
        tokenizer: a Hugging Face tokenizer. Only text is tokenised, but its eos_token_id is used for all rows.
        dropped_path: where dropped rows are written with file:line and reason. It is removed when nothing was dropped.

    Raises:
        ConfigError: no data is configured. DataError: a file is unreadable or empty, no example is left, or more than
            `data.max_drop` of the rows are bad. EnvironmentProblem: an optional library is missing.
    """
    if config.data.eos != "never" and tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-sequence token; set data.eos=never")
    parser = RowParser(config, tokenizer)
    loaded = LoadedExamples()
    first_place: dict[tuple[tuple[int, ...], ...], str] = {}
    for source, questions in open_sources(config, bool(getattr(tokenizer, "chat_template", None))):
        if isinstance(source, TreeSource):
            loaded.samplers |= {
                (tree.model_hash, tree.adapter_hash) for tree in source.reader.trees if tree.id in questions
            }
        for question, place, row, read in source.rows(questions):
            try:
                if isinstance(read, BadRow):
                    raise read  # counted below, with those that parse to no example
                group = _group(question, read, source.path, bool(config.data.mixture))
                example, merged = parser.parse(read, place, group, source.implicit_prompt)
                ids = (example.prompt_ids, *example.responses)
                if ids in first_place:
                    raise BadRow(DUPLICATE, f"of {first_place[ids]}")
            except RecursionError:
                loaded.dropped.append(_record(place, TOO_DEEP, ""))
            except BadRow as bad:  # a line that is no object is kept as its text
                loaded.dropped.append(_record(place, bad, bad.text if bad is row else row))
            else:
                first_place[ids] = place
                loaded.examples.append(example)
                loaded.num_merged_boundaries += merged
                if (piece := parser.unknown_piece(read, example)) is not None:
                    loaded.unknown.append((place, piece))
    if loaded.unknown:
        where = f"{len(loaded.unknown)} of {len(loaded.examples)} rows"
        logger.warning("%s", unknown_sentence(tokenizer, where, *loaded.unknown[0]))
    if dropped_path is not None:
        write_dropped(dropped_path, loaded.dropped)
    _check_drop_rate(config, loaded)
    return loaded


def _group(question: str, row: Row, path: str, in_mixture: bool) -> str:
    # ids of trees are unique in their file only, hashes of prompts everywhere
    if not in_mixture or "tree" not in row:
        return question
    return f"{row.get('task') or path}:{question}"


def _record(place: str, bad: BadRow, content: Any) -> Row:
    """One line of `dropped.jsonl`. A row that canonical JSON cannot hold (NaN, a date) is kept as text."""
    try:
        try:
            canonical_json(content)
        except (TypeError, ValueError):
            content = json.dumps(content, default=str)
    except RecursionError:
        content = None  # the file and the line are named
    return {"source": place, "reason": bad.reason, "detail": bad.detail, "row": content}


def _check_drop_rate(config: Config, loaded: LoadedExamples) -> None:
    label = config.data.path or "data.mixture"
    num_duplicates = loaded.dropped_by_reason.get(DUPLICATE, 0)
    num_bad = len(loaded.dropped) - num_duplicates
    total = len(loaded.examples) + num_bad  # of distinct rows: copies make no row better or worse
    if total == 0:
        if config.train.method == "sft":
            what = "example: no tree has a winning path"
        elif config.train.method in TREE_METHODS:
            what = f"example for train.method={config.train.method}: no thoughts of different values to compare"
        else:
            what = f"pair: by pairs.rule={config.pairs.rule} no winning path of its trees has a loser"
        raise DataError(f"{label}: no {what}; look at `cpo-fast pairs`, or collect more questions")
    # with no example left nothing can be trained, whatever data.max_drop allows
    if not loaded.examples or num_bad > config.data.max_drop * total:
        raise DataError(
            f"{label}: {num_bad} of {total} rows are bad, more than data.max_drop={config.data.max_drop} allows: "
            f"{_reasons(loaded)}; mend the rows or raise the limit"
        )
    if num_duplicates:
        logger.warning("%s: %d rows repeat an earlier row and are trained once", label, num_duplicates)
    if num_bad:
        logger.warning("%s: dropped %d of %d rows: %s", label, num_bad, total, _reasons(loaded))
    if loaded.num_merged_boundaries:
        logger.warning(
            "%s: in %d rows the prompt's last token merges with the response and is trained with it",
            label,
            loaded.num_merged_boundaries,
        )


def _reasons(loaded: LoadedExamples) -> str:
    """`3 like rows.jsonl:7: missing key 'chosen'`, the most frequent first."""
    parts = []
    reasons = {reason: count for reason, count in loaded.dropped_by_reason.items() if reason != DUPLICATE}
    for reason, count in list(reasons.items())[:MAX_REASONS_SHOWN]:
        first = next(row for row in loaded.dropped if row["reason"] == reason)
        detail = f" ({first['detail']})" if first["detail"] else ""
        parts.append(f"{count} like {first['source']}: {reason}{detail}")
    more = len(reasons) - len(parts)
    return "; ".join(parts) + (f"; and {more} other reasons" if more else "")


class RowSource:
    """A data set whose rows can be trained on as they are.

    Attributes:
        questions: distinct, in file order.
        implicit_prompt: no row has a prompt: it is the common beginning of chosen and rejected.
    """

    def __init__(self, path: str, rows: Sequence[tuple[str, Row | BadRow]], layout: Layout) -> None:
        self.path = path
        layout.check_columns(path, [row for _, row in rows if not isinstance(row, BadRow)])
        readings = [_read(row, layout) for _, row in rows]
        layout.report(path)
        good = [read for read in readings if not isinstance(read, BadRow)]
        self.implicit_prompt = not any("prompt" in row or "prompt_token_ids" in row for row in good)
        self._rows = [
            (_question(read, self.implicit_prompt), place, row, read)
            for (place, row), read in zip(rows, readings, strict=True)
        ]
        self.questions = [name for name in dict.fromkeys(entry[0] for entry in self._rows) if name]

    def rows(self, questions: AbstractSet[str]) -> Iterator[SourceRow]:
        """The rows of these questions, and every row that names none because it is bad."""
        return (entry for entry in self._rows if not entry[0] or entry[0] in questions)


class TreeSource:
    """A data set of search trees. Raises DataError with file:line."""

    implicit_prompt = False

    def __init__(self, path: str, config: Config) -> None:
        self.path, self.config = path, config
        self.reader = TreeFileReader(path)
        self.questions = self.reader.questions

    def rows(self, questions: AbstractSet[str]) -> Iterator[SourceRow]:
        """The rows that `cpo-fast pairs` would write of these questions' trees, or those of an objective of whole trees."""
        method = self.config.train.method
        if method in TREE_METHODS:
            ignored = _ignored(self.config, ("rule",) if method == "full_step" else ("rule", "rejected_fraction"))
            if ignored:
                logger.warning(
                    "%s: train.method=%s takes what its trees hold: no effect of %s", self.path, method, ignored
                )
        made = self.reader.rows(self.config.pairs, self.config.seed, questions, method)
        logger.info("%s: %d rows from %s", self.path, len(made.rows), made.shares)
        warning = made.warning(
            f"train.method={method}" if method in TREE_METHODS else f"pairs.rule={self.config.pairs.rule}"
        )
        if warning:
            logger.warning("%s", warning)
        if made.unused:
            unused = "; ".join(f"{count} {reason}" for reason, count in made.unused_by_reason.items())
            logger.info("%s: not used: %s", self.path, unused)
        return ((row["tree"], f"{self.path}:{row['tree']}", row, row) for row in made.rows)


def _read(row: Row | BadRow, layout: Layout) -> Row | BadRow:
    try:
        return row if isinstance(row, BadRow) else layout.read(row)
    except RecursionError:
        return TOO_DEEP
    except BadRow as bad:
        return bad


def open_sources(config: Config, chat: bool) -> list[tuple[RowSource | TreeSource, set[str]]]:
    """Every data set of the configuration with the questions to use of it. `chat`: there is a chat template.

    Raises:
        ConfigError: no data is configured, or a share leaves a data set without a question.
        DataError: a file is not usable.
    """
    mixture = config.data.mixture
    sources = [_open(path, config, layout) for path, layout in _listed(config, chat)]
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


def check_data(config: Config) -> None:
    """Refuse in moments what `load_examples` would refuse once a model is there: a data set of which no row can be used.

    A file is read up to the first row that can be. Of parquet and of a hub data set nothing is read.

    Raises:
        ConfigError: no data is configured.
        DataError: a file is not there, empty or of another kind, or no row of it has the columns that are needed.
    """
    for path, layout in _listed(config, chat=False):
        if path.endswith(".parquet"):
            try:
                Path(path).stat()
            except OSError as error:
                raise unreadable(path, error) from None
        elif not is_hub(path):
            _check_rows(path, layout, config)


def _check_rows(path: str, layout: Layout, config: Config) -> None:
    begin, rows = _begun(path)
    if _holds_trees(path, begin):
        return
    _refuse_rows_for_trees(path, config)
    objects: list[Row] = []
    bad, num_good = LoadedExamples(), 0
    for place, row in itertools.chain(begin, rows):
        read = _read(row, layout)
        if not isinstance(row, BadRow):
            objects.append(row)
            if not isinstance(read, BadRow):
                num_good += 1
                if all(column in row for column in layout.columns.values()):
                    return
        if isinstance(read, BadRow):
            bad.dropped.append(_record(place, read, None))
    layout.check_columns(path, objects)
    if not num_good:
        _check_drop_rate(config, bad)


def _listed(config: Config, chat: bool) -> list[tuple[str, Layout]]:
    """Every data set of the configuration and how its rows are read. Raises ConfigError without any."""
    data, names = config.data, RESPONSES.get(config.train.method, ())
    if not data.mixture and not data.path:
        raise ConfigError("data.path is empty; set it to trees, pairs or a preference set")
    listed = [(item.path, {**data.columns, **item.columns}) for item in data.mixture] or [(data.path, data.columns)]
    return [(path, Layout(names, {str(name): key for name, key in columns.items()}, chat)) for path, columns in listed]


_Rows = Iterator[tuple[str, Row | BadRow]]


def _begun(path: str) -> tuple[list[tuple[str, Row | BadRow]], _Rows]:
    """The rows of one data set up to the first readable one, and those that follow."""
    rows = read_rows(path)
    begin: list[tuple[str, Row | BadRow]] = []
    for entry in rows:
        begin.append(entry)
        if not isinstance(entry[1], BadRow):
            break
    if not begin:
        raise DataError(f"{path}: the file has no rows; check data.path")
    return begin, rows


def _holds_trees(path: str, begin: Sequence[tuple[str, Row | BadRow]]) -> bool:
    first = begin[-1][1]
    # prompts stand in files beside the trees, which a hub data set has not
    return not isinstance(first, BadRow) and "nodes" in first and not is_hub(path)


def _open(path: str, config: Config, layout: Layout) -> RowSource | TreeSource:
    """Read one data set. It holds trees if its first readable row has nodes."""
    begin, rows = _begun(path)
    if _holds_trees(path, begin):
        return TreeSource(path, config)  # its lines are parsed there, the ones after the first only there
    _refuse_rows_for_trees(path, config)
    ignored = _ignored(config, ("rule", "rejected_fraction"))
    if ignored:
        logger.warning("%s holds no trees but rows, which are used as they are: no effect of %s", path, ignored)
    return RowSource(path, [*begin, *rows], layout)


def _refuse_rows_for_trees(path: str, config: Config) -> None:
    if config.train.method in TREE_METHODS:
        raise DataError(
            f"{path} holds no trees but rows, and train.method={config.train.method} reads whole trees; set data.path to "
            "the trees.jsonl of cpo-fast collect"
        )


def _ignored(config: Config, names: Sequence[str]) -> str:
    """Those keys of section pairs that somebody has set, as `pairs.rule=lower, ...`."""
    given = {name: getattr(config.pairs, name) for name in names}
    return ", ".join(f"pairs.{name}={value}" for name, value in given.items() if value != getattr(PairsConfig(), name))


def apportion(weights: Sequence[float], sizes: Sequence[int], total: int | None) -> list[int]:
    """Questions to take from each data set, in the shares of `weights`, exactly up to rounding:

        n_i = w_i * scale,   scale = min(total / sum of w, min over i of size_i / w_i)

    Args:
        weights: relative shares, positive.
        sizes: questions that each data set has.
        total: questions in all, or None for as many as the shares allow.
    """
    largest = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    wanted = math.inf if total is None else total / sum(weights)
    if total is None or wanted > largest:  # a data set is too small for its share: all give fewer
        # the data set that sets the limit gives everything, of which floor would lose a question to rounding
        return [min(size, math.floor(weight * largest + 1e-9)) for size, weight in zip(sizes, weights, strict=True)]
    exact = [weight * wanted for weight in weights]
    counts = [math.floor(value + 1e-9) for value in exact]
    # largest remainders get the rest, equal remainders in the order of the data sets
    order = sorted(range(len(exact)), key=lambda place: (counts[place] - exact[place], place))
    for place in order[: total - sum(counts)]:
        counts[place] += 1
    return counts


def _question(row: Row | BadRow, implicit_prompt: bool) -> str:
    """The tree that a row names, else a hash of its prompt, or "" for a row too bad to tell."""
    if isinstance(row, BadRow):
        return ""
    if isinstance(row.get("tree"), str | int) and row["tree"] != "":
        return str(row["tree"])
    try:
        if "prompt_token_ids" in row:
            content = repr(row["prompt_token_ids"])
        else:
            content = prompt_text(with_extracted_prompt(row) if implicit_prompt else row)
    except (BadRow, KeyError, TypeError, RecursionError):
        return ""  # parsing will say what is wrong
    return short_hash(content)
