"""The search of one question: which states are expanded, what becomes of their samples, and which answer wins.

    expand     k thoughts are sampled under a state. Equal ones become one node with a count. The evaluator judges each
    bfs        the paper's search, level by level: the n best open states of a level are expanded
    dfs        the best child of a state first, to the end of its chain, then the next best
    mcts       Monte Carlo tree search: where simulations lead that go by mean value and by how seldom a state was visited
    vote       over the complete chains by the evaluator's values of their last thoughts, see `selection`

A line `Answer: ...` ends its chain. If its answer can be read and it ended by newline or end-of-sequence, the node is
complete and votes. A thought that was cut at the token cap, that ended the sequence before an answer, or that starts
another question ends its chain too, without a vote. Every thought that was generated stays in the tree, followed or not.
Order is (-value, parent rank, sample index): no sets, no hash order.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial

from cpo_fast.config import Config
from cpo_fast.errors import failure_detail
from cpo_fast.search.engine import Requests, Sample, SampleRequest, Search
from cpo_fast.search.selection import puct, rank, vote
from cpo_fast.search.state_evaluator import Evaluator, Verdict, state_digest
from cpo_fast.search.tree_store import Provenance
from cpo_fast.tasks import Prompts, Question, common_prefix_length
from cpo_fast.tree import ROOT, Node, SearchTree, Status, comparable, path_to, rounded_logps

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
        answer, winners = vote(builder.nodes, prompts.task.vote_by, config.search.min_value)
        if winners:
            status: Status = "ok"
        elif any(node.complete for node in builder.nodes):
            status = "abstained"
        else:
            status = "no_answer" if builder.nodes else "no_candidates"
        return replace(
            tree,
            nodes=tuple(builder.nodes),
            winning_nodes=tuple(winners),
            answer=answer,
            num_empty=builder.num_empty,
            status=status,
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
        open_nodes = [node for node in children if self.is_open(node)]
        values = [node.value for node in open_nodes]
        return [open_nodes[index].id for index in rank(values, self.config.num_kept, self.config.keep_ties)]

    def is_open(self, node: Node) -> bool:
        """Whether the search may continue a state."""
        return not node.terminal and node.depth < self.config.max_steps

    def reward(self, node: Node) -> float:
        """A node's value from 0, impossible or no readable verdict, to 1, likely."""
        low, high = self.config.value_impossible, self.config.value_likely
        return 0.0 if node.value is None else (node.value - low) / (high - low)

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


def monte_carlo(builder: TreeBuilder) -> Search[None]:
    """Monte Carlo tree search: simulations until `search.num_simulations`, the budget, or all open states are spent.

    A simulation walks from the question down, each time to the child that `selection.puct` puts first (the earlier sample
    of equals), to a state that was not expanded or to a complete chain. The state is expanded, and the walk goes on to the
    best of its children that is open or complete. The evaluator's value of the thought where the walk ends, from 0 to 1, is
    the reward of every state on it; 0 where the expanded state has no such child. A child's P is its share of its siblings'
    samples; its Q before a visit is its own value. States below which nothing can be continued or vote are not entered.
    """
    config, nodes = builder.config, builder.nodes
    visits: Counter[int] = Counter()
    rewards: defaultdict[int, float] = defaultdict(float)  # summed over the visits
    children: dict[int, list[int]] = {}  # of an expanded state, those that a walk may enter

    def urgency(child: int, num_parent_visits: int) -> float:
        num_visits = visits[child]
        quality = rewards[child] / num_visits if num_visits else builder.reward(nodes[child])
        prior = nodes[child].count / config.num_candidates
        return puct(quality, prior, num_visits, num_parent_visits, config.exploration)

    num_open = 1  # states to expand, the question itself at first
    for _ in range(config.num_simulations):
        if not (num_open and builder.budget):
            break
        path = [ROOT]
        while path[-1] in children:  # max keeps the first of equals, and children stand in sample order
            path.append(max(children[path[-1]], key=partial(urgency, num_parent_visits=visits[path[-1]])))
        leaf, reward = path[-1], 0.0
        if leaf == ROOT or not nodes[leaf].complete:
            thoughts = yield from builder.expand([leaf])
            num_open += sum(map(builder.is_open, thoughts)) - 1
            children[leaf] = [node.id for node in thoughts if node.complete or builder.is_open(node)]
            if children[leaf]:
                path.append(max(children[leaf], key=lambda child: comparable(nodes[child].value)))
            else:
                _close(children, path)
        if path[-1] not in children:
            reward = builder.reward(nodes[path[-1]])
        visits.update(path)
        for state in path:
            rewards[state] += reward
    nodes[:] = [replace(node, visits=visits[node.id]) for node in nodes]


def _close(children: dict[int, list[int]], path: Sequence[int]) -> None:
    """Take the last state of a path, below which nothing is left, from its parent, and so on up while that leaves none."""
    for parent, state in zip(path[-2::-1], path[:0:-1], strict=True):
        children[parent].remove(state)
        if children[parent]:
            break


# by the name that `search.strategy` gives it; another search is one function and one entry
STRATEGIES: dict[str, Callable[[TreeBuilder], Search[None]]] = {
    "bfs": breadth_first,
    "dfs": depth_first,
    "mcts": monte_carlo,
}
