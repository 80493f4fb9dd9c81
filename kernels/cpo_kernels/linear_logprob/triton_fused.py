# mypy: disable-error-code="no-untyped-def"
"""Path B: log-probs of targets without a logit in memory, by Triton. For rows that take no gradient.

Tiles of h W^T stay in registers, and each program leaves the partial sums of one row tile over one split of the
vocabulary (`triton_sums`). A target's logit is a dot product of its own, so a row may have any number of targets. A target
has the row's largest logit if its column is the largest one's, or if its dot product reaches that column's dot product. A
tile's value is compared with no dot product, because the two round differently.
"""

import torch
import triton
import triton.language as tl

from cpo_kernels.device import architecture, multiprocessors
from cpo_kernels.linear_logprob.results import Head
from cpo_kernels.linear_logprob.triton_sums import NUM_STATS, Transform, accumulate, final_logits, merge, splits
from cpo_kernels.logprob_plan import LogprobPlan
from cpo_kernels.triton_tiles import INTERPRETED

BLOCK_WIDTH = 512  # products of a target's dot per step: 1 KiB of a bf16 row
PROGRAMS_AN_SM = 4  # one or two at a time: enough to even out the last wave
GROUP_ROWS = 8  # row tiles that walk the vocabulary together: 8 x 128 rows x 4096 x 2 bytes = 8 MiB stay in L2

# Tiles of the fused products: (largest number of rows or None, BLOCK_R, BLOCK_V, BLOCK_E, warps, stages). A Hopper
# warp-group product needs 64 rows; a smaller tile wastes less of a small step. Products of float32 are exact (ieee),
# without tensor cores: registers bound their tiles. `make aot` bounds what a tile may spill.
TILES_16_BIT = ((16, 16, 128, 64, 4, 4), (64, 64, 128, 64, 4, 3), (None, 128, 128, 64, 8, 3))
# On sm90 two programs of the largest tile fit an SM at 128 registers a thread, which hold all that a plain head without
# outputs keeps; left alone the compiler takes 132 at E 576. With outputs or a soft-cap 40 to 224 bytes would spill.
PLAIN_REGISTERS = {"sm90": 128}
TILES_32_BIT = ((16, 16, 128, 32, 4, 2), (None, 64, 64, 32, 8, 2))


@triton.jit(do_not_specialize=["num_rows", "vocab", "num_splits", "tiles_per_split"])
def _product_partials(
    hidden,  # [R, E]
    weight,  # [V, E]
    bias,  # [V] or unused
    partials,  # [2 or 5, R, splits] fp32
    num_rows, vocab, num_splits, tiles_per_split,
    slope, inner, cap,  # `Transform`
    WIDTH: tl.constexpr,  # E is fixed by the model: a constant bound lets the loop over it be pipelined
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, WITH_OUTPUTS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_E: tl.constexpr, GROUP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Partial sums of one row tile over one split. Row tiles of a group are neighbours, so a W tile is read once."""
    num_row_tiles = tl.cdiv(num_rows, BLOCK_R)
    group_programs = GROUP * num_splits
    first_tile = tl.program_id(0) // group_programs * GROUP
    tiles_in_group = tl.minimum(num_row_tiles - first_tile, GROUP)
    in_group = tl.program_id(0) % group_programs
    row = (first_tile + in_group % tiles_in_group) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = in_group // tiles_in_group
    # rows and columns beyond the end read the last one again, and their results are masked
    hidden_rows = hidden + tl.minimum(row, num_rows - 1).to(tl.int64)[:, None] * WIDTH
    element = tl.arange(0, BLOCK_E)
    row_max = tl.full([BLOCK_R], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_R], tl.float32)
    weighted = tl.zeros([BLOCK_R], tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    top = tl.zeros([BLOCK_R], tl.float32)
    last = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(vocab, BLOCK_V))
    for tile in range(split * tiles_per_split, last):
        column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        read = tl.minimum(column, vocab - 1)
        weight_rows = weight + read.to(tl.int64)[None, :] * WIDTH
        products = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
        for start in range(0, WIDTH, BLOCK_E):
            if WIDTH % BLOCK_E == 0:
                h = tl.load(hidden_rows + start + element[None, :])
                w = tl.load(weight_rows + start + element[:, None])
            else:
                inside = start + element < WIDTH
                h = tl.load(hidden_rows + start + element[None, :], mask=inside[None, :], other=0.0)
                w = tl.load(weight_rows + start + element[:, None], mask=inside[:, None], other=0.0)
            if UPCAST:
                h, w = h.to(tl.float32), w.to(tl.float32)
            products = tl.dot(h, w, products, input_precision="ieee")
        if HAS_BIAS:
            products += tl.load(bias + read).to(tl.float32)[None, :]
        logits = final_logits(products, slope, inner, cap, CAPPED)
        inside_vocab = (column < vocab)[None, :]
        if WITH_OUTPUTS:
            total += tl.sum(tl.where(inside_vocab, logits, 0.0), axis=1)
        logits = tl.where(inside_vocab, logits, float("-inf"))
        tile_max = tl.max(logits, axis=1)
        if WITH_OUTPUTS:
            name = tl.where(logits == tile_max[:, None], column.to(tl.float32)[None, :], 16777216.0)
            top = tl.where(tile_max > row_max, tl.min(name, axis=1), top)
        row_max, row_sum, weighted = accumulate(row_max, row_sum, weighted, logits, tile_max, 1, WITH_OUTPUTS)
    out = partials + row.to(tl.int64) * num_splits + split
    plane = num_rows.to(tl.int64) * num_splits
    tl.store(out, row_max, mask=row < num_rows)
    tl.store(out + plane, row_sum, mask=row < num_rows)
    if WITH_OUTPUTS:
        tl.store(out + 2 * plane, weighted, mask=row < num_rows)
        tl.store(out + 3 * plane, total, mask=row < num_rows)
        tl.store(out + 4 * plane, top, mask=row < num_rows)


@triton.jit
def _target_logits(
    hidden,  # [R, E]
    weight,  # [V, E]
    bias,  # [V] or unused
    pair_row,  # [U] int64, or unused: pair u is of row u
    target,  # [U] int64
    picked,  # [U] fp32
    slope, inner, cap,  # `Transform`
    WIDTH: tl.constexpr, ONE_A_ROW: tl.constexpr, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The logit of one target as a dot product."""
    u = tl.program_id(0).to(tl.int64)
    row = u
    if not ONE_A_ROW:
        row = tl.load(pair_row + u)
    column = tl.load(target + u)
    products = tl.zeros([BLOCK_E], tl.float32)
    for start in range(0, WIDTH, BLOCK_E):
        element = start + tl.arange(0, BLOCK_E)
        h = tl.load(hidden + row * WIDTH + element, mask=element < WIDTH, other=0.0).to(tl.float32)
        w = tl.load(weight + column * WIDTH + element, mask=element < WIDTH, other=0.0).to(tl.float32)
        products += h * w
    x = tl.sum(products, axis=0)
    if HAS_BIAS:
        x += tl.load(bias + column).to(tl.float32)
    tl.store(picked + u, final_logits(x, slope, inner, cap, CAPPED))


def fused_scores(
    rows: torch.Tensor,  # [R, E], R > 0, contiguous
    head: Head,  # contiguous
    plan: LogprobPlan,
    with_outputs: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs [U] float32 of the plan's pairs, `stats` [NUM_STATS, R] of `triton_sums`, and is_top1 [U] bool if asked."""
    (num_rows, width), weight, target, transform = rows.shape, head.weight, plan.pair_target, Transform.of(head)
    vocab, bias = weight.shape[0], weight if head.bias is None else head.bias
    picked, logps = (rows.new_empty(target.shape, dtype=torch.float32) for _ in range(2))
    table = TILES_32_BIT if rows.dtype == torch.float32 else TILES_16_BIT
    limit_and_tile = next(entry for entry in table if entry[0] is None or num_rows <= entry[0])
    block_r, block_v, block_e, warps, stages = limit_and_tile[1:]
    row_tiles = triton.cdiv(num_rows, block_r)
    wanted = PROGRAMS_AN_SM * multiprocessors(rows.device)
    num_splits, tiles_per_split = splits(triton.cdiv(vocab, block_v), row_tiles, wanted)
    partials = rows.new_empty(5 if with_outputs else 2, num_rows, num_splits, dtype=torch.float32)
    stats = rows.new_empty(NUM_STATS, num_rows, dtype=torch.float32)
    top = plan.unique_rows.new_empty(num_rows)
    constants = {"WIDTH": width, "HAS_BIAS": head.bias is not None, "CAPPED": transform.capped}
    plain = block_r == 128 and not with_outputs and not transform.capped
    with torch.cuda.device_of(rows):
        _product_partials[(row_tiles * num_splits,)](
            rows, weight, bias, partials, num_rows, vocab, num_splits, tiles_per_split, *transform,
            WITH_OUTPUTS=with_outputs, BLOCK_R=block_r, BLOCK_V=block_v, BLOCK_E=block_e, GROUP=GROUP_ROWS,
            UPCAST=INTERPRETED, num_warps=warps, num_stages=stages,
            maxnreg=PLAIN_REGISTERS.get(architecture(rows.device)) if plain else None, **constants,
        )  # fmt: skip
        _target_logits[(target.shape[0],)](
            rows, weight, bias, plan.pair_row, target, picked, *transform,
            ONE_A_ROW=False, BLOCK_E=BLOCK_WIDTH, **constants,
        )  # fmt: skip
        merge(partials, picked, plan.row_offsets, logps, stats, top, 0, vocab)
        if not with_outputs:
            return logps, stats, plan.pair_row.new_empty(0, dtype=torch.bool)
        best = stats.new_empty(num_rows)
        _target_logits[(num_rows,)](
            rows, weight, bias, plan.pair_row, top, best, *transform,
            ONE_A_ROW=True, BLOCK_E=BLOCK_WIDTH, **constants,
        )  # fmt: skip
    is_top1 = (target == top[plan.pair_row]) | (picked >= best[plan.pair_row])
    return logps, stats, is_top1
