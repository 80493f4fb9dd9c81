"""Tree decode on a CPU in C++ (csrc/tree_decode.cpp): each row by the same operations, whichever rows stand beside it.

A row's scores, its softmax and its sum over values run over its whole path in path order, however the path is cut into
items. Rows that read the same keys take them together, which changes no row's bits; nor does the number of threads. float32
accumulators (float64 for float64).
"""

from typing import NamedTuple

import numpy as np
import torch

import cpo_kernels._csrc as _csrc
from cpo_kernels.device import accumulation_dtype
from cpo_kernels.tree_decode.plan import DecodePlan
from cpo_kernels.tree_decode.rotation import rotate


class RowKeys(NamedTuple):
    """What each row reads: arena rows [start, start + num_keys) of items in path order, then keys of its own."""

    start: np.ndarray  # [I] int64
    num_keys: np.ndarray  # [I] int64
    offsets: np.ndarray  # [N + 1] int64, of each row's items
    own_start: np.ndarray  # [N] int64
    own_count: np.ndarray  # [N] int64


def tree_decode_native(
    q: torch.Tensor,  # [N, H, D]
    k_new: torch.Tensor,  # [N, Hkv, D]
    v_new: torch.Tensor,  # [N, Hkv, D]
    k_arena: torch.Tensor,  # [C, Hkv, D]
    v_arena: torch.Tensor,  # [C, Hkv, D]
    plan: DecodePlan,
    scale: float,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,  # [N, D] each
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [H]
) -> torch.Tensor:
    """Store the new keys and values, then attend: [N, H, D] in the dtype of q, 0 for a row without keys."""
    if rotary is not None:
        q, k_new = (rotate(x, *rotary) for x in (q, k_new))
    dtype = accumulation_dtype(q.dtype)
    rows = row_keys(plan)
    out = torch.empty(q.shape, dtype=dtype)
    _csrc.tree_decode(
        _contiguous(q.detach().to(dtype)).numpy(),
        _bits(_contiguous(k_new.detach())),
        _bits(_contiguous(v_new.detach())),
        _bits(k_arena.detach()),
        _bits(v_arena.detach()),
        str(q.dtype).removeprefix("torch."),
        plan.slots.numpy(),
        *rows,
        scale,
        window or 0,
        softcap or 0.0,
        None if sinks is None else sinks.detach().to(dtype).contiguous().numpy(),
        out.numpy(),
        torch.get_num_threads(),
    )
    return out.to(q.dtype)


def row_keys(plan: DecodePlan) -> RowKeys:
    """The keys of a plan's rows, made once and kept with it for all layers unless its contents change."""
    if plan.is_reused:
        return _row_keys(plan)
    key = ("native",)
    if key not in plan.host_derived:
        plan.host_derived[key] = _row_keys(plan)
    keys: RowKeys = plan.host_derived[key]
    return keys


def _row_keys(plan: DecodePlan) -> RowKeys:
    items, offsets, index, own_start, own_count = (
        tensor.numpy().astype(np.int64)
        for tensor in (plan.items, plan.partial_offsets, plan.partial_index, plan.suffix_start, plan.suffix_len)
    )
    num_queries = items[:, 1]
    which = np.repeat(np.arange(len(items)), num_queries)
    number = np.arange(len(which)) - np.repeat(np.cumsum(num_queries) - num_queries, num_queries)
    item, query = np.zeros((2, plan.num_partials), np.int64)  # of each partial
    partial = items[which, 5] + number
    item[partial], query[partial] = which, number
    index = index[: offsets[-1]]  # a padded plan has more, which nobody reads
    item, query = item[index], query[index]  # in path order, row after row
    count = np.clip(items[item, 4] + query, 0, items[item, 3])
    some = count > 0
    item, count = item[some], count[some]
    offsets = np.concatenate([[0], np.cumsum(some)])[offsets]
    return RowKeys(items[item, 2], count, offsets, own_start, own_count)


def _contiguous(x: torch.Tensor) -> torch.Tensor:
    """With its last dimension contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _bits(x: torch.Tensor) -> np.ndarray:
    """An array of a tensor's numbers, 16-bit ones as integers."""
    array: np.ndarray = (x.view(torch.int16) if x.element_size() == 2 else x).numpy()
    return array
