"""A tree under construction: sample and judge the children of states, within the node budget.

What every search does alike is here, so that a strategy only decides which states are expanded, and in which order
(see `strategy`). A line `Answer: ...` ends its chain; if its answer can be read and it ended by newline or
end-of-sequence, it is complete and votes. A thought that was cut at the token cap, ended the sequence before an answer,
or starts another question ends its chain too, without a vote; it stays in the tree as a loser. Every thought that was
generated stays, followed or not.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cpo_fast.config import SearchConfig
from cpo_fast.search.engine import Sample, Search
from cpo_fast.search.evaluate import Evaluator, Verdict
from cpo_fast.search.expand import expand
from cpo_fast.search.select import rank
from cpo_fast.search.state import Candidate, State
from cpo_fast.tasks import Task
from cpo_fast.tree import ROOT, Node, Status, rounded_logps


@dataclass(frozen=True)
class Child:
    """A judged thought under an expanded state.

    Attributes:
        state: the state that includes it.
        value: the evaluator's verdict; None when none could be read.
        is_open: the search may continue it.
    """

    state: State
    value: float | None
    is_open: bool


@dataclass(frozen=True)
class SearchOutcome:
    """What one search found; fields as in `tree.SearchTree`."""

    nodes: tuple[Node, ...]
    winning_nodes: tuple[int, ...]
    answer: str | None
    num_empty: int
    status: Status
    num_thought_tokens: int = 0
    num_verdict_tokens: int = 0


class Grower:
    """The tree of one question while a strategy grows it.

    Args:
        evaluator: judges thoughts. task: says where a chain ends and what its answer is.
        root_ids: the question prompt as the model reads it.
        settings: the search.
        run_name: seed and question, part of every sample's uid.

    Attributes:
        root: the state without a thought, where every strategy starts.
        settings: as given.
        nodes: the thoughts so far; the id of a node is its place.
        num_empty: samples dropped because they were only whitespace.
        num_thought_tokens: tokens generated for thoughts, duplicates and empty samples included.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        task: Task,
        root_ids: Sequence[int],
        settings: SearchConfig,
        run_name: str,
    ) -> None:
        self._evaluator = evaluator
        self._task = task
        self._run_name = run_name
        self.root = State.root(root_ids)
        self.settings = settings
        self.nodes: list[Node] = []
        self.num_empty = 0
        self.num_thought_tokens = 0

    @property
    def room(self) -> int:
        """How many states may still be expanded before `search.max_nodes` is reached.

        Counted as if every sample were a new thought, so that the answer is known before sampling: a tree never grows
        past the budget by more than the children of one state.
        """
        left = max(self.settings.max_nodes - len(self.nodes), 0)
        return -(-left // self.settings.num_candidates)

    def expand(self, states: Sequence[State]) -> Search[list[list[Child]]]:
        """Sample, merge and judge the children of states, add them to the tree, and mark the states as kept.

        Asks the engine twice: for all thoughts, then for all verdicts.

        Args:
            states: best first; those beyond `room` are left alone.

        Returns:
            One list of children for each expanded state, in sample order.
        """
        states = states[: self.room]
        expansion = yield from expand(states, self.settings, self._run_name, next_id=len(self.nodes))
        self.num_empty += expansion.num_empty
        self.num_thought_tokens += expansion.num_tokens
        flat = [candidate for candidates in expansion.children for candidate in candidates]
        judged = yield from self._evaluator.evaluate([candidate.state for candidate in flat])
        verdicts = iter(judged)
        children: list[list[Child]] = []
        for state, candidates in zip(states, expansion.children, strict=True):
            if state.node_id != ROOT:
                self.nodes[state.node_id] = replace(self.nodes[state.node_id], kept=True)
            children.append([self._add(candidate, next(verdicts), state.node_id) for candidate in candidates])
        return children

    def select(self, children: Sequence[Child]) -> list[State]:
        """The states of the best `search.num_kept` children that may be continued, best first."""
        open_children = [child for child in children if child.is_open]
        values = [child.value for child in open_children]
        chosen = rank(values, self.settings.num_kept, self.settings.keep_ties)
        return [open_children[index].state for index in chosen]

    def _add(self, candidate: Candidate, verdict: Verdict, parent: int) -> Child:
        state, sample = candidate.state, candidate.sample
        answer = self._task.parse_answer(sample.text) if sample.stop != "length" else None
        node = Node(
            id=state.node_id,
            parent=parent,
            depth=state.depth,
            text=sample.text,
            token_ids=sample.token_ids,
            value=verdict.value,
            evaluations=verdict.evaluations,
            kept=answer is not None,
            terminal=self._ends(sample),
            complete=answer is not None,
            count=candidate.count,
            answer=answer,
            stop=sample.stop,
            logps=rounded_logps(sample.logps),
        )
        assert node.id == len(self.nodes)
        self.nodes.append(node)
        is_open = not node.terminal and state.depth < self.settings.max_steps
        return Child(state, verdict.value, is_open)

    def _ends(self, sample: Sample) -> bool:
        """Whether the search cannot continue after this thought."""
        text = sample.text
        return sample.stop != "newline" or self._task.is_answer_line(text) or self._task.leaves_question(text)
