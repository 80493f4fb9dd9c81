# mypy: disable-error-code="no-untyped-def"
"""A LoRA adapter of a bfloat16 layer in Triton, forward and backward, its float32 weights as pairs of bfloat16.

    u = x A^T [T, R],   out = round(base + s u B^T)
    d = g B   [T, R],   dx = round(s d A),   dA = s d^T x,   dB = s g^T u          g: gradient of out, which is base's too

x and g are bfloat16 already. A float32 number w is w_hi + w_lo, both bfloat16, to 2^-18 of itself, and products with
bfloat16 numbers run on matrix units: x A^T = x A_hi^T + x A_lo^T, summed in float32. Of two float32 factors the product of
the low parts is left out. Rounding A, B, u or d to bfloat16 alone would be off by 2^-9. The parts are made in registers
where they are used, so that no copy of A or B exists that an optimizer step could leave behind.

`_reduce_columns` sums a row's products in splits of its columns. `_expand_columns` adds these up in their order and writes
u or d for `_sum_rows`. No atomics, so results are bitwise repeatable.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from cpo_kernels.triton_tiles import INTERPRETED, MIN_BLOCK, as_operand, cast

MAX_RANK = 64  # two tiles of 64 x 64 float32, in parts, are all that registers hold
ROWS = 64  # of a tile
TARGET_PROGRAMS = 512  # about four a multiprocessor
MAX_SPLITS = 4
MIN_SPLIT_COLUMNS = 256
TILES = {
    "_reduce_columns": {"BLOCK_C": 64, "num_warps": 4, "num_stages": 3},
    "_expand_columns": {"BLOCK_C": 64, "num_warps": 4, "num_stages": 3},
    "_sum_rows": {"BLOCK_C": 32, "num_warps": 4, "num_stages": 3},
}


class TritonLora(torch.autograd.Function):
    """base [..., N], x [..., E], a [R, E], b [N, R], scaling -> base + scaling * x a^T b^T, as base."""

    @staticmethod
    def forward(
        ctx: Any, base: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        dtypes = base.dtype, x.dtype, a.dtype, b.dtype
        if dtypes != (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32) or len(a) > MAX_RANK:
            raise ValueError(
                f"add_lora: impl='triton' expects bfloat16 base and x, float32 a and b and a rank <= {MAX_RANK}, got "
                f"{', '.join(map(str, dtypes))} and {len(a)}"
            )
        out, u = _expanded(_rows(base), _reduced(_rows(x), a), b.t(), scaling)
        ctx.save_for_backward(x, a, b, u)
        ctx.scaling = scaling
        return out.view(base.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, a, b, u = ctx.saved_tensors
        grad = _rows(grad_outputs[0])
        needs_base, needs_x, needs_a, needs_b, _ = ctx.needs_input_grad
        grad_x = grad_a = grad_b = None
        if needs_x or needs_a:
            grad_rows, d = _expanded(None, _reduced(grad, b.t()), a, ctx.scaling)
            grad_x = grad_rows.view(x.shape) if needs_x else None
            grad_a = _summed(_rows(x), d, torch.empty_like(a), ctx.scaling) if needs_a else None
        if needs_b:
            grad_b = _summed(grad, u, torch.empty_like(b).t(), ctx.scaling).t()
        return grad_outputs[0] if needs_base else None, grad_x, grad_a, grad_b, None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[rows, columns] with adjacent columns, copied only where they are not."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _block_rank(rank: int) -> int:
    return max(MIN_BLOCK, triton.next_power_of_2(rank))


def _reduced(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, C] times weight [R, C] transposed, as [splits, T, R] float32 whose sum over the splits it is."""
    (num_rows, columns), rank = x.shape, len(weight)
    num_blocks = triton.cdiv(num_rows, ROWS)
    splits = max(1, min(MAX_SPLITS, TARGET_PROGRAMS // max(1, num_blocks), columns // MIN_SPLIT_COLUMNS))
    out = torch.empty((splits, num_rows, rank), dtype=torch.float32, device=x.device)
    if num_rows:
        _reduce_columns[(num_blocks, splits)](
            x, weight, out, x.stride(0), *weight.stride(), num_rows,
            COLUMNS=columns, RANK=rank, SPLITS=splits, BLOCK_T=ROWS, BLOCK_R=_block_rank(rank), UPCAST=INTERPRETED,
            **TILES["_reduce_columns"],
        )  # fmt: skip
    return out


def _expanded(
    base: torch.Tensor | None, parts: torch.Tensor, weight: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """base [T, C], or 0, plus scaling times the sum of parts [splits, T, R] times weight [R, C]: bfloat16 [T, C].

    And the sum of parts, float32 [T, R].
    """
    (splits, num_rows, rank), columns = parts.shape, weight.shape[1]
    out = torch.empty((num_rows, columns), dtype=torch.bfloat16, device=parts.device)
    sums = torch.empty((num_rows, rank), dtype=torch.float32, device=parts.device)
    if num_rows:
        tile = TILES["_expand_columns"]
        _expand_columns[(triton.cdiv(num_rows, ROWS), triton.cdiv(columns, tile["BLOCK_C"]))](
            out if base is None else base, parts, weight, out, sums,
            0 if base is None else base.stride(0), *weight.stride(), scaling, num_rows,
            COLUMNS=columns, RANK=rank, SPLITS=splits, HAS_BASE=base is not None, BLOCK_T=ROWS,
            BLOCK_R=_block_rank(rank), UPCAST=INTERPRETED, **tile,
        )  # fmt: skip
    return out, sums


def _summed(x: torch.Tensor, sums: torch.Tensor, out: torch.Tensor, scaling: float) -> torch.Tensor:
    """scaling times sums [T, R] transposed times x [T, C], written to out [R, C]."""
    (num_rows, columns), rank = x.shape, sums.shape[1]
    tile = TILES["_sum_rows"]
    _sum_rows[(triton.cdiv(columns, tile["BLOCK_C"]),)](
        x, sums, out, x.stride(0), *out.stride(), scaling, num_rows,
        COLUMNS=columns, RANK=rank, BLOCK_T=ROWS, BLOCK_R=_block_rank(rank), UPCAST=INTERPRETED, **tile,
    )  # fmt: skip
    return out


@triton.jit
def _high_and_low(
    x,  # fp32
    UPCAST: tl.constexpr,
):
    """Two bfloat16 whose sum is x to 2^-18 of it."""
    high = as_operand(x, tl.bfloat16, UPCAST)
    return high, as_operand(x - high.to(tl.float32), tl.bfloat16, UPCAST)


@triton.jit(do_not_specialize=["num_rows"])
def _reduce_columns(
    x_ptr,  # [T, C] bf16, adjacent columns
    weight_ptr,  # [R, C] fp32
    out_ptr,  # [SPLITS, T, R] fp32 contiguous
    x_stride, rank_stride, column_stride, num_rows,
    COLUMNS: tl.constexpr, RANK: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile of rows and one split of the columns."""
    num_rows = num_rows.to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    ranks = tl.arange(0, BLOCK_R)
    steps: tl.constexpr = (COLUMNS + SPLITS * BLOCK_C - 1) // (SPLITS * BLOCK_C)
    total = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for step in range(steps):
        columns = (tl.program_id(1) * steps + step) * BLOCK_C + tl.arange(0, BLOCK_C)
        real = columns < COLUMNS
        x = tl.load(
            x_ptr + rows[:, None] * x_stride + columns[None, :], (rows[:, None] < num_rows) & real[None, :], 0.0
        )
        place = weight_ptr + ranks[None, :] * rank_stride + columns[:, None] * column_stride
        high, low = _high_and_low(tl.load(place, mask=(ranks[None, :] < RANK) & real[:, None], other=0.0), UPCAST)
        if UPCAST:
            x = x.to(tl.float32)
        total = tl.dot(x, high, total, input_precision="ieee")
        total = tl.dot(x, low, total, input_precision="ieee")
    place = out_ptr + (tl.program_id(1) * num_rows + rows[:, None]) * RANK + ranks[None, :]
    tl.store(place, total, mask=(rows[:, None] < num_rows) & (ranks[None, :] < RANK))


@triton.jit(do_not_specialize=["num_rows", "scaling"])
def _expand_columns(
    base_ptr,  # [T, C] bf16, adjacent columns; not read unless HAS_BASE
    parts_ptr,  # [SPLITS, T, R] fp32
    weight_ptr,  # [R, C] fp32
    out_ptr,  # [T, C] bf16 contiguous
    sums_ptr,  # [T, R] fp32 contiguous
    base_stride, rank_stride, column_stride, scaling, num_rows,
    COLUMNS: tl.constexpr, RANK: tl.constexpr, SPLITS: tl.constexpr, HAS_BASE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile of rows and columns."""
    num_rows = num_rows.to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    ranks = tl.arange(0, BLOCK_R)
    real = (rows[:, None] < num_rows) & (columns[None, :] < COLUMNS)
    real_sums = (rows[:, None] < num_rows) & (ranks[None, :] < RANK)
    place = rows[:, None] * RANK + ranks[None, :]
    sums = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for split in tl.static_range(SPLITS):
        sums += tl.load(parts_ptr + split * num_rows * RANK + place, mask=real_sums, other=0.0)
    if tl.program_id(1) == 0:
        tl.store(sums_ptr + place, sums, mask=real_sums)
    place = weight_ptr + ranks[:, None] * rank_stride + columns[None, :] * column_stride
    weight = tl.load(place, mask=(ranks[:, None] < RANK) & (columns[None, :] < COLUMNS), other=0.0)
    high, low = _high_and_low(sums, UPCAST)
    weight_high, weight_low = _high_and_low(weight, UPCAST)
    total = tl.dot(low, weight_high, input_precision="ieee")
    total = tl.dot(high, weight_low, total, input_precision="ieee")
    total = tl.dot(high, weight_high, total, input_precision="ieee") * scaling
    if HAS_BASE:
        total += tl.load(base_ptr + rows[:, None] * base_stride + columns[None, :], real, 0.0).to(tl.float32)
    tl.store(out_ptr + rows[:, None] * COLUMNS + columns[None, :], cast(total, tl.bfloat16, UPCAST), mask=real)


@triton.jit(do_not_specialize=["num_rows", "scaling"])
def _sum_rows(
    x_ptr,  # [T, C] bf16, adjacent columns
    sums_ptr,  # [T, R] fp32 contiguous
    out_ptr,  # [R, C] fp32
    x_stride, rank_stride, column_stride, scaling, num_rows,
    COLUMNS: tl.constexpr, RANK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A block of columns over all rows."""
    num_rows = num_rows.to(tl.int64)
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    ranks = tl.arange(0, BLOCK_R)
    real = columns < COLUMNS
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for first in range(0, num_rows, BLOCK_T):
        rows = first + tl.arange(0, BLOCK_T).to(tl.int64)
        x = tl.load(
            x_ptr + rows[:, None] * x_stride + columns[None, :], (rows[:, None] < num_rows) & real[None, :], 0.0
        )
        real_sums = (rows[:, None] < num_rows) & (ranks[None, :] < RANK)
        sums = tl.load(sums_ptr + rows[:, None] * RANK + ranks[None, :], mask=real_sums, other=0.0)
        high, low = _high_and_low(sums, UPCAST)
        if UPCAST:
            x = x.to(tl.float32)
        total = tl.dot(tl.trans(high), x, total, input_precision="ieee")
        total = tl.dot(tl.trans(low), x, total, input_precision="ieee")
    place = out_ptr + ranks[:, None] * rank_stride + columns[None, :] * column_stride
    tl.store(place, total * scaling, mask=(ranks[:, None] < RANK) & real[None, :])
