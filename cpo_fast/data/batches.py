"""Training and held-out data parted by question: a question (group) never stands on both sides.

Pairs of one question share its prompt and most of its thoughts, so a split by pair would validate on what was trained.

Which pairs an optimizer step trains on: a pure function of the pairs' groups, the seed and the epoch.

`pairs` shuffles pairs independently, the batches that a pairwise trainer would see. `questions` shuffles questions and
keeps each one's pairs together, so that a step shares more. There is no sampler state to save or lose.

How much each pair counts in the mean loss.

    pair      w = 1
    node      w = N / (states * pairs of its state)          each state counts equally
    question  w = N / (questions * pairs of its question)    each question counts equally

with N pairs, so that the weights of all pairs sum to N. In a plain mean a state contributes winners times losers terms,
and questions with many branches dominate.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Literal, Protocol, TypeVar

import numpy as np

from cpo_fast.data.examples import PreferencePair
from cpo_fast.data.pair_rules import draw
from cpo_fast.errors import DataError


class Grouped(Protocol):
    """Anything that belongs to a question."""

    @property
    def group(self) -> str:
        """The question."""


Item = TypeVar("Item", bound=Grouped)


def split_by_question(items: Sequence[Item], fraction: float, seed: int) -> tuple[list[Item], list[Item]]:
    """(training items, held-out items), each in the order given.

    Which questions are held out depends on their names and the seed, not on the order of the items; a larger fraction
    holds out a superset.

    Args:
        items: pairs or examples.
        fraction: share of the questions to hold out; 0 holds out none, anything above at least one, and one question
            always stays to train on.
        seed: the run's seed.

    Raises:
        ValueError: the fraction is not in [0, 1). DataError: there are not two questions to part.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"expected a fraction in [0, 1), got {fraction}")
    if fraction == 0:
        return list(items), []
    groups = {item.group for item in items}
    if len(groups) < 2:
        raise DataError(
            f"data.held_out={fraction} needs at least two questions, the data has {len(groups)}; set data.held_out=0"
        )
    count = min(max(1, round(fraction * len(groups))), len(groups) - 1)
    held_out = draw(groups, count, seed, "held_out")
    return [item for item in items if item.group not in held_out], [item for item in items if item.group in held_out]


def epoch_batches(
    groups: Sequence[str], batch_pairs: int, order: Literal["pairs", "questions"], seed: int, epoch: int
) -> list[list[int]]:
    """Batches of indices for one epoch; every index appears exactly once, the last batch may be short.

    Args:
        groups: the question of each pair.
        batch_pairs: pairs per optimizer step.
        order: `pairs` or `questions`.
        seed, epoch: key of the counter-based generator (Philox); equal keys give equal batches.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    if order == "pairs":
        indices = generator.permutation(len(groups)).tolist()
    else:
        members: dict[str, list[int]] = {}
        for index, group in enumerate(groups):
            members.setdefault(group, []).append(index)
        names = list(members)
        indices = [index for place in generator.permutation(len(names)) for index in members[names[place]]]
    return [indices[start : start + batch_pairs] for start in range(0, len(indices), batch_pairs)]


def weigh_pairs(pairs: Sequence[PreferencePair], weight: Literal["pair", "node", "question"]) -> list[PreferencePair]:
    """The same pairs with `weight` set; a state is a prompt of a question. Weigh again after taking a part of them."""
    if weight == "pair":
        return [replace(pair, weight=1.0) for pair in pairs]
    keys: list[Hashable] = [(pair.group, pair.prompt_ids) if weight == "node" else pair.group for pair in pairs]
    members = Counter(keys)
    return [
        replace(pair, weight=len(pairs) / (len(members) * members[key])) for pair, key in zip(pairs, keys, strict=True)
    ]
