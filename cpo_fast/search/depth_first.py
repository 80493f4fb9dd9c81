"""Depth-first search: the best child of a state first, to the end of its chain, then the next best.

At most `search.num_kept` children are followed under each state (breadth-first search keeps as many per level), and
none valued below `search.dfs_threshold`. A child without a readable verdict is not known to be bad: it is followed,
last. The node budget decides how far the search comes back; what it has not reached by then stays an unexpanded leaf.
"""

from cpo_fast.search.engine import Search
from cpo_fast.search.grower import Grower


def grow(grower: Grower) -> Search[None]:
    """Grow the tree along the best children until nothing is left to follow or the budget is spent."""
    threshold = grower.settings.dfs_threshold
    stack = [grower.root]
    while stack and grower.room:
        (children,) = yield from grower.expand([stack.pop()])
        promising = [
            child for child in children if threshold is None or child.value is None or child.value >= threshold
        ]
        stack.extend(reversed(grower.select(promising)))
