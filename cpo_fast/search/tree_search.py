"""The search of one question: which states are expanded, what becomes of their samples, and which answer wins.

    expand     k thoughts are sampled under a state. Equal ones become one node with a count. The evaluator judges each
    bfs        the paper's search, level by level: the n best open states of a level are expanded
    dfs        the best child of a state first, to the end of its chain, then the next best
    vote       over the complete chains, see `selection`

A line `Answer: ...` ends its chain. If its answer can be read and it ended by newline or end-of-sequence, the node is
complete and votes. A thought that was cut at the token cap, that ended the sequence before an answer, or that starts
another question ends its chain too, without a vote. Every thought that was generated stays in the tree, followed or not.
Order is (-value, parent rank, sample index): no sets, no hash order.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from cpo_fast.config import Config
from cpo_fast.errors import failure_detail
from cpo_fast.search.engine import Requests, Sample, SampleRequest, Search
from cpo_fast.search.selection import rank, vote
from cpo_fast.search.state_evaluator import Evaluator, Verdict, state_digest
from cpo_fast.search.tree_store import Provenance
from cpo_fast.tasks import Prompts, Question, common_prefix_length
from cpo_fast.tree import ROOT, Node, SearchTree, path_to, rounded_logps

logger = logging.getLogger(__name__)


def search_question(
    config: Config, prompts: Prompts, question: Question, provenance: Provenance | None = None
) -> Search[SearchTree]:
    """Grow the tree of one question and let its complete chains vote.

    Args:
        config: `search` and `seed` are used. The seed and the question's id name every random number.
        prompts: of the question's task.
        provenance: written into the tree. None for a tree that is not kept.

    Returns:
        The tree. Where anything raises, it has the status `failed`, the reason, and what is known of the prompt.
    """
    tree = SearchTree(
        id=question.id,
        question=question.text,
        gold=question.gold,
        num_shared_tokens=0,
        question_token_ids=(),
        nodes=(),
        winning_nodes=(),
        answer=None,
        num_empty=0,
        status="failed",
        detail="",
        **asdict(provenance or Provenance(prompts.task.name, prompts.shared.hash, "", "", config.seed, "")),
    )
    try:
        # each part as soon as it is known, so that a failed tree has it
        tree = replace(tree, question_prompt=prompts.question_part(question))
        root_ids = prompts.encode(question)
        num_shared_tokens = common_prefix_length(prompts.shared.token_ids, root_ids)
        question_ids = tuple(root_ids[num_shared_tokens:])
        tree = replace(tree, num_shared_tokens=num_shared_tokens, question_token_ids=question_ids)
        builder = TreeBuilder(config, prompts, question, root_ids)
        yield from STRATEGIES[config.search.strategy](builder)
        answer, winners = vote(builder.nodes, prompts.task.vote_by)
        return replace(
            tree,
            nodes=tuple(builder.nodes),
            winning_nodes=tuple(winners),
            answer=answer,
            num_empty=builder.num_empty,
            status="ok" if winners else "no_answer" if builder.nodes else "no_candidates",
            num_thought_tokens=builder.num_thought_tokens,
            num_verdict_tokens=builder.evaluator.num_tokens,
        )
    except Exception as error:  # one question that cannot be asked must not end a run of thousands
        logger.debug("question %r failed", question.id, exc_info=error)
        return replace(tree, detail=failure_detail(error))


class TreeBuilder:
    """The tree of one question while a strategy grows it.

    A strategy decides which states are expanded, and in which order. A state is named by its last node, the question
    itself by `ROOT`, and is expanded at most once. That, `search.max_steps` and the node budget bound every search.

    Args:
        config, prompts, question: as for `search_question`.
        root_ids: the question's prompt as the model reads it.

    Attributes:
        config: the search section. evaluator: judges thoughts.
        nodes: the thoughts so far. The id of a node is its place.
        num_empty: samples dropped because they were only whitespace.
        num_thought_tokens: tokens generated for thoughts, duplicates and empty samples included.
    """

    def __init__(self, config: Config, prompts: Prompts, question: Question, root_ids: Sequence[int]) -> None:
        self.config = config.search
        self._run_name = f"{config.seed}/{question.id}"
        self.evaluator = Evaluator(config.search, prompts, question, self._run_name)
        self.nodes: list[Node] = []
        self.num_empty = 0
        self.num_thought_tokens = 0
        self._task = prompts.task
        self._root_ids = tuple(root_ids)

    @property
    def budget(self) -> int:
        """How many states may still be expanded before `search.max_nodes` is reached."""
        # as if every sample were a new thought, which is known before sampling: a tree outgrows the budget by the children
        # of one state at most
        left = max(self.config.max_nodes - len(self.nodes), 0)
        return -(-left // self.config.num_candidates)  # rounded up

    def expand(self, parents: Sequence[int]) -> Search[list[Node]]:
        """Sample, merge and judge the children of states, add them to the tree, and mark the states as kept.

        Asks the engine twice: for all thoughts, then for all verdicts.

        Args:
            parents: the states, best first. Those beyond `budget` are left out.

        Returns:
            The new nodes, by parent and sample index.
        """
        parents = parents[: self.budget]
        paths = [path_to(self.nodes, parent) for parent in parents]
        # the state names its samples, so a second time would give the same ones
        answers = yield Requests(tuple(request for path in paths for request in self._requests(path)), keep=True)
        samples = [answer for answer in answers if isinstance(answer, Sample)]
        assert len(samples) == len(parents) * self.config.num_candidates, "a request is answered by a sample"
        self.num_thought_tokens += sum(sample.num_tokens for sample in samples)
        thoughts: list[tuple[int, list[Sample]]] = []  # rank of the parent, and the samples that became one thought
        for place in range(len(parents)):
            start = place * self.config.num_candidates
            thoughts += [(place, equal) for equal in self._merge(samples[start : start + self.config.num_candidates])]
        states = [(*(node.text for node in paths[place]), equal[0].text) for place, equal in thoughts]
        verdicts = yield from self.evaluator.evaluate(states)  # of all states, in one batch
        num_before = len(self.nodes)
        for (place, equal), verdict in zip(thoughts, verdicts, strict=True):
            self._add(parents[place], equal, verdict)
        for parent in parents:
            if parent != ROOT:
                self.nodes[parent] = replace(self.nodes[parent], kept=True)
        return self.nodes[num_before:]

    def select(self, children: Sequence[Node]) -> list[int]:
        """Ids of the best `search.num_kept` children that the search may continue, best first."""
        # an answer is terminal, so it takes no place among those that go on
        open_nodes = [node for node in children if not node.terminal and node.depth < self.config.max_steps]
        values = [node.value for node in open_nodes]
        return [open_nodes[index].id for index in rank(values, self.config.num_kept, self.config.keep_ties)]

    def _requests(self, path: Sequence[Node]) -> list[SampleRequest]:
        token_ids = (*self._root_ids, *(token for node in path for token in node.token_ids))
        digest, config = state_digest(token_ids), self.config
        return [
            SampleRequest(
                token_ids,
                f"{self._run_name}/thought/{digest}/{index}",
                config.temperature,
                config.top_p,
                config.max_thought_tokens,
                config.top_k,
                config.repetition_penalty,
            )
            for index in range(config.num_candidates)
        ]

    def _merge(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        """Samples that are equal after whitespace is collapsed, by first appearance. Letters keep their case."""
        equal: dict[str, list[Sample]] = {}
        for sample in samples:
            equal.setdefault(" ".join(sample.text.split()), []).append(sample)
        self.num_empty += len(equal.pop("", []))
        return list(equal.values())  # losers too: preference pairs are made of them

    def _add(self, parent: int, equal: Sequence[Sample], verdict: Verdict) -> None:
        """Make a node of equal samples: the first one's text and ids, and their count."""
        sample, task = equal[0], self._task
        # an answer that was cut at the token cap may be half a number
        answer = task.parse_answer(sample.text) if sample.stop != "length" else None
        ends = sample.stop != "newline" or task.is_answer_line(sample.text) or task.leaves_question(sample.text)
        self.nodes.append(
            Node(
                id=len(self.nodes),
                parent=parent,
                depth=1 if parent == ROOT else self.nodes[parent].depth + 1,
                text=sample.text,
                token_ids=sample.token_ids,
                value=verdict.value,
                evaluations=verdict.evaluations,
                kept=answer is not None,
                terminal=ends,
                complete=answer is not None,
                count=len(equal),
                answer=answer,
                stop=sample.stop,
                logps=rounded_logps(sample.logps),
            )
        )


def breadth_first(builder: TreeBuilder) -> Search[None]:
    """Expand level by level. A level is one batch of samples and one batch of verdicts, whatever the model says."""
    level = [ROOT]
    while level and builder.budget:
        children = yield from builder.expand(level)
        level = builder.select(children)


def depth_first(builder: TreeBuilder) -> Search[None]:
    """Follow the best children until nothing is left to follow or the budget is spent.

    At most `search.num_kept` children are followed under each state, and none valued below `search.dfs_threshold`.
    """
    threshold = builder.config.dfs_threshold
    stack = [ROOT]
    while stack and builder.budget:
        children = yield from builder.expand([stack.pop()])
        # a child without a readable verdict is not known to be bad: it is followed, last
        promising = [node for node in children if threshold is None or node.value is None or node.value >= threshold]
        stack.extend(reversed(builder.select(promising)))  # the best is popped first


# by the name that `search.strategy` gives it; another search is one function and one entry
STRATEGIES: dict[str, Callable[[TreeBuilder], Search[None]]] = {"bfs": breadth_first, "dfs": depth_first}
