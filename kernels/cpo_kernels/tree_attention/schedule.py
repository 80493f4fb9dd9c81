"""Which blocks of the tree-attention matrix a tiled kernel visits, and which of those need no mask.

Row i may see row j iff j <= i < subtree_end[j]. For query rows [m0, m1) and a block of keys [n0, n1), with emin and
emax the least and greatest `subtree_end` of the keys, the block is skipped iff n0 >= m1 or emax <= m0, full iff
n1 - 1 <= m0 and emin >= m1, partial otherwise. Both tests are exact, so a kernel that follows the schedule computes
every visible score and masks only where it must. The rows that see a key block at all are one contiguous range. dK and
dV therefore walk [n0, emax) and need no list, only pieces of work. A range much longer than the others is cut into
parts, by the heads of the attention too, whose sums are added afterwards in the order of the parts.

Under a sliding window `window_schedule` leaves out the blocks that no row sees through it. Its tests are exact too; the
rows that see a key block are then several ranges, those less than four query blocks apart taken as one and masked.

Computed by csrc in O(T + visited blocks). A schedule makes attention faster and never changes what it means.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

import cpo_kernels._csrc as _csrc
from cpo_kernels.device import to_device
from cpo_kernels.tree_attention.window import Window


@dataclass(frozen=True, eq=False)
class TreeSchedule:
    """The blocks to visit and the runs without a branch, as plain int32 tensors.

    T rows, Q = ceil(T / block_q) query blocks, K = ceil(T / block_kv) key blocks, W >= K pieces of work, B key blocks
    cut into parts, N runs. "Full" means that all block_kv keys exist and are visible: the ragged last key block is never
    full, so a kernel loads a full block unchecked. Ranges are half open, and an empty one has start == stop. All tensors
    are on one device but those of the runs, which stay on the CPU because only host code reads them.
    """

    subtree_end: torch.Tensor  # [T] int32, what the schedule was made for
    block_q: int
    block_kv: int
    kv_query_start: torch.Tensor  # [K] int32, rows [start, stop) see at least one key of the block; no others do
    kv_query_stop: torch.Tensor  # [K] int32
    kv_full_start: torch.Tensor  # [K] int32, rows [start, stop) see every key of the block; no others do
    kv_full_stop: torch.Tensor  # [K] int32
    full_offsets: torch.Tensor  # [Q + 1] int32, query block b has full key blocks full_offsets[b]:full_offsets[b + 1]
    full_blocks: torch.Tensor  # int32, full key blocks of all query blocks, ascending within one
    partial_offsets: torch.Tensor  # [Q + 1] int32
    partial_blocks: torch.Tensor  # int32, partial key blocks likewise
    work_block: torch.Tensor  # [W] int32, key block of a piece of work on dK and dV, ascending
    work_start: torch.Tensor  # [W] int32, its query rows [start, stop): the pieces of a block cover its query range,
    work_stop: torch.Tensor  # [W] int32, in order and whole multiples of block_q rows, but for the last
    work_part: torch.Tensor  # [W] int32, -1 where the piece is the whole range, else its place among the parts
    split_block: torch.Tensor  # [B] int32, key blocks whose query range is cut into parts, ascending
    split_offsets: torch.Tensor  # [B + 1] int32, parts of split_block[b] are split_offsets[b]:split_offsets[b + 1]
    num_parts: int  # split_offsets[B]
    host_segment_start: torch.Tensor  # [N] int32 on the CPU, first row of a maximal run of only children
    host_segment_stop: torch.Tensor  # [N] int32 on the CPU, one past its last row
    host_segment_end: torch.Tensor  # [N] int32 on the CPU, the subtree_end that all rows of the run share
    # what an implementation makes of the schedule, once for all layers; by name, device and whatever else it depends on
    host_derived: dict[tuple[Any, ...], Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def num_rows(self) -> int:
        return self.subtree_end.shape[0]

    @property
    def blocks(self) -> tuple[int, int]:
        return self.block_q, self.block_kv

    def to(self, device: torch.device | str, subtree_end: torch.Tensor | None = None) -> TreeSchedule:
        """The same schedule on `device`, as `to_device` moves it.

        Args:
            device: where the kernels run.
            subtree_end: [T] int32, the forest's own tensor on `device` where there is one already: the schedule then
                refers to it, and `tree_attention` sees that both are of one forest.
        """
        return to_device(self if subtree_end is None else replace(self, subtree_end=subtree_end), device)


def tree_schedule(
    subtree_end: torch.Tensor, block_q: int = 128, block_kv: int = 64, heads: tuple[int, int] = (16, 16)
) -> TreeSchedule:
    """Compute the block schedule of one forest on the host.

    Args:
        subtree_end: [T] int32, any device (one copy to the host if it is not there already).
        block_q: query rows per block. 128 by 64 fits a head of 128 in shared memory with both operands resident.
        block_kv: keys per block.
        heads: query heads and key heads of the attention. The work on dK and dV is cut so that no program of few key
            heads or of many query heads on one keeps the others waiting. Other heads than the attention's change the
            time and the order of sums, and nothing else.

    Returns:
        The schedule, on the device of `subtree_end`.

    Raises:
        ValueError: `subtree_end` is not a 1-D int32 tensor or not laminar (see `validate_subtree_end`), or a block
            size is below 1, or the query heads are no multiple of the key heads.
    """
    arrays = _csrc.tree_schedule(_host_array(subtree_end), block_q, block_kv, *heads)
    return _from_arrays(subtree_end, (block_q, block_kv), arrays).to(subtree_end.device)


def window_schedule(schedule: TreeSchedule, size: int, heads: tuple[int, int]) -> tuple[TreeSchedule, Window]:
    """What a schedule becomes under a sliding window, made once for all layers and kept with it. No device is waited for.

    Its `kv_query_start` and `kv_query_stop` still bound the rows that see a key block, but rows between them may not, and
    the pieces of work leave most of those out. `kv_full_start` and `kv_full_stop` bound the first of the rows that see
    all keys: others may follow. With parts for the rows on both sides of a hidden span, `num_parts` stays below
    2 N + 2 max(N, K / 8), where N = 1024 / key heads and K key blocks are on the line; 2 N is the bound without a window.

    Args:
        schedule: of a forest.
        size: of the window.
        heads: as of `tree_schedule`, of the attention.

    Returns:
        The schedule, on the device of the given one, with the same blocks, and the window with depths [T] int32 there.
    """
    device = schedule.subtree_end.device
    key = ("window", size, heads, device)
    if key not in schedule.host_derived:
        lengths = schedule.host_segment_stop - schedule.host_segment_start
        ends = torch.repeat_interleave(schedule.host_segment_end, lengths)
        arrays = _csrc.tree_schedule(ends.numpy(), *schedule.blocks, *heads, window=size)
        depths = to_device(torch.from_numpy(arrays["depths"]), device)
        windowed = _from_arrays(ends, schedule.blocks, arrays).to(device, schedule.subtree_end)
        schedule.host_derived[key] = (windowed, Window(depths, size))
    derived: tuple[TreeSchedule, Window] = schedule.host_derived[key]
    return derived


def _from_arrays(
    subtree_end: torch.Tensor, blocks: tuple[int, int], arrays: dict[str, np.ndarray[Any, Any]]
) -> TreeSchedule:
    tensors: dict[str, Any] = {
        f"host_{name}" if name.startswith("segment_") else name: torch.from_numpy(array)
        for name, array in arrays.items()
        if name != "depths"
    }
    num_parts = int(arrays["split_offsets"][-1])
    return TreeSchedule(subtree_end=subtree_end, block_q=blocks[0], block_kv=blocks[1], num_parts=num_parts, **tensors)


def validate_subtree_end(subtree_end: torch.Tensor) -> None:
    """Check in O(T) that `subtree_end` ([T] int32) describes subtrees in depth-first preorder.

    Raises:
        ValueError: naming the first row whose end is not in (row, T], or whose subtree leaves the one that contains it,
            or `subtree_end` is not a 1-D int32 tensor.
    """
    _csrc.validate_subtree_end(_host_array(subtree_end))


def _host_array(subtree_end: torch.Tensor) -> np.ndarray:
    if subtree_end.dtype != torch.int32 or subtree_end.dim() != 1:
        raise ValueError(
            f"subtree_end: expected a 1-D int32 tensor, got {tuple(subtree_end.shape)} of {subtree_end.dtype}"
        )
    return np.ascontiguousarray(subtree_end.detach().cpu().numpy())
