"""Claims about the scored tokens: read at the parent row, segment-major, and every wrong index refused."""

import numpy as np
import pytest
import torch

from cpo_kernels.forest import build_forest
from cpo_kernels.logprob_plan import LogprobPlan
from tests.cpo_kernels.forest_oracle import random_sequences


def int64(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize("seed", range(100))
def test_plan_scores_each_token_at_the_row_before_it_on_its_path(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sequences = random_sequences(rng)
    starts = [int(rng.integers(1, len(s) + 1)) for s in sequences]
    forest = build_forest(sequences, pad_to_multiple_of=5)
    plan = forest.logprob_plan(starts)

    rows, targets, segments = [], [], []
    for s, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        path = forest.path_rows[forest.path_offsets[s] : forest.path_offsets[s + 1]].tolist()
        for t in range(start, len(sequence)):
            rows.append(path[t - 1])
            targets.append(sequence[t])
            segments.append(s)
    assert (plan.rows.tolist(), plan.targets.tolist(), plan.segments.tolist()) == (rows, targets, segments)
    assert plan.num_segments == len(sequences)
    assert plan.rows.dtype == plan.targets.dtype == plan.segments.dtype == torch.int64


def test_first_tokens_of_siblings_share_one_row() -> None:
    plan = build_forest([[1, 2, 3], [1, 2, 4], [1, 2, 5]]).logprob_plan([2, 2, 2])
    assert plan.rows.tolist() == [1, 1, 1]
    assert plan.targets.tolist() == [3, 4, 5]
    assert plan.unique_rows.tolist() == [1]


def test_start_at_the_length_gives_an_empty_segment() -> None:
    plan = build_forest([[1, 2], [1, 3], [4]]).logprob_plan([2, 1, 1])
    assert plan.segments.tolist() == [1]
    assert plan.num_segments == 3


def test_starts_may_be_a_tensor_or_an_array() -> None:
    forest = build_forest([[1, 2, 3], [1, 2]])
    for starts in (torch.tensor([1, 2], dtype=torch.int32), np.array([1, 2])):
        assert forest.logprob_plan(starts).rows.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([1, 0], r"starts\[1\] of sequence 1: expected 1 <= start <= 2, got 0"),
        ([4, 1], r"starts\[0\] of sequence 0: expected 1 <= start <= 3, got 4"),
        ([1, -1], r"starts\[1\]"),
        ([1], "expected 2, one a sequence"),
        ([[1, 1]], "expected 2, one a sequence"),
        ([1.0, 1.0], "expected integers"),
    ],
)
def test_a_bad_start_is_named(starts: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_forest([[1, 2, 3], [1, 2]]).logprob_plan(starts)


def test_build_lists_distinct_rows_in_any_order() -> None:
    plan = LogprobPlan.build(int64(7, 2, 7, 0), int64(1, 1, 3, 0), int64(2, 0, 0, 2), num_segments=4)
    assert plan.unique_rows.tolist() == [0, 2, 7]
    assert torch.equal(plan.unique_rows[plan.pair_row[plan.pair_index]], plan.rows)


@pytest.mark.parametrize(
    ("rows", "targets", "segments", "message"),
    [
        (int64(0, 1), int64(0), int64(0, 0), "targets: expected 2 entries like rows, got 1"),
        (int64(0), int64(0), int64(0, 0), "segments: expected 1 entries like rows, got 2"),
        (int64(0).int(), int64(0), int64(0), "rows: expected a 1-D int64 tensor, got .*int32"),
        (int64(0), int64(0)[None], int64(0), r"targets: expected a 1-D int64 tensor, got \(1, 1\)"),
        (int64(-1), int64(0), int64(0), "rows: expected values >= 0, got -1"),
        (int64(0), int64(-100), int64(0), "targets: expected values >= 0, got -100"),
        (int64(0), int64(0), int64(-1), "segments: expected values >= 0, got -1"),
        (int64(0), int64(0), int64(3), "segments: expected values < num_segments = 3, got 3"),
    ],
)
def test_build_refuses_what_is_out_of_range(
    rows: torch.Tensor, targets: torch.Tensor, segments: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LogprobPlan.build(rows, targets, segments, num_segments=3)


def test_build_refuses_a_negative_number_of_segments() -> None:
    with pytest.raises(ValueError, match="num_segments"):
        LogprobPlan.build(int64(), int64(), int64(), num_segments=-1)


def test_to_moves_every_tensor() -> None:
    plan = build_forest([[1, 2]]).logprob_plan([1]).to("meta")
    for name, value in vars(plan).items():
        if isinstance(value, torch.Tensor) and name != "host_offsets":
            assert value.device.type == "meta", name
    assert plan.host_offsets.device.type == "cpu"


def test_pairs_are_distinct_and_their_orders_belong_together() -> None:
    plan = LogprobPlan.build(int64(7, 2, 7, 0, 7), int64(5, 1, 3, 0, 5), int64(2, 0, 0, 2, 1), num_segments=4)
    pairs = list(zip(plan.unique_rows[plan.pair_row].tolist(), plan.pair_target.tolist(), strict=True))
    assert pairs == [(0, 0), (2, 1), (7, 3), (7, 5)]
    assert [pairs[i] for i in plan.pair_index] == list(zip(plan.rows.tolist(), plan.targets.tolist(), strict=True))
    assert plan.row_offsets.tolist() == plan.host_offsets.tolist() == [0, 1, 2, 4]
    assert plan.pair_order.tolist() == [3, 1, 2, 0, 4]
    assert plan.pair_lengths.tolist() == [1, 1, 1, 2]
    assert plan.segment_order.tolist() == [1, 2, 4, 0, 3]
    assert plan.segment_lengths.tolist() == [2, 1, 2, 0]
    assert (plan.num_segments, plan.max_row, plan.max_target) == (4, 7, 5)
