"""Claims about key blocks whose query range is cut into parts: bounded, equal to the whole, added in one order.

The schedule cuts ranges of hundreds of rows. The kernels are given short lines, cut here by the same rules, and one line
that the schedule has cut.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from cpo_kernels import TreeSchedule, tree_schedule
from cpo_kernels.tolerances import random_subtree_end
from tests.cpo_kernels.attention_oracle import NAMES, excess, random_heads, triton_results
from tests.cpo_kernels.kernel_device import runs_kernels

MIN_PART_BLOCKS = 16
HEADS = (16, 16)  # query heads and key heads, unless others are named
MAX_PARTS = 2047  # times key heads: fewer than twice the 1024th share of the work


def prompt_and_thoughts(num_rows: int, prompt: int, thought: int) -> torch.Tensor:
    """subtree_end [T] int32 of one prompt and thoughts of equal length below it, which do not see each other."""
    ends = [num_rows] * prompt
    for start in range(prompt, num_rows, thought):
        ends += [min(start + thought, num_rows)] * (min(start + thought, num_rows) - start)
    return torch.tensor(ends, dtype=torch.int32)


def cut(schedule: TreeSchedule, num_cut: int, rows: int) -> TreeSchedule:
    """The same schedule with the query ranges of the first `num_cut` key blocks in parts of `rows` rows."""
    work: list[tuple[int, int, int, int]] = []  # block, start, stop, part
    offsets = [0]
    for block, (start, stop) in enumerate(zip(schedule.kv_query_start, schedule.kv_query_stop, strict=True)):
        if block >= num_cut:
            work.append((block, int(start), int(stop), -1))
            continue
        for first in range(int(start), int(stop), rows):
            work.append((block, first, min(first + rows, int(stop)), offsets[-1] + (first - int(start)) // rows))
        offsets.append(work[-1][3] + 1)
    columns = torch.tensor(work, dtype=torch.int32).T.contiguous()
    return replace(
        schedule,
        **dict(zip(("work_block", "work_start", "work_stop", "work_part"), columns, strict=True)),
        split_block=torch.arange(num_cut, dtype=torch.int32),
        split_offsets=torch.tensor(offsets, dtype=torch.int32),
        num_parts=offsets[-1],
    )


LINES = {
    "prompt": prompt_and_thoughts(2048, 100, 30),
    "chain": torch.full((1000,), 1000, dtype=torch.int32),
    "random": random_subtree_end(3, 1500, num_padding=20),
    "one row": torch.ones(1, dtype=torch.int32),
    "no row": torch.zeros(0, dtype=torch.int32),
}


@pytest.mark.parametrize("heads", [HEADS, (32, 8), (12, 1)])
@pytest.mark.parametrize("blocks", [(16, 16), (16, 64), (32, 16)])
@pytest.mark.parametrize("line", LINES)
def test_pieces_cover_every_query_range_once_and_in_order(
    line: str, blocks: tuple[int, int], heads: tuple[int, int]
) -> None:
    schedule = tree_schedule(LINES[line], *blocks, heads)
    starts, stops = schedule.work_start.tolist(), schedule.work_stop.tolist()
    pieces: dict[int, list[int]] = {}
    for place, block in enumerate(schedule.work_block.tolist()):
        pieces.setdefault(block, []).append(place)
    assert list(pieces) == list(range(len(schedule.kv_query_start)))
    split, slots = [], []
    for block, places in pieces.items():
        assert starts[places[0]] == schedule.kv_query_start[block]
        assert stops[places[-1]] == schedule.kv_query_stop[block]
        assert all(stops[one] == starts[two] for one, two in pairwise(places))
        assert all((stops[place] - starts[place]) % blocks[0] == 0 for place in places[:-1])
        parts = schedule.work_part[places].tolist()
        if len(places) > 1:
            split.append(block)
            slots.append(parts)
        else:
            assert parts == [-1]
    assert schedule.split_block.tolist() == split
    offsets = schedule.split_offsets.tolist()
    assert slots == [list(range(first, last)) for first, last in pairwise(offsets)]
    assert offsets[-1] == schedule.num_parts <= MAX_PARTS // heads[1]


def test_only_ranges_beyond_the_limit_are_cut() -> None:
    """The limit is 16 query blocks, or a 64th of all where that is more: a long chain has no range above it."""
    schedule = tree_schedule(prompt_and_thoughts(512, 16, 16), 16, 16)
    assert schedule.work_part.tolist()[:3] == [0, 1, -1]  # 32 query blocks see the first key block
    assert schedule.num_parts == 2
    assert tree_schedule(prompt_and_thoughts(16 * MIN_PART_BLOCKS, 16, 16), 16, 16).num_parts == 0
    assert tree_schedule(torch.full((8192,), 8192, dtype=torch.int32), 64, 64).num_parts == 0
    assert tree_schedule(prompt_and_thoughts(65536, 512, 40), 128, 64).num_parts > 16


@pytest.mark.parametrize(("heads", "limit"), [((32, 32), 16), ((32, 8), 4), ((64, 8), 2), ((28, 4), 3), ((71, 1), 1)])
def test_query_heads_of_one_key_head_shorten_the_pieces(heads: tuple[int, int], limit: int) -> None:
    """One program walks the range for every head of the group: 16 query blocks are 16 / group of its own."""
    subtree_end = prompt_and_thoughts(1701, 400, 50)
    schedule = tree_schedule(subtree_end, heads=heads)
    rows = (schedule.work_stop - schedule.work_start).tolist()
    assert max(rows) <= limit * schedule.block_q
    assert max(rows) > (limit - 1) * schedule.block_q or limit == 16  # all 14 blocks stay whole
    assert schedule.num_parts == 0 or limit < 16


def test_the_longest_piece_is_near_the_mean_load_of_a_program() -> None:
    """One tree, 32 query heads on 8 key heads, two programs on each of 132 multiprocessors: few wait for the prompt."""

    def longest_over_load(cut_for: tuple[int, int]) -> float:
        schedule = tree_schedule(prompt_and_thoughts(1701, 400, 50), heads=cut_for)
        rows = schedule.work_stop - schedule.work_start
        return float(rows.max() * 4 / (rows.sum() * 32 / (2 * 132)))

    assert longest_over_load((32, 8)) < 1.5
    assert longest_over_load((32, 32)) > 4


def test_few_key_heads_get_more_pieces_of_a_long_line() -> None:
    """A 1024th share times the key heads: of 8 key heads, a 128th of all query blocks."""
    subtree_end = prompt_and_thoughts(65536, 512, 40)
    whole = tree_schedule(subtree_end)
    ranges = [-(-rows // 128) for rows in (whole.kv_query_stop - whole.kv_query_start).tolist()]
    pieces = set()
    for key_heads in (4, 8, 16, 32):
        schedule = tree_schedule(subtree_end, heads=(key_heads, key_heads))
        limit = max(MIN_PART_BLOCKS, -(-sum(ranges) * key_heads // 1024))
        assert len(schedule.work_block) == sum(-(-blocks // limit) for blocks in ranges), key_heads
        pieces.add(len(schedule.work_block))
    assert len(pieces) == 4


def test_heads_that_share_no_key_head_evenly_are_refused() -> None:
    for heads in ((8, 3), (2, 4), (4, 0)):
        with pytest.raises(ValueError, match="multiple of the key heads"):
            tree_schedule(LINES["prompt"], heads=heads)


SHORT = prompt_and_thoughts(100, 30, 23)  # seven query blocks see the first key block, six the second
PROMPT = prompt_and_thoughts(529, 30, 23)  # 34 query blocks see the first key block: three parts, the last ragged


def short_in_parts(block_kv: int = 16) -> TreeSchedule:
    """Three parts of the first key block, the last ragged; of blocks of 16 keys two of the second."""
    return cut(tree_schedule(SHORT, 16, block_kv), 2 if block_kv == 16 else 1, 48)


@runs_kernels
def test_parts_add_up_to_the_whole_and_two_runs_are_bitwise_equal() -> None:
    """Two query heads on one key head."""
    inputs, schedule = random_heads(len(SHORT), 2, 1, 16, torch.float32), short_in_parts()
    assert schedule.split_offsets.tolist() == [0, 3, 5]
    parts = triton_results(inputs, SHORT, schedule)
    assert max(excess(parts, inputs, SHORT).values()) <= 1.0
    for name, got, want in zip(NAMES, parts, triton_results(inputs, SHORT), strict=True):
        first = 32 if name in ("dk", "dv") else 0  # the keys of the two blocks that are cut
        assert torch.equal(got[first:], want[first:]), name
    for first_run, second_run in zip(parts, triton_results(inputs, SHORT, schedule), strict=True):
        assert torch.equal(first_run, second_run)


@runs_kernels
def test_parts_that_the_schedule_makes_add_up() -> None:
    inputs, schedule = random_heads(len(PROMPT), 1, 1, 16, torch.float32), tree_schedule(PROMPT, 16, 16)
    assert schedule.split_offsets.tolist() == [0, 3, 6]
    assert max(excess(triton_results(inputs, PROMPT, schedule), inputs, PROMPT).values()) <= 1.0


@runs_kernels
def test_parts_that_the_schedule_makes_for_a_group_add_up() -> None:
    """Four query heads on one key head: seven query blocks in parts of four, which stay whole for a head each."""
    inputs, schedule = random_heads(len(SHORT), 4, 1, 16, torch.float32), tree_schedule(SHORT, 16, 16, (4, 1))
    assert schedule.split_offsets.tolist() == [0, 2, 4]
    assert tree_schedule(SHORT, 16, 16).num_parts == 0
    parts = triton_results(inputs, SHORT, schedule)
    assert max(excess(parts, inputs, SHORT).values()) <= 1.0
    assert all(map(torch.equal, parts, triton_results(inputs, SHORT, schedule)))


@runs_kernels
@pytest.mark.parametrize(("kv_heads", "head_dim", "dtype"), [(2, 16, torch.bfloat16), (1, 96, torch.float32)])
def test_parts_of_several_tiles(kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """Blocks of 64 keys are four tiles of a float32 head of 96; its columns are padded to 128."""
    inputs = random_heads(len(SHORT), kv_heads, kv_heads, head_dim, dtype)
    got = triton_results(inputs, SHORT, short_in_parts(block_kv=64))
    assert max(excess(got, inputs, SHORT).values()) <= 1.0


def dropped_part(right: TreeSchedule) -> TreeSchedule:
    return replace(right, split_offsets=right.split_offsets - (right.split_offsets > 0).int())


def part_added_twice(right: TreeSchedule) -> TreeSchedule:
    stop = right.work_stop.clone()
    stop[0] += right.block_q
    return replace(right, work_stop=stop)


def parts_of_the_next_block(right: TreeSchedule) -> TreeSchedule:
    return replace(right, split_block=right.split_block.flip(0))


@runs_kernels
@pytest.mark.parametrize("mutation", [dropped_part, part_added_twice, parts_of_the_next_block])
def test_a_wrong_cut_gives_wrong_gradients(mutation: Callable[[TreeSchedule], TreeSchedule]) -> None:
    inputs = random_heads(len(SHORT), 1, 1, 16, torch.float32)
    ratios = excess(triton_results(inputs, SHORT, mutation(short_in_parts())), inputs, SHORT)
    assert min(ratios["dk"], ratios["dv"]) > 100, ratios


@runs_kernels
def test_parts_are_added_in_the_order_of_the_schedule() -> None:
    """Reversed they give the same gradient to rounding and other bits, so a sum in arrival order would be seen."""
    right = short_in_parts()
    last = right.split_offsets[1:] - 1
    first = right.split_offsets[:-1]
    owner = torch.bucketize(right.work_part, right.split_offsets, right=True) - 1
    turned = torch.where(right.work_part < 0, right.work_part, (first + last)[owner.clamp(min=0)] - right.work_part)
    inputs = random_heads(len(SHORT), 1, 1, 16, torch.float32)
    got = triton_results(inputs, SHORT, replace(right, work_part=turned.int()))
    assert max(excess(got, inputs, SHORT).values()) <= 1.0
    want = triton_results(inputs, SHORT, right)
    assert not torch.equal(got[2], want[2])
    assert not torch.equal(got[3], want[3])
