"""Log-probabilities in plain torch whose backward needs no [T, V] tensor, and no head where the head is frozen.

With u the distinct (row, target) pairs of row r, G = sum of upstream gradients of the row, f = dz / d(h W^T):

    d/dh_r = sum_u c_u f_u W[t_u]  -  G Y_r,      Y_r = sum over v that are no target of r of p_v f_v W[v]
    c_u = g_u - G p_u = g_u (1 - p_u) - p_u (G - g_u),      1 - p_u = rest_r + sum of the row's other p

The expected embedding Y and rest_r, the mass on no target, do not depend on the loss. Both are made in the forward, where
the softmax is at hand. Leaving the targets out of Y and never subtracting p from 1 keeps the gradient of confident tokens
exact. The plain W[t] - Y is off by half there, and 1 - exp(logp) is all rounding once 1 - p is below the rounding of a
logit. A head that takes a gradient needs the logits again in backward: there dz = c_u at targets and -G p_v elsewhere is
made a chunk of rows at a time, and gives dh, dW and db.

Runs on any device. Chunks are cut by the plan's `host_offsets`, so the host never waits for a GPU.
"""

from collections.abc import Iterator

import torch

from cpo_kernels.device import accumulation_dtype
from cpo_kernels.linear_logprob.results import GRADED, Head, HeadGradients, PairScores, pair_coefficients
from cpo_kernels.logprob_plan import LogprobPlan


def score(rows: torch.Tensor, head: Head, plan: LogprobPlan, outputs: tuple[str, ...], mode: str) -> PairScores:
    """One pass of rows [R, E] over the head, with each reduction over the vocabulary only where it is asked for."""
    dtype = accumulation_dtype(rows.dtype)
    num_pairs, (num_rows, width) = plan.pair_row.shape[0], rows.shape
    graded, expecting = mode in GRADED, mode == "expected"

    def column(wanted: bool, *shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return rows.new_zeros(shape if wanted else (0,), dtype=dtype)

    scores = PairScores(
        logps=column(True, num_pairs),
        slopes=column(graded, num_pairs),
        rest=column(graded, num_rows),
        expected=column(expecting, num_rows, width),
        target_weights=head.weight[plan.pair_target] if expecting else column(False, dtype=head.weight.dtype),
        normalizer=column(mode == "recompute", 2, num_rows),
        **{name: column(True, num_pairs, dtype=torch.bool if name == "is_top1" else dtype) for name in outputs},
    )
    for chunk, span, row, target in _chunks(plan, head, num_rows):
        logits = head.logits(rows[chunk])  # [rows of the chunk, V]
        log_sum_exp = torch.logsumexp(logits, dim=-1)
        picked = logits[row, target]
        scores.logps[span] = picked - log_sum_exp[row]
        if scores.is_top1 is not None:
            scores.is_top1[span] = picked >= logits.amax(dim=-1)[row]
        if scores.mean_logit is not None:
            scores.mean_logit[span] = logits.mean(dim=-1)[row]
        if not graded and scores.entropy is None:
            continue
        probabilities = torch.exp(logits - log_sum_exp.unsqueeze(1))
        if scores.entropy is not None:
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


def row_gradients(grad: torch.Tensor, scores: PairScores, plan: LogprobPlan) -> torch.Tensor:
    """Gradient [R, E] of sum grad logps under a frozen head, grad [U]: a gather and a scaled sum."""
    coefficient, row_grad = pair_coefficients(grad, scores, plan)
    expected = scores.expected
    weights = scores.target_weights.to(expected.dtype) * (coefficient * scores.slopes).to(expected.dtype).unsqueeze(1)
    grad_rows = expected * -row_grad.to(expected.dtype).unsqueeze(1)
    return grad_rows.index_add_(0, plan.pair_row, weights).to(scores.target_weights.dtype)


def head_gradients(
    grad: torch.Tensor,  # [U]
    scores: PairScores,
    rows: torch.Tensor,  # [R, E]
    head: Head,
    plan: LogprobPlan,
    needs: tuple[bool, bool, bool],  # of rows, weight, bias
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of rows [R, E], weight [V, E] and bias [V], each if it is needed, a chunk of logits at a time."""
    dtype = accumulation_dtype(rows.dtype)
    coefficient, row_grad = (x.to(dtype) for x in pair_coefficients(grad, scores, plan))
    gradients = HeadGradients(rows, head, needs)
    for chunk, span, row, target in _chunks(plan, head, rows.shape[0]):
        logits = head.logits(rows[chunk])
        grad_logits = torch.exp(logits - scores.normalizer[0, chunk].unsqueeze(1))
        grad_logits.mul_((-row_grad[chunk] / scores.normalizer[1, chunk]).unsqueeze(1))
        grad_logits[row, target] = coefficient[span]
        gradients.add(grad_logits.mul_(head.slope(logits)), chunk)
    return gradients.rounded()


def _chunks(plan: LogprobPlan, head: Head, num_rows: int) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor]]:
    """Rows of a chunk, its pairs, and these as (row in the chunk, target)."""
    step = head.chunk_rows(num_rows)
    edges = [*plan.host_offsets[:-1:step].tolist(), plan.pair_row.shape[0]]
    for index, first in enumerate(range(0, num_rows, step)):
        span = slice(edges[index], edges[index + 1])
        yield slice(first, first + step), span, plan.pair_row[span] - first, plan.pair_target[span]
