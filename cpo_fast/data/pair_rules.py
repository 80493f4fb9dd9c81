"""What a search tree teaches: which thoughts are preferred over which, by a rule that is a pure function of the tree.

Sibling rules (Chain of Preference Optimization, arXiv 2406.09136): for every state s on a winning path, the children of
s on a winning path are winners and every other generated child, pruned ones included, is a loser. Children of states off
the winning paths are never used.

    all     each winner against each loser
    lower   each winner against the losers valued below it
    lowest  each winner against the loser of the smallest value (ties: smallest sample index), if that is below it
    fpo     each winning path against each other complete path, whole, at most `max_fpo_pairs` a question

A thought without a value (no verdict was readable) ranks below every value, as the search ranks it: it is below any
winner that has a value, and nothing is below a winner without one. Gold answers, times and file order do not enter.

Objectives that read the whole tree (`train.method`) need values, so thoughts without one are left out:

    tpo, dvo, tree_grpo  the children of every state that was expanded, on a winning path or not, if their values differ
    full_step            the pairs of fpo, if every thought of both paths has a value
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cpo_fast.config import PairsConfig
from cpo_fast.files import canonical_json
from cpo_fast.tree import ROOT, Node, SearchTree, comparable

OUTSIDE_FRACTION = "outside pairs.rejected_fraction"
NOT_BELOW = "value not below the winner's"
NOT_LOWEST = "not the lowest value"
OVER_CAP = "over pairs.max_fpo_pairs"
SAME_TOKENS = "chosen equals rejected"
NO_VALUE = "a thought without a value"
EQUAL_VALUES = "no thoughts of different values"


@dataclass(frozen=True)
class TreeExample:
    """An example that is still in its tree.

    Attributes:
        parent: the state that the responses continue, -1 for the question itself.
        step: depth of the responses' thoughts from 1, or 0 when they are whole paths.
        last: the last thought of each response: (chosen, rejected), (completion,), or the children of a state, of which
            the best is the first and the worst the second. A response is the thoughts from below `parent` down to it.
    """

    parent: int
    step: int
    last: tuple[Node, ...]

    @property
    def node_ids(self) -> tuple[int, ...]:
        return tuple(node.id for node in self.last)


@dataclass(frozen=True)
class Selection:
    """What a rule took from one tree, by state, then winner, then loser, each in node order, and what it left."""

    examples: tuple[TreeExample, ...]
    unused: tuple[tuple[TreeExample, str], ...] = ()  # with the reason


def select_pairs(tree: SearchTree, config: PairsConfig, seed: int = 0) -> Selection:
    """The pairs of one tree, and the couples of winner and loser that became none. Seed and ids key every draw."""
    pairs: list[TreeExample] = []
    unused: list[tuple[TreeExample, str]] = []
    for parent, step, winners, losers in _sibling_groups(tree, whole_paths=config.rule == "fpo"):
        # before the rule looks at them; nested, because what a share of 0.2 takes, a share of 0.3 takes too
        drawn = [loser for loser in losers if uniform(seed, "rejected", tree.id, loser.id) < config.rejected_fraction]
        drawn_ids = {loser.id for loser in drawn}
        # min keeps the first of equals, and siblings stand in sample order
        lowest = min(drawn, key=lambda node: comparable(node.value), default=None)
        for winner in winners:
            for loser in losers:
                pair = TreeExample(parent, step, (winner, loser))
                reason = ""
                if loser.id not in drawn_ids:
                    reason = OUTSIDE_FRACTION
                elif config.rule in ("lower", "lowest") and comparable(loser.value) >= comparable(winner.value):
                    reason = NOT_BELOW
                elif config.rule == "lowest" and loser is not lowest:
                    reason = NOT_LOWEST
                elif response_ids(tree, parent, winner) == response_ids(tree, parent, loser):
                    reason = SAME_TOKENS
                if reason:
                    unused.append((pair, reason))
                else:
                    pairs.append(pair)
    if config.rule == "fpo" and len(pairs) > config.max_fpo_pairs:  # drawn, and left in node order
        order = sorted(pairs, key=lambda pair: uniform(seed, "fpo", tree.id, *pair.node_ids))
        kept = {pair.node_ids for pair in order[: config.max_fpo_pairs]}
        unused += [(pair, OVER_CAP) for pair in pairs if pair.node_ids not in kept]
        pairs = [pair for pair in pairs if pair.node_ids in kept]
    return Selection(tuple(pairs), tuple(unused))


def select_winning_paths(tree: SearchTree) -> Selection:
    """The winning paths in node order, each token sequence once: the completions of supervised fine-tuning."""
    last: dict[tuple[int, ...], Node] = {}
    for winner in tree.winning_nodes:
        last.setdefault(tuple(tree.path_ids(winner)), tree.nodes[winner])
    return Selection(tuple(TreeExample(ROOT, 0, (node,)) for node in last.values()))


def select_children(tree: SearchTree) -> Selection:
    """For every expanded state its children with values, the best first, the worst second and the others in node order."""
    groups: list[TreeExample] = []
    unused: list[tuple[TreeExample, str]] = []
    for state in [ROOT, *(node.id for node in tree.nodes)]:
        first: dict[tuple[int, ...], Node] = {}
        for node in tree.children(state):
            first.setdefault(node.token_ids, node)  # texts that differ may have equal tokens
        step = 1 if state == ROOT else tree.nodes[state].depth + 1
        unused += [(TreeExample(state, step, (node,)), NO_VALUE) for node in first.values() if node.value is None]
        valued = [node for node in first.values() if node.value is not None]
        if not valued:
            continue
        # both are the first of equals
        best, worst = (choose(valued, key=lambda node: comparable(node.value)) for choose in (max, min))
        others = tuple(node for node in valued if node.id not in (best.id, worst.id))
        if best.value == worst.value:
            unused.append((TreeExample(state, step, tuple(valued)), EQUAL_VALUES))
        else:
            groups.append(TreeExample(state, step, (best, worst, *others)))
    return Selection(tuple(groups), tuple(unused))


def select_valued_paths(tree: SearchTree, config: PairsConfig, seed: int = 0) -> Selection:
    """The pairs of rule `fpo`, whatever the configured one, whose thoughts have values."""
    whole = select_pairs(tree, config.model_copy(update={"rule": "fpo"}), seed)
    paths = {node.id: tree.path(node.id) for pair in whole.examples for node in pair.last}
    lacking = {last for last, path in paths.items() if any(node.value is None for node in path)}
    without = tuple((pair, NO_VALUE) for pair in whole.examples if lacking & set(pair.node_ids))
    return Selection(tuple(pair for pair in whole.examples if not lacking & set(pair.node_ids)), whole.unused + without)


def response(tree: SearchTree, parent: int, last: Node) -> list[Node]:
    """The thoughts from below state `parent` down to `last`."""
    return tree.path(last.id)[len(tree.path(parent)) :]


def response_ids(tree: SearchTree, parent: int, last: Node) -> list[int]:
    """Token ids of `response`."""
    return [token for node in response(tree, parent, last) for token in node.token_ids]


def draw(names: Iterable[str], count: int, seed: int, purpose: str) -> set[str]:
    """`count` of the distinct `names` (all of them if there are fewer): those with the smallest numbers."""
    return set(sorted(set(names), key=lambda name: (uniform(seed, purpose, name), name))[:count])


def uniform(seed: int, *names: str | int) -> float:
    """A number in [0, 1) for these names: the first 53 bits of SHA-256(seed, names) / 2^53.

    There is no generator state, so row order, file order and other questions change nothing. Different purposes pass
    different first names.
    """
    content = canonical_json([seed, *names])
    digest = hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _sibling_groups(tree: SearchTree, whole_paths: bool) -> Iterator[tuple[int, int, list[Node], list[Node]]]:
    """Yield (state, step, winners, losers) for every state on a winning path, or once for whole paths."""
    if not tree.winning_nodes:
        return
    if whole_paths:
        complete = [node for node in tree.nodes if node.complete]
        winners = set(tree.winning_nodes)
        yield ROOT, 0, [n for n in complete if n.id in winners], [n for n in complete if n.id not in winners]
        return
    winning = {node.id for winner in tree.winning_nodes for node in tree.path(winner)}
    for state in [ROOT, *sorted(winning)]:
        children = tree.children(state)
        step = 1 if state == ROOT else tree.nodes[state].depth + 1
        yield state, step, [n for n in children if n.id in winning], [n for n in children if n.id not in winning]
