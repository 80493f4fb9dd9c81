"""How much each pair counts in the mean loss.

    pair      w = 1
    node      w = N / (states * pairs of its state)          each state counts equally
    question  w = N / (questions * pairs of its question)    each question counts equally

with N pairs, so that the weights of all pairs sum to N. In a plain mean a state contributes winners times losers terms,
and questions with many branches dominate.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Literal

from cpo_fast.data.pair import PreferencePair


def weigh_pairs(pairs: Sequence[PreferencePair], weight: Literal["pair", "node", "question"]) -> list[PreferencePair]:
    """The same pairs with `weight` set; a state is a prompt of a question. Weigh again after taking a part of them."""
    if weight == "pair":
        return [replace(pair, weight=1.0) for pair in pairs]
    keys: list[Hashable] = [(pair.group, pair.prompt_ids) if weight == "node" else pair.group for pair in pairs]
    members = Counter(keys)
    return [
        replace(pair, weight=len(pairs) / (len(members) * members[key])) for pair, key in zip(pairs, keys, strict=True)
    ]
