"""How sure an accuracy is, and what a typical duration is: the Wilson score interval, and mean and percentiles.

Wilson, with p = successes / n and z the normal quantile of the confidence:

    (p + z²/2n ± z sqrt(p (1 - p) / n + z²/4n²)) / (1 + z²/n)

It stays inside [0, 1] and keeps its coverage at the small n and extreme p of a quick evaluation, where the textbook
interval p ± z sqrt(p (1 - p) / n) collapses to a point (E. B. Wilson, J. Am. Stat. Assoc. 22, 1927). Comparing two
models on the same questions needs a paired test: see `paired`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy


@dataclass(frozen=True)
class Spread:
    """Mean, median and 95th percentile of one quantity, in its own unit."""

    mean: float
    p50: float
    p95: float


def wilson_interval(num_successes: int, num_trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided Wilson score interval of a proportion, without continuity correction.

    Args:
        num_successes: between 0 and num_trials.
        num_trials: at least 1.
        confidence: coverage, between 0 and 1 exclusive.

    Returns:
        (low, high), 0 <= low <= num_successes / num_trials <= high <= 1.

    Raises:
        ValueError: an argument is out of range.
    """
    if num_trials < 1 or not 0 <= num_successes <= num_trials:
        raise ValueError(f"expected 0 <= num_successes <= num_trials >= 1, got {num_successes} of {num_trials}")
    if not 0 < confidence < 1:
        raise ValueError(f"expected 0 < confidence < 1, got {confidence}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = num_successes / num_trials
    centre = share + z * z / (2 * num_trials)
    half_width = z * math.sqrt(share * (1 - share) / num_trials + z * z / (4 * num_trials**2))
    scale = 1 + z * z / num_trials
    # at 0 and n the exact ends are 0 and 1; rounding must not push them past the proportion itself
    low = 0.0 if num_successes == 0 else (centre - half_width) / scale
    high = 1.0 if num_successes == num_trials else (centre + half_width) / scale
    return low, high


def spread(values: Sequence[float]) -> Spread:
    """Mean, median and 95th percentile (linear interpolation). Raises ValueError when there are no values."""
    if not values:
        raise ValueError("expected at least one value, got none")
    p50, p95 = numpy.percentile(values, [50, 95])
    return Spread(mean=float(numpy.mean(values)), p50=float(p50), p95=float(p95))
