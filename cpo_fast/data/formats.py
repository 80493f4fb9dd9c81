"""Training files to preference pairs: `trees.jsonl`, `pairs.jsonl`, or any prompt/chosen/rejected JSONL of text.

The kind is read off the first row. Ids that a row carries are used as they are. Text is tokenised together with its
prompt, as it would stand in one row; the prompt is what prompt, prompt + chosen and prompt + rejected have in common, so
a token that merges across the boundary belongs to the response and is trained. Bad rows are counted by reason and
written to `dropped.jsonl`; nothing is cut.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpo_fast.config import DataConfig
from cpo_fast.data.pair import PreferencePair
from cpo_fast.data.pairs import iterate_pair_rows
from cpo_fast.errors import DataError
from cpo_fast.files import read_jsonl, write_jsonl
from cpo_fast.tasks import common_prefix_length

logger = logging.getLogger(__name__)

TEXT_KEYS = ("prompt", "chosen", "rejected")
ID_KEYS = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")


class BadRow(Exception):
    """A row that cannot become a pair; the message is the reason it is counted under."""


@dataclass
class LoadedPairs:
    """Pairs in file order, what was dropped and why, and how many prompts merged a token with a response."""

    pairs: list[PreferencePair] = field(default_factory=list)
    dropped: list[dict[str, Any]] = field(default_factory=list)
    num_merged_boundaries: int = 0

    @property
    def dropped_by_reason(self) -> dict[str, int]:
        """Counts of dropped rows, most frequent first."""
        return dict(Counter(row["reason"] for row in self.dropped).most_common())


def load_pairs(config: DataConfig, tokenizer: Any, dropped_path: str | Path | None = None) -> LoadedPairs:
    """Read `config.path` into pairs.

    Args:
        config: path, end-of-sequence rule, length limit and the share of bad rows that is tolerated.
        tokenizer: a Hugging Face tokenizer; only text rows are tokenised, but its eos_token_id is used for all.
        dropped_path: where dropped rows are written with file:line and reason; not written when nothing was dropped.

    Raises:
        DataError: the file is unreadable or empty, a line is no JSON object, no pair is left, or more than
            `config.max_drop` of the rows are bad.
    """
    if config.eos != "never" and tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-sequence token; set data.eos=never")
    loaded = LoadedPairs()
    seen: dict[tuple[tuple[int, ...], ...], str] = {}
    for source, row in _rows(Path(config.path)):
        try:
            pair, merged = _pair(row, source, config, tokenizer)
            key = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
            if key in seen:
                raise BadRow("duplicate")
            seen[key] = source
        except BadRow as reason:
            loaded.dropped.append({"source": source, "reason": str(reason), "row": row})
        else:
            loaded.pairs.append(pair)
            loaded.num_merged_boundaries += merged
    _report(loaded, config, dropped_path)
    return loaded


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    first = next(iter(read_jsonl(path)), None)
    if first is None:
        raise DataError(f"{path}: the file has no rows; check data.path")
    if "nodes" in first[1]:
        yield from ((f"{path}:{row['tree']}", row) for row in iterate_pair_rows(path))
    else:
        yield from ((f"{path}:{number}", row) for number, row in read_jsonl(path))


def _pair(row: dict[str, Any], source: str, config: DataConfig, tokenizer: Any) -> tuple[PreferencePair, bool]:
    if all(key in row for key in ID_KEYS):
        prompt, chosen, rejected = (_ids(row, key) for key in ID_KEYS)
        merged = False
    else:
        prompt, chosen, rejected, merged = _tokenized(row, tokenizer)
    eos = tokenizer.eos_token_id
    if config.eos == "every" or (config.eos == "final" and row.get("chosen_final", True)):
        chosen = _with_eos(chosen, eos)
    if config.eos == "every" or (config.eos == "final" and row.get("rejected_final", True)):
        rejected = _with_eos(rejected, eos)
    if not prompt:
        raise BadRow("empty prompt")
    if not chosen or not rejected:
        raise BadRow("empty response")
    if chosen == rejected:
        raise BadRow("chosen equals rejected")
    if config.max_length is not None and len(prompt) + max(len(chosen), len(rejected)) > config.max_length:
        raise BadRow("longer than data.max_length")
    step = row.get("step", 0)
    group = row.get("tree") or hashlib.sha256(repr(prompt).encode()).hexdigest()[:16]
    return PreferencePair(prompt, chosen, rejected, str(group), step if isinstance(step, int) else 0, source), merged


def _tokenized(row: dict[str, Any], tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool]:
    for key in TEXT_KEYS:
        if key not in row:
            raise BadRow(f"missing key '{key}'")
        if not isinstance(row[key], str):
            raise BadRow(f"'{key}' is not text")
    if not row["chosen"].strip() or not row["rejected"].strip():
        raise BadRow("empty response")
    prompt = tokenizer(row["prompt"]).input_ids
    chosen = tokenizer(row["prompt"] + row["chosen"]).input_ids
    rejected = tokenizer(row["prompt"] + row["rejected"]).input_ids
    eos = tokenizer.eos_token_id
    if prompt and prompt[-1] == eos and chosen[: len(prompt)] != prompt:
        prompt = prompt[:-1]  # a tokenizer that closes every text with end-of-sequence
    common = min(common_prefix_length(prompt, chosen), common_prefix_length(prompt, rejected))
    merged = common < len(prompt)
    return tuple(chosen[:common]), tuple(chosen[common:]), tuple(rejected[common:]), merged


def _ids(row: dict[str, Any], key: str) -> tuple[int, ...]:
    value = row[key]
    if not isinstance(value, list) or any(type(token) is not int or token < 0 for token in value):
        raise BadRow(f"'{key}' is not a list of token ids")
    return tuple(value)


def _with_eos(ids: tuple[int, ...], eos: int) -> tuple[int, ...]:
    return ids if ids and ids[-1] == eos else (*ids, eos)


def _report(loaded: LoadedPairs, config: DataConfig, dropped_path: str | Path | None) -> None:
    total = len(loaded.pairs) + len(loaded.dropped)
    reasons = ", ".join(f"{reason}: {count}" for reason, count in loaded.dropped_by_reason.items())
    if loaded.dropped and dropped_path is not None:
        write_jsonl(dropped_path, loaded.dropped)
    if total == 0:
        raise DataError(f"{config.path}: no pair in this file (its trees have no winning path with a losing sibling)")
    if not loaded.pairs or len(loaded.dropped) > config.max_drop * total:
        first = loaded.dropped[0]
        raise DataError(
            f"{config.path}: {len(loaded.dropped)} of {total} rows are bad ({reasons}; first: {first['source']}), more "
            f"than data.max_drop={config.max_drop} allows; mend the rows or raise the limit"
        )
    if loaded.dropped:
        logger.warning("%s: dropped %d of %d rows (%s)", config.path, len(loaded.dropped), total, reasons)
    if loaded.num_merged_boundaries:
        logger.warning(
            "%s: in %d rows the prompt's last token merges with the response and is trained with it",
            config.path,
            loaded.num_merged_boundaries,
        )
