"""Log-probabilities in plain torch whose backward needs no [T, V] tensor, and no head where the head is frozen.

With u the distinct (row, target) pairs of row r, G = sum of upstream gradients of the row, f = dz / d(h W^T):

    d/dh_r = sum_u c_u f_u W[t_u]  -  G Y_r,      Y_r = sum over v that are no target of r of p_v f_v W[v]
    c_u = g_u - G p_u = g_u (1 - p_u) - p_u (G - g_u),      1 - p_u = rest_r + sum of the row's other p

Y, the expected embedding, does not depend on the loss, so it is made in the forward from the softmax that is there
anyway, and so is rest_r, the mass that is on no target. Leaving the targets out of Y and never subtracting p from 1
keeps the gradient of confident tokens exact; the plain W[t] - Y is off by half there, and 1 - exp(logp) is all rounding
once 1 - p is below the rounding of a logit. A head that takes a gradient needs the logits again in backward: there
dz = c_u at targets and -G p_v elsewhere is made a chunk of rows at a time, and gives dh, dW and db.

Policy and reference rows go through products of the same shapes, so equal hidden states give bitwise equal log-probs.
Any device; float32 accumulation (float64 for float64). Chunks are cut by `host_offsets`, so nothing waits for a GPU.
"""

from collections.abc import Iterator

import torch

from cpo_kernels.device import accumulation_dtype, matmul_accumulated
from cpo_kernels.linear_logprob.results import GRADED, Head, Scores, pair_coefficients
from cpo_kernels.logprob_plan import LogprobPlan


def score(rows: torch.Tensor, head: Head, plan: LogprobPlan, outputs: tuple[str, ...], mode: str) -> Scores:
    """One pass of rows [R, E] over the head; every optional reduction over the vocabulary only when asked."""
    dtype = accumulation_dtype(rows.dtype)
    num_pairs, (num_rows, width) = plan.pair_row.shape[0], rows.shape
    graded, expecting = mode in GRADED, mode == "expected"

    def column(wanted: bool, *shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return rows.new_zeros(shape if wanted else (0,), dtype=dtype)

    scores = Scores(
        logps=column(True, num_pairs),
        entropy=column("entropy" in outputs, num_pairs),
        mean_logit=column("mean_logit" in outputs, num_pairs),
        is_top1=column("is_top1" in outputs, num_pairs, dtype=torch.bool),
        slopes=column(graded, num_pairs),
        rest=column(graded, num_rows),
        expected=column(expecting, num_rows, width),
        target_weights=head.weight[plan.pair_target] if expecting else column(False, dtype=head.weight.dtype),
        normalizer=column(mode == "recompute", 2, num_rows),
    )
    for chunk, span, row, target in _chunks(plan, head, num_rows):
        logits = head.logits(rows[chunk])  # [rows of the chunk, V]
        log_sum_exp = torch.logsumexp(logits, dim=-1)
        picked = logits[row, target]
        scores.logps[span] = picked - log_sum_exp[row]
        if "is_top1" in outputs:
            scores.is_top1[span] = picked >= logits.amax(dim=-1)[row]
        if "mean_logit" in outputs:
            scores.mean_logit[span] = logits.mean(dim=-1)[row]
        if not graded and "entropy" not in outputs:
            continue
        probabilities = torch.exp(logits - log_sum_exp.unsqueeze(1))
        if "entropy" in outputs:
            scores.entropy[span] = -(probabilities * (logits - log_sum_exp.unsqueeze(1))).sum(dim=-1)[row]
        if graded:
            slope = head.slope(logits)
            scores.slopes[span] = slope[row, target] if isinstance(slope, torch.Tensor) else slope
            probabilities[row, target] = 0.0
            scores.rest[chunk] = probabilities.sum(dim=-1)
        if expecting:
            scores.expected[chunk] = probabilities.mul_(slope) @ head.weight.to(dtype)
        elif graded:
            scores.normalizer[0, chunk], scores.normalizer[1, chunk] = log_sum_exp, 1.0
    return scores


def rows_gradient(grad: torch.Tensor, saved: Scores, plan: LogprobPlan, dtype: torch.dtype) -> torch.Tensor:
    """Gradient [R, E] of sum grad logps under a frozen head, grad [U]: a gather and a scaled sum."""
    coefficient, row_grad = pair_coefficients(grad, saved.logps, saved.rest, plan)
    expected = saved.expected
    weights = saved.target_weights.to(expected.dtype) * (coefficient * saved.slopes).to(expected.dtype).unsqueeze(1)
    grad_rows = expected * -row_grad.to(expected.dtype).unsqueeze(1)
    return grad_rows.index_add_(0, plan.pair_row, weights).to(dtype)


def head_gradients(
    grad: torch.Tensor,  # [U]
    saved: Scores,
    rows: torch.Tensor,  # [R, E]
    head: Head,
    plan: LogprobPlan,
    needs: tuple[bool, bool, bool],  # of rows, weight, bias
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of rows [R, E], weight [V, E] and bias [V], each if it is needed; one chunk of logits at a time."""
    dtype = accumulation_dtype(rows.dtype)
    coefficient, row_grad = (x.to(dtype) for x in pair_coefficients(grad, saved.logps, saved.rest, plan))
    grad_rows, grad_weight, grad_bias = gradient_buffers(rows, head, needs)
    for chunk, span, row, target in _chunks(plan, head, rows.shape[0]):
        logits = head.logits(rows[chunk])
        grad_logits = torch.exp(logits - saved.normalizer[0, chunk].unsqueeze(1))
        grad_logits.mul_((-row_grad[chunk] / saved.normalizer[1, chunk]).unsqueeze(1))
        grad_logits[row, target] = coefficient[span]
        grad_logits.mul_(head.slope(logits))
        add_chunk(grad_logits, rows[chunk], head, chunk, grad_rows, grad_weight, grad_bias)
    return cast_gradients(head, rows.dtype, grad_rows, grad_weight, grad_bias)


def gradient_buffers(
    rows: torch.Tensor, head: Head, needs: tuple[bool, bool, bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Zeros of rows, weight and bias in the accumulation dtype, where needed."""
    dtype = accumulation_dtype(rows.dtype)
    shapes = (rows.shape, head.weight.shape, head.weight.shape[:1])
    a, b, c = (
        rows.new_zeros(shape, dtype=dtype) if needed else None for shape, needed in zip(shapes, needs, strict=True)
    )
    return a, b, c


def add_chunk(
    grad_products: torch.Tensor,  # [C, V] d loss / d(h W^T)
    rows: torch.Tensor,  # [C, E]
    head: Head,
    chunk: slice,
    grad_rows: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
    grad_bias: torch.Tensor | None,
) -> None:
    """Add what a chunk of rows gives to the accumulated gradients."""
    dtype = grad_products.dtype
    if grad_rows is not None:
        grad_rows[chunk] = matmul_accumulated(grad_products, head.weight.to(dtype))
    if grad_weight is not None:
        for first in range(0, grad_products.shape[1], head.chunk_columns):
            columns = slice(first, first + head.chunk_columns)
            grad_weight[columns] += matmul_accumulated(grad_products[:, columns].t(), rows.to(dtype))
    if grad_bias is not None:
        grad_bias += grad_products.sum(dim=0, dtype=grad_bias.dtype)


def cast_gradients(
    head: Head,
    rows_dtype: torch.dtype,
    grad_rows: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
    grad_bias: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The accumulated gradients in the dtypes of what they belong to, rounded once."""
    bias_dtype = rows_dtype if head.bias is None else head.bias.dtype
    pairs = ((grad_rows, rows_dtype), (grad_weight, head.weight.dtype), (grad_bias, bias_dtype))
    a, b, c = (None if tensor is None else tensor.to(dtype) for tensor, dtype in pairs)
    return a, b, c


def _chunks(plan: LogprobPlan, head: Head, num_rows: int) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor]]:
    """Rows of a chunk, its pairs, and these as (row in the chunk, target)."""
    step = head.chunk_rows
    edges = [*plan.host_offsets[:-1:step].tolist(), plan.pair_row.shape[0]]
    for index, first in enumerate(range(0, num_rows, step)):
        span = slice(edges[index], edges[index + 1])
        yield slice(first, first + step), span, plan.pair_row[span] - first, plan.pair_target[span]
