"""Which states go on, and which answer wins.

States go on in the order (-value, parent rank, sample index), cut at n. The vote is over the complete paths, grouped by
normalised answer:

    value   the largest sum of values, then the larger best value, then the group that came first
    count   the most paths, then the group whose path comes first in the order (-value, node)

Every complete path of the winning group is a winning path, or with `search.min_value` every one that has it: without any
the search abstains. Monte Carlo tree search walks from a state to the child of the largest

    PUCT    Q(child) + c P(child) sqrt(N(state)) / (1 + N(child))

(Rosin 2011; AlphaGo Zero, Silver et al. 2017; for thoughts of a language model Xie et al., arXiv 2405.00451): N counts
simulations that went through, Q is their mean reward, P the policy's probability, c `search.exploration`. Gold answers have
no part in any of these.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal

from cpo_fast.tree import Node, comparable


def rank(values: Sequence[float | None], num_kept: int, keep_ties: bool = False) -> list[int]:
    """Indices of the best `num_kept` values, best first. None ranks last.

    Args:
        values: in order of (parent rank, sample index), which decides ties.
        num_kept: n.
        keep_ties: go on past n as long as the value equals the n-th. None ties with nothing but None.
    """
    order = sorted(range(len(values)), key=lambda index: (-comparable(values[index]), index))
    end = min(num_kept, len(order))
    while keep_ties and 0 < end < len(order) and values[order[end]] == values[order[end - 1]]:
        end += 1
    return order[:end]


def puct(quality: float, prior: float, num_visits: int, num_parent_visits: int, exploration: float) -> float:
    """How much a child wants to be visited: Q, P, N(child), N(state) and c of the formula above."""
    return quality + exploration * prior * math.sqrt(num_parent_visits) / (1 + num_visits)


def vote(
    nodes: Iterable[Node], by: Literal["value", "count"] = "value", min_value: float | None = None
) -> tuple[str | None, list[int]]:
    """The winning answer and the ids of its complete nodes, ascending, or (None, []) when there is none.

    Args:
        nodes: of one tree. Only complete ones vote.
        by: what a path adds to its answer: its value (a path without a readable verdict adds 0), or one.
        min_value: leave out of the winners, after the vote, what is valued below. No readable verdict is below any.
    """
    groups: dict[str, list[Node]] = {}
    for node in nodes:
        if node.complete and node.answer is not None:
            groups.setdefault(node.answer, []).append(node)
    if not groups:
        return None, []
    strength = _summed_values if by == "value" else _num_paths
    # max keeps the first of equals, and groups stand in order of first appearance
    winner = max(groups, key=lambda answer: strength(groups[answer]))
    winners = [node.id for node in groups[winner] if min_value is None or comparable(node.value) >= min_value]
    return (winner if winners else None), winners


def _summed_values(group: list[Node]) -> tuple[float, ...]:
    values = [node.value for node in group]
    return sum(0.0 if value is None else value for value in values), max(comparable(value) for value in values)


def _num_paths(group: list[Node]) -> tuple[float, ...]:
    # two paths of one tree differ: equal siblings are merged
    first = min((-comparable(node.value), node.id) for node in group)
    return len(group), -first[0], -first[1]  # negated, because the group that comes first is the stronger
