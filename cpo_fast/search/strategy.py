"""Which search grows the tree, by the name that `search.strategy` gives it.

A strategy is one function: it gets a `Grower`, whose `root` is the question, and calls `expand` on the states it wants
to continue until it is done; it is a generator, because what it asks is answered by an engine that serves other
searches too. `room` tells it what the node budget still allows. Merging, judging, answers, the budget
and the vote are not its business, so another search is one file and one entry below.
"""

from typing import Any, Protocol

from cpo_fast.config import SearchConfig
from cpo_fast.search import breadth_first, depth_first
from cpo_fast.search.engine import Search
from cpo_fast.search.evaluate import Evaluator
from cpo_fast.search.grower import Grower, SearchOutcome
from cpo_fast.search.select import vote
from cpo_fast.tasks import Question, Task
from cpo_fast.tree import Status


class Strategy(Protocol):
    """Decides which states are expanded, and in which order.

    A state is expanded at most once: its samples have names of their own, so a second time would give the same ones.
    That, `search.max_steps` and the node budget bound every search.
    """

    def __call__(self, grower: Grower) -> Search[None]:
        """Grow the tree from `grower.root`."""


STRATEGIES: dict[str, Strategy] = {"bfs": breadth_first.grow, "dfs": depth_first.grow}


def search_question(
    tokenizer: Any,
    task: Task,
    question: Question,
    root_ids: list[int],
    settings: SearchConfig,
    seed: int,
    chat: bool = False,
) -> Search[SearchOutcome]:
    """Grow and judge one tree, and let its complete paths vote.

    Args:
        tokenizer: for the evaluator's prompts.
        task, question: what is asked. root_ids: the question prompt as the model reads it.
        settings: the search. seed: the run's seed; with the question's id it names every random number.
        chat: ask the evaluator through the tokenizer's chat template, as `root_ids` asks the question.
    """
    run_name = f"{seed}/{question.id}"
    evaluator = Evaluator(tokenizer, task, question, settings, run_name, chat)
    grower = Grower(evaluator, task, root_ids, settings, run_name)
    yield from STRATEGIES[settings.strategy](grower)
    answer, winners = vote(grower.nodes, task.vote_by)
    status: Status = "ok" if winners else "no_answer" if grower.nodes else "no_candidates"
    return SearchOutcome(
        nodes=tuple(grower.nodes),
        winning_nodes=tuple(winners),
        answer=answer,
        num_empty=grower.num_empty,
        status=status,
        num_thought_tokens=grower.num_thought_tokens,
        num_verdict_tokens=evaluator.num_tokens,
    )
