"""Claims about the block schedule: on random forests every list and range equals brute force over the whole mask."""

from dataclasses import fields
from itertools import pairwise

import numpy as np
import pytest
import torch

from cpo_kernels.forest import build_forest
from cpo_kernels.tree_attention.schedule import TreeSchedule, tree_schedule, validate_subtree_end, window_schedule


def random_subtree_end(rng: np.random.Generator, num_rows: int) -> torch.Tensor:
    """Runs of 1 to 60 rows hung under a random open subtree: branches, chains, several roots, padding-like singles."""
    parent = np.full(num_rows, -1)
    row = 0
    while row < num_rows:
        length = min(int(rng.integers(1, 60)), num_rows - row)
        open_rows = [-1]
        above = row - 1
        while above >= 0:
            open_rows.append(above)
            above = parent[above]
        parent[row] = open_rows[int(rng.integers(0, len(open_rows)))]
        parent[row + 1 : row + length] = np.arange(row, row + length - 1)
        row += length
    end = np.arange(1, num_rows + 1)
    for row in range(num_rows - 1, -1, -1):
        if parent[row] >= 0:
            end[parent[row]] = max(end[parent[row]], end[row])
    return torch.from_numpy(end.astype(np.int32))


def dense_mask(end: torch.Tensor) -> np.ndarray:
    rows = np.arange(end.numel())
    return (rows[None, :] <= rows[:, None]) & (rows[:, None] < end.numpy()[None, :])


def lists(offsets: torch.Tensor, blocks: torch.Tensor) -> list[list[int]]:
    bounds = offsets.tolist()
    return [blocks[a:b].tolist() for a, b in pairwise(bounds)]


def check_lists(mask: np.ndarray, schedule: TreeSchedule) -> np.ndarray:
    """The mask, padded to whole key blocks, after a check of the full and partial lists against it."""
    num_rows, block_q, block_kv = len(mask), schedule.block_q, schedule.block_kv
    # keys beyond the line count as unseen, so a ragged key block can never be full
    padded = np.pad(mask, ((0, 0), (0, -num_rows % block_kv)))
    full, partial = [], []
    for m0 in range(0, num_rows, block_q):
        tiles = padded[m0 : m0 + block_q].reshape(-1, padded.shape[1] // block_kv, block_kv)
        is_full = tiles.all(axis=(0, 2))
        full.append(np.flatnonzero(is_full).tolist())
        partial.append(np.flatnonzero(tiles.any(axis=(0, 2)) & ~is_full).tolist())
    assert lists(schedule.full_offsets, schedule.full_blocks) == full
    assert lists(schedule.partial_offsets, schedule.partial_blocks) == partial
    return padded


def check_against_brute_force(end: torch.Tensor, schedule: TreeSchedule) -> None:
    padded, block_kv = check_lists(dense_mask(end), schedule), schedule.block_kv
    for block in range(padded.shape[1] // block_kv):
        keys = padded[:, block * block_kv : (block + 1) * block_kv]
        seeing = range(int(schedule.kv_query_start[block]), int(schedule.kv_query_stop[block]))
        seeing_all = range(int(schedule.kv_full_start[block]), int(schedule.kv_full_stop[block]))
        assert np.flatnonzero(keys.any(axis=1)).tolist() == list(seeing)
        assert np.flatnonzero(keys.all(axis=1)).tolist() == list(seeing_all)


@pytest.mark.parametrize("block_q", [16, 64, 128])
@pytest.mark.parametrize("block_kv", [16, 32, 128])
@pytest.mark.parametrize("num_rows", [1, 63, 64, 129, 777])
def test_schedule_equals_brute_force(block_q: int, block_kv: int, num_rows: int) -> None:
    rng = np.random.default_rng(block_q * block_kv + num_rows)
    for _ in range(4):
        end = random_subtree_end(rng, num_rows)
        check_against_brute_force(end, tree_schedule(end, block_q, block_kv))


@pytest.mark.parametrize("window", [1, 40, 10**6])
@pytest.mark.parametrize("blocks", [(16, 16), (128, 64), (3, 7)])
def test_schedule_under_a_window_equals_brute_force(blocks: tuple[int, int], window: int) -> None:
    """Lists exactly; a piece of work visits whole query blocks, and every row that sees its keys is in one piece."""
    rng = np.random.default_rng(window)
    for num_rows in (1, 129, 777):
        end = random_subtree_end(rng, num_rows)
        schedule, derived = window_schedule(tree_schedule(end, *blocks), window, (4, 2))
        mask = dense_mask(end)
        depths = mask.sum(axis=1) - 1
        assert derived.depths.tolist() == depths.tolist()
        padded = check_lists(mask & (depths[:, None] - depths[None] < window), schedule)
        visits = np.zeros((padded.shape[1] // blocks[1], num_rows), int)
        for block, start, stop in zip(schedule.work_block, schedule.work_start, schedule.work_stop, strict=True):
            visits[block, start : start + -(-(stop - start) // blocks[0]) * blocks[0]] += 1
        for block in range(len(visits)):
            keys = padded[:, block * blocks[1] : (block + 1) * blocks[1]]
            assert (visits[block][keys.any(axis=1)] == 1).all()
            assert visits[block].max() == 1
            assert keys[int(schedule.kv_full_start[block]) : int(schedule.kv_full_stop[block])].all()


def test_gaps_of_a_window_make_no_more_parts_than_memory_is_for() -> None:
    """A comb: chains of 100 rows below every row of a trunk, which sees the heads of the next 40 chains over a gap each."""
    ends = [3980 if row % 101 == 0 else min((row // 101 + 1) * 101, 3980) for row in range(3980)]
    wide, narrow = (
        window_schedule(tree_schedule(torch.tensor(ends, dtype=torch.int32), 16, 16), 40, heads)[0]
        for heads in ((1, 1), (128, 128))
    )
    gaps = [sum(np.diff(schedule.split_offsets.numpy()) - 1) for schedule in (wide, narrow)]
    assert gaps[0] > 500  # of one key head 1024 may be left
    assert gaps[1] == 249 // 8  # key blocks over 8
    mask = dense_mask(wide.subtree_end)
    depths = mask.sum(axis=1) - 1
    mask &= depths[:, None] - depths[None] < 40
    visited = np.zeros_like(mask)
    for block, start, stop in zip(narrow.work_block, narrow.work_start, narrow.work_stop, strict=True):
        assert not visited[start:stop, block * 16 : (block + 1) * 16].any()
        visited[start:stop, block * 16 : (block + 1) * 16] = True
    assert (visited | ~mask).all()


def test_blocks_larger_than_the_line_and_blocks_of_one_row() -> None:
    end = random_subtree_end(np.random.default_rng(0), 50)
    for block_q, block_kv in ((1, 1), (1, 7), (512, 3), (512, 512)):
        check_against_brute_force(end, tree_schedule(end, block_q, block_kv))


@pytest.mark.parametrize("seed", range(50))
def test_segments_are_the_maximal_runs_without_a_branch(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sequences = [rng.integers(0, 2, int(rng.integers(1, 9))).tolist() for _ in range(8)]
    forest = build_forest(sequences, pad_to_multiple_of=16)
    schedule = forest.schedule()

    parent = forest.parent_row.tolist()
    num_children = [parent.count(row) for row in range(len(parent))]
    starts = [row for row in range(len(parent)) if parent[row] != row - 1 or row == 0 or num_children[row - 1] != 1]
    assert schedule.host_segment_start.tolist() == starts
    assert schedule.host_segment_stop.tolist() == [*starts[1:], len(parent)]
    for start, stop, end in zip(
        schedule.host_segment_start, schedule.host_segment_stop, schedule.host_segment_end, strict=True
    ):
        assert (forest.subtree_end[start:stop] == end).all()


def test_one_chain_is_one_segment_and_causal_blocks() -> None:
    schedule = build_forest([list(range(256))]).schedule(64, 64)
    assert schedule.host_segment_stop.tolist() == [256]
    assert lists(schedule.full_offsets, schedule.full_blocks) == [[], [0], [0, 1], [0, 1, 2]]
    assert lists(schedule.partial_offsets, schedule.partial_blocks) == [[0], [1], [2], [3]]


def test_forest_schedule_uses_the_forest_line() -> None:
    forest = build_forest([[1, 2, 3, 4], [1, 5]], pad_to_multiple_of=8)
    check_against_brute_force(forest.subtree_end, forest.schedule(2, 4))


def test_empty_line_has_an_empty_schedule() -> None:
    schedule = tree_schedule(torch.zeros(0, dtype=torch.int32), 64, 64)
    assert schedule.num_rows == 0
    assert schedule.full_offsets.tolist() == schedule.partial_offsets.tolist() == [0]
    assert schedule.host_segment_start.numel() == schedule.host_segment_stop.numel() == 0


def test_every_tensor_is_int32_and_moves() -> None:
    schedule = build_forest([[1, 2], [1, 3]]).schedule(16, 32)
    moved = schedule.to("meta")
    tensors = [field.name for field in fields(schedule) if isinstance(getattr(schedule, field.name), torch.Tensor)]
    assert len(tensors) == 18
    for name in tensors:
        assert getattr(schedule, name).dtype == torch.int32, name
        assert getattr(moved, name).device.type == ("cpu" if name.startswith("host_") else "meta"), name
    assert (moved.block_q, moved.block_kv, moved.num_rows) == (16, 32, 3)


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ([3, 1, 3], "row < subtree_end.* <= 3 at row 1, got 1"),
        ([2, 2, 4], "row < subtree_end.* <= 3 at row 2, got 4"),
        ([2, 3, 3], "nest: expected subtree_end <= 2 at row 1, got 3"),
        ([5, 3, 3, 5, 6, 6], "nest: expected subtree_end <= 5 at row 4, got 6"),
        ([-1], "at row 0, got -1"),
    ],
)
def test_an_array_that_is_no_forest_is_refused(end: list[int], message: str) -> None:
    for check in (validate_subtree_end, tree_schedule):
        with pytest.raises(ValueError, match=message):
            check(torch.tensor(end, dtype=torch.int32))


@pytest.mark.parametrize("seed", range(100))
def test_validator_accepts_exactly_the_nested_intervals(seed: int) -> None:
    """A forest with one end changed is accepted if and only if its intervals still nest."""
    rng = np.random.default_rng(seed)
    end = random_subtree_end(rng, 90)
    validate_subtree_end(end)
    row = int(rng.integers(0, 90))
    end[row] = int(rng.integers(row + 1, 91))
    intervals = list(enumerate(end.tolist()))
    nested = all(other >= stop for start, other in intervals for at, stop in intervals if start <= at < other)
    if nested:
        validate_subtree_end(end)
    else:
        with pytest.raises(ValueError, match="nest"):
            validate_subtree_end(end)


def test_wrong_type_shape_and_block_size_are_refused() -> None:
    with pytest.raises(ValueError, match="1-D int32"):
        tree_schedule(torch.ones(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="1-D int32"):
        validate_subtree_end(torch.ones(1, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match="block_q >= 1"):
        tree_schedule(torch.ones(1, dtype=torch.int32), 0, 64)
