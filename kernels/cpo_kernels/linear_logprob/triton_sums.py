# mypy: disable-error-code="no-untyped-def"
"""A row's log-sum-exp in splits of the vocabulary: partial sums, and their merge to log-probs, entropy and mean logit.

Of each split s a program keeps the row's maximum m_s and the sums s_s of exp(z - m_s), t_s of (z - m_s) exp(z - m_s) and
total_s of z. Then

    M = max_s m_s,   S = sum_s s_s exp(m_s - M),   logp_u = (z_u - M) - log S
    T = sum_s exp(m_s - M) (t_s + (m_s - M) s_s),   entropy = log S - T / S,   mean = sum_s total_s / V

which never forms the rounded sum M + log S. `triton_chunked` and `triton_fused` share the merge. All sums are float32, in a
fixed order, without atomics. Sizes that change from step to step are no constants and select no variant of a kernel, so
Triton compiles nothing after the first steps.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from cpo_kernels.linear_logprob.results import Head

MAX_SPLITS = 256  # partial sums of a row, merged by one program; one row tile alone then fills a card of 132 SMs
MAX_VOCAB = 1 << 24  # the column of the largest logit is kept as a float32, exact below this

# Planes of `partials` [5, R, splits] (the first two alone where no output is asked) and of `stats` [7, R].
MAXIMUM, SUM, WEIGHTED, TOTAL, TOP = range(5)
PART_MAX, PART_SUM, REST, ROW_MAX, ROW_SUM, ENTROPY, MEAN = range(7)
NUM_STATS = 7


class Transform(NamedTuple):
    """z = slope x, or cap tanh(inner x) under a soft-cap, of products x = h W^T + b."""

    slope: float  # logit_scale / temperature
    inner: float  # logit_scale / softcap
    cap: float  # softcap / temperature

    @classmethod
    def of(cls, head: Head) -> "Transform":
        """The head's transform. Without a soft-cap inner and cap are 0."""
        slope = float(head.logit_scale / head.temperature)
        if head.softcap is None:
            return cls(slope, 0.0, 0.0)
        return cls(slope, float(head.logit_scale / head.softcap), float(head.softcap / head.temperature))

    @property
    def capped(self) -> bool:
        return self.cap != 0.0


@triton.jit
def final_logits(
    x: tl.tensor,  # [...] fp32 products h W^T + b
    slope: tl.tensor, inner: tl.tensor, cap: tl.tensor,  # `Transform`
    CAPPED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Products to logits. tanh by its series near 0, where 1 - 2 / (exp(2x) + 1) has no digits (Cephes `tanhf`)."""
    if CAPPED:
        y = inner * x
        size = tl.abs(y)
        square = tl.minimum(size, 1.0) * tl.minimum(size, 1.0)
        series = (-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2
        series = (series * square + 1.33314422036e-1) * square - 3.33332819422e-1
        far = 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(size, 20.0)) + 1.0)  # 1 in float32 from 10 on
        bounded = tl.where(size < 0.625, size + size * square * series, far)
        return cap * tl.where(y < 0.0, -bounded, bounded)
    else:
        return x * slope


@triton.jit
def slope_factor(
    z: tl.tensor,  # [...] fp32 logits
    cap: tl.tensor,
    CAPPED: tl.constexpr,
) -> tl.tensor:
    """dz / dx over the constant slope: 1 - tanh^2 under a soft-cap."""
    if CAPPED:
        bounded = z / cap
        return 1.0 - bounded * bounded
    else:
        return tl.full(z.shape, 1.0, tl.float32)


@triton.jit
def accumulate(
    row_max: tl.tensor,  # [R] fp32
    row_sum: tl.tensor,  # [R] fp32
    weighted: tl.tensor,  # [R] fp32
    tile: tl.tensor,  # [R, V] fp32, or [V] of one row
    tile_max: tl.tensor,  # [R] fp32
    AXIS: tl.constexpr,
    WITH_OUTPUTS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Running (max, sum, weighted sum) after one more tile. A row that has seen only -inf stays at sum 0."""
    new_max = tl.maximum(row_max, tile_max)
    pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
    decay = tl.exp(row_max - pivot)
    if AXIS == 1:
        shifted = tile - pivot[:, None]
    else:
        shifted = tile - pivot
    powers = tl.exp(shifted)
    if WITH_OUTPUTS:
        moved = tl.where(row_max == float("-inf"), 0.0, row_max - pivot)
        weighted = decay * (weighted + moved * row_sum)
        weighted += tl.sum(powers * tl.where(tile == float("-inf"), 0.0, shifted), axis=AXIS)
    row_sum = row_sum * decay + tl.sum(powers, axis=AXIS)
    return new_max, row_sum, weighted


@triton.jit(do_not_specialize=["first_row", "num_rows", "plane", "num_splits", "vocab"])
def _merge(
    partials,  # [5, C, splits] fp32, whose planes are named above
    picked,  # [U] fp32 logits of targets
    row_offsets,  # [R + 1] int64, targets [row_offsets[r], row_offsets[r + 1]) are of row r
    logps,  # [U] fp32
    stats,  # [7, R] fp32
    top,  # [R] int64 column of the largest logit, written only where targets are in the partial sums
    first_row,  # of the chunk
    num_rows,  # C
    plane,  # R
    num_splits, vocab,
    TARGETS_APART: tl.constexpr,  # the partial sums leave the targets out
    WITH_OUTPUTS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Merge a row's partial sums, and its targets where they are apart, to the log-probs of its targets."""
    in_chunk = tl.program_id(0).to(tl.int64)
    row = in_chunk + first_row
    split = tl.arange(0, BLOCK_S)
    mask = split < num_splits
    part_plane = num_rows.to(tl.int64) * num_splits
    place = partials + in_chunk * num_splits + split
    maxima = tl.load(place, mask=mask, other=float("-inf"))
    sums = tl.load(place + part_plane, mask=mask, other=0.0)
    part_max = tl.max(maxima, axis=0)
    pivot = tl.where(part_max == float("-inf"), 0.0, part_max)
    part_sum = tl.sum(sums * tl.exp(maxima - pivot), axis=0)
    first, last = tl.load(row_offsets + row), tl.load(row_offsets + row + 1)
    total_max, total_sum = part_max, part_sum
    stat = stats + row
    if TARGETS_APART:
        for u in range(first, last):
            total_max = tl.maximum(total_max, tl.load(picked + u))
        total_sum = part_sum * tl.exp(part_max - total_max)
        others = total_sum
        for u in range(first, last):
            total_sum += tl.exp(tl.load(picked + u) - total_max)
        tl.store(stat, part_max)
        tl.store(stat + plane, part_sum)
        tl.store(stat + 2 * plane, others / total_sum)
    tl.store(stat + 3 * plane, total_max)
    tl.store(stat + 4 * plane, total_sum)
    for u in range(first, last):
        tl.store(logps + u, (tl.load(picked + u) - total_max) - tl.log(total_sum))
    if WITH_OUTPUTS:
        shift = tl.where(maxima == float("-inf"), 0.0, maxima - total_max)
        weighted = tl.load(place + 2 * part_plane, mask=mask, other=0.0) + shift * sums
        weighted_sum = tl.sum(tl.exp(maxima - total_max) * weighted, axis=0)
        total = tl.sum(tl.load(place + 3 * part_plane, mask=mask, other=0.0), axis=0)
        if TARGETS_APART:
            for u in range(first, last):
                z = tl.load(picked + u)
                weighted_sum += tl.exp(z - total_max) * (z - total_max)
                total += z
        else:
            columns = tl.load(place + 4 * part_plane, mask=mask, other=0.0)
            column = tl.min(tl.where(maxima == part_max, columns, 16777216.0), axis=0)
            tl.store(top + row, tl.minimum(column.to(tl.int64), vocab - 1))  # no column equals a NaN
        tl.store(stat + 5 * plane, tl.log(total_sum) - weighted_sum / total_sum)
        tl.store(stat + 6 * plane, total / vocab)


def splits(num_tiles: int, programs_per_split: int, wanted_programs: int) -> tuple[int, int]:
    """How many splits of how many tiles each, none empty. Shapes and the card decide, so sums repeat on equal cards."""
    wanted = max(1, min(MAX_SPLITS, num_tiles, triton.cdiv(wanted_programs, programs_per_split)))
    tiles_per_split = triton.cdiv(num_tiles, wanted)
    return triton.cdiv(num_tiles, tiles_per_split), tiles_per_split


def merge(
    partials: torch.Tensor,  # [2 or 5, C, splits] float32
    picked: torch.Tensor,  # [U] float32
    row_offsets: torch.Tensor,  # [R + 1] int64
    logps: torch.Tensor,  # [U] float32, written at the chunk's targets
    stats: torch.Tensor,  # [NUM_STATS, R] float32, written at the chunk's rows
    top: torch.Tensor | None,  # [R] int64, None where the partial sums leave the targets out
    first_row: int,
    vocab: int,
) -> None:
    """Merge the partial sums of rows [first_row, first_row + C). Five planes say that outputs are asked."""
    planes, num_rows, num_splits = partials.shape
    _merge[(num_rows,)](
        partials, picked, row_offsets, logps, stats, row_offsets if top is None else top,
        first_row, num_rows, stats.shape[1], num_splits, vocab,
        TARGETS_APART=top is None, WITH_OUTPUTS=planes == 5, BLOCK_S=MAX_SPLITS,
    )  # fmt: skip
