"""What a search cost and what it brought, a tree at a time: thoughts, values by depth, tokens generated and useful.

A token is useful when its thought lies on a winning path; those are what a chain that found the answer at once would
have cost. Everything else that was generated (losers, duplicates, empty samples, verdicts) is the price of the search.
A pure function of the tree.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cpo_fast.search.engine import num_generated
from cpo_fast.tree import Node, SearchTree


@dataclass(frozen=True)
class DepthStatistics:
    """The thoughts at one depth (steps, from 1).

    Attributes:
        num_thoughts: unique thoughts. num_kept: of them expanded or complete.
        num_judged: of them with a value; the next three are over those, None without any.
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
        max_depth: thoughts of the longest chain. num_complete: chains that voted. num_answers: different answers.
        num_winning: winning paths.
        num_generated_tokens: of all samples and all sampled verdicts.
        num_verdict_tokens: of the verdicts among them.
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
        """Plain JSON values: a line of `statistics.jsonl`."""
        return asdict(self)


def tree_statistics(tree: SearchTree) -> TreeStatistics:
    """Count one tree."""
    by_depth: dict[int, list[Node]] = defaultdict(list)
    for node in tree.nodes:
        by_depth[node.depth].append(node)
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
