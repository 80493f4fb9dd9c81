"""What goes into a pass over the LM head, what comes out of it, and the few sums that all implementations share.

    z = softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature          `softcap` None leaves tanh out

`Head` makes these logits in the accumulation dtype, never rounded to 16 bits. `PairScores` is what one pass leaves for
each distinct (row, target) pair of a plan, `LogprobResult` what a caller of `linear_logprob` gets. P scored tokens,
U pairs, R distinct rows, S segments. What a pass leaves besides log-probs depends on its mode:

* `none`: no row takes a gradient.
* `reference`: rows of the frozen reference model beside a policy that takes a gradient. They take none, but go through
  the policy's kernels, so equal hidden states give bitwise equal log-probs (rewards before step 1 are exactly 0).
* `expected`: rows take a gradient and the head does not. The expected embedding is made in the forward.
* `recompute`: the head takes a gradient too. Backward makes the logits again, a chunk of rows at a time.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from cpo_kernels.device import accumulation_dtype, matmul_accumulated
from cpo_kernels.linear_logprob.chunk_size import chunk_rows, max_chunk_logits
from cpo_kernels.logprob_plan import LogprobPlan

OUTPUTS = ("entropy", "mean_logit", "is_top1")
GRADED = ("expected", "recompute")  # modes that a backward follows


@dataclass(frozen=True)
class Head:
    """Weight (and bias) of an output head and its logit transform, as the module docstring has it.

    Models that scale or cap their logits (Cohere, Granite, Gemma 2) train another objective when this is ignored.
    """

    weight: torch.Tensor  # [V, E]
    bias: torch.Tensor | None = None  # [V]
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def trainable(self) -> bool:
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    def chunk_rows(self, num_rows: int) -> int:
        """Rows of `num_rows` whose logits are held at once."""
        return chunk_rows(num_rows, self.weight.shape[0], self.weight.device)

    @property
    def chunk_columns(self) -> int:
        """Rows of the weight's gradient that are held at once beside their sum."""
        return max(1, max_chunk_logits(self.weight.device) // self.weight.shape[1])

    def contiguous(self) -> "Head":
        """The same head, detached, for kernels that address it by row and column."""
        bias = None if self.bias is None else self.bias.detach().contiguous()
        return Head(self.weight.detach().contiguous(), bias, self.logit_scale, self.softcap, self.temperature)

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
        """dz / d(h W^T), a factor of every gradient of z: a tensor like z under a soft-cap, else a constant."""
        constant = self.logit_scale / self.temperature
        if self.softcap is None:
            return constant
        return constant * (1.0 - (logits * self.temperature / self.softcap).square())


class PairScores(NamedTuple):
    """Tensors of one pass in the accumulation dtype. One that the mode does not need has no elements."""

    logps: torch.Tensor  # [U]
    slopes: torch.Tensor  # [U] dz / d(h W^T) at the target; expected and recompute
    rest: torch.Tensor  # [R] probability on no target; expected and recompute
    expected: torch.Tensor  # [R, E] sum of p W dz / d(h W^T) over the columns that are no target; expected
    target_weights: torch.Tensor  # [U, E] in the dtype of the head; expected
    normalizer: torch.Tensor  # [2, R]: p = exp(z - normalizer[0]) / normalizer[1]; recompute
    entropy: torch.Tensor | None = None  # [U] nats, at the pair's row; this and the next two where asked
    mean_logit: torch.Tensor | None = None  # [U]
    is_top1: torch.Tensor | None = None  # [U] bool


NUM_SAVED = 6  # the fields of `PairScores` that backward reads


@dataclass(frozen=True)
class LogprobResult:
    """Log-probabilities of a plan's tokens in float32, or float64 for float64 inputs.

    `token_logps` and `segment_logps` are differentiable, everything else is not. What was not asked for is None.
    """

    token_logps: torch.Tensor  # [P]
    segment_logps: torch.Tensor  # [S] sum over a segment's tokens, exactly 0 for an empty one
    ref_token_logps: torch.Tensor | None = None  # [P]
    ref_segment_logps: torch.Tensor | None = None  # [S]
    entropy: torch.Tensor | None = None  # [P] nats, of the policy's distribution at the token's row
    mean_logit: torch.Tensor | None = None  # [P] mean of the final logits over the vocabulary
    is_top1: torch.Tensor | None = None  # [P] bool, the target has the row's largest logit


def segment_sums(token_logps: torch.Tensor, plan: LogprobPlan) -> torch.Tensor:
    """Sum tokens [P] by segment in the order of the plan: [S], bitwise repeatable, 0 for an empty segment."""
    if token_logps.shape[0] == 0:
        return token_logps.new_zeros(plan.num_segments) + token_logps.sum()  # keeps the graph of an empty plan
    return _sum_runs(token_logps[plan.segment_order], plan.segment_lengths)


def pair_gradients(plan: LogprobPlan, grad_tokens: torch.Tensor, grad_segments: torch.Tensor) -> torch.Tensor:
    """Upstream gradient [U] of each pair: that of its tokens [P] and of their segments [S], summed in one order."""
    total = grad_tokens + grad_segments[plan.segments]
    return _sum_runs(total[plan.pair_order], plan.pair_lengths)


def pair_coefficients(grad: torch.Tensor, scores: PairScores, plan: LogprobPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """d(sum grad logp) / dz at the pairs [U], and the row's sum of upstream gradients grad [R], both float64.

    c_u = g_u (1 - p_u) - p_u (G - g_u), 1 - p_u = rest + the row's other p. These are U numbers: float64 makes "the
    row's others" exact where one target holds nearly all mass or gradient.
    """
    grad, mass = grad.double(), scores.logps.exp().double()
    lengths = plan.row_offsets.diff()
    row_grad, row_mass = _sum_runs(grad, lengths), _sum_runs(mass, lengths)
    not_target = scores.rest.double()[plan.pair_row] + (row_mass[plan.pair_row] - mass)
    return grad * not_target - mass * (row_grad[plan.pair_row] - grad), row_grad


def _sum_runs(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Sums of consecutive runs, each from left to right. A run without elements is 0."""
    if values.shape[0] == 0:
        return values
    sums: torch.Tensor = torch.segment_reduce(values, "sum", lengths=lengths, initial=0.0, unsafe=True)
    return sums


class HeadGradients:
    """Gradients of rows, weight and bias, each if it is needed, summed over chunks of rows in the accumulation dtype."""

    def __init__(self, rows: torch.Tensor, head: Head, needs: tuple[bool, bool, bool]) -> None:
        self.rows, self.head = rows, head
        dtype = accumulation_dtype(rows.dtype)
        shapes = (rows.shape, head.weight.shape, head.weight.shape[:1])
        self.grad_rows, self.grad_weight, self.grad_bias = (
            rows.new_zeros(shape, dtype=dtype) if needed else None for shape, needed in zip(shapes, needs, strict=True)
        )

    def add(self, grad_products: torch.Tensor, chunk: slice) -> None:
        """Add what d loss / d(h W^T) [C, V] of a chunk of C rows gives."""
        dtype = grad_products.dtype
        if self.grad_rows is not None:
            self.grad_rows[chunk] = matmul_accumulated(grad_products, self.head.weight.to(dtype))
        if self.grad_weight is not None:
            rows = self.rows[chunk].to(dtype)
            for first in range(0, grad_products.shape[1], self.head.chunk_columns):
                columns = slice(first, first + self.head.chunk_columns)
                self.grad_weight[columns] += matmul_accumulated(grad_products[:, columns].t(), rows)
        if self.grad_bias is not None:
            self.grad_bias += grad_products.sum(dim=0, dtype=self.grad_bias.dtype)

    def rounded(
        self, scale: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """The sums over `scale`, rounded once to the dtypes of what they belong to."""
        bias_dtype = self.rows.dtype if self.head.bias is None else self.head.bias.dtype
        dtypes = (self.rows.dtype, self.head.weight.dtype, bias_dtype)
        sums = (self.grad_rows, self.grad_weight, self.grad_bias)
        a, b, c = (
            None if total is None else (total if scale is None else total.div_(scale)).to(dtype)
            for total, dtype in zip(sums, dtypes, strict=True)
        )
        return a, b, c
