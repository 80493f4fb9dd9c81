"""What `tree_decode_eager` walks: a plan's products and private keys as tiles, tiles of one shape as one batched product.

A tile is some query rows of one key head against some keys. Its shape follows from its keys alone (a row's tile has the
same shape whichever rows share the forward), so its products have the same bits in every batch. Where a product is so
large that copying its keys would cost more than a call, it stays whole and reads them where they are.

    rounds    tiles that are computed together: queries and keys are gathered in one go, then one product for each shape
    partials  of all tiles in one row of numbers, which the merge reads by index

Indices, and buffers for a round, are made once per plan, window and shape of heads, and serve every layer.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cpo_kernels.tree_decode.plan import DecodePlan

# Rows of a product come in multiples of both: the matrix library deals them out to threads by fours, and sums what is
# left over in another order.
ROW_MULTIPLE = 16
ROWS_PER_THREAD = 4
# torch multiplies matrices of fewer scalar products than 400 by a plain loop, which sums in another order too.
SMALL_PRODUCT = 400
MAX_QUERIES = 256  # of one product: its scores, 256 queries x group x 256 keys a head, stay near the core
SUFFIX_BLOCK = 32  # private keys of one partial: a thought is 20 to 80 tokens
MAX_GATHERED = 1 << 14  # numbers of keys copied to tile one product: above, the copy costs more than the calls it saves
ROUND_NUMBERS = 1 << 19  # of queries, keys, values and scores of one round: 2 MiB in float32 stay near the core

# columns of products: `visible` keys are seen by the first query, one more by each that follows; keys past `LAST_KEY`, the
# last that exists, are hidden ones
QUERY, NUM_QUERIES, KEY, NUM_KEYS, VISIBLE, DEPTH, LAST_KEY = range(7)

Indices = npt.NDArray[np.int64]


class HeadShape(NamedTuple):
    """Key heads, query heads of one key head, and their size."""

    num_kv_heads: int
    group: int
    head_dim: int


class Shape(NamedTuple):
    """The tiles of one shape in a round, as views of the round's buffers. B of them: tiles x key heads."""

    queries: torch.Tensor  # [B, T, D]
    keys: torch.Tensor  # [B, D, nk]
    values: torch.Tensor  # [B, nk, D]
    scores: torch.Tensor  # [B, T, nk]
    maximum: torch.Tensor  # [B, T, 1]
    total: torch.Tensor  # [B, T]
    out: torch.Tensor  # [B, T, D]


class Round(NamedTuple):
    """Tiles that are computed together, or one product that reads its keys where they are."""

    query_rows: torch.Tensor  # int64, of q [N * H, D]
    key_rows: torch.Tensor | None  # int64, of an arena [C * Hkv, D]
    key_range: tuple[int, int]  # arena slots of the one product, where `key_rows` is None
    queries: torch.Tensor  # [len(query_rows), D]
    keys: torch.Tensor  # [len(key_rows), D]
    values: torch.Tensor  # [len(key_rows), D]
    scores: torch.Tensor  # flat
    hidden: torch.Tensor | None  # bool like `scores`; None where every query sees all keys
    maximum: torch.Tensor  # flat
    shapes: list[Shape]


class Tables(NamedTuple):
    """A plan as `tree_decode_eager` walks it."""

    rounds: list[Round]
    maximum: torch.Tensor  # [P + 1] of every tile's rows; the last is that of a row without a partial
    total: torch.Tensor  # [P + 1]
    out: torch.Tensor  # [P + 1, D]
    levels: torch.Tensor  # [L, N * H] int64, which partial each row reads at each level


def tables_of(plan: DecodePlan, heads: HeadShape, dtype: torch.dtype, window: int | None = None) -> Tables:
    """Tables of a plan for layers with a window, kept with it. From a device the plan is read back once a window."""
    if plan.is_reused:
        raise ValueError(
            "tree_decode: impl='eager' reads a plan once and cannot follow one whose contents change between forwards; "
            "use impl='triton', or a new plan for each forward"
        )
    if window is not None and window >= plan.longest_path:
        window = None
    num_threads = torch.get_num_threads()
    # buffers that are made in inference mode cannot be written outside it
    key = ("eager", plan.slots.device, num_threads, window, heads, dtype, torch.is_inference_mode_enabled())
    if key not in plan.host_derived:
        plan.host_derived[key] = _make_tables(plan, heads, dtype, num_threads, window)
    tables: Tables = plan.host_derived[key]
    return tables


class _Tiles(NamedTuple):
    """Tiles of one shape, [n] each, before they are dealt out to rounds."""

    num_rows: int  # T
    num_keys: int
    stays: bool  # one product whose keys are not copied
    products: Indices  # [n, 7] of each tile
    first_row: Indices  # [n] of the product's rows, queries x group

    def numbers(self, heads: HeadShape) -> int:
        """Of one tile: queries, keys, values and scores."""
        size = self.num_rows * (self.num_keys + heads.head_dim) + 2 * self.num_keys * heads.head_dim
        return size * heads.num_kv_heads


def _make_tables(
    plan: DecodePlan, heads: HeadShape, dtype: torch.dtype, num_threads: int, window: int | None
) -> Tables:
    row_multiple = max(ROW_MULTIPLE, ROWS_PER_THREAD * num_threads)
    start, length, depth = (
        values.cpu().numpy().astype(np.int64) for values in (plan.suffix_start, plan.suffix_len, plan.suffix_depth)
    )
    # depth of the first key that each row sees
    oldest = depth + length - window if window else np.full(len(start), -1)
    shared, partial_product, partial_query = _shared_products(plan, oldest)
    private = _private_products(start, length, depth, oldest)
    products = np.concatenate([shared, private])
    rows = products[:, NUM_QUERIES] * heads.group
    # how many rows a product is filled up to, whole or in tiles
    least = -(-SMALL_PRODUCT // (products[:, NUM_KEYS] * heads.head_dim))
    whole = np.maximum(-(-rows // row_multiple) * row_multiple, least)
    tile = np.minimum(whole, np.maximum(row_multiple, least))
    tile[len(shared) :] = heads.group  # one row's private keys
    num_copied = -(-rows // tile) * products[:, NUM_KEYS] * heads.num_kv_heads * heads.head_dim
    # one key of one head alone is a vector, not a matrix of a batch, and is summed in another order
    is_vector = products[:, NUM_KEYS] * heads.num_kv_heads == 1
    # and a batch of fewer matrices than threads has each cut among them, so another batch would sum otherwise
    stays = (num_copied > MAX_GATHERED) | is_vector | (heads.num_kv_heads < num_threads)
    stays[len(shared) :] = False
    tile[stays] = whole[stays]
    num_tiles = -(-rows // tile)
    least_tiles = -(-num_threads // heads.num_kv_heads)
    if 0 < len(private) < least_tiles:
        num_tiles[-1] += least_tiles - len(private)  # of the last row once more, which nobody reads

    # tiles of one shape adjoin, and so do their partials: [tile, key head, row]
    order = np.lexsort((tile, products[:, NUM_KEYS], stays))
    first_partial = np.empty_like(tile)  # of each product
    size = num_tiles * tile * heads.num_kv_heads
    first_partial[order] = np.cumsum(size[order]) - size[order]
    shapes = np.stack([stays, products[:, NUM_KEYS], tile], axis=1)[order]  # [W, 3]
    starts = np.flatnonzero((np.diff(shapes, axis=0, prepend=-1) != 0).any(axis=1) | (shapes[:, 0] > 0))
    tiles: list[_Tiles] = []
    for first, some in zip(starts.tolist(), np.split(order, starts[1:]) if len(order) else (), strict=True):
        is_whole, num_keys, num_rows = shapes[first].tolist()
        counts = num_tiles[some]
        numbers = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        tiles.append(
            _Tiles(num_rows, num_keys, bool(is_whole), np.repeat(products[some], counts, axis=0), numbers * num_rows)
        )
    product, query = _levels(plan, partial_product, partial_query, private, len(shared))
    num_partials = int(size.sum())
    levels = _partials_of_rows(product, query, first_partial, tile, num_partials, heads)
    rounds = _deal(tiles, heads, least_tiles)
    return _with_buffers(rounds, levels, num_partials, oldest, heads, dtype, plan.slots.device)


def _shared_products(plan: DecodePlan, oldest: Indices) -> tuple[Indices, Indices, Indices]:
    """Products of the plan's items [W, 7]; each partial's product, -1 where it is left out, and query in it [P]."""
    product = np.full(plan.num_partials, -1)
    query = np.zeros(plan.num_partials, np.int64)
    items = [
        (*item, depth)
        for item, depth in zip(plan.items.tolist(), plan.item_depth.tolist(), strict=True)
        # some row of it reaches its last key
        if item[1] > 0 and oldest[item[0] : item[0] + item[1]].min() < depth + item[3]
    ]
    items.sort(key=lambda item: item[5])
    products: list[list[int]] = []
    for query_start, num_queries, key_start, num_keys, first_visible, partial_start, depth in items:
        last = products[-1] if products else None
        # adjacent queries that see the same keys wholly are one product
        extends = (
            last is not None
            and first_visible == num_keys == last[VISIBLE]
            and last[KEY : NUM_KEYS + 1] == [key_start, num_keys]
            and last[QUERY] + last[NUM_QUERIES] == query_start
            and last[NUM_QUERIES] + num_queries <= MAX_QUERIES
        )
        if last is None or not extends:
            last = [query_start, 0, key_start, num_keys, first_visible, depth, key_start + num_keys - 1]
            products.append(last)
        product[partial_start : partial_start + num_queries] = len(products) - 1
        query[partial_start : partial_start + num_queries] = last[NUM_QUERIES] + np.arange(num_queries)
        last[NUM_QUERIES] += num_queries
    return np.asarray(products, dtype=np.int64).reshape(-1, 7), product, query


def _private_products(start: Indices, length: Indices, depth: Indices, oldest: Indices) -> Indices:
    """Products of each row with its private keys [B, 7], SUFFIX_BLOCK at a time, without what it has outgrown."""
    num_blocks = -(-length // SUFFIX_BLOCK)
    row = np.repeat(np.arange(len(length)), num_blocks)
    first = (np.arange(len(row)) - np.repeat(np.cumsum(num_blocks) - num_blocks, num_blocks)) * SUFFIX_BLOCK
    reached = oldest[row] < depth[row] + first + SUFFIX_BLOCK
    row, first = row[reached], first[reached]
    ones = np.ones_like(row)
    return np.stack(
        [row, ones, start[row] + first, ones * SUFFIX_BLOCK, length[row] - first, depth[row] + first,
         (start + length - 1)[row]], axis=1,
    )  # fmt: skip


def _levels(
    plan: DecodePlan, partial_product: Indices, partial_query: Indices, private: Indices, num_shared: int
) -> tuple[Indices, Indices]:
    """The product that each row reads at each level, -1 for none, and which of its queries the row is: [L, N] each."""
    offsets, index = plan.partial_offsets.cpu().numpy(), plan.partial_index.cpu().numpy()
    start, length = plan.suffix_start.cpu().numpy(), plan.suffix_len.cpu().numpy()
    counts = np.diff(offsets)
    num_levels = int((counts - (-length // SUFFIX_BLOCK)).max(initial=0))
    product, query = np.full((num_levels, len(start)), -1), np.zeros((num_levels, len(start)), np.int64)
    row = np.repeat(np.arange(len(start)), counts)
    at = np.arange(offsets[-1]) - offsets[row], row
    product[at], query[at] = partial_product[index[: offsets[-1]]], partial_query[index[: offsets[-1]]]
    row = private[:, QUERY]
    product[counts[row] + (private[:, KEY] - start[row]) // SUFFIX_BLOCK, row] = num_shared + np.arange(len(private))
    sees_some = (product >= 0).any(axis=1)
    return product[sees_some], query[sees_some]


def _partials_of_rows(
    product: Indices,  # [L, N]
    query: Indices,  # [L, N]
    first_partial: Indices,  # [W]
    tile: Indices,  # [W]
    num_partials: int,
    heads: HeadShape,
) -> Indices:
    """Which partial each row and head reads at each level: [L, N * H]. `num_partials` where there is none."""
    if len(first_partial) == 0:
        return np.empty((0, product.shape[1] * heads.num_kv_heads * heads.group), np.int64)
    first, num_rows = first_partial[product][:, :, None, None], tile[product][:, :, None, None]
    row = query[:, :, None, None] * heads.group + np.arange(heads.group)  # [L, N, 1, G]
    head = np.arange(heads.num_kv_heads)[:, None]
    partial = first + (row // num_rows * heads.num_kv_heads + head) * num_rows + row % num_rows
    return np.where(product[:, :, None, None] < 0, num_partials, partial).reshape(len(product), -1)


def _with_buffers(
    rounds: list[list[_Tiles]],
    levels: Indices,
    num_partials: int,
    oldest: Indices,
    heads: HeadShape,
    dtype: torch.dtype,
    device: torch.device,
) -> Tables:
    num_queries, num_keys, num_scores = (
        max((sum(len(one.products) * heads.num_kv_heads * part(one) for one in some) for some in rounds), default=0)
        for part in (lambda one: one.num_rows, lambda one: one.num_keys, lambda one: one.num_rows * one.num_keys)
    )

    def buffer(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    queries, keys, values = (buffer(count, heads.head_dim) for count in (num_queries, num_keys, num_keys))
    scores = buffer(num_scores)
    maximum, total, out = buffer(num_partials + 1), buffer(num_partials + 1), buffer(num_partials + 1, heads.head_dim)
    # the partial of a row that has none at some level
    maximum[-1], total[-1], out[-1] = torch.finfo(dtype).min, 0, 0
    made: list[Round] = []
    done = 0
    for some in rounds:
        shapes: list[Shape] = []
        query = key = score = 0
        first = done
        for one in some:
            num, nt, nk = len(one.products) * heads.num_kv_heads, one.num_rows, one.num_keys
            copied = slice(key, key + num * nk)
            shapes.append(
                Shape(
                    queries[query : query + num * nt].view(num, nt, -1),
                    keys[copied].view(num, nk, -1).transpose(1, 2),
                    values[copied].view(num, nk, -1),
                    scores[score : score + num * nt * nk].view(num, nt, nk),
                    maximum[done : done + num * nt].view(num, nt, 1),
                    total[done : done + num * nt].view(num, nt),
                    out[done : done + num * nt].view(num, nt, -1),
                )
            )
            query, key, score, done = query + num * nt, key + num * nk, score + num * nt * nk, done + num * nt
        parts = [_indices(one, oldest, heads) for one in some]
        query_rows, key_rows, hidden = (np.concatenate([part[at] for part in parts]) for at in range(3))
        start = int(some[0].products[0, KEY])
        made.append(
            Round(
                torch.from_numpy(query_rows).to(device),
                None if some[0].stays else torch.from_numpy(key_rows).to(device),
                (start, start + some[0].num_keys),
                queries[:query],
                keys[:key],
                values[:key],
                scores[:score],
                torch.from_numpy(hidden).to(device) if hidden.any() else None,
                maximum[first:done],
                shapes,
            )
        )
    return Tables(made, maximum, total, out, torch.from_numpy(levels).to(device))


def _deal(tiles: list[_Tiles], heads: HeadShape, least_tiles: int) -> list[list[_Tiles]]:
    """Tiles in order, as many in a round as its numbers allow; whole products by themselves."""
    rounds: list[list[_Tiles]] = []
    room = 0
    for one in tiles:
        done, count = 0, len(one.products)
        least = 1 if one.stays else least_tiles
        while done < count:
            fits = room // one.numbers(heads)
            if one.stays or fits < least:
                rounds.append([])
                room = ROUND_NUMBERS
                fits = max(2 * least, room // one.numbers(heads))
            last = min(count, done + fits)
            if 0 < count - last < least:
                last = count - least if count - least - done >= least else count
            rounds[-1].append(one._replace(products=one.products[done:last], first_row=one.first_row[done:last]))
            room = 0 if one.stays else room - (last - done) * one.numbers(heads)
            done = last
    return rounds


def _indices(tiles: _Tiles, oldest: Indices, heads: HeadShape) -> tuple[Indices, Indices, npt.NDArray[np.bool_]]:
    """Rows of q [n * Hkv * T] and of an arena [n * Hkv * nk], and which scores [n * Hkv * T * nk] are hidden."""
    query, num_queries, first_key, _, visible, depth, last_key = tiles.products.T[:, :, None]  # [n, 1] each
    head = np.arange(heads.num_kv_heads)[:, None]
    # what a tile has too many repeats the last row of its product
    row = np.minimum(tiles.first_row[:, None] + np.arange(tiles.num_rows), num_queries * heads.group - 1)  # [n, T]
    place, member = row // heads.group, row % heads.group
    query_rows = ((query + place) * heads.num_kv_heads)[:, None] + head
    query_rows = query_rows * heads.group + member[:, None]
    number = np.arange(tiles.num_keys)
    slots = np.minimum(first_key + number, last_key)  # [n, nk]
    key_rows = slots[:, None] * heads.num_kv_heads + head
    seen, above = visible + place, oldest[query + place] - depth  # [n, T]
    hidden = (number >= seen[:, :, None]) | (number < above[:, :, None])
    hidden = np.repeat(hidden[:, None], heads.num_kv_heads, axis=1)
    return query_rows.reshape(-1), key_rows.reshape(-1), hidden.reshape(-1)
