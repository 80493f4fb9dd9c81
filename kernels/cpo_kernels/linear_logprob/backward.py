# mypy: disable-error-code="no-untyped-def"
"""Gradient of a row's target log-probs under a frozen head, by Triton: a gather and a scaled subtraction.

    d/dh_r = slope sum_u c_u W[t_u] - G Y_r,   c_u = g_u (rest_r + sum of the row's other p) - p_u (G - g_u)

with g the upstream gradients, G their sum over the row, p = exp(logp), and Y and rest from the forward (see `eager`).
One program per row and block of E; it writes its place once, so there are no atomics and the sums have one order.
"""

import torch
import triton
import triton.language as tl

from cpo_kernels.linear_logprob.interpreter import INTERPRETED, cast

BLOCK_WIDTH = 1024  # elements of E per program: 8 per thread of 4 warps, and 4 programs a row at E = 4096


@triton.jit
def _row_gradients(
    grad,  # [U] fp32
    logps,  # [U] fp32
    rest,  # [R] fp32
    expected,  # [R, E] fp32
    target_weights,  # [U, E]
    row_offsets,  # [R + 1] int64
    grad_rows,  # [R, E]
    slope,
    WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One row, one block of E."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask = column < WIDTH
    first, last = tl.load(row_offsets + row), tl.load(row_offsets + row + 1)
    # float64 for these few numbers: "the row's others" must be exact where one target holds nearly everything
    row_grad = tl.full([1], 0.0, tl.float64)
    row_mass = tl.full([1], 0.0, tl.float64)
    for u in range(first, last):
        row_grad += tl.load(grad + u).to(tl.float64)
        row_mass += tl.exp(tl.load(logps + u)).to(tl.float64)
    row_rest = tl.load(rest + row).to(tl.float64)
    total = -row_grad.to(tl.float32) * tl.load(expected + row * WIDTH + column, mask=mask, other=0.0)
    for u in range(first, last):
        upstream = tl.load(grad + u).to(tl.float64)
        mass = tl.exp(tl.load(logps + u)).to(tl.float64)
        coefficient = upstream * (row_rest + (row_mass - mass)) - mass * (row_grad - upstream)
        weights = tl.load(target_weights + u * WIDTH + column, mask=mask, other=0.0).to(tl.float32)
        total += (coefficient * slope).to(tl.float32) * weights
    place = grad_rows + row * WIDTH + column
    tl.store(place, cast(total, grad_rows.dtype.element_ty, INTERPRETED), mask=mask)


def row_gradients(
    grad: torch.Tensor,  # [U] float32
    logps: torch.Tensor,  # [U] float32
    rest: torch.Tensor,  # [R] float32, probability on no target
    expected: torch.Tensor,  # [R, E] float32, slope times the sum of p W over the columns that are no target
    target_weights: torch.Tensor,  # [U, E]
    row_offsets: torch.Tensor,  # [R + 1] int64
    slope: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Gradient [R, E] in `dtype` of sum_u grad_u logps_u. Inputs are contiguous."""
    num_rows, width = expected.shape
    grad_rows = expected.new_empty(expected.shape, dtype=dtype)
    if num_rows == 0:
        return grad_rows
    with torch.cuda.device_of(expected):
        _row_gradients[(num_rows, triton.cdiv(width, BLOCK_WIDTH))](
            grad, logps, rest, expected, target_weights, row_offsets, grad_rows, slope,
            WIDTH=width, BLOCK_E=BLOCK_WIDTH, INTERPRETED=INTERPRETED,
        )  # fmt: skip
    return grad_rows
