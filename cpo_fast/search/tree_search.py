"""A tree under construction: sample and judge the children of states, within the node budget.

What every search does alike is here, so that a strategy only decides which states are expanded, and in which order
(see `strategy`). A line `Answer: ...` ends its chain; if its answer can be read and it ended by newline or
end-of-sequence, it is complete and votes. A thought that was cut at the token cap, ended the sequence before an answer,
or starts another question ends its chain too, without a vote; it stays in the tree as a loser. Every thought that was
generated stays, followed or not.

Breadth-first search, the paper's: level by level, the n best open states of a level are expanded.

An answer takes no place among the n. Order is (-value, parent rank, sample index), so a level is one batch of samples
and one batch of verdicts whatever the model says.

Depth-first search: the best child of a state first, to the end of its chain, then the next best.

At most `search.num_kept` children are followed under each state (breadth-first search keeps as many per level), and
none valued below `search.dfs_threshold`. A child without a readable verdict is not known to be bad: it is followed,
last. The node budget decides how far the search comes back; what it has not reached by then stays an unexpanded leaf.

Sample k thoughts per state and merge the duplicates of one parent.

Duplicates are equal after whitespace is collapsed; the first sample's ids and text stay, with a count. Letters keep
their case and nothing is cut: the ids of a candidate are the ids that were generated. Samples of only whitespace are
dropped and counted.

Which search grows the tree, by the name that `search.strategy` gives it.

A strategy is one function: it gets a `Grower`, whose `root` is the question, and calls `expand` on the states it wants
to continue until it is done; it is a generator, because what it asks is answered by an engine that serves other
searches too. `room` tells it what the node budget still allows. Merging, judging, answers, the budget
and the vote are not its business, so another search is one file and one entry below.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from cpo_fast.config import SearchConfig
from cpo_fast.search.engine import Ask, Request, Sample, Search
from cpo_fast.search.selection import rank, vote
from cpo_fast.search.state import Candidate, State
from cpo_fast.search.state_evaluator import Evaluator, Verdict
from cpo_fast.tasks import Question, Task
from cpo_fast.tree import ROOT, Node, Status, rounded_logps


@dataclass(frozen=True)
class Expansion:
    """What the samples under some states came to.

    Attributes:
        children: one list of candidates a state, in sample order.
        num_empty: samples dropped because they were only whitespace.
        num_tokens: tokens generated for all samples, duplicates and empty ones included.
    """

    children: list[list[Candidate]]
    num_empty: int
    num_tokens: int


def expand(states: Sequence[State], settings: SearchConfig, run_name: str, next_id: int) -> Search[Expansion]:
    """Sample under each state, in one ask.

    Args:
        states: the states to continue, in rank order.
        settings: `num_candidates`, `max_thought_tokens`, and how a token is sampled.
        run_name: seed and question, the part of a sample's uid that the state does not give.
        next_id: id of the first node that these candidates become; ids go up by parent rank and sample index.
    """
    requests = [
        Request(
            state.token_ids,
            f"{run_name}/thought/{state.digest}/{index}",
            settings.temperature,
            settings.top_p,
            settings.max_thought_tokens,
            settings.top_k,
            settings.repetition_penalty,
        )
        for state in states
        for index in range(settings.num_candidates)
    ]
    answers = yield Ask(tuple(requests), keep=True)
    samples = [answer for answer in answers if isinstance(answer, Sample)]
    assert len(samples) == len(requests), "a request is answered by a sample"
    children: list[list[Candidate]] = []
    num_empty = 0
    for place, state in enumerate(states):
        merged: dict[str, Candidate] = {}
        first = place * settings.num_candidates
        for sample in samples[first : first + settings.num_candidates]:
            key = " ".join(sample.text.split())
            if not key:
                num_empty += 1
            elif key in merged:
                merged[key] = replace(merged[key], count=merged[key].count + 1)
            else:
                after = state.extend(next_id, sample.token_ids, sample.text)
                merged[key] = Candidate(after, sample, count=1)
                next_id += 1
        children.append(list(merged.values()))
    return Expansion(children, num_empty, sum(sample.num_tokens for sample in samples))


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


def grow_breadth_first(grower: Grower) -> Search[None]:
    """Grow the whole tree, at most `search.max_steps` thoughts deep."""
    frontier = [grower.root]
    while frontier and grower.room:
        families = yield from grower.expand(frontier)
        frontier = grower.select([child for siblings in families for child in siblings])


def grow_depth_first(grower: Grower) -> Search[None]:
    """Grow the tree along the best children until nothing is left to follow or the budget is spent."""
    threshold = grower.settings.dfs_threshold
    stack = [grower.root]
    while stack and grower.room:
        (children,) = yield from grower.expand([stack.pop()])
        promising = [
            child for child in children if threshold is None or child.value is None or child.value >= threshold
        ]
        stack.extend(reversed(grower.select(promising)))


class Strategy(Protocol):
    """Decides which states are expanded, and in which order.

    A state is expanded at most once: its samples have names of their own, so a second time would give the same ones.
    That, `search.max_steps` and the node budget bound every search.
    """

    def __call__(self, grower: Grower) -> Search[None]:
        """Grow the tree from `grower.root`."""


STRATEGIES: dict[str, Strategy] = {"bfs": grow_breadth_first, "dfs": grow_depth_first}


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
