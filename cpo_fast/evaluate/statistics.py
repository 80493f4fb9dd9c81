"""How sure an accuracy is, what a typical duration is, and whether two measurements on the same questions differ.

Wilson, with p = successes / n and z the normal quantile of the confidence:

    (p + z²/2n ± z sqrt(p (1 - p) / n + z²/4n²)) / (1 + z²/n)

It keeps its coverage at the small n and extreme p of a quick evaluation, where the textbook interval
p ± z sqrt(p (1 - p) / n) collapses to a point (E. B. Wilson, J. Am. Stat. Assoc. 22, 1927).

Two models on the same questions need a paired test. The exact McNemar test, with b questions that only the first
answers right and c that only the second does, n = b + c:

    p = min(1, 2 sum_{i <= min(b, c)} C(n, i) / 2^n)

the two-sided sign test of "a discordant question is as likely to favour either side". Questions on which both agree say
nothing about the difference (Q. McNemar, Psychometrika 12, 1947).

The bootstrap resamples the n questions with replacement, B times, and takes percentiles of the mean difference. It
needs no model of the scores, so it serves F1 and accuracy alike. With a few dozen questions it is somewhat too narrow,
as every percentile interval is (B. Efron, R. Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
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
        num_successes: between 0 and `num_trials`, which is at least 1.
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


# drawn indices held at once: 32 MiB of int64, whatever the number of questions
MAX_DRAWN = 1 << 22


def mcnemar_exact(num_only_first: int, num_only_second: int) -> float:
    """Two-sided exact p-value in (0, 1] that the two are equally often right. 1 when there is no discordant question.

    Args:
        num_only_first, num_only_second: b and c, questions that only the first or the second answers right.

    Raises:
        ValueError: a count is negative.
    """
    if num_only_first < 0 or num_only_second < 0:
        raise ValueError(f"expected counts >= 0, got {num_only_first} and {num_only_second}")
    num_discordant = num_only_first + num_only_second
    ways, total = 1, 0  # integers: the sum is exact and cannot overflow
    for i in range(min(num_only_first, num_only_second) + 1):
        total += ways
        ways = ways * (num_discordant - i) // (i + 1)  # C(n, i + 1) from C(n, i), always whole
    # the division of two integers is correctly rounded even where neither fits a float
    return min(1.0, 2 * total / 2**num_discordant)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of a family of tests, corrected so that any false one among them is as unlikely as the smallest says.

    The i-th smallest of m, from 0, becomes the largest of (m - j) p_j over j <= i, at most 1 (S. Holm, Scand. J. Stat. 6,
    1979).
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, largest = [0.0] * len(order), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p_values[index]))
        corrected[index] = largest
    return corrected


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    num_resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of mean(second) - mean(first) over resampled questions.

    Args:
        first, second: one score per question, in the same order of questions.
        num_resamples: B. seed: equal seeds give equal intervals.
        confidence: coverage, between 0 and 1 exclusive.

    Returns:
        (low, high), linear interpolation between order statistics.

    Raises:
        ValueError: no scores, unequal lengths, or an argument out of range.
    """
    if not first or len(first) != len(second):
        raise ValueError(f"expected equally many scores, at least one, got {len(first)} and {len(second)}")
    if num_resamples < 1 or not 0 < confidence < 1:
        raise ValueError(f"expected num_resamples >= 1 and 0 < confidence < 1, got {num_resamples} and {confidence}")
    differences = numpy.asarray(second, dtype=numpy.float64) - numpy.asarray(first, dtype=numpy.float64)  # [n]
    generator = numpy.random.Generator(numpy.random.Philox(key=seed))
    num_questions = len(differences)
    rows = max(1, MAX_DRAWN // num_questions)  # resamples drawn at once
    means = numpy.empty(num_resamples)  # [B]
    for start in range(0, num_resamples, rows):
        # [rows, n] int64
        drawn = generator.integers(num_questions, size=(min(rows, num_resamples - start), num_questions))
        means[start : start + rows] = differences[drawn].mean(axis=1)
    low, high = numpy.percentile(means, [50 * (1 - confidence), 50 * (1 + confidence)])
    return float(low), float(high)
