"""How many questions each data set of a mixture gives.

    n_i = w_i * scale,   scale = min(total / sum of w, min over i of size_i / w_i)

The shares are those of the weights, exactly up to rounding; without a total the mixture is as large as the shares allow.
"""

import math
from collections.abc import Sequence


def apportion(weights: Sequence[float], sizes: Sequence[int], total: int | None) -> list[int]:
    """Questions to take from each data set.

    Args:
        weights: relative shares, positive.
        sizes: questions that each data set has.
        total: questions in all, or None for as many as the shares allow. Where a data set is too small for its share,
            all give fewer, so that the shares hold.
    """
    largest = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    wanted = math.inf if total is None else total / sum(weights)
    if total is None or wanted > largest:
        # the data set that sets the limit gives everything; floor would lose a question to rounding
        return [min(size, math.floor(weight * largest + 1e-9)) for size, weight in zip(sizes, weights, strict=True)]
    exact = [weight * wanted for weight in weights]
    counts = [math.floor(value + 1e-9) for value in exact]
    # largest remainders get the rest; equal remainders in the order of the data sets
    order = sorted(range(len(exact)), key=lambda place: (counts[place] - exact[place], place))
    for place in order[: total - sum(counts)]:
        counts[place] += 1
    return counts
