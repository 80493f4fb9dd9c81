"""What one pass over the head gives: the log-probs of a plan's pairs, and what backward will need.

U distinct (row, target) pairs, R distinct rows. Which of the optional tensors are filled depends on the mode:

* `none`: no gradient is wanted;
* `reference`: neither, but of a policy that takes one: equal hidden states must give equal bits, so its way is taken;
* `expected`: the gradient of the hidden rows under a frozen head, whose expected embedding is made at once;
* `recompute`: gradients of the head too, whose logits backward makes again, a chunk of rows at a time.
"""

from typing import NamedTuple

import torch

from cpo_kernels.logprob_plan import LogprobPlan

GRADED = ("expected", "recompute")  # modes that backward follows


class Scores(NamedTuple):
    """Tensors of one pass, in the accumulation dtype; one that is not wanted has no elements."""

    logps: torch.Tensor  # [U]
    entropy: torch.Tensor  # [U] nats, at the pair's row
    mean_logit: torch.Tensor  # [U]
    is_top1: torch.Tensor  # [U] bool
    slopes: torch.Tensor  # [U] dz / d(h W^T) at the target; expected and recompute
    rest: torch.Tensor  # [R] probability on no target; expected and recompute
    expected: torch.Tensor  # [R, E] sum of p W dz / d(h W^T) over the columns that are no target; expected
    target_weights: torch.Tensor  # [U, E] in the dtype of the head; expected
    normalizer: torch.Tensor  # [2, R]: p = exp(z - normalizer[0]) / normalizer[1]; recompute


def pair_gradients(plan: LogprobPlan, grad_tokens: torch.Tensor, grad_segments: torch.Tensor) -> torch.Tensor:
    """Upstream gradient [U] of each pair: that of its tokens [P] and of their segments [S], summed in one order."""
    total = grad_tokens + grad_segments[plan.segments]
    if total.shape[0] == 0:
        return total
    summed: torch.Tensor = torch.segment_reduce(
        total[plan.pair_order], "sum", lengths=plan.pair_lengths, initial=0.0, unsafe=True
    )
    return summed


def pair_coefficients(
    grad: torch.Tensor,  # [U]
    logps: torch.Tensor,  # [U]
    rest: torch.Tensor,  # [R]
    plan: LogprobPlan,
) -> tuple[torch.Tensor, torch.Tensor]:
    """d(sum grad logp) / dz at the pairs [U], and the row's sum of upstream gradients [R], both float64.

    c_u = g_u (1 - p_u) - p_u (G - g_u), 1 - p_u = rest + the row's other p. These are U numbers: float64 makes "the
    row's others" exact where one target holds nearly all mass or gradient.
    """
    grad, mass = grad.double(), logps.exp().double()
    lengths = plan.row_offsets.diff()
    row_grad, row_mass = (
        torch.segment_reduce(x, "sum", lengths=lengths, initial=0.0, unsafe=True) if x.shape[0] else x
        for x in (grad, mass)
    )
    not_target = rest.double()[plan.pair_row] + (row_mass[plan.pair_row] - mass)
    return grad * not_target - mass * (row_grad[plan.pair_row] - grad), row_grad
