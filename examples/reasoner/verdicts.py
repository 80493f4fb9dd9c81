"""How good a search's votes and verdicts were: `python examples/reasoner/verdicts.py RUN/trees.jsonl [--variant hard]`.

By the corpus' arithmetic: a state is right if a flawless writer could have written every line of it. A verdict calls a
state likely if its value lies in the upper half of the scale from 1 to 10. Prints one JSON object; gold and truth are used
here alone, never in a search.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corpus import VARIANTS, Variant, gold, is_right

from cpo_fast.evaluate.statistics import wilson_interval
from cpo_fast.tree import SearchTree, path_to, read_trees

MIDDLE = 5.5  # between `search.value_impossible` and `search.value_likely`


def share(flags: Sequence[bool]) -> float | None:
    """The share of true ones, None of no flags."""
    return round(sum(flags) / len(flags), 3) if flags else None


def describe(trees: Sequence[SearchTree], variant: Variant) -> dict[str, Any]:
    """Accuracy of the vote with its 95 % interval, of verdicts (all, and by depth), and of winning paths."""
    judged: list[tuple[int, bool, bool]] = []  # depth, whether the state is right, whether it was called likely
    winners: list[bool] = []
    for tree in trees:
        for node in tree.nodes:
            truth = is_right(variant, tree.question, [one.text for one in path_to(tree.nodes, node.id)])
            if node.value is not None:
                judged.append((node.depth, truth, node.value > MIDDLE))
            if node.id in tree.winning_nodes:
                winners.append(truth)
    votes = [tree.answer == gold(tree.question) for tree in trees]
    depths = sorted({depth for depth, _, _ in judged})
    return {
        "questions": len(trees),
        "vote_accuracy": share(votes),
        "vote_interval": [round(bound, 3) for bound in wilson_interval(sum(votes), len(votes))],
        "states": len(judged),
        "states_right": share([truth for _, truth, _ in judged]),
        "verdicts_right": share([truth == likely for _, truth, likely in judged]),
        "right_called_likely": share([likely for _, truth, likely in judged if truth]),
        "wrong_called_impossible": share([not likely for _, truth, likely in judged if not truth]),
        "verdicts_right_by_depth": {
            str(depth): share([truth == likely for at, truth, likely in judged if at == depth]) for depth in depths
        },
        "winning_paths": len(winners),
        "winning_paths_right": share(winners),
        "thought_tokens_per_question": round(sum(tree.num_thought_tokens for tree in trees) / len(trees), 1),
    }


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("trees", type=Path)
    parser.add_argument("--variant", choices=VARIANTS, default="plain")
    settings = parser.parse_args()
    print(json.dumps(describe(read_trees(settings.trees), VARIANTS[settings.variant]), indent=1))


if __name__ == "__main__":
    main()
