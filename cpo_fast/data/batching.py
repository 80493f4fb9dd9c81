"""Which pairs an optimizer step trains on: a pure function of the pairs' groups, the seed and the epoch.

`pairs` shuffles pairs independently, the batches that a pairwise trainer would see. `questions` shuffles questions and
keeps each one's pairs together, so that a step shares more. There is no sampler state to save or lose.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np


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
