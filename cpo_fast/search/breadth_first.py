"""Breadth-first tree of thoughts over one question, level by level, at most `search.max_steps` thoughts deep.

A level: sample k thoughts under every open state, merge duplicates, judge all of them, keep the n best open ones. A
line `Answer: ...` ends its chain: it is not expanded and takes no place among the n, and if its answer can be read
and it ended by newline or end-of-sequence, it is complete and votes. A thought that was cut at the token cap, ended
the sequence before an answer, or starts another question ends its chain too, without a vote; it stays in the tree as
a loser.
"""

from dataclasses import dataclass
from typing import Any

from cpo_fast.config import SearchConfig
from cpo_fast.search.engine import Engine
from cpo_fast.search.evaluate import Evaluator, Verdict
from cpo_fast.search.expand import expand
from cpo_fast.search.select import rank, vote
from cpo_fast.search.state import Candidate, State
from cpo_fast.tasks import Question, Task
from cpo_fast.tree import Node, Status


@dataclass(frozen=True)
class SearchOutcome:
    """What one search found; fields as in `tree.SearchTree`."""

    nodes: tuple[Node, ...]
    winning_nodes: tuple[int, ...]
    answer: str | None
    num_empty: int
    status: Status


def search_question(
    engine: Engine,
    tokenizer: Any,
    task: Task,
    question: Question,
    root_ids: list[int],
    settings: SearchConfig,
    seed: int,
) -> SearchOutcome:
    """Grow and judge one tree.

    Args:
        engine: samples thoughts and scores verdicts. tokenizer: for the evaluator's prompts.
        task, question: what is asked. root_ids: the question prompt as the model reads it.
        settings: the search. seed: the run's seed; with the question's id it names every random number.
    """
    run_name = f"{seed}/{question.id}"
    evaluator = Evaluator(engine, tokenizer, task, question, settings, run_name)
    nodes: list[Node] = []
    num_empty = 0
    frontier = [State.root(root_ids)]
    for depth in range(1, settings.max_steps + 1):
        levels, num_dropped = expand(engine, frontier, settings, run_name, next_id=len(nodes))
        num_empty += num_dropped
        candidates = [candidate for level in levels for candidate in level]
        verdicts = evaluator.evaluate([candidate.state for candidate in candidates])
        # on the last level nothing is expanded any more, so nothing is kept for it
        is_open = [depth < settings.max_steps and not _ends(task, candidate) for candidate in candidates]
        open_indices = [index for index, flag in enumerate(is_open) if flag]
        best = [open_indices[i] for i in rank([verdicts[index].value for index in open_indices], settings.num_kept)]
        nodes.extend(
            _node(task, candidate, verdict, frontier[candidate.parent_rank].node_id, depth, index in best)
            for index, (candidate, verdict) in enumerate(zip(candidates, verdicts, strict=True))
        )
        frontier = [candidates[index].state for index in best]
        if not frontier:
            break
    answer, winners = vote(nodes)
    status: Status = "ok" if winners else "no_answer" if nodes else "no_candidates"
    return SearchOutcome(tuple(nodes), tuple(winners), answer, num_empty, status)


def _ends(task: Task, candidate: Candidate) -> bool:
    """Whether the search cannot continue after this thought."""
    text = candidate.text
    return candidate.stop != "newline" or task.is_answer_line(text) or task.leaves_question(text)


def _node(task: Task, candidate: Candidate, verdict: Verdict, parent: int, depth: int, is_selected: bool) -> Node:
    answer = task.parse_answer(candidate.text) if candidate.stop != "length" else None
    return Node(
        id=candidate.state.node_id,
        parent=parent,
        depth=depth,
        text=candidate.text,
        token_ids=candidate.token_ids,
        value=verdict.value,
        evaluations=verdict.evaluations,
        kept=is_selected or answer is not None,
        terminal=_ends(task, candidate),
        complete=answer is not None,
        count=candidate.count,
        answer=answer,
        stop=candidate.stop,
    )
