"""Wilson's interval against published values and its own defining equation; the spread of durations."""

import math

import pytest

from cpo_fast.evaluate.statistics import spread, wilson_interval


@pytest.mark.parametrize(
    ("num_successes", "num_trials", "expected"),
    [
        # Newcombe, Stat. Med. 17 (1998) 857-872, table I, method 3 (score, no continuity correction)
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0000, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilson_interval_equals_newcombes_table(
    num_successes: int, num_trials: int, expected: tuple[float, float]
) -> None:
    assert wilson_interval(num_successes, num_trials) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize(("num_successes", "num_trials"), [(1, 2), (3, 7), (40, 1000)])
def test_wilson_ends_solve_the_score_equation(num_successes: int, num_trials: int, confidence: float) -> None:
    # an end q is where |share - q| is z standard errors of q itself: P(|Z| < z) is then the confidence
    share = num_successes / num_trials
    for end in wilson_interval(num_successes, num_trials, confidence):
        z = abs(share - end) / math.sqrt(end * (1 - end) / num_trials)
        assert math.erf(z / math.sqrt(2)) == pytest.approx(confidence, abs=1e-9)


def test_wilson_interval_contains_the_share_and_is_symmetric() -> None:
    for num_trials in (1, 2, 12, 999):
        for num_successes in {0, 1, num_trials // 2, num_trials}:
            low, high = wilson_interval(num_successes, num_trials)
            assert 0 <= low <= num_successes / num_trials <= high <= 1
            mirrored = wilson_interval(num_trials - num_successes, num_trials)
            assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


@pytest.mark.parametrize("arguments", [(0, 0), (-1, 5), (6, 5), (1, 5, 0.0), (1, 5, 1.0)])
def test_wilson_interval_refuses_what_is_no_proportion(arguments: tuple) -> None:
    with pytest.raises(ValueError, match="expected"):
        wilson_interval(*arguments)


def test_spread_is_mean_median_and_interpolated_95th_percentile() -> None:
    values = [5.0, 1.0, 2.0, 4.0, 8.0]
    result = spread(values)
    assert (result.mean, result.p50) == (4.0, 4.0)
    assert result.p95 == pytest.approx(5 + 0.8 * 3)  # rank 0.95 * 4 = 3.8 between the 4th and 5th value
    assert spread([3.0]).p95 == 3.0
    with pytest.raises(ValueError, match="at least one"):
        spread([])
