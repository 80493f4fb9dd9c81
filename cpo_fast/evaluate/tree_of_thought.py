"""Tree of thought as a way to answer: the search of `collect`, its vote, and every token that it generated.

    tokens = all thoughts (the losers, duplicates and empty ones included) + all sampled verdicts

End-of-sequence tokens count; they were generated. With `evaluator: logits` a verdict generates nothing, and its forward
shows in the seconds alone. The tree itself is dropped: `collect` keeps trees.
"""

import time
from dataclasses import dataclass
from typing import Any

from cpo_fast.config import SearchConfig
from cpo_fast.search.engine import Engine, drive
from cpo_fast.search.strategy import SearchOutcome, search_question
from cpo_fast.tasks import Question, Task
from cpo_fast.tree import ROOT, Status


@dataclass(frozen=True)
class TreeAnswer:
    """What one search answered.

    Attributes:
        answer: normalised answer that won the vote, or None.
        text: the winning path whose last thought has the largest value; empty without a winner.
        status: as in `tree.SearchTree`.
        num_tokens: all generated tokens; num_verdict_tokens: those of them that were verdicts.
        seconds: wall time of the search.
    """

    answer: str | None
    text: str
    status: Status
    num_tokens: int
    num_verdict_tokens: int
    seconds: float


def tree_answer(
    engine: Engine,
    tokenizer: Any,
    task: Task,
    question: Question,
    root_ids: list[int],
    settings: SearchConfig,
    seed: int,
    chat: bool = False,
) -> TreeAnswer:
    """Search one question alone and vote. Arguments as for `search.strategy.search_question`."""
    start = time.perf_counter()
    outcome = drive(engine, search_question(tokenizer, task, question, root_ids, settings, seed, chat))
    seconds = time.perf_counter() - start
    num_tokens = outcome.num_thought_tokens + outcome.num_verdict_tokens
    text = _best_path(outcome)
    return TreeAnswer(outcome.answer, text, outcome.status, num_tokens, outcome.num_verdict_tokens, seconds)


def _best_path(outcome: SearchOutcome) -> str:
    def value_of(node_id: int) -> float:
        value = outcome.nodes[node_id].value
        return float("-inf") if value is None else value

    # max keeps the first of equals; there is no winner when nothing was complete
    node_id = max(outcome.winning_nodes, key=value_of, default=ROOT)
    lines: list[str] = []
    while node_id != ROOT:
        lines.append(outcome.nodes[node_id].text)
        node_id = outcome.nodes[node_id].parent
    return "".join(reversed(lines))
