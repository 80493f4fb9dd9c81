"""Whether two measurements on the same questions differ: the exact McNemar test and the paired bootstrap.

McNemar, with b questions that only the first answers right and c that only the second does, n = b + c:

    p = min(1, 2 sum_{i <= min(b, c)} C(n, i) / 2^n)

the two-sided sign test of "a discordant question is as likely to favour either side"; the questions on which both agree
say nothing about the difference (Q. McNemar, Psychometrika 12, 1947). The sum is made of integers, so nothing is
approximated and nothing overflows.

The bootstrap resamples the n questions with replacement, B times, and takes percentiles of the mean difference. It
needs no model of the scores, so it serves F1 and accuracy alike; with a few dozen questions it is somewhat too narrow,
as every percentile interval is (B. Efron, R. Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
"""

from collections.abc import Sequence

import numpy

# drawn indices held at once: 32 MiB of int64, whatever the number of questions
MAX_DRAWN = 1 << 22


def mcnemar_exact(num_only_first: int, num_only_second: int) -> float:
    """Two-sided exact p-value that the two are equally often right.

    Args:
        num_only_first: b, questions that only the first answers right.
        num_only_second: c, questions that only the second answers right.

    Returns:
        p in (0, 1]; 1 when there is no discordant question.

    Raises:
        ValueError: a count is negative.
    """
    if num_only_first < 0 or num_only_second < 0:
        raise ValueError(f"expected counts >= 0, got {num_only_first} and {num_only_second}")
    num_discordant = num_only_first + num_only_second
    ways, total = 1, 0
    for i in range(min(num_only_first, num_only_second) + 1):
        total += ways
        ways = ways * (num_discordant - i) // (i + 1)  # C(n, i + 1) from C(n, i), always whole
    # the division of two integers is correctly rounded even where neither fits a float
    return min(1.0, 2 * total / 2**num_discordant)


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
        num_resamples: B.
        seed: equal seeds give equal intervals.
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
    rows = max(1, MAX_DRAWN // num_questions)
    means = numpy.empty(num_resamples)  # [B]
    for start in range(0, num_resamples, rows):
        drawn = generator.integers(num_questions, size=(min(rows, num_resamples - start), num_questions))
        means[start : start + rows] = differences[drawn].mean(axis=1)
    low, high = numpy.percentile(means, [50 * (1 - confidence), 50 * (1 + confidence)])
    return float(low), float(high)
