"""McNemar's exact test against published p-values; the bootstrap against enumeration, theory and its own coverage."""

import itertools
import math
import tracemalloc
from fractions import Fraction

import numpy
import pytest

from cpo_fast.evaluate.statistics import holm, mcnemar_exact, paired_bootstrap


@pytest.mark.parametrize(
    ("num_only_first", "num_only_second", "expected", "tolerance"),
    [
        # Armitage, Berry, Statistical Methods in Medical Research (1994), p. 127: two culture media
        (12, 2, 0.0129, 5e-5),
        # Fagerland, Lydersen, Laake, BMC Med. Res. Methodol. 13:91 (2013): airway hyper-responsiveness
        (1, 7, 0.0703, 5e-5),
        # Agresti, Categorical Data Analysis (1990), table 10.1: approval of a prime minister; R's exact2x2 prints it
        (150, 86, 3.716e-05, 5e-9),
        # the documentation of mlxtend, evaluate.mcnemar, scenario A
        (11, 1, 0.00634765625, 1e-15),
    ],
)
def test_mcnemar_equals_published_p_values(
    num_only_first: int, num_only_second: int, expected: float, tolerance: float
) -> None:
    assert mcnemar_exact(num_only_first, num_only_second) == pytest.approx(expected, abs=tolerance)
    assert mcnemar_exact(num_only_second, num_only_first) == mcnemar_exact(num_only_first, num_only_second)


def test_mcnemar_equals_counting_every_outcome() -> None:
    for total in range(12):
        heads = [sum(outcome) for outcome in itertools.product((0, 1), repeat=total)]
        for first in range(total + 1):
            low = min(first, total - first)
            extreme = sum(each <= low or each >= total - low for each in heads)
            assert mcnemar_exact(first, total - first) == Fraction(extreme, 2**total)


def test_mcnemar_without_discordant_questions_or_with_thousands() -> None:
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(4000, 4000) == 1.0
    # 2^-8000 is no float; the normal approximation with continuity correction is good to a few per cent this far in
    z = (abs(4150 - 3850) - 1) / math.sqrt(8000)
    assert mcnemar_exact(3850, 4150) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)
    with pytest.raises(ValueError, match="expected counts"):
        mcnemar_exact(-1, 3)


def test_holm_corrects_by_how_many_tests_are_left() -> None:
    """By hand: 4 x 0.005, 3 x 0.01, 2 x 0.03, and 0.04, which no smaller p-value may exceed."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    assert holm([0.02]) == [0.02]


def test_bootstrap_percentiles_equal_the_enumerated_resamples() -> None:
    first, second = [0.0, 1.0, 0.0], [1.0, 0.5, 0.0]
    differences = [b - a for a, b in zip(first, second, strict=True)]
    means = [sum(drawn) / 3 for drawn in itertools.product(differences, repeat=3)]  # all 27, equally likely
    for confidence in (0.5, 0.8):
        exact = numpy.percentile(sorted(means), [50 * (1 - confidence), 50 * (1 + confidence)], method="inverted_cdf")
        found = paired_bootstrap(first, second, num_resamples=40_000, confidence=confidence)
        assert found == pytest.approx(exact, abs=1e-12)


def test_bootstrap_interval_is_normal_theory_on_many_questions() -> None:
    generator = numpy.random.default_rng(5)
    first, second = generator.random(4000), generator.random(4000) ** 2
    difference = second - first
    half_width = 1.959964 * difference.std() / math.sqrt(4000)
    low, high = paired_bootstrap(list(first), list(second), num_resamples=4000)
    assert (low, high) == pytest.approx((difference.mean() - half_width, difference.mean() + half_width), abs=6e-4)
    # pairing matters: the same scores against shuffled partners are far more spread
    related = numpy.clip(first + 0.01 * generator.standard_normal(4000), 0, 1)
    low, high = paired_bootstrap(list(first), list(related), num_resamples=1000)
    assert high - low < 0.1 * 2 * half_width


def test_bootstrap_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = numpy.random.default_rng(11)
    # per question: 25 % gained, 10 % lost, so the true difference is 0.15
    changes = generator.choice([1.0, -1.0, 0.0], p=[0.25, 0.10, 0.65], size=(400, 80))
    covered = 0
    for seed, row in enumerate(changes):
        low, high = paired_bootstrap([0.0] * 80, list(row), num_resamples=500, seed=seed)
        covered += low <= 0.15 <= high
    # 95 % nominal; 400 data sets have a standard error of 1.1 points, and percentile intervals are a little narrow
    assert 0.91 <= covered / 400 <= 0.98


def test_bootstrap_is_a_function_of_its_seed() -> None:
    first, second = [0.0, 1.0] * 20, [1.0, 1.0, 0.0, 1.0] * 10
    assert paired_bootstrap(first, second, seed=3) == paired_bootstrap(first, second, seed=3)
    spread = {paired_bootstrap(first, list(numpy.linspace(0, 1, 40)), seed=seed) for seed in range(3)}
    assert len(spread) == 3
    assert paired_bootstrap([0.5, 0.5], [0.75, 0.75]) == (0.25, 0.25)


def test_bootstrap_never_draws_too_much_at_once() -> None:
    scores = numpy.tile([1.0, 0.0, 0.0, 0.0], 1000)
    tracemalloc.start()
    try:
        found = paired_bootstrap([0.0] * 4000, list(scores), num_resamples=4000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100e6  # bytes; the 16 million draws and their scores are 256e6
    half_width = 1.959964 * scores.std() / math.sqrt(4000)
    assert found == pytest.approx((0.25 - half_width, 0.25 + half_width), abs=1e-3)


@pytest.mark.parametrize(
    ("first", "second", "changes"),
    [([], [], {}), ([1.0], [1.0, 0.0], {}), ([1.0], [1.0], {"num_resamples": 0}), ([1.0], [1.0], {"confidence": 1.0})],
)
def test_bootstrap_refuses_what_is_not_paired(first: list[float], second: list[float], changes: dict) -> None:
    with pytest.raises(ValueError, match="expected"):
        paired_bootstrap(first, second, **changes)
