"""Small search trees with values, samples and log-probs of a model, and the files that hold them."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from cpo_fast.tree import Node, SearchTree
from tests.data.hand_made import PROMPT, node, tree, write_trees

TokenLogps = Callable[[list[int], int], list[float]]  # of a sequence's tokens from a position on


def valued_tree(seed: int, tree_id: str, largest_id: int = 90) -> SearchTree:
    """A question with 4 thoughts, two of them expanded, off the winning path too. Siblings share their first tokens.

    Values tie and one is missing, samples repeat, one chain breaks off.
    """
    generator = random.Random(f"{seed} {tree_id}")
    nodes: list[Node] = []

    def grow(parent: int, depth: int, count: int, answers: Sequence[str | None]) -> None:
        shared = generator.randint(5, largest_id)
        for index in range(count):
            ids = [shared] * (index % 2) + [generator.randint(5, largest_id) for _ in range(generator.randint(1, 4))]
            value = generator.choice([1.0, 2.5, 4.0, 10.0, round(generator.uniform(1, 10), 2)])
            changes = {"token_ids": (*ids, 5 + len(nodes)), "value": value, "count": generator.randint(1, 3)}
            nodes.append(node(len(nodes), parent, depth, answers[index], **changes))

    grow(-1, 1, 4, [None] * 4)
    grow(0, 2, 4, ["4", "4", "5", None])
    grow(2, 2, 3, ["6", None, "4"])
    nodes[3] = replace(nodes[3], value=None)
    nodes[1] = replace(nodes[1], value=nodes[0].value)
    nodes[5] = replace(nodes[5], value=nodes[4].value + (-0.5 if nodes[4].value > 5 else 0.5))
    nodes[6] = replace(nodes[6], stop="length", complete=False, answer=None)
    return tree(nodes, (4, 5), tree_id, question=f"How many are {tree_id}?", question_token_ids=(50, 5 + seed % 40, 51))


def sampled_by(trees: Sequence[SearchTree], logps: TokenLogps, **hashes: str) -> list[SearchTree]:
    """The trees with the log-probs that a model gives their thoughts, as a search notes them."""
    found = []
    for one in trees:
        nodes = []
        for each in one.nodes:
            state = [*one.root_ids(PROMPT), *one.path_ids(each.parent)]
            values = logps([*state, *each.token_ids], len(state))
            nodes.append(replace(each, logps=tuple(min(0.0, round(value, 6)) for value in values)))
        found.append(replace(one, nodes=tuple(nodes), **hashes))
    return found


def visited(one: SearchTree) -> SearchTree:
    """The tree with visit counts that sum up towards the root."""
    visits = [0] * len(one.nodes)
    for each in reversed(one.nodes):
        visits[each.id] += 1 + each.id % 3
        if each.parent >= 0:
            visits[each.parent] += visits[each.id]
    nodes = tuple(replace(each, visits=count) for each, count in zip(one.nodes, visits, strict=True))
    return replace(one, nodes=nodes)


def valued_trees(num_trees: int, **changes: int) -> list[SearchTree]:
    """Trees of `num_trees` questions."""
    return [valued_tree(seed, f"q{seed}", **changes) for seed in range(num_trees)]


def write(path: Path, trees: Sequence[SearchTree]) -> Path:
    """Write the trees and their prompt; returns the path."""
    return write_trees(path, trees)
