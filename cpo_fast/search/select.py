"""Which states go on, and which answer wins.

States go on in the order (-value, parent rank, sample index), cut at n: no sets, no hash order, ties end at the cut.
The vote sums values over the complete paths of each normalised answer; the largest sum wins, then the group with the
larger best value, then the one that came first. Every complete path of the winning group is a winning path. Gold
answers have no part in either.
"""

from collections.abc import Iterable, Sequence

from cpo_fast.tree import Node


def rank(values: Sequence[float | None], num_kept: int) -> list[int]:
    """Indices of the best `num_kept` values, best first; None ranks last.

    Args:
        values: in order of (parent rank, sample index), which decides ties.
        num_kept: n.
    """
    order = sorted(range(len(values)), key=lambda index: (-_weight(values[index]), index))
    return order[:num_kept]


def vote(nodes: Iterable[Node]) -> tuple[str | None, list[int]]:
    """The winning answer and the ids of its complete nodes, ascending; (None, []) when nothing is complete.

    A path without a readable verdict counts as 0 in the sum.
    """
    groups: dict[str, list[Node]] = {}
    for node in nodes:
        if node.complete and node.answer is not None:
            groups.setdefault(node.answer, []).append(node)
    if not groups:
        return None, []
    # max keeps the first of equals, and groups stand in order of first appearance
    winner = max(groups, key=lambda answer: _strength(groups[answer]))
    return winner, [node.id for node in groups[winner]]


def _strength(group: list[Node]) -> tuple[float, float]:
    values = [node.value for node in group]
    return sum(0.0 if value is None else value for value in values), max(_weight(value) for value in values)


def _weight(value: float | None) -> float:
    return float("-inf") if value is None else value
