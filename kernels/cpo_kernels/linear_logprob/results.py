"""What one pass over the head gives: the log-probs of a plan's pairs, and what backward will need.

U distinct (row, target) pairs, R distinct rows. Which of the optional tensors are filled depends on the mode:

* `none`: no gradient is wanted;
* `reference`: neither, but of a policy that takes one: equal hidden states must give equal bits, so its way is taken;
* `expected`: the gradient of the hidden rows under a frozen head, whose expected embedding is made at once;
* `recompute`: gradients of the head too, whose logits backward makes again, a chunk of rows at a time.

The LM head as one function: hidden rows to final logits, in the accumulation dtype, never rounded to 16 bits.

    z = softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature

(`softcap` None leaves tanh out). `slope` is dz / d(h W^T), the factor that every gradient of z carries. Models that
scale or cap their logits (Cohere, Granite, Gemma 2) train another objective when this is ignored.

What `linear_logprob` returns, and the segment sums in the one order that every implementation keeps.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from cpo_kernels.device import matmul_accumulated
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


MAX_CHUNK_LOGITS = 1 << 25  # logits held at once: 128 MiB in float32
ROW_TILE = 128  # rows of a matrix product's tile on sm80 and sm90


@dataclass(frozen=True)
class Head:
    """Weight [V, E] (and bias [V]) of an output head with its logit transform; see the module docstring."""

    weight: torch.Tensor  # [V, E]
    bias: torch.Tensor | None = None  # [V]
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def trainable(self) -> bool:
        """Whether the weight or the bias takes a gradient."""
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    @property
    def chunk_rows(self) -> int:
        """Rows whose logits are held at once: whole tiles of a matrix product where that many fit."""
        rows = max(1, MAX_CHUNK_LOGITS // self.weight.shape[0])
        return rows if rows < ROW_TILE else rows // ROW_TILE * ROW_TILE

    @property
    def chunk_columns(self) -> int:
        """Rows of the weight's gradient that are held at once beside their sum."""
        return max(1, MAX_CHUNK_LOGITS // self.weight.shape[1])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final logits z [R, V] of hidden rows [R, E]."""
        return self.transform(matmul_accumulated(hidden, self.weight.t()))

    def transform(self, raw: torch.Tensor) -> torch.Tensor:
        """Raw products h W^T to final logits z, same shape."""
        if self.bias is not None:
            raw = raw + self.bias.to(raw.dtype)
        if self.logit_scale != 1.0:
            raw = raw * self.logit_scale
        if self.softcap is not None:
            raw = torch.tanh(raw / self.softcap) * self.softcap
        return raw if self.temperature == 1.0 else raw / self.temperature

    def slope(self, logits: torch.Tensor) -> torch.Tensor | float:
        """dz / d(h W^T) at final logits z: a tensor of the shape of z under a soft-cap, else a constant."""
        constant = self.logit_scale / self.temperature
        if self.softcap is None:
            return constant
        return constant * (1.0 - (logits * self.temperature / self.softcap).square())


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
