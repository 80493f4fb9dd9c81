"""Which examples are trained, when, and how much each counts: pure functions of questions, seed and epoch.

    split_by_question   training and held-out examples, no question on both sides
    weigh               factors of the pairs' losses
    epoch_batches       the examples of every optimizer step of an epoch

There is no sampler state to save or lose.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from cpo_fast.data.examples import Example
from cpo_fast.data.pair_rules import draw
from cpo_fast.errors import DataError


def split_by_question(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(training examples, held-out examples), each in the order given.

    Args:
        fraction: share of the questions to hold out. 0 holds out none, anything above at least one, and one question
            always stays to train on.

    Raises:
        ValueError: the fraction is not in [0, 1). DataError: there are not two questions to part.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"expected a fraction in [0, 1), got {fraction}")
    if fraction == 0:
        return list(examples), []
    # by question: its pairs share the prompt and most thoughts, so a split by pair would validate on what was trained
    groups = {example.group for example in examples}
    if len(groups) < 2:
        raise DataError(
            f"data.held_out={fraction} needs at least two questions, the data has {len(groups)}; set data.held_out=0"
        )
    count = min(max(1, round(fraction * len(groups))), len(groups) - 1)
    names = draw(groups, count, seed, "held_out")  # a larger count holds out a superset
    held_out = [example for example in examples if example.group in names]
    return [example for example in examples if example.group not in names], held_out


def weigh(pairs: Sequence[Example], weight: Literal["pair", "node", "question"]) -> list[Example]:
    """The same pairs with `weight` set, so that it averages to 1. Weigh again after taking a part of them.

        pair      w = 1
        node      w = N / (states * pairs of its state)          each state counts equally
        question  w = N / (questions * pairs of its question)    each question counts equally

    A state is a prompt of a question. In a plain mean a state contributes winners times losers terms, and questions with
    many branches dominate.
    """
    if weight == "pair":
        return [replace(pair, weight=1.0) for pair in pairs]
    keys: list[Hashable] = [(pair.group, pair.prompt_ids) if weight == "node" else pair.group for pair in pairs]
    members = Counter(keys)
    return [
        replace(pair, weight=len(pairs) / (len(members) * members[key])) for pair, key in zip(pairs, keys, strict=True)
    ]


def epoch_batches(
    groups: Sequence[str], batch_size: int, order: Literal["pairs", "questions"], seed: int, epoch: int
) -> list[list[int]]:
    """Batches of indices for one epoch. Every index appears exactly once, and the last batch may be short.

    Args:
        groups: the question of each example.
        batch_size: examples per optimizer step.
        order: `pairs` shuffles examples independently, the batches that a pairwise trainer would see. `questions` shuffles
            questions and keeps each one's examples together, so that a step shares more.
        seed, epoch: key of the counter-based generator (Philox). Equal keys give equal batches.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    if order == "pairs":
        indices = generator.permutation(len(groups)).tolist()
    else:
        members: dict[str, list[int]] = {}
        for index, group in enumerate(groups):
            members.setdefault(group, []).append(index)
        names = list(members)  # in the order of the data
        indices = [index for place in generator.permutation(len(names)) for index in members[names[place]]]
    return [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
