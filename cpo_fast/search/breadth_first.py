"""Breadth-first search, the paper's: level by level, the n best open states of a level are expanded.

An answer takes no place among the n. Order is (-value, parent rank, sample index), so a level is one batch of samples
and one batch of verdicts whatever the model says.
"""

from cpo_fast.search.grower import Grower


def grow(grower: Grower) -> None:
    """Grow the whole tree, at most `search.max_steps` thoughts deep."""
    frontier = [grower.root]
    while frontier and grower.room:
        children = [child for siblings in grower.expand(frontier) for child in siblings]
        frontier = grower.select(children)
