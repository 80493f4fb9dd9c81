"""Training files to items in token ids: search trees, pairs, supervised rows, or any preference set of others.

What a row may hold: `prompt`, `chosen` and `rejected` as text or as conversations, the prompt left out where both
responses begin with it, ids in `*_token_ids`; for supervised fine-tuning `prompt` and `completion`. Bad rows are counted
by reason and written to `dropped.jsonl` with file:line; above `data.max_drop` they end the run.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cpo_fast.config import Config
from cpo_fast.data.pair import PreferencePair
from cpo_fast.data.pairs import write_dropped
from cpo_fast.data.parse import RowParser
from cpo_fast.data.rows import BadRow
from cpo_fast.data.sft import SftExample
from cpo_fast.data.sources import Kind, group_name, open_sources
from cpo_fast.data.weights import weigh_pairs
from cpo_fast.errors import DataError
from cpo_fast.files import canonical_json

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
