"""Tree decode by the items of a plan in plain torch: one product a node, partials merged by maximum and sum.

    partial p of a row:  m_p = max_j s_j,  l_p = sum_j exp(s_j - m_p),  o_p = sum_j exp(s_j - m_p) v_j
    the row:             out = sum_p exp(m_p - m) o_p / sum_p exp(m_p - m) l_p,   m = max_p m_p

A row's result has the same bits whichever rows share its forward, because keys are cut by the plan, the same way for
every row, because products have enough rows that the matrix library sums each of them alike, and because sums over
partials run in path order, where a partial that a row lacks adds exactly 0. So does one that a sliding window hides from
it, which is why items that no row of theirs reaches, and blocks of a suffix that its row does not, are left out. float32
accumulators (float64 for float64 inputs).

Index tables are made once per plan and window and kept with it for every layer.
"""

from typing import NamedTuple

import numpy as np
import torch

from cpo_kernels.device import accumulation_dtype
from cpo_kernels.tree_decode.plan import DecodePlan
from cpo_kernels.tree_decode.rotation import rotate

# Rows of a product come in multiples of both: the matrix library deals them out to threads by fours, and sums what is
# left over in another order.
ROW_MULTIPLE = 16
ROWS_PER_THREAD = 4
# torch multiplies matrices of fewer scalar products than 400 by a plain loop, which sums in another order too.
SMALL_PRODUCT = 400
MAX_QUERIES = 256  # of one product: its scores, 256 queries x group x 256 keys a head, stay near the core
SUFFIX_BLOCK = 32  # private keys of one partial: a thought is 20 to 80 tokens
SUFFIX_ROWS = 32  # rows whose private keys are gathered at once: larger copies are new pages of memory at every call


class Product(NamedTuple):
    """Queries [query_start, +num_queries) against keys [key_start, +num_keys), `hidden` where a query sees not all."""

    query_start: int
    num_queries: int
    key_start: int
    num_keys: int
    hidden: torch.Tensor | None  # [num_queries, num_keys] bool


class SuffixBlock(NamedTuple):
    """One block of private keys of at most SUFFIX_ROWS rows that have it."""

    rows: torch.Tensor  # [n] int64
    keys: torch.Tensor  # [n * SUFFIX_BLOCK] int64 arena slots; past the suffix its last one, hidden
    hidden: torch.Tensor | None  # [n, SUFFIX_BLOCK] bool; None where every row fills the block


class Tables(NamedTuple):
    """A plan as `tree_decode_eager` walks it."""

    products: list[Product]
    blocks: list[SuffixBlock]
    merge: list[torch.Tensor]  # per level [N] int64, a position among all partials; one past them where a row has none
    row_multiple: int


def tree_decode_eager(
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
    k_arena.index_copy_(0, plan.slots, k_new)
    v_arena.index_copy_(0, plan.slots, v_new)
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = k_arena.shape[1]
    group = num_heads // num_kv_heads
    dtype = accumulation_dtype(q.dtype)
    tables = _tables(plan, window)
    # rows past the last are read as filler of the last products
    slack = max(tables.row_multiple, SMALL_PRODUCT)
    queries = torch.zeros((num_kv_heads, num_rows * group + slack, head_dim), dtype=dtype, device=q.device)
    rows = queries[:, : num_rows * group].unflatten(1, (num_rows, group))  # [Hkv, N, G, D]
    rows.copy_(q.unflatten(1, (num_kv_heads, group)).transpose(0, 1)).mul_(scale)

    maxima, sums, outs = [], [], []  # [Hkv, n * G], [Hkv, n * G], [Hkv, n * G, D] of each product and block
    for product in tables.products:
        first, last = product.query_start * group, (product.query_start + product.num_queries) * group
        keys = k_arena[product.key_start : product.key_start + product.num_keys].to(dtype)
        values = v_arena[product.key_start : product.key_start + product.num_keys].to(dtype)
        height = -(-(last - first) // tables.row_multiple) * tables.row_multiple
        height = max(height, -(-SMALL_PRODUCT // (product.num_keys * head_dim)))
        scores = _capped(torch.bmm(queries[:, first : first + height], keys.permute(1, 2, 0)), softcap)
        if product.hidden is not None:  # of scores [Hkv, height, nk]
            seen = scores[:, : last - first].unflatten(1, (product.num_queries, group))
            seen.masked_fill_(product.hidden.unsqueeze(1), float("-inf"))
        maximum, total = _exponentiate(scores)
        maxima.append(maximum[:, : last - first])
        sums.append(total[:, : last - first])
        outs.append(torch.bmm(scores, values.transpose(0, 1))[:, : last - first])
    for block in tables.blocks:
        own = rows.index_select(1, block.rows)  # [Hkv, n, G, D]
        keys, values = (_private(arena, block.keys, dtype) for arena in (k_arena, v_arena))  # [Hkv * n, block, D]
        scores = _capped(torch.bmm(own.flatten(0, 1), keys.transpose(1, 2)), softcap)  # [Hkv * n, G, block]
        if block.hidden is not None:
            scores.unflatten(0, (num_kv_heads, -1)).masked_fill_(block.hidden.unsqueeze(1), float("-inf"))
        maximum, total = _exponentiate(scores)
        maxima.append(maximum.view(num_kv_heads, -1))
        sums.append(total.view(num_kv_heads, -1))
        outs.append(torch.bmm(scores, values).view(num_kv_heads, -1, head_dim))
    # the partial of a row that has none at some level
    maxima.append(rows.new_full((num_kv_heads, group), torch.finfo(dtype).min))
    sums.append(rows.new_zeros((num_kv_heads, group)))
    outs.append(rows.new_zeros((num_kv_heads, group, head_dim)))
    maximum, total, out = (torch.cat(parts, dim=1).unflatten(1, (-1, group)) for parts in (maxima, sums, outs))
    sink = None if sinks is None else sinks.to(dtype).view(num_kv_heads, 1, group)
    return _merge(maximum, total, out, tables.merge, rows.shape, sink).permute(1, 0, 2, 3).flatten(1, 2).to(q.dtype)


def _capped(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Scores under a soft-cap, in place."""
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def _exponentiate(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn scores [.., n] into exp(score - maximum) in place. Maximum and sum [..], finite also where all are -inf."""
    maximum = scores.amax(dim=-1, keepdim=True).clamp_min_(torch.finfo(scores.dtype).min)
    scores.sub_(maximum).exp_()
    return maximum.squeeze(-1), scores.sum(dim=-1)


def _private(arena: torch.Tensor, keys: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    gathered = arena.index_select(0, keys).unflatten(0, (-1, SUFFIX_BLOCK)).permute(2, 0, 1, 3)
    return gathered.to(dtype, memory_format=torch.contiguous_format).contiguous().flatten(0, 1)


def _merge(
    maximum: torch.Tensor,  # [Hkv, P, G]
    total: torch.Tensor,  # [Hkv, P, G]
    out: torch.Tensor,  # [Hkv, P, G, D]
    levels: list[torch.Tensor],
    shape: torch.Size,
    sink: torch.Tensor | None,  # [Hkv, 1, G]
) -> torch.Tensor:
    """[Hkv, N, G, D]: level after level, each row's next partial is added."""
    merged, denominator = out.new_zeros(shape), out.new_zeros(shape[:3])
    if levels:
        maxima = [maximum.index_select(1, level) for level in levels]
        largest = torch.stack(maxima).amax(dim=0)
        if sink is not None:
            largest = torch.maximum(largest, sink)
            denominator += torch.exp(sink - largest)
        for level, level_maximum in zip(levels, maxima, strict=True):
            weight = level_maximum.sub_(largest).exp_()  # [Hkv, N, G]
            denominator += total.index_select(1, level).mul_(weight)
            merged += out.index_select(1, level).mul_(weight.unsqueeze(-1))
    return merged.div_(denominator.masked_fill_(denominator == 0, 1.0).unsqueeze(-1))


def _tables(plan: DecodePlan, window: int | None = None) -> Tables:
    """Tables of a plan for layers with a window, kept with it. From a device the plan is read back once a window."""
    if plan.is_reused:
        raise ValueError(
            "tree_decode: impl='eager' reads a plan once and cannot follow one whose contents change between forwards; "
            "use impl='triton', or a new plan for each forward"
        )
    if window is not None and window >= plan.longest_path:
        window = None
    multiple = max(ROW_MULTIPLE, ROWS_PER_THREAD * torch.get_num_threads())
    key = ("eager", plan.slots.device, multiple, window)
    if key not in plan.host_derived:
        plan.host_derived[key] = _make_tables(plan, multiple, window)
    tables: Tables = plan.host_derived[key]
    return tables


def _make_tables(plan: DecodePlan, row_multiple: int, window: int | None) -> Tables:
    device = plan.slots.device
    num_rows = len(plan.slots)
    start, length = plan.suffix_start.cpu().numpy().astype(np.int64), plan.suffix_len.cpu().numpy()
    # depth of the first key that each row sees
    oldest = plan.suffix_depth.cpu().numpy() + length - window if window else np.full(num_rows, -1)
    items = [
        (*item, depth)
        for item, depth in zip(plan.items.tolist(), plan.item_depth.tolist(), strict=True)
        # some row of it reaches its last key
        if item[1] > 0 and oldest[item[0] : item[0] + item[1]].min() < depth + item[3]
    ]
    items.sort(key=lambda item: item[5])
    position = np.full(plan.num_partials, -1)  # of a partial in the concatenation of all products
    products: list[Product] = []
    num_partials = 0
    for query_start, num_queries, key_start, num_keys, first_visible, partial_start, depth in items:
        position[partial_start : partial_start + num_queries] = np.arange(num_partials, num_partials + num_queries)
        num_partials += num_queries
        hidden = None
        if first_visible < num_keys:
            seen = torch.arange(num_queries, device=device) + first_visible
            hidden = torch.arange(num_keys, device=device) >= seen.unsqueeze(1)
        above = oldest[query_start : query_start + num_queries] - depth  # keys of the item before each row's first one
        if above.max() > 0:
            outside = torch.from_numpy(np.arange(num_keys) < above[:, None]).to(device)
            hidden = outside if hidden is None else hidden | outside
        product = Product(query_start, num_queries, key_start, num_keys, hidden)
        if not (products and _extends(products[-1], product)):
            products.append(product)
        else:
            products[-1] = products[-1]._replace(num_queries=products[-1].num_queries + num_queries)
    offsets, index = plan.partial_offsets.cpu().numpy(), plan.partial_index.cpu().numpy()
    counts = np.diff(offsets)
    num_blocks = -(-length // SUFFIX_BLOCK)
    # private keys that a row has outgrown
    num_above = np.maximum(length - window, 0) if window else np.zeros_like(length)
    blocks: list[SuffixBlock] = []
    num_levels = int((counts + num_blocks).max(initial=0))
    num_all = num_partials + int((num_blocks - num_above // SUFFIX_BLOCK).sum())
    position[position < 0] = num_all  # items left out
    table = np.full((num_levels, num_rows), num_all)
    row_of_index = np.repeat(np.arange(num_rows), counts)
    table[np.arange(offsets[-1]) - offsets[row_of_index], row_of_index] = position[index[: offsets[-1]]]
    for number in range(int(num_blocks.max(initial=0))):
        rows = np.flatnonzero((num_blocks > number) & (num_above < (number + 1) * SUFFIX_BLOCK))
        table[counts[rows] + number, rows] = np.arange(num_partials, num_partials + len(rows))
        num_partials += len(rows)
        places = number * SUFFIX_BLOCK + np.arange(SUFFIX_BLOCK)
        keys = start[rows, None] + np.minimum(places, length[rows, None] - 1)
        hidden_keys = (places >= length[rows, None]) | (places < num_above[rows, None])
        for first in range(0, len(rows), SUFFIX_ROWS):
            part = slice(first, first + SUFFIX_ROWS)
            blocks.append(
                SuffixBlock(
                    torch.from_numpy(rows[part]).to(device),
                    torch.from_numpy(keys[part].reshape(-1)).to(device),
                    torch.from_numpy(hidden_keys[part]).to(device) if hidden_keys[part].any() else None,
                )
            )
    table = table[(table < num_all).any(axis=1)]  # levels at which some row sees something
    return Tables(products, blocks, list(torch.from_numpy(table).to(device)), row_multiple)


def _extends(left: Product, right: Product) -> bool:
    """Whether two products are one: adjacent queries that see the same keys wholly."""
    return (
        left.hidden is None
        and right.hidden is None
        and left[2:4] == right[2:4]
        and left.query_start + left.num_queries == right.query_start
        and left.num_queries + right.num_queries <= MAX_QUERIES
    )
