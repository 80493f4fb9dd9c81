# mypy: disable-error-code="no-untyped-def"
"""Log-probs of chosen columns of softmax(z), z = slope (h W^T) + bias', by Triton: with logits in chunks, or with none.

The vocabulary is cut into splits. Of each split a program keeps the row's maximum m_s and sum s_s of exp(z - m_s), and

    M = max_s m_s,   S = sum_s s_s exp(m_s - M),   logp_u = (z_u - M) - log S

which never forms the rounded sum M + log S. Two ways to the partial sums share the merge:

* `fused_logps`: tiles of h W^T stay in registers, no logit reaches memory; a target's logit is a dot product of its own,
  so a row may have any number of targets. For rows that take no gradient.
* `chunk_scores`: a chunk's products come from a matrix multiplication in float32. The targets are moved out of the logits
  (and -inf put in their place) first, so the partial sums are those of the other columns: the mass on no target is a sum
  and never 1 - exp(logp). `conditional_probabilities` then gives exp(z - m) / s over the other columns, whose product
  with W is the expected embedding that backward needs.

All sums are float32, in a fixed order, without atomics. Sizes that change from step to step are no constants and select
no variant of a kernel, so nothing is compiled after the first steps. Left out: soft-cap, gradients of the head, float64.
"""

import torch
import triton
import triton.language as tl

from cpo_kernels.linear_logprob.interpreter import INTERPRETED, cast

MAX_SPLITS = 256  # partial sums of a row, merged by one program; one row tile alone then fills a card of 132 SMs
TARGET_PROGRAMS = 512  # about four per SM: enough to even out the last wave
BLOCK_LOGITS = 1024  # columns of a row per step: 4 KiB in float32
BLOCK_TARGETS = 64  # targets per program; 16 to 500 per chunk in practice
BLOCK_WIDTH = 512  # products of a target's dot per step: 1 KiB of a bf16 row
GROUP_ROWS = 8  # row tiles that walk the vocabulary together: 8 x 128 rows x 4096 x 2 bytes = 8 MiB stay in L2
# Stored probabilities are scaled by this: the smallest float16 stands for 6e-11, and 128k smaller ones lose 1e-5 at most.
PROBABILITY_SCALE = 1024.0

# Tiles of the fused products: (largest number of rows or None, BLOCK_R, BLOCK_V, BLOCK_E, warps, stages). A Hopper
# warp-group product needs 64 rows; a smaller tile wastes less of a small step. None of them spills more than two
# registers on sm80 or sm90. Products of float32 are exact (ieee), without tensor cores: registers bound their tiles.
TILES_16_BIT = ((16, 16, 128, 64, 4, 4), (64, 64, 128, 64, 4, 3), (None, 128, 128, 64, 8, 3))
TILES_32_BIT = ((16, 16, 128, 32, 4, 2), (None, 64, 64, 32, 8, 2))


@triton.jit
def _accumulate(row_max, row_sum, tile, tile_max, AXIS: tl.constexpr):
    """Running (max, sum) after one more tile; a row that has seen only -inf stays at sum 0."""
    new_max = tl.maximum(row_max, tile_max)
    pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
    new_sum = row_sum * tl.exp(row_max - pivot)
    if AXIS == 1:
        new_sum += tl.sum(tl.exp(tile - pivot[:, None]), axis=1)
    else:
        new_sum += tl.sum(tl.exp(tile - pivot), axis=0)
    return new_max, new_sum


@triton.jit(do_not_specialize=["num_rows", "num_splits", "tiles_per_split"])
def _product_partials(
    hidden,  # [R, E]
    weight,  # [V, E]
    bias,  # [V] or unused
    partial_max,  # [R, splits] fp32
    partial_sum,  # [R, splits] fp32
    num_rows,
    vocab,
    num_splits,
    tiles_per_split,
    slope,
    WIDTH: tl.constexpr,  # E is fixed by the model: a constant bound lets the loop over it be pipelined
    HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Partial max and sum of one row tile over one split; row tiles of a group are neighbours, so a W tile is read once."""
    num_row_tiles = tl.cdiv(num_rows, BLOCK_R)
    group_programs = GROUP * num_splits
    first_tile = tl.program_id(0) // group_programs * GROUP
    tiles_in_group = tl.minimum(num_row_tiles - first_tile, GROUP)
    in_group = tl.program_id(0) % group_programs
    row = (first_tile + in_group % tiles_in_group) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = in_group // tiles_in_group
    # Rows and columns beyond the end read the last one again; their results are masked.
    hidden_rows = hidden + tl.minimum(row, num_rows - 1).to(tl.int64)[:, None] * WIDTH
    element = tl.arange(0, BLOCK_E)
    row_max = tl.full([BLOCK_R], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_R], tl.float32)
    last = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(vocab, BLOCK_V))
    for tile in range(split * tiles_per_split, last):
        column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        read = tl.minimum(column, vocab - 1)
        weight_rows = weight + read.to(tl.int64)[None, :] * WIDTH
        logits = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
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
            logits = tl.dot(h, w, logits, input_precision="ieee")
        if HAS_BIAS:
            logits += tl.load(bias + read).to(tl.float32)[None, :]
        logits = tl.where((column < vocab)[None, :], logits * slope, float("-inf"))
        row_max, row_sum = _accumulate(row_max, row_sum, logits, tl.max(logits, axis=1), 1)
    out = row.to(tl.int64) * num_splits + split
    tl.store(partial_max + out, row_max, mask=row < num_rows)
    tl.store(partial_sum + out, row_sum, mask=row < num_rows)


@triton.jit(do_not_specialize=["num_splits", "tiles_per_split"])
def _logit_partials(
    logits,  # [C, V] fp32 products, -inf at targets
    bias,  # [V] or unused
    partial_max,  # [C, splits] fp32
    partial_sum,  # [C, splits] fp32
    vocab,
    num_splits,
    tiles_per_split,
    slope,
    HAS_BIAS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Partial max and sum of one row over one split of stored products."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row_max = tl.full([1], float("-inf"), tl.float32)
    row_sum = tl.zeros([1], tl.float32)
    last = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(vocab, BLOCK_V))
    for tile in range(split * tiles_per_split, last):
        column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        z = tl.load(logits + row * vocab + column, mask=column < vocab, other=float("-inf"))
        if HAS_BIAS:
            z += tl.load(bias + column, mask=column < vocab, other=0.0).to(tl.float32)
        z *= slope
        row_max, row_sum = _accumulate(row_max, row_sum, z, tl.max(z, axis=0), 0)
    out = row * num_splits + split + tl.arange(0, 1)
    tl.store(partial_max + out, row_max)
    tl.store(partial_sum + out, row_sum)


@triton.jit(do_not_specialize=["num_splits"])
def _merge(
    partial_max,  # [C, splits] fp32
    partial_sum,  # [C, splits] fp32
    picked,  # [U] fp32 logits of targets
    row_offsets,  # [C + 1] int64, targets [row_offsets[r], row_offsets[r + 1]) are of row r
    logps,  # [U] fp32
    columns_max,  # [C] fp32 over the columns in the partial sums
    columns_sum,  # [C] fp32
    rest,  # [C] fp32 probability of the columns in the partial sums
    num_splits,
    TARGETS_APART: tl.constexpr,  # the partial sums leave the targets out
    BLOCK_S: tl.constexpr,
):
    """Merge a row's partial sums, and its targets where they are apart; then the log-probs of its targets."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_S)
    maxima = tl.load(partial_max + row * num_splits + split, mask=split < num_splits, other=float("-inf"))
    sums = tl.load(partial_sum + row * num_splits + split, mask=split < num_splits, other=0.0)
    part_max = tl.max(maxima, axis=0)
    pivot = tl.where(part_max == float("-inf"), 0.0, part_max)
    part_sum = tl.sum(sums * tl.exp(maxima - pivot), axis=0)
    first, last = tl.load(row_offsets + row), tl.load(row_offsets + row + 1)
    total_max, total_sum = part_max, part_sum
    if TARGETS_APART:
        for u in range(first, last):
            total_max = tl.maximum(total_max, tl.load(picked + u))
        total_sum = part_sum * tl.exp(part_max - total_max)
        tl.store(columns_max + row, part_max)
        tl.store(columns_sum + row, part_sum)
        others = total_sum
        for u in range(first, last):
            total_sum += tl.exp(tl.load(picked + u) - total_max)
        tl.store(rest + row, others / total_sum)
    for u in range(first, last):
        tl.store(logps + u, (tl.load(picked + u) - total_max) - tl.log(total_sum))


@triton.jit(do_not_specialize=["first_row", "first_pair", "last_pair"])
def _take_targets(
    logits,  # [C, V] fp32 products; -inf is written at every target
    bias,  # [V] or unused
    pair_row,  # [U] int64
    target,  # [U] int64
    picked,  # [U] fp32
    first_row,
    first_pair,
    last_pair,
    vocab,
    slope,
    HAS_BIAS: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """Move the logits of distinct targets out of a chunk. A kernel of its own: its end is the barrier for the next."""
    u = first_pair + tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    mask = u < last_pair
    column = tl.load(target + u, mask=mask, other=0)
    place = (tl.load(pair_row + u, mask=mask, other=0) - first_row) * vocab + column
    z = tl.load(logits + place, mask=mask, other=0.0)
    if HAS_BIAS:
        z += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(picked + u, z * slope, mask=mask)
    tl.store(logits + place, tl.full([BLOCK_U], float("-inf"), tl.float32), mask=mask)


@triton.jit
def _conditional(
    logits,  # [C, V] fp32 products, -inf at targets
    bias,  # [V] or unused
    columns_max,  # [C] fp32
    columns_sum,  # [C] fp32
    probabilities,  # [C, V] dtype of the head
    vocab,
    slope,
    scale,
    HAS_BIAS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """scale exp(z - m) / s: the row's distribution over the columns that are no target, 0 at those that are."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = column < vocab
    z = tl.load(logits + row * vocab + column, mask=mask, other=float("-inf"))
    if HAS_BIAS:
        z += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    row_max, row_sum = tl.load(columns_max + row), tl.load(columns_sum + row)
    empty = row_sum == 0.0  # every column of the row is a target
    factor = tl.where(empty, 0.0, scale / tl.where(empty, 1.0, row_sum))
    values = tl.exp(z * slope - tl.where(empty, 0.0, row_max)) * factor
    place = probabilities + row * vocab + column
    tl.store(place, cast(values, probabilities.dtype.element_ty, INTERPRETED), mask=mask)


@triton.jit
def _target_logits(
    hidden,  # [R, E]
    weight,  # [V, E]
    bias,  # [V] or unused
    pair_row,  # [U] int64
    target,  # [U] int64
    picked,  # [U] fp32
    slope,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The logit of one target as a dot product."""
    u = tl.program_id(0)
    row, column = tl.load(pair_row + u), tl.load(target + u)
    total = tl.zeros([BLOCK_E], tl.float32)
    for start in range(0, WIDTH, BLOCK_E):
        element = start + tl.arange(0, BLOCK_E)
        h = tl.load(hidden + row * WIDTH + element, mask=element < WIDTH, other=0.0).to(tl.float32)
        w = tl.load(weight + column * WIDTH + element, mask=element < WIDTH, other=0.0).to(tl.float32)
        total += h * w
    z = tl.sum(total, axis=0)
    if HAS_BIAS:
        z += tl.load(bias + column).to(tl.float32)
    tl.store(picked + u, z * slope)


def _splits(num_tiles: int, programs_per_split: int) -> tuple[int, int]:
    """How many splits of how many tiles each, none empty; depends on shapes alone, so that sums repeat on any card."""
    wanted = min(MAX_SPLITS, num_tiles, triton.cdiv(TARGET_PROGRAMS, programs_per_split))
    tiles_per_split = triton.cdiv(num_tiles, wanted)
    return triton.cdiv(num_tiles, tiles_per_split), tiles_per_split


def fused_logps(
    rows: torch.Tensor,  # [R, E]
    weight: torch.Tensor,  # [V, E]
    bias: torch.Tensor | None,  # [V]
    slope: float,
    pair_row: torch.Tensor,  # [U] int64, ascending
    target: torch.Tensor,  # [U] int64
    row_offsets: torch.Tensor,  # [R + 1] int64
) -> torch.Tensor:
    """Log-probs [U] float32 of targets, without logits in memory. Rows and weight are contiguous."""
    (num_rows, width), vocab = rows.shape, weight.shape[0]
    picked, logps = (rows.new_empty(target.shape, dtype=torch.float32) for _ in range(2))
    if num_rows == 0:
        return logps
    table = TILES_32_BIT if rows.dtype == torch.float32 else TILES_16_BIT
    limit_and_tile = next(entry for entry in table if entry[0] is None or num_rows <= entry[0])
    block_r, block_v, block_e, warps, stages = limit_and_tile[1:]
    row_tiles = triton.cdiv(num_rows, block_r)
    splits, tiles_per_split = _splits(triton.cdiv(vocab, block_v), row_tiles)
    partials = rows.new_empty(2, num_rows, splits, dtype=torch.float32)
    some_bias, has_bias = (weight, False) if bias is None else (bias, True)
    with torch.cuda.device_of(rows):
        _product_partials[(row_tiles * splits,)](
            rows, weight, some_bias, partials[0], partials[1], num_rows, vocab, splits, tiles_per_split, slope,
            WIDTH=width, HAS_BIAS=has_bias, BLOCK_R=block_r, BLOCK_V=block_v, BLOCK_E=block_e, GROUP=GROUP_ROWS,
            UPCAST=INTERPRETED, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        _target_logits[(target.shape[0],)](
            rows, weight, some_bias, pair_row, target, picked, slope,
            WIDTH=width, HAS_BIAS=has_bias, BLOCK_E=BLOCK_WIDTH,
        )  # fmt: skip
        unused = partials
        _merge[(num_rows,)](
            partials[0], partials[1], picked, row_offsets, logps, unused, unused, unused, splits,
            TARGETS_APART=False, BLOCK_S=MAX_SPLITS,
        )  # fmt: skip
    return logps


def chunk_scores(
    logits: torch.Tensor,  # [C, V] float32 products h W^T of rows [first_row, first_row + C); targets become -inf
    bias: torch.Tensor | None,  # [V]
    slope: float,
    pair_row: torch.Tensor,  # [U] int64, ascending
    target: torch.Tensor,  # [U] int64
    row_offsets: torch.Tensor,  # [R + 1] int64
    first_row: int,
    pair_span: tuple[int, int],  # the chunk's targets
    picked: torch.Tensor,  # [U] float32, written at the chunk's targets
    logps: torch.Tensor,  # [U] float32, written at the chunk's targets
) -> torch.Tensor:
    """Log-probs of a chunk's targets, and [3, C] float32: maximum, sum and probability of the columns that are none."""
    (num_rows, vocab), (first_pair, last_pair) = logits.shape, pair_span
    splits, tiles_per_split = _splits(triton.cdiv(vocab, BLOCK_LOGITS), num_rows)
    partials = logits.new_empty(2, num_rows, splits)
    others = logits.new_empty(3, num_rows)
    some_bias, has_bias = (logits, False) if bias is None else (bias, True)
    with torch.cuda.device_of(logits):
        _take_targets[(triton.cdiv(last_pair - first_pair, BLOCK_TARGETS),)](
            logits, some_bias, pair_row, target, picked, first_row, first_pair, last_pair, vocab, slope,
            HAS_BIAS=has_bias, BLOCK_U=BLOCK_TARGETS,
        )  # fmt: skip
        _logit_partials[(num_rows, splits)](
            logits, some_bias, partials[0], partials[1], vocab, splits, tiles_per_split, slope,
            HAS_BIAS=has_bias, BLOCK_V=BLOCK_LOGITS,
        )  # fmt: skip
        _merge[(num_rows,)](
            partials[0], partials[1], picked, row_offsets[first_row : first_row + num_rows + 1], logps,
            others[0], others[1], others[2], splits, TARGETS_APART=True, BLOCK_S=MAX_SPLITS,
        )  # fmt: skip
    return others


def conditional_probabilities(
    logits: torch.Tensor,  # [C, V] float32 as `chunk_scores` left them
    bias: torch.Tensor | None,  # [V]
    slope: float,
    others: torch.Tensor,  # [3, C] float32 of `chunk_scores`
    dtype: torch.dtype,
) -> torch.Tensor:
    """[C, V] PROBABILITY_SCALE times the distribution over the columns that are no target, 0 at targets."""
    num_rows, vocab = logits.shape
    probabilities = torch.empty_like(logits, dtype=dtype)
    some_bias, has_bias = (logits, False) if bias is None else (bias, True)
    with torch.cuda.device_of(logits):
        _conditional[(num_rows, triton.cdiv(vocab, BLOCK_LOGITS))](
            logits, some_bias, others[0], others[1], probabilities, vocab, slope, PROBABILITY_SCALE,
            HAS_BIAS=has_bias, BLOCK_V=BLOCK_LOGITS, INTERPRETED=INTERPRETED,
        )  # fmt: skip
    return probabilities
