"""The search of one question from its prompt to its line in `trees.jsonl`, whatever became of it."""

import logging
from dataclasses import asdict
from typing import Any

from cpo_fast.config import Config
from cpo_fast.search.engine import Search
from cpo_fast.search.grower import SearchOutcome
from cpo_fast.search.provenance import Provenance
from cpo_fast.search.root import RootPrompts
from cpo_fast.search.strategy import search_question
from cpo_fast.tasks import Question, Task
from cpo_fast.tree import SearchTree

logger = logging.getLogger(__name__)


class QuestionSearch:
    """One question's search and tree.

    Args:
        config: `seed`, `task.chat` and `search` are used.
        task, question: what is asked.
        roots: the question's prompt as the model reads it. tokenizer: for the evaluator's prompts.
        provenance: written into the tree.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        question: Question,
        roots: RootPrompts,
        tokenizer: Any,
        provenance: Provenance,
    ) -> None:
        self._config = config
        self._task = task
        self._question = question
        self._roots = roots
        self._tokenizer = tokenizer
        self._provenance = provenance
        # what a failed search leaves of these stands in its tree
        self._question_prompt = ""
        self._root_ids: list[int] = []

    def grow(self) -> Search[SearchOutcome]:
        """The search itself, for an engine to drive."""
        self._question_prompt = self._roots.question_part(self._question)
        self._root_ids = self._roots.encode(self._question)
        config = self._config
        outcome = yield from search_question(
            self._tokenizer,
            self._task,
            self._question,
            self._root_ids,
            config.search,
            config.seed,
            config.task.chat,
        )
        return outcome

    def tree(self, result: SearchOutcome | Exception) -> SearchTree:
        """The tree of what `grow` returned, or of status `failed` with the reason that it raised."""
        detail = ""
        if isinstance(result, Exception):
            logger.debug("question %r failed", self._question.id, exc_info=result)  # the tree tells the reason
            first_line = (str(result).splitlines() or [""])[0]
            detail = f"{type(result).__name__}: {first_line}"[:300]
            outcome = SearchOutcome(nodes=(), winning_nodes=(), answer=None, num_empty=0, status="failed")
        else:
            outcome = result
        num_shared_tokens = self._roots.num_shared_tokens(self._root_ids)
        return SearchTree(
            id=self._question.id,
            question=self._question.text,
            question_prompt=self._question_prompt,
            gold=self._question.gold,
            num_shared_tokens=num_shared_tokens,
            question_token_ids=tuple(self._root_ids[num_shared_tokens:]),
            nodes=outcome.nodes,
            winning_nodes=outcome.winning_nodes,
            answer=outcome.answer,
            num_empty=outcome.num_empty,
            status=outcome.status,
            detail=detail,
            num_thought_tokens=outcome.num_thought_tokens,
            num_verdict_tokens=outcome.num_verdict_tokens,
            **asdict(self._provenance),
        )
