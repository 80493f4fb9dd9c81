# mypy: disable-error-code="no-untyped-def"
"""RMSNorm in Triton, forward and backward, one row of E columns a program.

    r = 1 / sqrt(mean(x^2) + eps),   n = round(r x),   out = round(weight n)

With g the gradient of the output and h = round(g weight), rounded to the dtype of x as autograd rounds it:

    dx = r (h - r^2 x mean(h x)),   dweight = sum over rows of g n

Forward keeps x and r, one float32 a row. The gradient of a weight that is not frozen is summed by a fixed number of
programs, each over rows a fixed distance apart, and their sums are added afterwards: bitwise repeatable, no atomics.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from cpo_kernels.triton_tiles import INTERPRETED, as_operand, cast

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_COLUMNS = 32768  # a row is held in registers: 64 float32 a thread at 16 warps
WEIGHT_PROGRAMS = 512  # that sum the weight's gradient, about four a multiprocessor


class TritonRMSNorm(torch.autograd.Function):
    """x [..., E], weight [E], eps -> out [..., E] in the wider dtype of the two."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        num_columns = x.shape[-1]
        if num_columns > MAX_COLUMNS or x.dtype not in DTYPES or weight.dtype not in (x.dtype, torch.float32):
            raise ValueError(
                f"rms_norm: impl='triton' expects bfloat16, float16 or float32 x, a weight of its dtype or float32, and "
                f"E <= {MAX_COLUMNS}, got {x.dtype}, {weight.dtype} and {num_columns}"
            )
        rows, weight = _rows(x), weight.contiguous()
        out = torch.empty(rows.shape, dtype=weight.dtype, device=x.device)
        rstd = torch.empty(len(rows), dtype=torch.float32, device=x.device)
        if rows.numel():
            _norm_forward[(len(rows),)](
                rows, weight, out, rstd, rows.stride(0), eps,
                COLUMNS=num_columns, UPCAST=INTERPRETED, **_block(num_columns),
            )  # fmt: skip
        ctx.save_for_backward(x, weight, rstd)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        rows, grad = _rows(x), _rows(grad_outputs[0])
        needs_weight = ctx.needs_input_grad[1]
        num_rows, num_columns = rows.shape
        num_programs = min(num_rows, WEIGHT_PROGRAMS) if needs_weight else num_rows
        grad_x = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
        sums = torch.empty((num_programs if needs_weight else 0, num_columns), dtype=torch.float32, device=x.device)
        if rows.numel():
            _norm_backward[(num_programs,)](
                rows, weight, rstd, grad, grad_x, sums, rows.stride(0), grad.stride(0), num_rows,
                COLUMNS=num_columns, NEEDS_WEIGHT=needs_weight, UPCAST=INTERPRETED, **_block(num_columns),
            )  # fmt: skip
        grad_weight = sums.sum(0).to(weight.dtype) if needs_weight else None
        return grad_x.view(x.shape) if ctx.needs_input_grad[0] else None, grad_weight, None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[rows, E] with adjacent columns, copied only where they are not."""
    rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty(0, 0)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _block(num_columns: int) -> dict[str, int]:
    """Columns of a program, a power of two, and its warps: 16 columns a thread."""
    block = max(32, triton.next_power_of_2(num_columns))
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


@triton.jit
def _norm_forward(
    x_ptr,  # [N, E], adjacent columns
    weight_ptr,  # [E]
    out_ptr,  # [N, E] contiguous
    rstd_ptr,  # [N] fp32
    row_stride,
    eps,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One row, and its 1 / sqrt(mean square + eps)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    real = columns < COLUMNS
    x = tl.load(x_ptr + row * row_stride + columns, mask=real, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=real, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, 0) / COLUMNS + eps)
    normalised = as_operand(x * rstd, x_ptr.dtype.element_ty, UPCAST).to(tl.float32)
    out = cast(weight * normalised, out_ptr.dtype.element_ty, UPCAST)
    tl.store(out_ptr + row * COLUMNS + columns, out, mask=real)
    tl.store(rstd_ptr + row, rstd)


@triton.jit(do_not_specialize=["num_rows"])
def _norm_backward(
    x_ptr,  # [N, E], adjacent columns
    weight_ptr,  # [E]
    rstd_ptr,  # [N] fp32
    grad_ptr,  # [N, E], adjacent columns
    grad_x_ptr,  # [N, E] contiguous
    sums_ptr,  # [programs, E] fp32, the weight's gradient in parts; not touched unless NEEDS_WEIGHT
    row_stride, grad_stride, num_rows,
    COLUMNS: tl.constexpr, NEEDS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Every row whose number is the program's modulo the number of programs."""
    columns = tl.arange(0, BLOCK)
    real = columns < COLUMNS
    weight = tl.load(weight_ptr + columns, mask=real, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for place in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = tl.cast(place, tl.int64)
        x = tl.load(x_ptr + row * row_stride + columns, mask=real, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * grad_stride + columns, mask=real, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        inner = as_operand(grad * weight, x_ptr.dtype.element_ty, UPCAST).to(tl.float32)
        mean = tl.sum(inner * x, 0) / COLUMNS
        grad_x = rstd * (inner - rstd * rstd * x * mean)
        tl.store(grad_x_ptr + row * COLUMNS + columns, cast(grad_x, grad_x_ptr.dtype.element_ty, UPCAST), mask=real)
        if NEEDS_WEIGHT:
            total += grad * as_operand(x * rstd, x_ptr.dtype.element_ty, UPCAST).to(tl.float32)
    if NEEDS_WEIGHT:
        tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * COLUMNS + columns, total, mask=real)
