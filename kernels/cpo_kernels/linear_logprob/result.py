"""What `linear_logprob` returns, and the segment sums in the one order that every implementation keeps."""

from dataclasses import dataclass

import torch

from cpo_kernels.logprob_plan import LogprobPlan


@dataclass(frozen=True)
class LogprobResult:
    """Log-probabilities of a plan's tokens; float32, or float64 for float64 inputs.

    `token_logps` [P] and `segment_logps` [S] are differentiable, everything else is not; what was not asked for is None.
    """

    token_logps: torch.Tensor  # [P]
    segment_logps: torch.Tensor  # [S] sum over a segment's tokens, exactly 0 for an empty one
    ref_token_logps: torch.Tensor | None = None  # [P]
    ref_segment_logps: torch.Tensor | None = None  # [S]
    entropy: torch.Tensor | None = None  # [P] nats, of the policy's distribution at the token's row
    mean_logit: torch.Tensor | None = None  # [P] mean of the final logits over the vocabulary
    is_top1: torch.Tensor | None = None  # [P] bool, the target has the row's largest logit


OUTPUTS = ("entropy", "mean_logit", "is_top1")


def segment_sums(token_logps: torch.Tensor, plan: LogprobPlan) -> torch.Tensor:
    """Sum tokens [P] by segment in the order of the plan: [S], bitwise repeatable, 0 for an empty segment."""
    if token_logps.shape[0] == 0:
        return token_logps.new_zeros(plan.num_segments) + token_logps.sum()  # keeps the graph of an empty plan
    sums: torch.Tensor = torch.segment_reduce(
        token_logps[plan.segment_order], "sum", lengths=plan.segment_lengths, initial=0.0, unsafe=True
    )
    return sums
