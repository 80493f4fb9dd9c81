# mypy: disable-error-code="no-untyped-def"
"""Gradients of target log-probs by Triton, for a frozen head and for one that takes a gradient itself.

    d/dh_r = sum_u c_u f_u W[t_u] - G Y_r,   c_u = g_u (rest_r + sum of the row's other p) - p_u (G - g_u)

with g the upstream gradients, G their sum over the row, p = exp(logp), f = dz / d(h W^T), and Y and rest from the forward
(see `eager`). Frozen (`row_gradients`): a gather and a scaled subtraction, one program per row and block of E. Trainable
(`product_gradients`): a chunk of d loss / d(h W^T), c_u f_u at targets and -G p f elsewhere, made in float32 and rounded
once, for the matrix products that give dh and dW. Every place is written once: no atomics, one order of sums.
"""

import torch
import triton
import triton.language as tl

from cpo_kernels.linear_logprob.partials import Transform, slope_factor
from cpo_kernels.linear_logprob.triton_chunked import BLOCK_LOGITS, BLOCK_TARGETS, chunk_logits
from cpo_kernels.logprob_plan import LogprobPlan
from cpo_kernels.triton_tiles import INTERPRETED, cast

BLOCK_WIDTH = 1024  # elements of E per program: 8 per thread of 4 warps, and 4 programs a row at E = 4096


@triton.jit
def _row_gradients(
    grad,  # [U] fp32
    logps,  # [U] fp32
    rest,  # [R] fp32
    expected,  # [R, E] fp32
    target_weights,  # [U, E]
    slopes,  # [U] fp32
    row_offsets,  # [R + 1] int64
    grad_rows,  # [R, E]
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
        total += (coefficient * tl.load(slopes + u).to(tl.float64)).to(tl.float32) * weights
    place = grad_rows + row * WIDTH + column
    tl.store(place, cast(total, grad_rows.dtype.element_ty, INTERPRETED), mask=mask)


# slices by row begin at any float: an aligned one and another would be two variants
@triton.jit(do_not_specialize_on_alignment=["row_max", "row_sum", "row_grad"])
def _product_gradients(
    products,  # [C, V] fp32
    bias,  # [V] or unused
    row_max,  # [C] fp32
    row_sum,  # [C] fp32
    row_grad,  # [C] fp32, G
    scale,  # [1] fp32
    grad_products,  # [C, V]
    vocab,
    slope,
    inner,
    cap,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """scale times -G p f, as if no column were a target."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    z = chunk_logits(products, bias, row, column, vocab, slope, inner, cap, HAS_BIAS, CAPPED)
    factor = -tl.load(row_grad + row) / tl.load(row_sum + row) * tl.load(scale) * slope
    values = tl.exp(z - tl.load(row_max + row)) * factor * slope_factor(tl.where(column < vocab, z, 0.0), cap, CAPPED)
    place = grad_products + row * vocab + column
    tl.store(place, cast(values, grad_products.dtype.element_ty, INTERPRETED), mask=column < vocab)


@triton.jit(do_not_specialize=["first_row"])
def _put_targets(
    coefficients,  # [U] fp32, c f
    target,  # [U] int64
    row_offsets,  # [R + 1] int64
    scale,  # [1] fp32
    grad_products,  # [C, V]; written at targets
    first_row,
    vocab,
    BLOCK_U: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """scale times the gradient at targets. A kernel of its own: the end of the one before is the barrier."""
    row = tl.program_id(0).to(tl.int64)
    first, last = tl.load(row_offsets + first_row + row), tl.load(row_offsets + first_row + row + 1)
    for start in range(first, last, BLOCK_U):
        u = start + tl.arange(0, BLOCK_U)
        mask = u < last
        values = tl.load(coefficients + u, mask=mask, other=0.0) * tl.load(scale)
        place = grad_products + row * vocab + tl.load(target + u, mask=mask, other=0)
        tl.store(place, cast(values, grad_products.dtype.element_ty, INTERPRETED), mask=mask)


def row_gradients(
    grad: torch.Tensor,  # [U] float32
    logps: torch.Tensor,  # [U] float32
    rest: torch.Tensor,  # [R] float32, probability on no target
    expected: torch.Tensor,  # [R, E] float32, sum of p f W over the columns that are no target
    target_weights: torch.Tensor,  # [U, E]
    slopes: torch.Tensor,  # [U] float32
    row_offsets: torch.Tensor,  # [R + 1] int64
    dtype: torch.dtype,
) -> torch.Tensor:
    """Gradient [R, E] in `dtype` of sum_u grad_u logps_u. Inputs are contiguous."""
    num_rows, width = expected.shape
    grad_rows = expected.new_empty(expected.shape, dtype=dtype)
    if num_rows == 0:
        return grad_rows
    with torch.cuda.device_of(expected):
        _row_gradients[(num_rows, triton.cdiv(width, BLOCK_WIDTH))](
            grad, logps, rest, expected, target_weights, slopes, row_offsets, grad_rows,
            WIDTH=width, BLOCK_E=BLOCK_WIDTH, INTERPRETED=INTERPRETED,
        )  # fmt: skip
    return grad_rows


def product_gradients(
    products: torch.Tensor,  # [C, V] float32, h W^T of rows [first_row, first_row + C)
    bias: torch.Tensor | None,  # [V]
    transform: Transform,
    normalizer: torch.Tensor,  # [2, C] float32 of these rows: p = exp(z - normalizer[0]) / normalizer[1]
    row_grad: torch.Tensor,  # [C] float32, sum of upstream gradients of these rows
    coefficients: torch.Tensor,  # [U] float32, gradient of the product at each pair
    plan: LogprobPlan,
    first_row: int,
    scale: torch.Tensor,  # [1] float32, on the device
    dtype: torch.dtype,
) -> torch.Tensor:
    """[C, V] in `dtype`: `scale` times the gradient of the products."""
    num_rows, vocab = products.shape
    grad_products = torch.empty_like(products, dtype=dtype)
    with torch.cuda.device_of(products):
        _product_gradients[(num_rows, triton.cdiv(vocab, BLOCK_LOGITS))](
            products, products if bias is None else bias, normalizer[0], normalizer[1], row_grad, scale,
            grad_products, vocab, *transform,
            HAS_BIAS=bias is not None, CAPPED=transform.capped, BLOCK_V=BLOCK_LOGITS, INTERPRETED=INTERPRETED,
        )  # fmt: skip
        _put_targets[(num_rows,)](
            coefficients, plan.pair_target, plan.row_offsets, scale, grad_products, first_row, vocab,
            BLOCK_U=BLOCK_TARGETS, INTERPRETED=INTERPRETED, num_warps=1,
        )  # fmt: skip
    return grad_products
