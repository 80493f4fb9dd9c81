"""A decode plan row by row: which arena slots each row reads, in path order. For implementations that walk rows."""

from typing import NamedTuple

import numpy as np
import torch

from cpo_kernels.tree_decode.plan import DecodePlan


class RowKeys(NamedTuple):
    """What each row reads: arena rows [start, start + num_keys) of items in path order, then keys of its own."""

    start: np.ndarray  # [I] int64
    num_keys: np.ndarray  # [I] int64
    node: np.ndarray  # [I] int64: rows share a read where these are equal
    offsets: np.ndarray  # [N + 1] int64, of each row's items
    own_start: np.ndarray  # [N] int64
    own_count: np.ndarray  # [N] int64

    def gathered(self, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Arena rows [N, L] int64 that rows read, the last `window` of each, and how many they are [N]; 0 past them."""
        num_rows = len(self.own_start)
        place = np.arange(len(self.start)) + np.repeat(np.arange(num_rows), np.diff(self.offsets))
        start, count = np.empty((2, len(self.start) + num_rows), np.int64)
        start[place], count[place] = self.start, self.num_keys
        own = self.offsets[1:] + np.arange(num_rows)
        start[own], count[own] = self.own_start, self.own_count
        ends = np.cumsum(count)
        keys = np.repeat(start - (ends - count), count) + np.arange(ends[-1] if len(ends) else 0)
        stops = ends[own] if num_rows else ends
        total = np.diff(stops, prepend=0)
        seen = np.minimum(total, window) if window else total
        column = np.arange(int(seen.max(initial=1)))  # a maximum is taken over them
        table = np.zeros((num_rows, len(column)), np.int64)
        visible = column < seen[:, None]
        table[visible] = keys[((stops - seen)[:, None] + column)[visible]]
        return torch.from_numpy(table), torch.from_numpy(seen)


def row_keys(plan: DecodePlan, impl: str) -> RowKeys:
    """The keys of a plan's rows, made once and kept with it for all layers. From a device the plan is read back.

    Raises:
        ValueError: the plan's contents change between forwards. `impl` names who asks.
    """
    if plan.is_reused:
        raise ValueError(
            f"tree_decode: impl={impl!r} reads a plan once and cannot follow one whose contents change between forwards; "
            "use impl='triton', or a new plan for each forward"
        )
    key = ("row keys",)
    if key not in plan.host_derived:
        plan.host_derived[key] = _row_keys(plan)
    keys: RowKeys = plan.host_derived[key]
    return keys


def _row_keys(plan: DecodePlan) -> RowKeys:
    items, offsets, index, own_start, own_count = (
        tensor.cpu().numpy().astype(np.int64)
        for tensor in (plan.items, plan.partial_offsets, plan.partial_index, plan.suffix_start, plan.suffix_len)
    )
    items = items[np.argsort(items[:, 5], kind="stable")]  # as they were cut
    query_start, num_queries, key_start, num_keys, _, partial_start = items.T
    # tiles of one node adjoin; a plan that shares nothing keeps neighbours apart
    extends = (key_start[1:] == key_start[:-1]) & (num_keys[1:] == num_keys[:-1])
    extends &= query_start[1:] == query_start[:-1] + num_queries[:-1]
    node = np.cumsum(np.concatenate([[True], ~extends])[: len(items)])
    which = np.repeat(np.arange(len(items)), num_queries)
    number = np.arange(len(which)) - np.repeat(np.cumsum(num_queries) - num_queries, num_queries)
    item, query = np.zeros((2, plan.num_partials), np.int64)  # of each partial
    partial = partial_start[which] + number
    item[partial], query[partial] = which, number
    index = index[: offsets[-1]]  # a padded plan has more, which nobody reads
    item, query = item[index], query[index]  # in path order, row after row
    seen = np.clip(items[item, 4] + query, 0, num_keys[item])
    some = seen > 0
    item, seen = item[some], seen[some]
    offsets = np.concatenate([[0], np.cumsum(some)])[offsets]
    return RowKeys(key_start[item], seen, node[item], offsets, own_start, own_count)
