# mypy: disable-error-code="no-untyped-def"
"""Tree attention, forward, in Triton.

    out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j]   over   { j : j <= i < subtree_end[j] }

One program makes one tile of query rows of one head. It walks the key blocks that the schedule lists for those rows:
first the full ones, without a mask and without bounds, then the partial ones under (n <= m) & (m < subtree_end[n]). Key
blocks that no row of the tile sees are never read. The softmax is the online one in base 2, with maximum, sum and
weighted values in float32. log2 of the sum of exponentials is kept for the backward.

What a model has beyond this is an argument that is None where it has not: the machine code is then without it. A window
is a further mask of partial blocks, by depth. A soft-cap c makes the scores c tanh(scale q . k / c) before the mask. A
sink is where the online softmax of a row starts: its maximum, a sum of 1 and no values.

A NaN or an infinity among the values of a hidden row that shares a partial block with visible ones is multiplied by zero
and spreads.
"""

import torch
import triton
import triton.language as tl

from cpo_kernels.tree_attention.schedule import TreeSchedule
from cpo_kernels.tree_attention.window import Window, feature_arguments, score_factor
from cpo_kernels.triton_tiles import (
    EXACT_TILES,
    INTERPRETED,
    Tile,
    accurate_tanh,
    apply_tree_mask,
    apply_window,
    by_rows,
    choose_tile,
    listed_tile,
    load_rows,
    online_softmax_step,
    padded_head_dim,
    store_rows,
    tile_architecture,
)

# By architecture and padded head size. Beside a tile: the share of the matrix peak that its machine code can reach, blocks
# that a multiprocessor holds, registers a thread. `make aot` holds them to it; the model stands in the tests' machine_code.
# Of three stages one tile of keys is on its way while the one before is computed with; of two and of one a block waits for
# its copies, so that only where a multiprocessor holds two blocks the other one computes meanwhile.
TILES = {
    90: {
        64: Tile(block_q=128, block_kv=64, num_warps=4, num_stages=3),  # 100 %, 2 blocks, 228 registers
        128: Tile(block_q=128, block_kv=64, num_warps=8, num_stages=3),  # 100 %, 1 block, 168 registers
        256: Tile(block_q=128, block_kv=32, num_warps=8, num_stages=3),  # 80 %, 1 block, 238 registers
    },
    80: {
        64: Tile(block_q=128, block_kv=64, num_warps=4, num_stages=3),  # 100 %, 2 blocks, 250 registers
        128: Tile(block_q=128, block_kv=32, num_warps=4, num_stages=3),  # 100 %, 2 blocks, 255 registers
        256: Tile(block_q=32, block_kv=64, num_warps=4, num_stages=1),  # 88 %, 2 blocks, 254 registers
    },
}


def tree_attention_forward(
    q: torch.Tensor,  # [T, H, D]
    k: torch.Tensor,  # [T, Hkv, D]
    v: torch.Tensor,  # [T, Hkv, D]
    schedule: TreeSchedule,
    scale: float,
    window: Window | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [H]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention output and what the backward needs of the softmax.

    Args:
        q, k, v: bfloat16, float16 or float32, all the same, any strides. Hkv divides H.
        schedule: of the same forest, on the device of q. Its block sizes are powers of two >= 16.
        scale: factor on q . k.
        window: with `schedule`, as `window_schedule` gives both.
        softcap: positive, of the scores.
        sinks: floating point, on the device of q.

    Returns:
        out [T, H, D] contiguous, in the dtype of q, and lse [H, T] float32: log2 of the sum over visible keys of
        exp(score), and of exp(sink) where there is one.

    Raises:
        ValueError: head size, dtype or block sizes that no kernel is made for.
    """
    num_rows, num_heads, head_dim = q.shape
    tile = choose_tile(
        "tree_attention", head_dim, q.dtype, TILES[tile_architecture(q.device)], EXACT_TILES, schedule.blocks
    )
    q, k, v = by_rows(q), by_rows(k), by_rows(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((num_heads, num_rows), dtype=torch.float32, device=q.device)
    _forward_kernel[(triton.cdiv(num_rows, tile.block_q) * num_heads,)](
        q, k, v, out, lse, schedule.subtree_end,
        schedule.full_offsets, schedule.full_blocks, schedule.partial_offsets, schedule.partial_blocks,
        num_rows, num_heads, num_heads // k.shape[1], score_factor(scale, softcap),
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim), BLOCK_Q=tile.block_q, BLOCK_KV=tile.block_kv,
        TILES_PER_Q=schedule.block_q // tile.block_q, TILES_PER_KV=schedule.block_kv // tile.block_kv,
        UPCAST=INTERPRETED, num_warps=tile.num_warps, num_stages=tile.num_stages,
        sinks_ptr=None if sinks is None else sinks.to(torch.float32).contiguous(),
        **feature_arguments(window, softcap),
    )  # fmt: skip
    return out, lse


@triton.jit(do_not_specialize=["num_rows", "window"])
def _forward_kernel(
    q_ptr,  # [T, H, D]
    k_ptr,  # [T, Hkv, D]
    v_ptr,  # [T, Hkv, D]
    out_ptr,  # [T, H, D] contiguous
    lse_ptr,  # [H, T] fp32
    end_ptr,  # [T] int32
    full_offsets_ptr,  # [Q + 1] int32
    full_blocks_ptr,  # int32
    partial_offsets_ptr,  # [Q + 1] int32
    partial_blocks_ptr,  # int32
    num_rows,
    num_heads,
    group,  # query heads per key head
    scale_log2,  # or, with cap_log2, scale / softcap
    q_row_stride, q_head_stride, k_row_stride, k_head_stride, v_row_stride, v_head_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    TILES_PER_Q: tl.constexpr, TILES_PER_KV: tl.constexpr, UPCAST: tl.constexpr,
    depths_ptr=None,  # [T] int32
    window=None,
    cap_log2=None,  # softcap log2(e)
    sinks_ptr=None,  # [H] fp32
) -> None:  # fmt: skip
    """Output and log-sum-exp of one query tile and head. Neighbouring programs are heads, whose rows are adjacent."""
    tile_index = tl.program_id(0) // num_heads
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    k_head_ptr = k_ptr + (head // group) * k_head_stride
    v_head_ptr = v_ptr + (head // group) * v_head_stride
    rows = tile_index * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q = load_rows(q_ptr + head * q_head_stride, rows, q_row_stride, num_rows, HEAD_DIM, BLOCK_D, True, UPCAST)

    maximum = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    if sinks_ptr is not None:
        maximum = tl.zeros([BLOCK_Q], tl.float32) + tl.load(sinks_ptr + head) * 1.4426950408889634
        total = tl.full([BLOCK_Q], 1.0, tl.float32)
    if depths_ptr is not None:
        row_depths = tl.load(depths_ptr + rows, mask=rows < num_rows, other=0)
    block_q = tile_index // TILES_PER_Q
    for masked in tl.static_range(2):  # full blocks, then partial ones
        offsets_ptr = partial_offsets_ptr if masked else full_offsets_ptr
        blocks_ptr = partial_blocks_ptr if masked else full_blocks_ptr
        first = tl.load(offsets_ptr + block_q) * TILES_PER_KV
        last = tl.load(offsets_ptr + block_q + 1) * TILES_PER_KV
        tile = listed_tile(blocks_ptr, first, last, TILES_PER_KV)
        for step in range(first, last):
            keys = tile * BLOCK_KV + tl.arange(0, BLOCK_KV)
            tile = listed_tile(blocks_ptr, step + 1, last, TILES_PER_KV)  # ahead: copies wait for no list
            k = load_rows(k_head_ptr, keys, k_row_stride, num_rows, HEAD_DIM, BLOCK_D, masked == 1, UPCAST)
            v = load_rows(v_head_ptr, keys, v_row_stride, num_rows, HEAD_DIM, BLOCK_D, masked == 1, UPCAST)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2  # [BLOCK_Q, BLOCK_KV]
            if cap_log2 is not None:
                scores = accurate_tanh(scores) * cap_log2
            if masked == 1:
                ends = tl.load(end_ptr + keys, mask=keys < num_rows, other=0)
                scores = apply_tree_mask(scores, rows[:, None], keys[None, :], ends[None, :])
                if depths_ptr is not None:
                    key_depths = tl.load(depths_ptr + keys, mask=keys < num_rows, other=0)
                    scores = apply_window(scores, row_depths[:, None], key_depths[None, :], window)
            maximum, total, acc = online_softmax_step(
                maximum, total, acc, scores, v, v_ptr.dtype.element_ty, masked == 1, UPCAST
            )

    total = tl.where(rows < num_rows, total, 1.0)  # rows past the line have seen nothing; they are not stored
    store_rows(out_ptr, acc / total[:, None], rows, head, num_heads, num_rows, HEAD_DIM, BLOCK_D, UPCAST)
    tl.store(lse_ptr + head * num_rows + rows, maximum + tl.log2(total), mask=rows < num_rows)
