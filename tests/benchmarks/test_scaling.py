"""The simulated curve is computed by the code that trains, and says no more than it can."""

import pytest

from benchmarks.scaling import Cluster, searched_questions, simulate

EXAMPLES = searched_questions(60, 50, 1000)


def test_one_gpu_is_busy_all_of_the_time_and_more_are_less() -> None:
    values = [simulate(EXAMPLES, "pairs", 32, count) for count in (1, 2, 8)]
    busy = [each["split_efficiency"] for each in values if each is not None]
    assert busy[0] == 1
    assert busy[0] > busy[1] > busy[2] > 0.1
    # a shared prompt is computed on every rank that needs it
    tokens = [each["tokens_a_pair"] for each in values if each is not None]
    assert tokens[0] < tokens[1] < tokens[2]


def test_a_step_of_more_pairs_than_there_are_is_left_out() -> None:
    assert simulate(EXAMPLES, "pairs", len(EXAMPLES) + 1, 2) is None


def test_seconds_are_computing_exchange_and_a_fixed_part() -> None:
    cluster = Cluster(
        weights=1.0, operations_a_second=4.0, adapter_bytes=8.0, link_bytes_a_second=2.0, step_seconds=1.0
    )
    assert cluster.seconds(10.0, 1) == 11.0
    assert cluster.seconds(10.0, 2) == pytest.approx(11.0 + 4.0)
