"""Search trees to preference pairs: the rule `all` of Chain of Preference Optimization (arXiv 2406.09136).

For every state s on a winning path: the children of s that lie on a winning path are chosen, every other generated child
of s, pruned ones included, is rejected, and each (chosen, rejected) couple is a pair. Children of states off the winning
paths are never used. A pure function of the tree: gold answers, times and file order do not enter.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpo_fast.files import write_jsonl
from cpo_fast.tasks import Question, get_task
from cpo_fast.tree import ROOT, Node, Prompt, SearchTree, read_prompt, read_trees


@dataclass(frozen=True)
class PairCounts:
    """What `write_pairs` did: pairs by step (from 1), trees that gave pairs, and trees that gave none by reason."""

    num_pairs: int
    pairs_by_step: dict[int, int]
    num_trees: int
    trees_without_pairs: dict[str, int]


@dataclass(frozen=True)
class TreePair:
    """One pair of sibling thoughts and the state they continue (`parent`, -1 for the question itself)."""

    parent: int
    chosen: Node
    rejected: Node


def tree_pairs(tree: SearchTree) -> list[TreePair]:
    """All pairs of one tree by rule `all`: by state, then chosen, then rejected, each in node order."""
    winning = {node.id for winner in tree.winning_nodes for node in tree.path(winner)}
    states = [ROOT, *sorted(winning)] if winning else []
    pairs: list[TreePair] = []
    for state in states:
        children = tree.children(state)
        chosen = [node for node in children if node.id in winning]
        rejected = [node for node in children if node.id not in winning]
        pairs.extend(TreePair(state, winner, loser) for winner in chosen for loser in rejected)
    return pairs


def pair_row(tree: SearchTree, prompt: Prompt, pair: TreePair) -> dict[str, Any]:
    """One line of `pairs.jsonl`: the three texts that TRL and others read, the exact ids, and the provenance.

    The ids are those of the search: root ids as tokenised, thoughts as generated.
    """
    state = tree.path(pair.parent)
    text = get_task(tree.task).prompt(Question(tree.id, tree.question)) + "".join(node.text for node in state)
    return {
        "prompt": text,
        "chosen": pair.chosen.text,
        "rejected": pair.rejected.text,
        "prompt_token_ids": [*tree.root_ids(prompt), *tree.path_ids(pair.parent)],
        "chosen_token_ids": list(pair.chosen.token_ids),
        "rejected_token_ids": list(pair.rejected.token_ids),
        "chosen_final": ends_chain(pair.chosen),
        "rejected_final": ends_chain(pair.rejected),
        "tree": tree.id,
        "step": pair.chosen.depth,
        "chosen_node": pair.chosen.id,
        "rejected_node": pair.rejected.id,
        "chosen_value": pair.chosen.value,
        "rejected_value": pair.rejected.value,
    }


def ends_chain(node: Node) -> bool:
    """Whether end-of-sequence belongs after this thought: the chain ends here and was not cut at the token cap."""
    return node.terminal and node.stop != "length"


def iterate_pair_rows(trees_path: str | Path) -> Iterator[dict[str, Any]]:
    """Every pair row of a `trees.jsonl`, in tree order."""
    prompts: dict[str, Prompt] = {}
    for tree in read_trees(trees_path):
        if tree.prompt_hash not in prompts:
            prompts[tree.prompt_hash] = read_prompt(trees_path, tree.prompt_hash)
        for pair in tree_pairs(tree):
            yield pair_row(tree, prompts[tree.prompt_hash], pair)


def write_pairs(trees_path: str | Path, pairs_path: str | Path) -> PairCounts:
    """Write `pairs.jsonl` from `trees.jsonl`, atomically; the same trees give the same bytes."""
    rows = list(iterate_pair_rows(trees_path))
    write_jsonl(pairs_path, rows)
    by_step: dict[int, int] = {}
    for row in rows:
        by_step[row["step"]] = by_step.get(row["step"], 0) + 1
    with_pairs = {row["tree"] for row in rows}
    without: dict[str, int] = {}
    trees = read_trees(trees_path)
    for tree in trees:
        if tree.id not in with_pairs:
            reason = tree.status if tree.status != "ok" else "no losing sibling"
            without[reason] = without.get(reason, 0) + 1
    return PairCounts(len(rows), dict(sorted(by_step.items())), len(with_pairs), without)
