"""`DecodePlan`: which keys each row of one packed forward over a search tree reads, as a list of work items.

An item is a run of query rows against a run of keys that lie together in the arena: the rows under a tree node against
that node. Query j of an item sees its first min(num_keys, first_visible + j) keys: all of them for an ancestor, those up
to itself for a node that is being prefilled. `build` cuts items to at most `QUERY_TILE` queries and `split` keys. Cuts
depend on the item alone, so a row's arithmetic does not depend on which rows share its forward.

Every (query, item) pair is a partial attention. A row's own partials, in the order in which its items were listed, then
its private suffix (the keys that it alone has decoded), are merged to its attention.

A row's depth is its place on its own path: it sees depth + 1 keys, itself included. A sliding window compares depths, so
the plan says at what depth each item's first key stands, and how many keys a row sees before its private suffix. A row
whose suffix grows between forwards gets deeper with it. One plan serves layers with and without windows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from cpo_kernels.device import to_device

QUERY_TILE = 64  # a chunk of a prefill that starts at a multiple of it is cut as the whole is
ITEM_COLUMNS = 6
MAX_INT32 = 2**31 - 1

Item = tuple[int, int, int, int, int]


@dataclass(frozen=True, eq=False)
class DecodePlan:
    """Which arena slots each query row of one packed forward reads: N rows, W work items, tensors on one device."""

    slots: torch.Tensor  # [N] int64, receives the row's new key and value; padding rows share the padding slot
    items: torch.Tensor  # [W, 6] int32: query_start, num_queries, key_start, num_keys, first_visible, partial_start
    partial_offsets: torch.Tensor  # [N + 1] int32
    partial_index: torch.Tensor  # int32, partials of row n at [partial_offsets[n], partial_offsets[n + 1]), root first
    suffix_start: torch.Tensor  # [N] int32, private keys are in slots [suffix_start, suffix_start + suffix_len)
    suffix_len: torch.Tensor  # [N] int32, the row's own new key included; 0: none
    item_depth: torch.Tensor  # [W] int32, depth of an item's first key
    suffix_depth: torch.Tensor  # [N] int32, keys seen in items; the row's depth is suffix_depth + suffix_len - 1
    num_partials: int
    longest_path: int  # keys that the deepest row sees, in a plan whose contents do not change
    num_arena_rows: int = 0  # slots of the least arena that has all that are named above
    is_reused: bool = False  # the tensors get other contents between forwards, as those of a recorded step do
    # what an implementation makes of the plan, once for all layers; by name, device and whatever else it depends on
    host_derived: dict[tuple[Any, ...], Any] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def build(
        cls,
        slots: Sequence[int] | np.ndarray | torch.Tensor,  # [N]
        items: Sequence[Item],
        suffix_start: Sequence[int] | np.ndarray | torch.Tensor,  # [N]
        suffix_len: Sequence[int] | np.ndarray | torch.Tensor,  # [N]
        split: int = 256,
    ) -> "DecodePlan":
        """Cut items and order their partials, on the host.

        Args:
            slots: arena slot of each query row's new key and value.
            items: (query_start, num_queries, key_start, num_keys, first_visible), those of one row listed root first.
            suffix_start: first private key of each row.
            suffix_len: how many it has, its own new key included. 0 for a row that is prefilled.
            split: keys of an item at most. Keys are cut at its multiples, counted from the item's first key.

        Returns:
            A plan on the CPU.

        Raises:
            ValueError: lengths differ, a range is empty, negative or outside the rows, an item's rows see other numbers of
                keys before it, or an arena row exceeds int32.
        """
        rows, start, length = (np.asarray(values, dtype=np.int64) for values in (slots, suffix_start, suffix_len))
        given = np.asarray(items, dtype=np.int64).reshape(-1, ITEM_COLUMNS - 1)
        _check(rows, start, length, given, split)
        cut = np.asarray(_cut(given, split), dtype=np.int64).reshape(-1, ITEM_COLUMNS - 1)
        stops = np.cumsum(cut[:, 1])
        num_partials = int(stops[-1]) if len(stops) else 0
        partial_start = stops - cut[:, 1]
        query_of_partial = np.repeat(cut[:, 0] - partial_start, cut[:, 1]) + np.arange(num_partials)
        offsets = np.concatenate([[0], np.cumsum(np.bincount(query_of_partial, minlength=len(rows)))])
        index = np.argsort(query_of_partial, kind="stable")
        item_depth, suffix_depth = _depths(cut, offsets, index, stops)
        last = max(int(values.max(initial=-1)) for values in (rows, start + length - 1, given[:, 2] + given[:, 3] - 1))
        if max(last, num_partials) > MAX_INT32:
            raise ValueError(f"DecodePlan: arena row {last} or {num_partials} partials exceed int32")
        return cls(
            slots=torch.from_numpy(rows.copy()),
            items=_int32(np.concatenate([cut, partial_start[:, None]], axis=1)),
            partial_offsets=_int32(offsets),
            partial_index=_int32(index),
            suffix_start=_int32(start),
            suffix_len=_int32(length),
            item_depth=_int32(item_depth),
            suffix_depth=_int32(suffix_depth),
            num_partials=num_partials,
            longest_path=int((suffix_depth + length).max(initial=0)),
            num_arena_rows=last + 1,
        )

    def to(self, device: torch.device | str) -> "DecodePlan":
        """The same plan on a device, as `to_device` moves it."""
        return to_device(self, device)

    def padded(self, num_items: int, num_partials: int) -> "DecodePlan":
        """The same plan with items of no queries and partials that nobody reads, so that shapes repeat in a CUDA graph.

        Raises:
            ValueError: the plan has more items or partials already.
        """
        if num_items < len(self.items) or num_partials < self.num_partials:
            raise ValueError(
                f"DecodePlan.padded: expected at least {len(self.items)} items and {self.num_partials} partials, "
                f"got {num_items} and {num_partials}"
            )
        return replace(
            self,
            items=_padded_rows(self.items, num_items),
            item_depth=_padded_rows(self.item_depth, num_items),
            partial_index=_padded_rows(self.partial_index, num_partials),
            num_partials=num_partials,
        )


def _check(slots: np.ndarray, start: np.ndarray, length: np.ndarray, items: np.ndarray, split: int) -> None:
    if slots.ndim != 1 or start.shape != slots.shape or length.shape != slots.shape:
        raise ValueError(
            "DecodePlan: expected slots, suffix_start and suffix_len of one length, "
            f"got {slots.shape}, {start.shape} and {length.shape}"
        )
    if split < 1:
        raise ValueError(f"DecodePlan: expected split >= 1, got {split}")
    for name, values in (("slots", slots), ("suffix_start", start), ("suffix_len", length)):
        if values.min(initial=0) < 0:
            raise ValueError(f"DecodePlan: {name} has a negative entry")
    query_start, num_queries, key_start, num_keys, first_visible = items.T
    fits = (query_start >= 0) & (num_queries >= 1) & (query_start + num_queries <= len(slots))
    fits &= (key_start >= 0) & (num_keys >= 1) & (first_visible >= 1) & (first_visible <= num_keys)
    if not fits.all():
        at = int(np.argmin(fits))
        raise ValueError(
            f"DecodePlan: item {at} is {tuple(items[at].tolist())}; expected (query_start, num_queries, key_start, "
            f"num_keys, first_visible) with queries inside the {len(slots)} rows, positive counts and first_visible "
            "in 1..num_keys"
        )


def _cut(items: np.ndarray, split: int) -> list[Item]:
    """Items of at most QUERY_TILE queries and `split` keys, key blocks outside, so that tiles of one block adjoin."""
    cut: list[Item] = []
    for query_start, num_queries, key_start, num_keys, first_visible in items.tolist():
        for block in range(0, num_keys, split):
            for tile in range(0, num_queries, QUERY_TILE):
                queries = min(QUERY_TILE, num_queries - tile)
                visible = min(num_keys, first_visible + tile + queries - 1)  # by the last row of the tile
                keys = min(split, visible - block)
                if keys > 0:
                    seen = min(keys, first_visible + tile - block)
                    cut.append((query_start + tile, queries, key_start + block, keys, seen))
    return cut


def _depths(
    items: np.ndarray,  # [W, 5], cut
    offsets: np.ndarray,  # [N + 1]
    index: np.ndarray,  # [P]
    stops: np.ndarray,  # [W], one past the last partial of each item
) -> tuple[np.ndarray, np.ndarray]:
    """Depth of each item's first key [W], and how many keys each row sees in items [N]."""
    item = np.repeat(np.arange(len(items)), items[:, 1])  # [P] of each partial
    query = np.arange(len(item)) - (stops - items[:, 1])[item]
    seen = np.clip(items[item, 4] + query, 0, items[item, 3])
    ends = np.concatenate([[0], np.cumsum(seen[index])])  # in path order, row after row
    row_start = ends[offsets[:-1]]  # [N]
    before = np.empty_like(seen)  # keys that a row sees before each partial
    before[index] = ends[:-1] - np.repeat(row_start, np.diff(offsets))
    depth = before[stops - 1]  # the last row of an item sees all that stands before it
    if (misplaced := (seen > 0) & (before != depth[item])).any():
        at = items[item[np.argmax(misplaced)]].tolist()
        raise ValueError(f"DecodePlan: rows of the item {tuple(at)} see other numbers of keys before it")
    return depth, ends[offsets[1:]] - row_start


def _int32(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int32))


def _padded_rows(values: torch.Tensor, num_rows: int) -> torch.Tensor:
    padding = values.new_zeros((num_rows - len(values), *values.shape[1:]))
    return torch.cat([values, padding])
