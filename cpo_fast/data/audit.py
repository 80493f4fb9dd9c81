"""What a set of preference rows looks like, step by step: counts, values and lengths, to be read before training on it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StepAudit:
    """The pairs of one step of the chain (0: whole paths).

    Attributes:
        num_pairs, num_states: pairs, and the distinct states they continue.
        chosen_value, rejected_value: mean over the pairs whose thought has a value; None when none has.
        num_without_value: pairs with a thought that no verdict was readable for.
        chosen_tokens, rejected_tokens: mean length of the responses in tokens.
        max_tokens: longest prompt + response in tokens.
    """

    num_pairs: int
    num_states: int
    chosen_value: float | None
    rejected_value: float | None
    num_without_value: int
    chosen_tokens: float
    rejected_tokens: float
    max_tokens: int


def audit_pairs(rows: Iterable[dict[str, Any]]) -> dict[int, StepAudit]:
    """A `StepAudit` for every step, ascending, of rows as `pairs.jsonl` holds them."""
    steps: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        steps.setdefault(row["step"], []).append(row)
    return {step: _audit(steps[step]) for step in sorted(steps)}


def _audit(rows: Sequence[dict[str, Any]]) -> StepAudit:
    chosen = [len(row["chosen_token_ids"]) for row in rows]
    rejected = [len(row["rejected_token_ids"]) for row in rows]
    lengths = zip((len(row["prompt_token_ids"]) for row in rows), chosen, rejected, strict=True)
    return StepAudit(
        num_pairs=len(rows),
        num_states=len({(row["tree"], tuple(row["prompt_token_ids"])) for row in rows}),
        chosen_value=_mean([row["chosen_value"] for row in rows if row["chosen_value"] is not None]),
        rejected_value=_mean([row["rejected_value"] for row in rows if row["rejected_value"] is not None]),
        num_without_value=sum(row["chosen_value"] is None or row["rejected_value"] is None for row in rows),
        chosen_tokens=sum(chosen) / len(rows),
        rejected_tokens=sum(rejected) / len(rows),
        max_tokens=max(prompt + max(first, second) for prompt, first, second in lengths),
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
