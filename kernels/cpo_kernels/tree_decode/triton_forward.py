# mypy: disable-error-code="no-untyped-def"
"""Tree decode in Triton: store the new keys and values, attend item by item, merge.

    partial:  o_p = sum_j softmax_j(scale * q . k_j) v_j  over the keys of one item,  lse_p its log-sum-exp
    merge:    out = sum_p exp(lse_p - lse) o_p  over a row's partials in path order, then its private suffix

A sliding window starts the keys of an item, and of a suffix, where the first row that reads them sees them. A sink of a
head is what the merge starts from: a sum of exp(sink) without a value. Without window, soft-cap and sinks none of their
arguments or instructions is in the kernels.

The partial kernel packs the query heads that share a key head into the rows of one tile, so an item's keys are loaded
once for all its queries and heads. The merge kernel reads a private suffix, which one row alone sees, as a product of a
matrix and a vector in float32. Heads that share a key head read it one after another, through the cache.

Log-sum-exps are in base 2. Maxima, sums and partial outputs are float32 and added in a fixed order, so results are
bitwise repeatable. From step to step only the contents of tensors change and no argument of a kernel, so one binary
serves all steps and a CUDA graph may replay them.
"""

import torch
import triton
import triton.language as tl

from cpo_kernels.tree_decode.plan import ITEM_COLUMNS, QUERY_TILE, DecodePlan
from cpo_kernels.triton_tiles import (
    INTERPRETED,
    LOG2_E,
    Tile,
    accurate_tanh,
    by_rows,
    cast,
    choose_tile,
    load_rows,
    online_softmax_step,
    padded_head_dim,
)

# By padded head size. 64 rows are the least that compute capability 9.0's matrix instructions take, and hold 16 queries
# of 4 heads; keys are read from memory once, so more rows would only help items of more queries. Of three stages a tile
# of keys is on its way while the one before is computed with; two blocks and more share a multiprocessor of 8.0 and 9.0.
TILES = {
    64: Tile(block_q=64, block_kv=64, num_warps=4, num_stages=3),
    128: Tile(block_q=64, block_kv=32, num_warps=4, num_stages=3),
    256: Tile(block_q=64, block_kv=16, num_warps=4, num_stages=3),
}
# float32 products run outside the matrix units and hold their operands in registers.
EXACT_TILES = {
    64: Tile(block_q=32, block_kv=32, num_warps=4, num_stages=1),
    128: Tile(block_q=16, block_kv=16, num_warps=4, num_stages=1),
    256: Tile(block_q=16, block_kv=16, num_warps=4, num_stages=1),
}
SUFFIX_BLOCKS = {
    64: 64,
    128: 32,
    256: 16,
}  # private keys in one step of a merge, by padded head size: 16 KiB in float32


_LOG2_E = tl.constexpr(LOG2_E)


def tree_decode_forward(
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
    """Store, attend and merge by three launches. The first also rotates queries and keys where `rotary` is given.

    Args:
        q, k_new, v_new: bfloat16, float16 or float32, all the same, any strides. Hkv divides H.
        k_arena, v_arena: same dtype, changed in place, last dimension contiguous.
        plan: of these N rows, on the device of q.
        scale: factor on q . k.
        rotary: cosines and sines, same dtype.
        window: a row's last so many keys. softcap: of scores. sinks: any float dtype, contiguous.

    Returns:
        [N, H, D] contiguous, in the dtype of q, 0 for a row without keys.

    Raises:
        ValueError: head size or dtype that no kernel is made for.
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = k_arena.shape[1]
    group = num_heads // num_kv_heads
    tile = choose_tile("tree_decode", head_dim, q.dtype, TILES, EXACT_TILES)
    q, k_new, v_new = by_rows(q), by_rows(k_new), by_rows(v_new)
    out = torch.empty((num_rows, num_heads, head_dim), dtype=q.dtype, device=q.device)
    if num_rows == 0:
        return out
    block_d = padded_head_dim(head_dim)
    stored = (k_new, v_new, k_arena, v_arena, plan.slots)
    stored_strides = [stride for tensor in stored[:4] for stride in tensor.stride()[:2]]
    if rotary is None:
        _store_kernel[(num_rows, num_kv_heads)](
            *stored, *stored_strides,
            HEAD_DIM=head_dim, BLOCK_D=block_d, num_warps=1,  # a head of 128 is four elements a lane
        )  # fmt: skip
    else:
        cos, sin = (table.contiguous() for table in rotary)
        rotated = torch.empty((num_rows, num_heads, head_dim), dtype=q.dtype, device=q.device)
        _rotate_store_kernel[(num_rows, num_kv_heads)](
            q, rotated, cos, sin, *stored, num_heads, *q.stride()[:2], *stored_strides,
            GROUP=group, HEAD_DIM=head_dim, BLOCK_HALF=triton.next_power_of_2(head_dim // 2), BLOCK_D=block_d,
            UPCAST=INTERPRETED, num_warps=1,
        )  # fmt: skip
        q = rotated
    partial_out = torch.empty((plan.num_partials, num_heads, head_dim), dtype=torch.float32, device=q.device)
    partial_lse = torch.empty((plan.num_partials, num_heads), dtype=torch.float32, device=q.device)
    strides = (*q.stride()[:2], *k_arena.stride()[:2], *v_arena.stride()[:2])
    # what multiplies a product of queries and keys, and the cap that its tanh then gets
    factor, cap = (scale * LOG2_E, None) if softcap is None else (scale / softcap, softcap * LOG2_E)
    options = {"cap": cap, "WINDOWED": window is not None, "CAPPED": softcap is not None}
    depths = (None,) * 4 if window is None else (plan.item_depth, plan.suffix_depth, plan.suffix_len, window)
    if len(plan.items):
        _partial_kernel[(len(plan.items), num_kv_heads, triton.cdiv(QUERY_TILE * group, tile.block_q))](
            q, k_arena, v_arena, partial_out, partial_lse, plan.items, *depths, factor, num_heads, *strides, **options,
            GROUP=group, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_Q=tile.block_q, BLOCK_KV=tile.block_kv,
            ITEM_COLUMNS=ITEM_COLUMNS, UPCAST=INTERPRETED, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    _merge_kernel[(num_rows, num_heads)](
        q, k_arena, v_arena, partial_out, partial_lse, plan.partial_offsets, plan.partial_index,
        plan.suffix_start, plan.suffix_len, out, sinks, window, factor, num_heads, *strides, **options,
        HAS_SINKS=sinks is not None, GROUP=group, HEAD_DIM=head_dim, BLOCK_D=block_d,
        BLOCK_KV=SUFFIX_BLOCKS[max(block_d, min(SUFFIX_BLOCKS))], UPCAST=INTERPRETED,
    )  # fmt: skip
    return out


@triton.jit
def _store_kernel(
    k_new_ptr,  # [N, Hkv, D]
    v_new_ptr,  # [N, Hkv, D]
    k_ptr,  # [C, Hkv, D]
    v_ptr,  # [C, Hkv, D]
    slots_ptr,  # [N] int64
    k_new_row_stride, k_new_head_stride, v_new_row_stride, v_new_head_stride,
    k_row_stride, k_head_stride, v_row_stride, v_head_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """Key and value of one row and head into its slot. Rows that share the padding slot race, and nothing reads it."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    columns = tl.arange(0, BLOCK_D)
    real = columns < HEAD_DIM
    k = tl.load(k_new_ptr + row * k_new_row_stride + head * k_new_head_stride + columns, mask=real)
    v = tl.load(v_new_ptr + row * v_new_row_stride + head * v_new_head_stride + columns, mask=real)
    tl.store(k_ptr + slot * k_row_stride + head * k_head_stride + columns, k, mask=real)
    tl.store(v_ptr + slot * v_row_stride + head * v_head_stride + columns, v, mask=real)


@triton.jit
def _rotate_store_kernel(
    q_ptr,  # [N, H, D]
    rotated_ptr,  # [N, H, D] contiguous
    cos_ptr,  # [N, D] contiguous
    sin_ptr,  # [N, D] contiguous
    k_new_ptr,  # [N, Hkv, D]
    v_new_ptr,  # [N, Hkv, D]
    k_ptr,  # [C, Hkv, D]
    v_ptr,  # [C, Hkv, D]
    slots_ptr,  # [N] int64
    num_heads,
    q_row_stride, q_head_stride,
    k_new_row_stride, k_new_head_stride, v_new_row_stride, v_new_head_stride,
    k_row_stride, k_head_stride, v_row_stride, v_head_stride,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
) -> None:  # fmt: skip
    """As `_store_kernel` with the key rotated, and the query heads that share it, which go to a tensor of their own."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    columns = tl.arange(0, BLOCK_D)
    real = columns < HEAD_DIM
    v = tl.load(v_new_ptr + row * v_new_row_stride + head * v_new_head_stride + columns, mask=real)
    tl.store(v_ptr + slot * v_row_stride + head * v_head_stride + columns, v, mask=real)
    k_new_ptr += row * k_new_row_stride + head * k_new_head_stride
    _rotate_head(k_new_ptr, k_ptr + slot * k_row_stride + head * k_head_stride, cos_ptr + row * HEAD_DIM,
                 sin_ptr + row * HEAD_DIM, HEAD_DIM, BLOCK_HALF, UPCAST)  # fmt: skip
    for member in tl.static_range(GROUP):
        q_head = head * GROUP + member
        target_ptr = rotated_ptr + (row * num_heads + q_head) * HEAD_DIM
        _rotate_head(q_ptr + row * q_row_stride + q_head * q_head_stride, target_ptr, cos_ptr + row * HEAD_DIM,
                     sin_ptr + row * HEAD_DIM, HEAD_DIM, BLOCK_HALF, UPCAST)  # fmt: skip


@triton.jit
def _rotate_head(
    source_ptr: tl.tensor,  # [D]
    target_ptr: tl.tensor,  # [D]
    cos_ptr: tl.tensor,  # [D]
    sin_ptr: tl.tensor,  # [D]
    HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """Rotate one head: elements i and i + D / 2 by angle i of the first half and of the second."""
    HALF: tl.constexpr = HEAD_DIM // 2
    low = tl.arange(0, BLOCK_HALF)
    real = low < HALF
    high = low + HALF
    first = tl.load(source_ptr + low, mask=real, other=0.0).to(tl.float32)
    second = tl.load(source_ptr + high, mask=real, other=0.0).to(tl.float32)
    first_cos = tl.load(cos_ptr + low, mask=real, other=0.0).to(tl.float32)
    first_sin = tl.load(sin_ptr + low, mask=real, other=0.0).to(tl.float32)
    second_cos = tl.load(cos_ptr + high, mask=real, other=0.0).to(tl.float32)
    second_sin = tl.load(sin_ptr + high, mask=real, other=0.0).to(tl.float32)
    dtype = target_ptr.dtype.element_ty
    tl.store(target_ptr + low, cast(first * first_cos - second * first_sin, dtype, UPCAST), mask=real)
    tl.store(target_ptr + high, cast(second * second_cos + first * second_sin, dtype, UPCAST), mask=real)


@triton.jit
def _partial_kernel(
    q_ptr,  # [N, H, D]
    k_ptr,  # [C, Hkv, D]
    v_ptr,  # [C, Hkv, D]
    out_ptr,  # [P, H, D] fp32 contiguous
    lse_ptr,  # [P, H] fp32, base 2
    items_ptr,  # [W, ITEM_COLUMNS] int32
    item_depth_ptr,  # [W] int32, None without a window, as the next three
    suffix_depth_ptr,  # [N] int32
    suffix_len_ptr,  # [N] int32
    window,
    factor,  # in base 2 without a cap
    num_heads,
    q_row_stride, q_head_stride, k_row_stride, k_head_stride, v_row_stride, v_head_stride,
    cap,  # in base 2, None without one
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    ITEM_COLUMNS: tl.constexpr, UPCAST: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of an item for one key head. Tile row m is query m // GROUP under query head m % GROUP of the group."""
    item_ptr = items_ptr + tl.program_id(0).to(tl.int64) * ITEM_COLUMNS
    kv_head = tl.program_id(1).to(tl.int64)
    num_queries = tl.load(item_ptr + 1)
    packed = tl.program_id(2) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    if tl.program_id(2) * BLOCK_Q >= num_queries * GROUP:
        return
    num_keys = tl.load(item_ptr + 3)
    query = packed // GROUP
    head = kv_head * GROUP + packed % GROUP
    real = query < num_queries
    visible = tl.minimum(num_keys, tl.load(item_ptr + 4) + query)
    columns = tl.arange(0, BLOCK_D)
    real_columns = columns[None, :] < HEAD_DIM

    rows = (tl.load(item_ptr) + query).to(tl.int64)
    q_addresses = q_ptr + (rows * q_row_stride + head * q_head_stride)[:, None] + columns[None, :]
    q = tl.load(q_addresses, mask=real[:, None] & real_columns, other=0.0)  # [BLOCK_Q, BLOCK_D]
    if UPCAST:
        q = q.to(tl.float32)
    first_key = tl.load(item_ptr + 2).to(tl.int64)
    k_item_ptr = k_ptr + first_key * k_row_stride + kv_head * k_head_stride
    v_item_ptr = v_ptr + first_key * v_row_stride + kv_head * v_head_stride

    maximum = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    start = 0
    if WINDOWED:
        depths = tl.load(suffix_depth_ptr + rows, mask=real, other=0) + tl.load(
            suffix_len_ptr + rows, mask=real, other=0
        )
        oldest = depths - window - tl.load(item_depth_ptr + tl.program_id(0))  # first key of the item that a row sees
        start = tl.maximum(tl.min(tl.where(real, oldest, num_keys), 0), 0) // BLOCK_KV * BLOCK_KV
    for first in range(start, num_keys, BLOCK_KV):
        keys = first + tl.arange(0, BLOCK_KV)
        k = load_rows(k_item_ptr, keys, k_row_stride, num_keys, HEAD_DIM, BLOCK_D, True, UPCAST)
        v = load_rows(v_item_ptr, keys, v_row_stride, num_keys, HEAD_DIM, BLOCK_D, True, UPCAST)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * factor  # [BLOCK_Q, BLOCK_KV]
        if CAPPED:
            scores = accurate_tanh(scores) * cap
        scores = tl.where(keys[None, :] < visible[:, None], scores, float("-inf"))
        if WINDOWED:
            scores = tl.where(keys[None, :] >= oldest[:, None], scores, float("-inf"))
        maximum, total, acc = online_softmax_step(maximum, total, acc, scores, v, v_ptr.dtype.element_ty, True, UPCAST)

    partial = (tl.load(item_ptr + 5) + query).to(tl.int64) * num_heads + head
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out_ptr + partial[:, None] * HEAD_DIM + columns[None, :], acc, mask=real[:, None] & real_columns)
    tl.store(lse_ptr + partial, maximum + tl.log2(total), mask=real)


@triton.jit
def _merge_kernel(
    q_ptr,  # [N, H, D]
    k_ptr,  # [C, Hkv, D]
    v_ptr,  # [C, Hkv, D]
    partial_out_ptr,  # [P, H, D] fp32 contiguous
    partial_lse_ptr,  # [P, H] fp32, base 2
    offsets_ptr,  # [N + 1] int32
    index_ptr,  # int32
    suffix_start_ptr,  # [N] int32
    suffix_len_ptr,  # [N] int32
    out_ptr,  # [N, H, D] contiguous
    sinks_ptr,  # [H], None without
    window,  # None without
    factor,  # in base 2 without a cap
    num_heads,
    q_row_stride, q_head_stride, k_row_stride, k_head_stride, v_row_stride, v_head_stride,
    cap,  # in base 2, None without one
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, HAS_SINKS: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_KV: tl.constexpr, UPCAST: tl.constexpr,
) -> None:  # fmt: skip
    """One row and head: its partials in path order, its private suffix, the division."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    real = columns < HEAD_DIM
    # a maximum that is finite from the start, below every score: no -inf - -inf, and a hidden partial weighs 0
    maximum = tl.full([], -1.0e38, tl.float32)
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    if HAS_SINKS:
        maximum = tl.maximum(maximum, tl.load(sinks_ptr + head).to(tl.float32) * _LOG2_E)
        total += 1.0
    for at in range(tl.load(offsets_ptr + row), tl.load(offsets_ptr + row + 1)):
        partial = tl.load(index_ptr + at).to(tl.int64) * num_heads + head
        lse = tl.load(partial_lse_ptr + partial)
        out = tl.load(partial_out_ptr + partial * HEAD_DIM + columns, mask=real, other=0.0)
        new_maximum = tl.maximum(maximum, lse)
        decay = tl.exp2(maximum - new_maximum)
        weight = tl.exp2(lse - new_maximum)
        total = total * decay + weight
        acc = acc * decay + out * weight
        maximum = new_maximum

    q = tl.load(q_ptr + row * q_row_stride + head * q_head_stride + columns, mask=real, other=0.0).to(tl.float32)
    first_key = tl.load(suffix_start_ptr + row).to(tl.int64)
    num_keys = tl.load(suffix_len_ptr + row)
    k_suffix_ptr = k_ptr + first_key * k_row_stride + (head // GROUP) * k_head_stride
    v_suffix_ptr = v_ptr + first_key * v_row_stride + (head // GROUP) * v_head_stride
    start = 0
    if WINDOWED:
        start = tl.maximum(num_keys - window, 0) // BLOCK_KV * BLOCK_KV
    for first in range(start, num_keys, BLOCK_KV):
        keys = first + tl.arange(0, BLOCK_KV)
        k = load_rows(k_suffix_ptr, keys, k_row_stride, num_keys, HEAD_DIM, BLOCK_D, True, True)  # as float32
        v = load_rows(v_suffix_ptr, keys, v_row_stride, num_keys, HEAD_DIM, BLOCK_D, True, True)
        scores = tl.sum(k * q[None, :], 1) * factor  # [BLOCK_KV]
        if CAPPED:
            scores = accurate_tanh(scores) * cap
        scores = tl.where(keys < num_keys, scores, float("-inf"))
        if WINDOWED:
            scores = tl.where(keys >= num_keys - window, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 0))
        decay = tl.exp2(maximum - new_maximum)
        weights = tl.exp2(scores - new_maximum)
        total = total * decay + tl.sum(weights, 0)
        acc = acc * decay + tl.sum(v * weights[:, None], 0)
        maximum = new_maximum

    result = cast(acc / tl.where(total == 0.0, 1.0, total), out_ptr.dtype.element_ty, UPCAST)
    tl.store(out_ptr + (row * num_heads + head) * HEAD_DIM + columns, result, mask=real)
