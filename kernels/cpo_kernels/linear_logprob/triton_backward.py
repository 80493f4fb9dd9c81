# mypy: disable-error-code="no-untyped-def"
"""Gradients of target log-probs by Triton, for a frozen head and for one that takes a gradient itself.

    d/dh_r = sum_u c_u f_u W[t_u] - G Y_r,   c_u = g_u (rest_r + sum of the row's other p) - p_u (G - g_u)

with g the upstream gradients, G their sum over the row, p = exp(logp), f = dz / d(h W^T), and Y and rest from the forward
(see `eager`). Under a frozen head (`row_gradients`) this is a gather and a scaled subtraction, by one program per row and
block of E. For a head that takes a gradient (`head_gradients`) a chunk of d loss / d(h W^T) is made, c_u f_u at targets
and -G p f elsewhere, for the matrix products that give dh and dW. Every place is written once: no atomics, one order of
sums.
"""

import torch
import triton
import triton.language as tl

from cpo_kernels.device import matmul_accumulated
from cpo_kernels.linear_logprob.results import Head, HeadGradients, PairScores, pair_coefficients
from cpo_kernels.linear_logprob.triton_chunked import (
    BLOCK_LOGITS,
    BLOCK_TARGETS,
    PROBABILITY_SCALE,
    bias_argument,
    chunk_logits,
    empty_chunk,
)
from cpo_kernels.linear_logprob.triton_sums import Transform, slope_factor
from cpo_kernels.logprob_plan import LogprobPlan
from cpo_kernels.triton_tiles import INTERPRETED, cast

BLOCK_WIDTH = 1024  # elements of E per program: 8 per thread of 4 warps, and 4 programs a row at E = 4096
SMALLEST_SIZE = 1e-30  # of upstream gradients: below it, all zero perhaps, their scale would not be finite


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
    WIDTH: tl.constexpr, BLOCK_E: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
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
@triton.jit(do_not_specialize=["vocab"], do_not_specialize_on_alignment=["row_max", "row_sum", "row_grad"])
def _product_gradients(
    products,  # [C, V] fp32
    bias,  # [stride] or unused
    row_max,  # [C] fp32
    row_sum,  # [C] fp32
    row_grad,  # [C] fp32, G
    scale,  # [1] fp32
    grad_products,  # [C, V], and 0 beyond
    vocab, stride,
    slope, inner, cap,  # `Transform`
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, BLOCK_V: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """scale times -G p f, as if no column were a target."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    z = chunk_logits(products, bias, row, column, vocab, stride, slope, inner, cap, HAS_BIAS, CAPPED)
    factor = -tl.load(row_grad + row) / tl.load(row_sum + row) * tl.load(scale) * slope
    values = tl.exp(z - tl.load(row_max + row)) * factor * slope_factor(tl.where(column < vocab, z, 0.0), cap, CAPPED)
    place = grad_products + row * stride + column
    tl.store(place, cast(values, grad_products.dtype.element_ty, INTERPRETED), mask=column < stride)


@triton.jit(do_not_specialize=["first_row"])
def _put_targets(
    coefficients,  # [U] fp32, c f
    target,  # [U] int64
    row_offsets,  # [R + 1] int64
    scale,  # [1] fp32
    grad_products,  # [C, V], written at targets
    first_row, stride,
    BLOCK_U: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """scale times the gradient at targets. It is a kernel of its own because the end of the one before is the barrier."""
    row = tl.program_id(0).to(tl.int64)
    first, last = tl.load(row_offsets + first_row + row), tl.load(row_offsets + first_row + row + 1)
    for start in range(first, last, BLOCK_U):
        u = start + tl.arange(0, BLOCK_U)
        mask = u < last
        values = tl.load(coefficients + u, mask=mask, other=0.0) * tl.load(scale)
        place = grad_products + row * stride + tl.load(target + u, mask=mask, other=0)
        tl.store(place, cast(values, grad_products.dtype.element_ty, INTERPRETED), mask=mask)


def row_gradients(grad: torch.Tensor, scores: PairScores, plan: LogprobPlan) -> torch.Tensor:
    """Gradient [R, E] of sum grad logps under a frozen head, grad [U] float32."""
    expected, target_weights = scores.expected, scores.target_weights
    grad_rows = expected.new_empty(expected.shape, dtype=target_weights.dtype)
    num_rows, width = expected.shape
    if num_rows == 0:
        return grad_rows
    with torch.cuda.device_of(expected):
        _row_gradients[(num_rows, triton.cdiv(width, BLOCK_WIDTH))](
            grad.contiguous(), scores.logps, scores.rest, expected, target_weights, scores.slopes, plan.row_offsets,
            grad_rows, WIDTH=width, BLOCK_E=BLOCK_WIDTH, INTERPRETED=INTERPRETED,
        )  # fmt: skip
    return grad_rows


def head_gradients(
    grad: torch.Tensor,  # [U]
    scores: PairScores,
    rows: torch.Tensor,  # [R, E]
    head: Head,
    plan: LogprobPlan,
    needs: tuple[bool, bool, bool],  # of rows, weight, bias
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of rows [R, E], weight [V, E] and bias [V], each if it is needed, a chunk of logits at a time.

    The gradient of a chunk's logits is made in float32, targets included, scaled to the size of the upstream gradients (on
    the device, so float16 keeps small ones too) and rounded once, for products of 16-bit operands.
    """
    head, rows = head.contiguous(), rows.contiguous()
    gradients = HeadGradients(rows, head, needs)
    if rows.shape[0] == 0:
        return gradients.rounded()
    coefficient, row_grad = pair_coefficients(grad, scores, plan)
    coefficient, row_grad = (coefficient * scores.slopes).float(), row_grad.float()
    size = (coefficient.abs().amax() + row_grad.abs().amax() * abs(Transform.of(head).slope)).clamp_min(SMALLEST_SIZE)
    scale = PROBABILITY_SCALE / size
    num_rows, vocab = rows.shape[0], head.weight.shape[0]
    step = head.chunk_rows(num_rows)
    products, grad_products = (empty_chunk(step, vocab, rows, dtype) for dtype in (torch.float32, head.weight.dtype))
    for first in range(0, num_rows, step):
        chunk, count = slice(first, first + step), min(step, num_rows - first)
        logits = matmul_accumulated(rows[chunk], head.weight.t(), out=products[:count])
        normalizer, upstream = scores.normalizer[:, chunk], row_grad[chunk]
        gradients.add(
            product_gradients(
                logits, head, normalizer, upstream, coefficient, plan, first, scale, grad_products[:count]
            ),
            chunk,
        )
    return gradients.rounded(scale)


def product_gradients(
    products: torch.Tensor,  # [C, V] float32 of `empty_chunk`, h W^T of rows [first_row, first_row + C)
    head: Head,
    normalizer: torch.Tensor,  # [2, C] float32 of these rows: p = exp(z - normalizer[0]) / normalizer[1]
    row_grad: torch.Tensor,  # [C] float32, sum of upstream gradients of these rows
    coefficients: torch.Tensor,  # [U] float32, gradient of the product at each pair
    plan: LogprobPlan,
    first_row: int,
    scale: torch.Tensor,  # [1] float32, on the device
    grad_products: torch.Tensor,  # [C, V] of `empty_chunk` in the dtype of the head
) -> torch.Tensor:
    """`grad_products`: `scale` times the gradient of the products."""
    (num_rows, vocab), stride = products.shape, products.stride(0)
    transform, bias = Transform.of(head), bias_argument(head, products)
    with torch.cuda.device_of(products):
        _product_gradients[(num_rows, triton.cdiv(vocab, BLOCK_LOGITS))](
            products, bias, normalizer[0], normalizer[1], row_grad, scale, grad_products, vocab, stride,
            *transform,
            HAS_BIAS=head.bias is not None, CAPPED=transform.capped, BLOCK_V=BLOCK_LOGITS, INTERPRETED=INTERPRETED,
        )  # fmt: skip
        _put_targets[(num_rows,)](
            coefficients, plan.pair_target, plan.row_offsets, scale, grad_products, first_row, stride,
            BLOCK_U=BLOCK_TARGETS, INTERPRETED=INTERPRETED, num_warps=1,
        )  # fmt: skip
    return grad_products
