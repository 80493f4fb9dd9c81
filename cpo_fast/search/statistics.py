"""What a search cost and what it brought, a tree at a time: thoughts, values by depth, tokens generated and useful.

A token is useful when its thought lies on a winning path: what a chain that found the answer at once would have cost. The
rest (losers, duplicates, empty samples, verdicts) is the price of the search. The numbers of a tree are a pure function of
it, and those of a run of `collect` are sums over its trees.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpo_fast.search.engine import num_generated
from cpo_fast.search.state_evaluator import num_unparseable
from cpo_fast.tasks import Task
from cpo_fast.tree import Node, SearchTree


@dataclass(frozen=True)
class DepthStatistics:
    """The thoughts at one depth (steps, from 1).

    Attributes:
        num_thoughts: unique thoughts. num_kept: of them expanded or complete.
        num_judged: of them with a value. The next three are over those, or None without any.
        mean_value, min_value, max_value: of the evaluator's values.
    """

    depth: int
    num_thoughts: int
    num_kept: int
    num_judged: int
    mean_value: float | None
    min_value: float | None
    max_value: float | None


@dataclass(frozen=True)
class TreeStatistics:
    """One tree in numbers.

    Attributes:
        id, status: as in `tree.SearchTree`.
        num_samples: generated thoughts. num_unique: nodes, duplicates merged. num_duplicates: merged into another.
        num_empty: only whitespace. num_cut: nodes that reached the token cap.
        max_depth: thoughts of the longest chain. num_complete: chains that voted, num_winning of them on winning paths.
        num_answers: different answers.
        num_generated_tokens: of all samples and sampled verdicts. num_verdict_tokens: of the verdicts among them.
        num_useful_tokens: of the thoughts on winning paths, each once.
        depths: from the first step to the deepest.
    """

    id: str
    status: str
    num_samples: int
    num_unique: int
    num_duplicates: int
    num_empty: int
    num_cut: int
    max_depth: int
    num_complete: int
    num_answers: int
    num_winning: int
    num_generated_tokens: int
    num_verdict_tokens: int
    num_useful_tokens: int
    depths: tuple[DepthStatistics, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def tree_statistics(tree: SearchTree) -> TreeStatistics:
    """Count one tree."""
    by_depth: dict[int, list[Node]] = defaultdict(list)
    for node in tree.nodes:
        by_depth[node.depth].append(node)
    # by id: winning paths share their first thoughts, which were generated once
    useful = {node.id: node for winner in tree.winning_nodes for node in tree.path(winner)}
    num_unique = len(tree.nodes)
    num_samples = sum(node.count for node in tree.nodes) + tree.num_empty
    return TreeStatistics(
        id=tree.id,
        status=tree.status,
        num_samples=num_samples,
        num_unique=num_unique,
        num_duplicates=num_samples - tree.num_empty - num_unique,
        num_empty=tree.num_empty,
        num_cut=sum(node.stop == "length" for node in tree.nodes),
        max_depth=max(by_depth, default=0),
        num_complete=sum(node.complete for node in tree.nodes),
        num_answers=len({node.answer for node in tree.nodes if node.complete}),
        num_winning=len(tree.winning_nodes),
        num_generated_tokens=tree.num_thought_tokens + tree.num_verdict_tokens,
        num_verdict_tokens=tree.num_verdict_tokens,
        num_useful_tokens=sum(num_generated(node.token_ids, node.stop) for node in useful.values()),
        depths=tuple(_depth_statistics(depth, by_depth[depth]) for depth in sorted(by_depth)),
    )


def _depth_statistics(depth: int, nodes: Sequence[Node]) -> DepthStatistics:
    values = [node.value for node in nodes if node.value is not None]
    return DepthStatistics(
        depth=depth,
        num_thoughts=len(nodes),
        num_kept=sum(node.kept for node in nodes),
        num_judged=len(values),
        mean_value=sum(values) / len(values) if values else None,
        min_value=min(values, default=None),
        max_value=max(values, default=None),
    )


@dataclass(frozen=True)
class Diversity:
    """How different what a search found is: means over trees, or over states, in which duplicates are merged.

    Attributes:
        thoughts_per_state: distinct thoughts under a state that was expanded.
        paths_per_question, winning_paths_per_question: distinct complete chains of a tree, and the winning ones.
        answers_per_question: different answers among them.
    """

    thoughts_per_state: float
    paths_per_question: float
    winning_paths_per_question: float
    answers_per_question: float


def diversity(trees: Sequence[SearchTree]) -> Diversity:
    """Of at least one tree. A state counts as expanded when it has a thought."""
    counted = [tree_statistics(tree) for tree in trees]
    num_states = sum(len({node.parent for node in tree.nodes}) for tree in trees)
    return Diversity(
        sum(one.num_unique for one in counted) / max(1, num_states),
        sum(one.num_complete for one in counted) / len(trees),
        sum(one.num_winning for one in counted) / len(trees),
        sum(one.num_answers for one in counted) / len(trees),
    )


@dataclass(frozen=True)
class CollectResult:
    """Summary of the trees of this run's questions.

    Attributes:
        trees_path: the file, or this worker's part of it while other workers' questions are missing.
        num_questions: how many were asked, of which num_resumed were found finished.
        num_missing: of them not finished yet: other workers'. 0 in the file that all are in.
        num_other: trees of other questions in the same file, which training takes too.
        statuses: how many trees per status.
        num_thoughts: nodes, duplicates merged. num_samples: generated thoughts, duplicates and empty ones counted.
        num_empty: samples dropped because they were only whitespace. num_cut: nodes cut at the token cap.
        num_winning_paths: over all trees.
        num_generated_tokens: of all samples and sampled verdicts. num_useful_tokens: of the thoughts on winning paths.
        num_verdicts, num_unparseable: sampled verdicts on distinct thoughts, and those that could not be read.
        num_gold: questions with a reference answer. num_correct: whose vote equals it, for information only.
        first_failure: reason of the first failed question, or "".
        seconds: wall time of this call's searches, loading left out.
    """

    trees_path: str
    num_questions: int
    num_missing: int
    num_resumed: int
    statuses: dict[str, int]
    num_thoughts: int
    num_samples: int
    num_empty: int
    num_cut: int
    num_winning_paths: int
    num_generated_tokens: int
    num_useful_tokens: int
    num_verdicts: int
    num_unparseable: int
    num_gold: int
    num_correct: int
    first_failure: str
    seconds: float
    num_other: int = 0

    @property
    def vote_accuracy(self) -> float | None:
        """Share of the questions with a reference answer whose vote equals it, or None without any."""
        return self.num_correct / self.num_gold if self.num_gold else None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "vote_accuracy": self.vote_accuracy}


def summarise(
    trees_path: Path,
    trees: Sequence[SearchTree],
    counted: Sequence[TreeStatistics],
    task: Task,
    num_questions: int,
    num_resumed: int,
    seconds: float,
    num_other: int = 0,
) -> CollectResult:
    """Sum up `trees` and their statistics `counted`. Other arguments as the fields of `CollectResult`."""
    nodes = [node for tree in trees for node in tree.nodes]
    with_gold = [(tree, tree.gold) for tree in trees if tree.gold is not None]
    return CollectResult(
        trees_path=str(trees_path),
        num_questions=num_questions,
        num_missing=num_questions - len(trees),
        num_resumed=num_resumed,
        statuses=dict(Counter(tree.status for tree in trees)),
        num_thoughts=len(nodes),
        num_samples=sum(one.num_samples for one in counted),
        num_empty=sum(one.num_empty for one in counted),
        num_cut=sum(one.num_cut for one in counted),
        num_winning_paths=sum(one.num_winning for one in counted),
        num_generated_tokens=sum(one.num_generated_tokens for one in counted),
        num_useful_tokens=sum(one.num_useful_tokens for one in counted),
        # only sampled verdicts have a label
        num_verdicts=sum("label" in record for node in nodes for record in node.evaluations),
        num_unparseable=sum(num_unparseable(node.evaluations) for node in nodes),
        num_gold=len(with_gold),
        num_correct=sum(task.is_correct(tree.answer, gold) for tree, gold in with_gold),
        first_failure=next((f"{tree.id}: {tree.detail}" for tree in trees if tree.status == "failed"), ""),
        seconds=round(seconds, 3),
        num_other=num_other,
    )
