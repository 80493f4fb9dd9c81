# mypy: disable-error-code="no-untyped-def"
"""Path A: log-probs and probabilities from stored products of one chunk of rows, by Triton.

The products h W^T of a chunk come from a matrix multiplication in float32. The targets are moved out first and -inf is put
in their place, so the partial sums are those of the other columns, and the mass on no target is a sum instead of
1 - exp(logp). `conditional_probabilities` then gives f exp(z - m) / s over the other columns, f = dz / dx without its
constant. Its product with W is the expected embedding that backward needs. Programs find a row's targets by
`row_offsets`, so the host reads no count.

Rows of products and probabilities begin `stride` elements apart, a multiple of 16, so every row is read and written 16
bytes at a time whatever the vocabulary. What lies between a row's end and the next is loaded and never used: no number in
it reaches a result, NaN neither.
"""

import torch
import triton
import triton.language as tl

from cpo_kernels.device import multiprocessors
from cpo_kernels.linear_logprob.chunk_size import row_stride
from cpo_kernels.linear_logprob.results import Head
from cpo_kernels.linear_logprob.triton_sums import (
    PART_MAX,
    PART_SUM,
    Transform,
    accumulate,
    final_logits,
    merge,
    slope_factor,
    splits,
)
from cpo_kernels.logprob_plan import LogprobPlan
from cpo_kernels.triton_tiles import INTERPRETED, cast

BLOCK_LOGITS = 1024  # columns of a row per step: 4 KiB in float32
# Of partial sums: as many as an SM holds at once, 4 warps each. One has 4 KiB of loads in flight. At about 700 ns a load
# the 4.3 TB/s of an H200 take 4.3e12 x 700e-9 / 132 SMs = 23 KB in flight an SM, six programs or more.
PROGRAMS_AN_SM = 16
BLOCK_TARGETS = 16  # targets of a row per step; most rows have 1, a branch as many as it has children
# Stored probabilities are scaled by this: the smallest float16 stands for 6e-11, and 128k smaller ones lose 1e-5 at most.
PROBABILITY_SCALE = 1024.0


@triton.jit(do_not_specialize=["first_row"])
def _take_targets(
    products,  # [C, V] fp32, -inf is written at every target
    bias,  # [V] or unused
    target,  # [U] int64
    row_offsets,  # [R + 1] int64
    picked,  # [U] fp32 logits
    first_row, stride,
    slope, inner, cap,  # `Transform`
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Move a row's targets out of a chunk. It is a kernel of its own because its end is the barrier for the next."""
    row = tl.program_id(0).to(tl.int64)
    first, last = tl.load(row_offsets + first_row + row), tl.load(row_offsets + first_row + row + 1)
    for start in range(first, last, BLOCK_U):
        u = start + tl.arange(0, BLOCK_U)
        mask = u < last
        column = tl.load(target + u, mask=mask, other=0)
        place = products + row * stride + column
        x = tl.load(place, mask=mask, other=0.0)
        if HAS_BIAS:
            x += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(picked + u, final_logits(x, slope, inner, cap, CAPPED), mask=mask)
        tl.store(place, tl.full([BLOCK_U], float("-inf"), tl.float32), mask=mask)


@triton.jit
def chunk_logits(
    products: tl.tensor,  # [C, V] fp32 pointer
    bias: tl.tensor,  # [stride] pointer, or unused
    row: tl.tensor,
    column: tl.tensor,  # [V] block
    vocab: tl.tensor, stride: tl.tensor,
    slope: tl.tensor, inner: tl.tensor, cap: tl.tensor,  # `Transform`
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Logits of a row's columns, -inf where a target was taken out and beyond the vocabulary."""
    mask = column < stride  # not vocab: a mask that may end anywhere makes loads of one element each
    x = tl.load(products + row * stride + column, mask=mask, other=float("-inf"))
    left_out = (x == float("-inf")) | (column >= vocab)
    x = tl.where(left_out, 0.0, x)
    if HAS_BIAS:
        x += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    return tl.where(left_out, float("-inf"), final_logits(x, slope, inner, cap, CAPPED))


@triton.jit(do_not_specialize=["num_rows", "vocab", "num_splits", "tiles_per_split"])
def _logit_partials(
    products,  # [C, V] fp32, -inf at targets
    bias,  # [stride] or unused
    partials,  # [2 or 5, C, splits] fp32, of which the fifth stays unused
    num_rows, vocab, stride, num_splits, tiles_per_split,
    slope, inner, cap,  # `Transform`
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, WITH_OUTPUTS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Partial sums of one row over one split of stored products."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row_max = tl.full([1], float("-inf"), tl.float32)
    row_sum = tl.zeros([1], tl.float32)
    weighted = tl.zeros([1], tl.float32)
    total = tl.zeros([1], tl.float32)
    last = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(vocab, BLOCK_V))
    for tile in range(split * tiles_per_split, last):
        column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        z = chunk_logits(products, bias, row, column, vocab, stride, slope, inner, cap, HAS_BIAS, CAPPED)
        if WITH_OUTPUTS:
            total += tl.sum(tl.where(z == float("-inf"), 0.0, z), axis=0)
        row_max, row_sum, weighted = accumulate(row_max, row_sum, weighted, z, tl.max(z, axis=0), 0, WITH_OUTPUTS)
    out = partials + row * num_splits + split + tl.arange(0, 1)
    plane = num_rows.to(tl.int64) * num_splits
    tl.store(out, row_max)
    tl.store(out + plane, row_sum)
    if WITH_OUTPUTS:
        tl.store(out + 2 * plane, weighted)
        tl.store(out + 3 * plane, total)


# planes of `stats` begin at any float: an aligned one and another would be two variants
@triton.jit(do_not_specialize=["vocab"], do_not_specialize_on_alignment=["columns_max", "columns_sum"])
def _conditional(
    products,  # [C, V] fp32, -inf at targets
    bias,  # [stride] or unused
    columns_max,  # [C] fp32
    columns_sum,  # [C] fp32
    probabilities,  # [C, V] dtype of the head, and 0 beyond
    vocab, stride,
    slope, inner, cap,  # `Transform`
    scale,
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, BLOCK_V: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """scale f exp(z - m) / s: the row's distribution over the columns that are no target, 0 at those that are."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    z = chunk_logits(products, bias, row, column, vocab, stride, slope, inner, cap, HAS_BIAS, CAPPED)
    row_max, row_sum = tl.load(columns_max + row), tl.load(columns_sum + row)
    empty = row_sum == 0.0  # every column of the row is a target
    factor = tl.where(empty, 0.0, scale / tl.where(empty, 1.0, row_sum))
    values = tl.exp(z - tl.where(empty, 0.0, row_max)) * factor
    values *= slope_factor(tl.where(z == float("-inf"), 0.0, z), cap, CAPPED)
    place = probabilities + row * stride + column
    tl.store(place, cast(values, probabilities.dtype.element_ty, INTERPRETED), mask=column < stride)


def empty_chunk(num_rows: int, vocab: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[C, V] for products or what is made of them, on the device of `like`, with rows `row_stride` apart."""
    return like.new_empty(num_rows, row_stride(vocab), dtype=dtype)[:, :vocab]


def bias_argument(head: Head, products: torch.Tensor) -> torch.Tensor:
    """The bias as long as a row of products with what lies beyond, or any tensor where the head has none."""
    if head.bias is None:
        return products
    return torch.nn.functional.pad(head.bias, (0, products.stride(0) - head.bias.shape[0]))


def chunk_scores(
    products: torch.Tensor,  # [C, V] float32 of `empty_chunk`, h W^T of rows from first_row on. Targets become -inf
    head: Head,
    plan: LogprobPlan,
    first_row: int,
    picked: torch.Tensor,  # [U] float32, written at the chunk's targets
    logps: torch.Tensor,  # [U] float32, written at the chunk's targets
    stats: torch.Tensor,  # [NUM_STATS, R] float32 of `triton_sums`, written at the chunk's rows
    with_outputs: bool,
) -> None:
    """Logits and log-probs of a chunk's targets, and what `stats` keeps of its rows."""
    (num_rows, vocab), stride = products.shape, products.stride(0)
    wanted = PROGRAMS_AN_SM * multiprocessors(products.device)
    num_splits, tiles_per_split = splits(triton.cdiv(vocab, BLOCK_LOGITS), num_rows, wanted)
    partials = products.new_empty(5 if with_outputs else 2, num_rows, num_splits)
    transform, bias = Transform.of(head), bias_argument(head, products)
    constants = {"HAS_BIAS": head.bias is not None, "CAPPED": transform.capped}
    with torch.cuda.device_of(products):
        _take_targets[(num_rows,)](
            products, bias, plan.pair_target, plan.row_offsets, picked, first_row, stride, *transform,
            BLOCK_U=BLOCK_TARGETS, num_warps=1, **constants,
        )  # fmt: skip
        _logit_partials[(num_rows, num_splits)](
            products, bias, partials, num_rows, vocab, stride, num_splits, tiles_per_split, *transform,
            WITH_OUTPUTS=with_outputs, BLOCK_V=BLOCK_LOGITS, **constants,
        )  # fmt: skip
        merge(partials, picked, plan.row_offsets, logps, stats, None, first_row, vocab)


def conditional_probabilities(
    products: torch.Tensor,  # [C, V] float32 as `chunk_scores` left them
    head: Head,
    stats: torch.Tensor,  # [NUM_STATS, C] float32 of these rows
    probabilities: torch.Tensor,  # [C, V] of `empty_chunk` in the dtype of the head
) -> torch.Tensor:
    """`probabilities`: PROBABILITY_SCALE times the distribution over the columns that are no target, 0 at targets."""
    (num_rows, vocab), stride = products.shape, products.stride(0)
    transform, bias = Transform.of(head), bias_argument(head, products)
    with torch.cuda.device_of(products):
        _conditional[(num_rows, triton.cdiv(vocab, BLOCK_LOGITS))](
            products, bias, stats[PART_MAX], stats[PART_SUM], probabilities, vocab, stride, *transform,
            PROBABILITY_SCALE,
            HAS_BIAS=head.bias is not None, CAPPED=transform.capped, BLOCK_V=BLOCK_LOGITS, INTERPRETED=INTERPRETED,
        )  # fmt: skip
    return probabilities
