"""Log-probabilities under a frozen head whose backward reads neither the head nor recomputes a logit.

With u the distinct (row, target) pairs of row r, G = sum of upstream gradients of the row, f = dz / d(h W^T):

    d/dh_r = sum_u c_u f_u W[t_u]  -  G Y_r,      Y_r = sum over v that are no target of r of p_v f_v W[v]
    c_u = g_u - G p_u = g_u (1 - p_u) - p_u (G - g_u),      1 - p_u = rest_r + sum of the row's other p

Y, the expected embedding, does not depend on the loss, so it is made in the forward from the softmax that is there
anyway, and so is rest_r, the mass that is on no target. Leaving the targets out of Y and never subtracting p from 1
keeps the gradient of confident tokens exact; the plain W[t] - Y is off by half there, and 1 - exp(logp) is all rounding
once 1 - p is below the rounding of a logit. Policy and reference rows go through products of the same shapes, so equal
hidden states give bitwise equal log-probs. Plain torch, any device; float32 accumulation (float64 for float64).
"""

from typing import Any, NamedTuple

import torch

from cpo_kernels.linear_logprob.head import Head
from cpo_kernels.precision import accumulation_dtype


class DistinctTargets(NamedTuple):
    """The distinct (row, target) pairs of a plan, by row: U pairs for P tokens."""

    row: torch.Tensor  # [U] int64, index into the distinct rows, ascending
    target: torch.Tensor  # [U] int64
    inverse: torch.Tensor  # [P] int64, pair of each token
    edges: list[int]  # pairs [edges[c], edges[c + 1]) belong to row chunk c
    chunk_rows: int


def distinct_targets(row_index: torch.Tensor, targets: torch.Tensor, num_rows: int, head: Head) -> DistinctTargets:
    """Merge equal (row, target) tokens and cut the pairs at the head's row chunks."""
    vocabulary = head.weight.shape[0]
    pairs, inverse = torch.unique(row_index * vocabulary + targets, return_inverse=True)
    row = pairs // vocabulary
    first_rows = torch.arange(0, num_rows, head.chunk_rows, device=row.device)
    edges = [*torch.searchsorted(row, first_rows).tolist(), row.shape[0]]
    return DistinctTargets(row, pairs % vocabulary, inverse, edges, head.chunk_rows)


class FrozenHeadLogps(torch.autograd.Function):
    """Log-probs [U] of distinct targets from hidden rows [R, E]; gradient to the rows only."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, head: Head, pairs: DistinctTargets, outputs: tuple[str, ...]
    ) -> tuple[torch.Tensor, ...]:
        """Returns logps [U] and one tensor [U] per name in `outputs`, these without gradient."""
        scores = score(rows, head, pairs, outputs, ctx.needs_input_grad[0])
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(
                scores.logps, scores.slopes, scores.rest, scores.expected, head.weight[pairs.target], pairs.row
            )
            ctx.rows_dtype = rows.dtype
        extra = tuple(scores.outputs[name] for name in outputs)
        ctx.mark_non_differentiable(*extra)
        return scores.logps, *extra

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The formula of the module docstring: a gather and a scaled sum."""
        logps, slopes, rest, expected, target_weights, row = ctx.saved_tensors
        # U numbers: float64 makes "the row's others" exact where one target holds nearly all mass or gradient
        grad, mass = grad_outputs[0].double(), logps.exp().double()  # [U]
        row_grad, row_mass = (rest.new_zeros(rest.shape, dtype=grad.dtype).index_add_(0, row, x) for x in (grad, mass))
        not_target = rest.double()[row] + (row_mass[row] - mass)
        coefficient = (grad * not_target - mass * (row_grad[row] - grad)) * slopes
        grad_rows = expected * -row_grad.to(expected.dtype).unsqueeze(1)
        grad_rows.index_add_(0, row, target_weights.to(expected.dtype) * coefficient.to(expected.dtype).unsqueeze(1))
        return grad_rows.to(ctx.rows_dtype), None, None, None


class Scores(NamedTuple):
    """What one pass over the head gives for U distinct targets of R rows."""

    logps: torch.Tensor  # [U]
    outputs: dict[str, torch.Tensor]  # [U] each, what was asked
    slopes: torch.Tensor  # [U] dz / d(h W^T) at the target
    rest: torch.Tensor  # [R] mass on no target; zero unless the expected embedding was asked
    expected: torch.Tensor  # [R, E], or [0, E]


def score(
    rows: torch.Tensor, head: Head, pairs: DistinctTargets, outputs: tuple[str, ...], with_expected: bool
) -> Scores:
    """One pass over the head, a chunk of rows at a time; every optional reduction over the vocabulary only when asked."""
    dtype = accumulation_dtype(rows.dtype)
    num_pairs = pairs.row.shape[0]
    logps, slopes = rows.new_zeros(num_pairs, dtype=dtype), rows.new_zeros(num_pairs, dtype=dtype)
    columns = {name: rows.new_zeros(num_pairs, dtype=torch.bool if name == "is_top1" else dtype) for name in outputs}
    rest = rows.new_zeros(rows.shape[0], dtype=dtype)
    expected = rows.new_zeros(rows.shape if with_expected else (0, rows.shape[1]), dtype=dtype)
    for chunk in range(len(pairs.edges) - 1):
        first_row, span = chunk * pairs.chunk_rows, slice(pairs.edges[chunk], pairs.edges[chunk + 1])
        chunk_rows = slice(first_row, first_row + pairs.chunk_rows)
        logits = head.logits(rows[chunk_rows])  # [rows of the chunk, V]
        row, target = pairs.row[span] - first_row, pairs.target[span]
        log_sum_exp = torch.logsumexp(logits, dim=-1)
        picked = logits[row, target]
        logps[span] = picked - log_sum_exp[row]
        slope = head.slope(logits)
        slopes[span] = slope[row, target] if isinstance(slope, torch.Tensor) else slope
        if "is_top1" in columns:
            columns["is_top1"][span] = picked >= logits.amax(dim=-1)[row]
        if "mean_logit" in columns:
            columns["mean_logit"][span] = logits.mean(dim=-1)[row]
        if not with_expected and "entropy" not in columns:
            continue
        probabilities = torch.exp(logits - log_sum_exp.unsqueeze(1))
        if "entropy" in columns:
            columns["entropy"][span] = -(probabilities * (logits - log_sum_exp.unsqueeze(1))).sum(dim=-1)[row]
        if with_expected:
            probabilities[row, target] = 0.0
            rest[chunk_rows] = probabilities.sum(dim=-1)
            expected[chunk_rows] = probabilities.mul_(slope) @ head.weight.to(dtype)
    return Scores(logps, columns, slopes, rest, expected)
