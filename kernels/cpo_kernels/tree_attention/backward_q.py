# mypy: disable-error-code="no-untyped-def"
"""Tree attention, backward, in Triton: dq.

One program makes one tile of query rows of one head over the key blocks that the schedule lists for them, as in the
forward: first the full ones, without a mask and without bounds, then the partial ones.
"""

import torch
import triton
import triton.language as tl

from cpo_kernels.tree_attention.schedule import TreeSchedule
from cpo_kernels.tree_attention.tiles import (
    Tile,
    as_operand,
    choose_tile,
    hide,
    listed_keys,
    load_rows,
    store_rows,
)

# By padded head size. Queries and output gradients stay, keys and values stream. 128 rows of 128 and more spill on 8.0, a
# head of 256 on 9.0 unless its tiles go through shared memory in two stages.
QUERY_TILES = {
    64: Tile(block_q=128, block_kv=64, num_warps=8, num_stages=2),
    128: Tile(block_q=64, block_kv=64, num_warps=8, num_stages=2),
    256: Tile(block_q=64, block_kv=32, num_warps=8, num_stages=2),
}


def launch_grad_q(
    inputs: tuple[torch.Tensor, ...],  # q, k, v, grad_out, lse, delta
    schedule: TreeSchedule,
    sizes: tuple[int | float, ...],
    strides: tuple[int, ...],
    constants: dict[str, int | bool],
) -> torch.Tensor:
    """dq [T, H, D], contiguous, in the dtype of q; the arguments are those of the kernel, made in `backward`."""
    q = inputs[0]
    num_rows, num_heads, head_dim = q.shape
    tile = choose_tile(QUERY_TILES, head_dim, q.dtype, schedule)
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _grad_q_kernel[(triton.cdiv(num_rows, tile.block_q) * num_heads,)](
        *inputs,
        grad_q,
        schedule.subtree_end,
        schedule.full_offsets,
        schedule.full_blocks,
        schedule.partial_offsets,
        schedule.partial_blocks,
        *sizes,
        *strides,
        BLOCK_Q=tile.block_q,
        BLOCK_KV=tile.block_kv,
        TILES_PER_Q=schedule.block_q // tile.block_q,
        TILES_PER_KV=schedule.block_kv // tile.block_kv,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **constants,
    )
    return grad_q


@triton.jit(do_not_specialize=["num_rows"])
def _grad_q_kernel(
    q_ptr,  # [T, H, D]
    k_ptr,  # [T, Hkv, D]
    v_ptr,  # [T, Hkv, D]
    grad_out_ptr,  # [T, H, D]
    lse_ptr,  # [H, T] fp32
    delta_ptr,  # [H, T] fp32
    grad_q_ptr,  # [T, H, D] contiguous
    end_ptr,  # [T] int32
    full_offsets_ptr,  # [Q + 1] int32
    full_blocks_ptr,  # int32
    partial_offsets_ptr,  # [Q + 1] int32
    partial_blocks_ptr,  # int32
    num_rows,
    num_heads,
    group,  # query heads per key head
    scale_log2,
    scale,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    grad_out_row_stride,
    grad_out_head_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    TILES_PER_Q: tl.constexpr,
    TILES_PER_KV: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """dq of one query tile and head, over the full and the partial key blocks of its schedule block."""
    tile_index = tl.program_id(0) // num_heads
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    k_head_ptr = k_ptr + (head // group) * k_head_stride
    v_head_ptr = v_ptr + (head // group) * v_head_stride
    grad_out_head_ptr = grad_out_ptr + head * grad_out_head_stride
    rows = tile_index * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q = load_rows(q_ptr + head * q_head_stride, rows, q_row_stride, num_rows, HEAD_DIM, BLOCK_D, True, UPCAST)
    grad_out = load_rows(grad_out_head_ptr, rows, grad_out_row_stride, num_rows, HEAD_DIM, BLOCK_D, True, UPCAST)
    lse = tl.load(lse_ptr + head * num_rows + rows, mask=rows < num_rows, other=0.0)
    delta = tl.load(delta_ptr + head * num_rows + rows, mask=rows < num_rows, other=0.0)

    grad_q = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    block_q = tile_index // TILES_PER_Q
    for masked in tl.static_range(2):  # full blocks, then partial ones
        offsets_ptr = partial_offsets_ptr if masked else full_offsets_ptr
        blocks_ptr = partial_blocks_ptr if masked else full_blocks_ptr
        first, last = tl.load(offsets_ptr + block_q), tl.load(offsets_ptr + block_q + 1)
        for step in range(first * TILES_PER_KV, last * TILES_PER_KV):
            keys = listed_keys(blocks_ptr, step, BLOCK_KV, TILES_PER_KV)
            k = load_rows(k_head_ptr, keys, k_row_stride, num_rows, HEAD_DIM, BLOCK_D, masked == 1, UPCAST)
            v = load_rows(v_head_ptr, keys, v_row_stride, num_rows, HEAD_DIM, BLOCK_D, masked == 1, UPCAST)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - lse[:, None]
            if masked == 1:
                ends = tl.load(end_ptr + keys, mask=keys < num_rows, other=0)
                scores = hide(scores, rows[:, None], keys[None, :], ends[None, :])
            weights = tl.exp2(scores)
            grad_weights = tl.dot(grad_out, tl.trans(v), input_precision="ieee")
            grad_scores = weights * (grad_weights - delta[:, None])
            grad_q = tl.dot(as_operand(grad_scores, k_ptr.dtype.element_ty, UPCAST), k, grad_q, input_precision="ieee")
    store_rows(grad_q_ptr, grad_q * scale, rows, head, num_heads, num_rows, HEAD_DIM, BLOCK_D, UPCAST)
