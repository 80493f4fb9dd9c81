"""Breadth-first search, the paper's: level by level, the n best open states of a level are expanded.

An answer takes no place among the n. Order is (-value, parent rank, sample index), so a level is one batch of samples
and one batch of verdicts whatever the model says.
"""

from cpo_fast.search.engine import Search
from cpo_fast.search.grower import Grower


def grow(grower: Grower) -> Search[None]:
    """Grow the whole tree, at most `search.max_steps` thoughts deep."""
    frontier = [grower.root]
    while frontier and grower.room:
        families = yield from grower.expand(frontier)
        frontier = grower.select([child for siblings in families for child in siblings])
