# mypy: disable-error-code="no-untyped-def"
"""Tree attention, backward, in Triton.

With p = 2^(scale log2(e) q . k - lse), dp = dout . v and delta = dout . out, over the visible pairs

    dv[j] = sum_i p[i, j] dout[i]       ds = p (dp - delta)
    dq[i] = scale sum_j ds[i, j] k[j]   dk[j] = scale sum_i ds[i, j] q[i]

The probabilities are made again from the forward's log-sum-exp. A soft-cap multiplies ds by its slope 1 - (s / c)^2. A
sink is in the log-sum-exp, and its own gradient needs no kernel (`sink_gradient`). A window is a further mask. Every
gradient is written once by one program that sums in a fixed order, query heads of a group and parts of a query range
included: no atomics, bitwise repeatable.

dq: one program makes one tile of query rows of one head over the key blocks that the schedule lists for them, as in the
forward: first the full ones, without a mask and without bounds, then the partial ones.

dk and dv: one program makes one tile of keys of one key head, over the queries of one piece of the schedule's work and
over the query heads of the group: masked steps, then unmasked ones where every key of the block is seen, then masked
ones. Where the piece is all the rows that see the block, the program writes dk and dv. Where it is a part of them, as for
a prompt that nearly all rows see, it writes float32 sums to a workspace, and a second kernel adds the parts of a block in
their order. The cut does not depend on the device, so neither do the bits.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from cpo_kernels.tree_attention.schedule import TreeSchedule
from cpo_kernels.tree_attention.window import Window, feature_arguments, score_factor, sink_gradient
from cpo_kernels.triton_tiles import (
    EXACT_TILES,
    INTERPRETED,
    Tile,
    accurate_tanh,
    apply_tree_mask,
    apply_window,
    as_operand,
    by_rows,
    choose_tile,
    listed_tile,
    load_rows,
    padded_head_dim,
    store_rows,
    tile_architecture,
)

# As the tiles of the forward. Queries and output gradients stay, keys and values stream. What divides rows among all warps
# of a block for every product, as 64 rows do among 4 warps and 128 among 8, computes none of them twice.
QUERY_TILES = {
    90: {
        64: Tile(block_q=128, block_kv=64, num_warps=4, num_stages=3),  # 100 %, 2 blocks, 255 registers
        128: Tile(block_q=128, block_kv=64, num_warps=8, num_stages=3),  # 100 %, 1 block, 188 registers
        256: Tile(block_q=128, block_kv=32, num_warps=8, num_stages=3),  # 75 %, 1 block, 239 registers
    },
    80: {
        64: Tile(block_q=128, block_kv=32, num_warps=4, num_stages=3),  # 100 %, 2 blocks, 252 registers
        128: Tile(block_q=64, block_kv=64, num_warps=4, num_stages=2),  # 92 %, 2 blocks, 255 registers
        256: Tile(block_q=32, block_kv=64, num_warps=4, num_stages=1),  # 80 %, 2 blocks, 255 registers
    },
}
# Keys and values stay, queries and output gradients stream. The two float32 accumulators of 64 keys, the least that the
# matrix instructions of 9.0 take, fill half the registers of a head of 128, and so two blocks a multiprocessor go with 32
# queries at a time. Of a head of 256 they would fill all: on 9.0 dk and dv take a pass each, which computes scores anew,
# and on 8.0 a block takes 32 keys.
KEY_TILES = {
    90: {
        64: Tile(block_q=64, block_kv=64, num_warps=4, num_stages=3),  # 100 %, 2 blocks, 255 registers
        128: Tile(block_q=32, block_kv=64, num_warps=4, num_stages=3),  # 80 %, 2 blocks, 255 registers
        256: Tile(block_q=32, block_kv=64, num_warps=4, num_stages=3, num_passes=2),  # 61 %, 1 block, 255 registers
    },
    80: {
        64: Tile(block_q=64, block_kv=64, num_warps=4, num_stages=3),  # 88 %, 2 blocks, 255 registers
        128: Tile(block_q=32, block_kv=64, num_warps=4, num_stages=2),  # 66 %, 2 blocks, 255 registers
        256: Tile(block_q=32, block_kv=32, num_warps=4, num_stages=2),  # 61 %, 2 blocks, 255 registers
    },
}
SUM_ROWS = 16  # rows of one program that adds parts: the least block of keys; bound by memory
DELTA_ROWS = 64  # rows of one program of the row-wise product; bound by memory at any size


def tree_attention_backward(
    grad_out: torch.Tensor,  # [T, H, D]
    q: torch.Tensor,  # [T, H, D]
    k: torch.Tensor,  # [T, Hkv, D]
    v: torch.Tensor,  # [T, Hkv, D]
    out: torch.Tensor,  # [T, H, D] contiguous
    lse: torch.Tensor,  # [H, T] float32
    schedule: TreeSchedule,
    scale: float,
    needs: tuple[bool, bool, bool] = (True, True, True),
    window: Window | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [H]
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of q, k and v, and of sinks, from the gradient of the output.

    Args:
        grad_out: in the dtype of q, any strides.
        q, k, v, schedule, scale, window, softcap: as given to the forward.
        out, lse: as returned by it.
        needs: which of dq, dk and dv are wanted. dk and dv come together, so that wanting one makes both.
        sinks: as given to the forward, or None where they need no gradient.

    Returns:
        dq [T, H, D], dk and dv [T, Hkv, D], contiguous, in the dtype of q, and dsinks [H] in the dtype of sinks, each None
        where it is not wanted.
    """
    num_rows, num_heads, head_dim = q.shape
    grad_out, q, k, v = by_rows(grad_out), by_rows(q), by_rows(k), by_rows(v)
    constants = {"HEAD_DIM": head_dim, "BLOCK_D": padded_head_dim(head_dim), "UPCAST": INTERPRETED}
    delta = torch.empty_like(lse)
    _delta_kernel[(triton.cdiv(num_rows, DELTA_ROWS) * num_heads,)](
        grad_out, out, delta, num_rows, num_heads, *grad_out.stride()[:2], BLOCK_Q=DELTA_ROWS, **constants
    )
    inputs = (q, k, v, grad_out, lse, delta)
    grad_sinks = None if sinks is None else sink_gradient(sinks, lse * math.log(2), delta, grad_out)
    sizes = (num_rows, num_heads, num_heads // k.shape[1], score_factor(scale, softcap), scale)
    features = feature_arguments(window, softcap)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *grad_out.stride()[:2])
    grad_q = launch_grad_q(inputs, schedule, sizes, strides, constants, features) if needs[0] else None
    if not (needs[1] or needs[2]):
        return grad_q, None, None, grad_sinks
    grad_k, grad_v = launch_grad_kv(inputs, schedule, sizes, strides, constants, features)
    return grad_q, grad_k if needs[1] else None, grad_v if needs[2] else None, grad_sinks


def launch_grad_q(
    inputs: tuple[torch.Tensor, ...],  # q, k, v, grad_out, lse, delta
    schedule: TreeSchedule,
    sizes: tuple[int | float, ...],  # num_rows, num_heads, group, scale_log2, scale
    strides: tuple[int, ...],  # of rows and heads of q, k, v and grad_out
    constants: dict[str, int | bool],
    features: dict[str, Any],  # of `feature_arguments`
) -> torch.Tensor:
    """dq [T, H, D], contiguous, in the dtype of q."""
    q = inputs[0]
    num_rows, num_heads, head_dim = q.shape
    tile = choose_tile(
        "tree_attention", head_dim, q.dtype, QUERY_TILES[tile_architecture(q.device)], EXACT_TILES, schedule.blocks
    )
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _grad_q_kernel[(triton.cdiv(num_rows, tile.block_q) * num_heads,)](
        *inputs, grad_q, schedule.subtree_end,
        schedule.full_offsets, schedule.full_blocks, schedule.partial_offsets, schedule.partial_blocks,
        *sizes, *strides, BLOCK_Q=tile.block_q, BLOCK_KV=tile.block_kv,
        TILES_PER_Q=schedule.block_q // tile.block_q, TILES_PER_KV=schedule.block_kv // tile.block_kv,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **constants, **features,
    )  # fmt: skip
    return grad_q


def launch_grad_kv(
    inputs: tuple[torch.Tensor, ...],  # q, k, v, grad_out, lse, delta
    schedule: TreeSchedule,
    sizes: tuple[int | float, ...],  # num_rows, num_heads, group, scale_log2, scale
    strides: tuple[int, ...],  # of rows and heads of q, k, v and grad_out
    constants: dict[str, int | bool],
    features: dict[str, Any],  # of `feature_arguments`
) -> tuple[torch.Tensor, torch.Tensor]:
    """dk and dv [T, Hkv, D], contiguous, in the dtype of k."""
    q, k, v = inputs[:3]
    num_kv_heads, head_dim = k.shape[1:]
    tile = choose_tile(
        "tree_attention", head_dim, q.dtype, KEY_TILES[tile_architecture(q.device)], EXACT_TILES, schedule.blocks
    )
    tiles_per_kv = schedule.block_kv // tile.block_kv
    grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    part_shape = (2, schedule.num_parts * schedule.block_kv, num_kv_heads, head_dim)
    part_k, part_v = torch.empty(part_shape, dtype=torch.float32, device=k.device)
    for with_k, with_v in ((True, True),) if tile.num_passes == 1 else ((True, False), (False, True)):
        _grad_kv_kernel[(len(schedule.work_block) * tiles_per_kv * num_kv_heads,)](
            *inputs, grad_k, grad_v, part_k, part_v, schedule.subtree_end,
            schedule.work_block, schedule.work_start, schedule.work_stop, schedule.work_part,
            schedule.kv_full_start, schedule.kv_full_stop, *sizes, *strides,
            BLOCK_Q=tile.block_q, BLOCK_KV=tile.block_kv, TILES_PER_KV=tiles_per_kv, WITH_K=with_k, WITH_V=with_v,
            num_warps=tile.num_warps, num_stages=tile.num_stages, **constants, **features,
        )  # fmt: skip
    if schedule.num_parts > 0:
        sum_tiles = schedule.block_kv // SUM_ROWS
        _sum_parts_kernel[(len(schedule.split_block) * sum_tiles * num_kv_heads,)](
            part_k, part_v, grad_k, grad_v, schedule.split_block, schedule.split_offsets,
            k.shape[0], num_kv_heads, sizes[-1], BLOCK_KV=SUM_ROWS, TILES_PER_KV=sum_tiles, **constants,
        )  # fmt: skip
    return grad_k, grad_v


@triton.jit(do_not_specialize=["num_rows"])
def _delta_kernel(
    grad_out_ptr,  # [T, H, D]
    out_ptr,  # [T, H, D] contiguous
    delta_ptr,  # [H, T] fp32
    num_rows,
    num_heads,
    grad_out_row_stride, grad_out_head_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, UPCAST: tl.constexpr,
) -> None:  # fmt: skip
    """delta[h, i] = dout[i, h] . out[i, h] in float32."""
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    rows = (tl.program_id(0) // num_heads) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    grad_out_head_ptr = grad_out_ptr + head * grad_out_head_stride
    grad_out = load_rows(grad_out_head_ptr, rows, grad_out_row_stride, num_rows, HEAD_DIM, BLOCK_D, True, UPCAST)
    out = load_rows(out_ptr + head * HEAD_DIM, rows, num_heads * HEAD_DIM, num_rows, HEAD_DIM, BLOCK_D, True, UPCAST)
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + head * num_rows + rows, delta, mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows", "window"])
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
    q_row_stride, q_head_stride, k_row_stride, k_head_stride, v_row_stride, v_head_stride,
    grad_out_row_stride, grad_out_head_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    TILES_PER_Q: tl.constexpr, TILES_PER_KV: tl.constexpr, UPCAST: tl.constexpr,
    depths_ptr=None,  # [T] int32
    window=None,
    cap_log2=None,  # softcap log2(e); scale_log2 is then scale / softcap
) -> None:  # fmt: skip
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

    if depths_ptr is not None:
        row_depths = tl.load(depths_ptr + rows, mask=rows < num_rows, other=0)
    grad_q = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
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
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
            if cap_log2 is not None:
                capped = accurate_tanh(scores)
                scores = capped * cap_log2
            scores = scores - lse[:, None]
            if masked == 1:
                ends = tl.load(end_ptr + keys, mask=keys < num_rows, other=0)
                scores = apply_tree_mask(scores, rows[:, None], keys[None, :], ends[None, :])
                if depths_ptr is not None:
                    key_depths = tl.load(depths_ptr + keys, mask=keys < num_rows, other=0)
                    scores = apply_window(scores, row_depths[:, None], key_depths[None, :], window)
            weights = tl.exp2(scores)
            grad_weights = tl.dot(grad_out, tl.trans(v), input_precision="ieee")
            grad_scores = weights * (grad_weights - delta[:, None])
            if cap_log2 is not None:
                grad_scores *= 1.0 - capped * capped
            grad_q = tl.dot(as_operand(grad_scores, k_ptr.dtype.element_ty, UPCAST), k, grad_q, input_precision="ieee")
    store_rows(grad_q_ptr, grad_q * scale, rows, head, num_heads, num_rows, HEAD_DIM, BLOCK_D, UPCAST)


@triton.jit
def _add_queries(
    grad_k,  # [BLOCK_KV, BLOCK_D] fp32
    grad_v,  # [BLOCK_KV, BLOCK_D] fp32
    k,  # [BLOCK_KV, BLOCK_D]
    v,  # [BLOCK_KV, BLOCK_D]
    keys,  # [BLOCK_KV] int32
    ends,  # [BLOCK_KV] int32
    row,  # int32, the first of BLOCK_Q
    q_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    q_row_stride, grad_out_row_stride, num_rows, scale_log2,
    BLOCK_Q: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WITH_K: tl.constexpr, WITH_V: tl.constexpr,
    MASKED: tl.constexpr, UPCAST: tl.constexpr,
    depths_ptr, key_depths, window, cap_log2,
):  # fmt: skip
    """Add one tile of queries of one head to dk (without its scale) and dv, with MASKED only the visible pairs."""
    offsets = tl.arange(0, BLOCK_Q)
    q_ptr += row.to(tl.int64) * q_row_stride
    grad_out_ptr += row.to(tl.int64) * grad_out_row_stride
    q = load_rows(q_ptr, offsets, q_row_stride, num_rows - row, HEAD_DIM, BLOCK_D, MASKED, UPCAST, True)
    grad_out = load_rows(
        grad_out_ptr, offsets, grad_out_row_stride, num_rows - row, HEAD_DIM, BLOCK_D, MASKED, UPCAST, True
    )
    rows = row + offsets
    if MASKED:
        lse = tl.load(lse_ptr + rows, mask=rows < num_rows, other=0.0)
        delta = tl.load(delta_ptr + rows, mask=rows < num_rows, other=0.0)
    else:
        lse = tl.load(lse_ptr + rows)
        delta = tl.load(delta_ptr + rows)
    scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2  # [BLOCK_KV, BLOCK_Q]
    if cap_log2 is not None:
        capped = accurate_tanh(scores)
        scores = capped * cap_log2
    scores = scores - lse[None, :]
    if MASKED:
        scores = apply_tree_mask(scores, rows[None, :], keys[:, None], ends[:, None])
        if depths_ptr is not None:
            row_depths = tl.load(depths_ptr + rows, mask=rows < num_rows, other=0)
            scores = apply_window(scores, row_depths[None, :], key_depths[:, None], window)
    weights = tl.exp2(scores)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    if WITH_V:
        grad_v = tl.dot(as_operand(weights, dtype, UPCAST), grad_out, grad_v, input_precision="ieee")
    if WITH_K:
        grad_weights = tl.dot(v, tl.trans(grad_out), input_precision="ieee")
        grad_scores = weights * (grad_weights - delta[None, :])
        if cap_log2 is not None:
            grad_scores *= 1.0 - capped * capped
        grad_k = tl.dot(as_operand(grad_scores, dtype, UPCAST), q, grad_k, input_precision="ieee")
    return grad_k, grad_v


@triton.jit(do_not_specialize=["num_rows", "window"])
def _grad_kv_kernel(
    q_ptr,  # [T, H, D]
    k_ptr,  # [T, Hkv, D]
    v_ptr,  # [T, Hkv, D]
    grad_out_ptr,  # [T, H, D]
    lse_ptr,  # [H, T] fp32
    delta_ptr,  # [H, T] fp32
    grad_k_ptr,  # [T, Hkv, D] contiguous
    grad_v_ptr,  # [T, Hkv, D] contiguous
    part_k_ptr,  # [parts * block_kv, Hkv, D] fp32
    part_v_ptr,  # [parts * block_kv, Hkv, D] fp32
    end_ptr,  # [T] int32
    work_block_ptr,  # [W] int32
    work_start_ptr,  # [W] int32
    work_stop_ptr,  # [W] int32
    work_part_ptr,  # [W] int32
    full_start_ptr,  # [K] int32
    full_stop_ptr,  # [K] int32
    num_rows,
    num_heads,
    group,  # query heads per key head
    scale_log2,
    scale,
    q_row_stride, q_head_stride, k_row_stride, k_head_stride, v_row_stride, v_head_stride,
    grad_out_row_stride, grad_out_head_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    TILES_PER_KV: tl.constexpr, WITH_K: tl.constexpr, WITH_V: tl.constexpr, UPCAST: tl.constexpr,
    depths_ptr=None,  # [T] int32
    window=None,
    cap_log2=None,  # softcap log2(e); scale_log2 is then scale / softcap
) -> None:  # fmt: skip
    """dk and dv of one key tile and key head, over the rows of a piece of work and the query heads of the group."""
    num_kv_heads = num_heads // group
    tile_index = tl.program_id(0) // num_kv_heads
    kv_head = (tl.program_id(0) % num_kv_heads).to(tl.int64)
    work = tile_index // TILES_PER_KV
    block = tl.load(work_block_ptr + work)
    offsets = tile_index % TILES_PER_KV * BLOCK_KV + tl.arange(0, BLOCK_KV)  # in the block
    keys = block * (TILES_PER_KV * BLOCK_KV) + offsets
    ends = tl.load(end_ptr + keys, mask=keys < num_rows, other=0)
    k_head_ptr, v_head_ptr = k_ptr + kv_head * k_head_stride, v_ptr + kv_head * v_head_stride
    k = load_rows(k_head_ptr, keys, k_row_stride, num_rows, HEAD_DIM, BLOCK_D, True, UPCAST)
    v = load_rows(v_head_ptr, keys, v_row_stride, num_rows, HEAD_DIM, BLOCK_D, True, UPCAST)

    key_depths = None
    if depths_ptr is not None:
        key_depths = tl.load(depths_ptr + keys, mask=keys < num_rows, other=0)
    start, stop = tl.load(work_start_ptr + work), tl.load(work_stop_ptr + work)
    full_start, full_stop = tl.load(full_start_ptr + block), tl.load(full_stop_ptr + block)
    num_steps = tl.cdiv(stop - start, BLOCK_Q)
    # the first step that lies in the full range, and one past the last; equal where none does
    full_begin = tl.minimum(tl.cdiv(tl.maximum(full_start - start, 0), BLOCK_Q), num_steps)
    full_end = tl.maximum((tl.minimum(full_stop, stop) - start) // BLOCK_Q, full_begin)

    grad_k = tl.zeros([BLOCK_KV, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_KV, BLOCK_D], tl.float32)
    for member in range(group):
        head = kv_head * group + member
        q_head_ptr, grad_out_head_ptr = q_ptr + head * q_head_stride, grad_out_ptr + head * grad_out_head_stride
        lse_head_ptr, delta_head_ptr = lse_ptr + head * num_rows, delta_ptr + head * num_rows
        for phase in tl.static_range(3):  # masked, full, masked
            first = 0 if phase == 0 else (full_begin if phase == 1 else full_end)
            last = full_begin if phase == 0 else (full_end if phase == 1 else num_steps)
            # an accumulator of a head of 256 leaves no registers for what a step can compute again
            for step in tl.range(first, last, disable_licm=WITH_K != WITH_V):
                grad_k, grad_v = _add_queries(
                    grad_k, grad_v, k, v, keys, ends, start + step * BLOCK_Q,
                    q_head_ptr, grad_out_head_ptr, lse_head_ptr, delta_head_ptr,
                    q_row_stride, grad_out_row_stride, num_rows, scale_log2,
                    BLOCK_Q, HEAD_DIM, BLOCK_D, WITH_K, WITH_V, phase != 1, UPCAST,
                    depths_ptr, key_depths, window, cap_log2,
                )  # fmt: skip
    part = tl.load(work_part_ptr + work)
    if part < 0:
        if WITH_K:
            store_rows(grad_k_ptr, grad_k * scale, keys, kv_head, num_kv_heads, num_rows, HEAD_DIM, BLOCK_D, UPCAST)
        if WITH_V:
            store_rows(grad_v_ptr, grad_v, keys, kv_head, num_kv_heads, num_rows, HEAD_DIM, BLOCK_D, UPCAST)
    else:
        first = part * (TILES_PER_KV * BLOCK_KV)
        last = first + TILES_PER_KV * BLOCK_KV
        if WITH_K:
            store_rows(part_k_ptr, grad_k, first + offsets, kv_head, num_kv_heads, last, HEAD_DIM, BLOCK_D, UPCAST)
        if WITH_V:
            store_rows(part_v_ptr, grad_v, first + offsets, kv_head, num_kv_heads, last, HEAD_DIM, BLOCK_D, UPCAST)


@triton.jit(do_not_specialize=["num_rows"])
def _sum_parts_kernel(
    part_k_ptr,  # [parts * block_kv, Hkv, D] fp32
    part_v_ptr,  # [parts * block_kv, Hkv, D] fp32
    grad_k_ptr,  # [T, Hkv, D] contiguous
    grad_v_ptr,  # [T, Hkv, D] contiguous
    split_block_ptr,  # [B] int32
    split_offsets_ptr,  # [B + 1] int32
    num_rows,
    num_kv_heads,
    scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_KV: tl.constexpr, TILES_PER_KV: tl.constexpr, UPCAST: tl.constexpr,
) -> None:  # fmt: skip
    """dk and dv of BLOCK_KV keys of one cut block and key head: the sum of its parts in their order."""
    tile_index = tl.program_id(0) // num_kv_heads
    kv_head = (tl.program_id(0) % num_kv_heads).to(tl.int64)
    split = tile_index // TILES_PER_KV
    offsets = tile_index % TILES_PER_KV * BLOCK_KV + tl.arange(0, BLOCK_KV)  # in the block
    keys = tl.load(split_block_ptr + split) * (TILES_PER_KV * BLOCK_KV) + offsets
    row_stride = num_kv_heads * HEAD_DIM
    part_k_head_ptr, part_v_head_ptr = part_k_ptr + kv_head * HEAD_DIM, part_v_ptr + kv_head * HEAD_DIM
    grad_k = tl.zeros([BLOCK_KV, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_KV, BLOCK_D], tl.float32)
    for part in range(tl.load(split_offsets_ptr + split), tl.load(split_offsets_ptr + split + 1)):
        rows = part * (TILES_PER_KV * BLOCK_KV) + offsets
        grad_k += load_rows(part_k_head_ptr, rows, row_stride, num_rows, HEAD_DIM, BLOCK_D, False, UPCAST)
        grad_v += load_rows(part_v_head_ptr, rows, row_stride, num_rows, HEAD_DIM, BLOCK_D, False, UPCAST)
    store_rows(grad_k_ptr, grad_k * scale, keys, kv_head, num_kv_heads, num_rows, HEAD_DIM, BLOCK_D, UPCAST)
    store_rows(grad_v_ptr, grad_v, keys, kv_head, num_kv_heads, num_rows, HEAD_DIM, BLOCK_D, UPCAST)
