"""Log-probabilities under a frozen head by the Triton kernels of `forward` and `backward`.

The same numbers as `eager`, whose docstring has the formulas. Where the hidden rows take a gradient, logits exist one
chunk at a time and the expected embedding is made from them; where they take none, no logit reaches memory. Policy and
reference of one call take the same way, kernel for kernel, so equal hidden states give bitwise equal log-probs.
"""

from typing import Any

import torch

from cpo_kernels.linear_logprob.backward import row_gradients
from cpo_kernels.linear_logprob.eager import DistinctTargets, distinct_targets
from cpo_kernels.linear_logprob.forward import (
    PROBABILITY_SCALE,
    chunk_scores,
    conditional_probabilities,
    fused_logps,
)
from cpo_kernels.linear_logprob.head import Head
from cpo_kernels.logprob_plan import LogprobPlan
from cpo_kernels.precision import matmul_accumulated


def triton_logps(
    rows: torch.Tensor,  # [R, E]
    ref_rows: torch.Tensor | None,  # [R, E]
    plan: LogprobPlan,
    head: Head,
    outputs: tuple[str, ...],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probs [P] float32 of policy (differentiable in `rows`) and reference (not).

    A head whose weight is not contiguous is copied.

    Raises:
        ValueError: float64, a soft-cap, a logit factor that is not positive, a head that takes a gradient, or any of
            `outputs`: no kernel here computes them.
    """
    for refused, what in (
        (rows.dtype == torch.float64, "float64 inputs"),
        (head.softcap is not None, f"softcap={head.softcap}"),
        (not _slope(head) > 0.0, f"logit_scale / temperature = {_slope(head)}"),
        (head.trainable and torch.is_grad_enabled(), "a weight or bias that requires a gradient"),
        (bool(outputs), f"outputs={outputs}"),
    ):
        if refused:
            raise ValueError(f"linear_logprob: impl='triton' does not take {what}; use impl='eager'")
    pairs = distinct_targets(plan.row_index, plan.targets, rows.shape[0], head)
    # Rows without gradient need no logits in memory; a reference goes the way of its policy.
    through_logits = rows.requires_grad
    offsets = torch.searchsorted(pairs.row, torch.arange(rows.shape[0] + 1, device=rows.device))
    weight, bias = head.weight.detach().contiguous(), None if head.bias is None else head.bias.detach().contiguous()
    head = Head(weight, bias, head.logit_scale, None, head.temperature)
    if through_logits:
        logps: torch.Tensor = _FrozenHead.apply(rows.contiguous(), head, pairs, offsets)
    else:
        logps = _fused(rows, head, pairs, offsets)
    ref_logps = None
    if ref_rows is not None:
        if through_logits:
            ref_logps = _score(ref_rows.contiguous(), head, pairs, offsets, with_expected=False)[0]
        else:
            ref_logps = _fused(ref_rows, head, pairs, offsets)
        ref_logps = ref_logps[pairs.inverse]
    return logps[pairs.inverse], ref_logps


class _FrozenHead(torch.autograd.Function):
    """Log-probs [U] of distinct targets from hidden rows [R, E]; gradient to the rows only."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, head: Head, pairs: DistinctTargets, offsets: torch.Tensor
    ) -> torch.Tensor:
        logps, rest, expected = _score(rows, head, pairs, offsets, with_expected=True)
        ctx.save_for_backward(logps, rest, expected, head.weight[pairs.target], offsets)
        ctx.slope, ctx.rows_dtype = _slope(head), rows.dtype
        return logps

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logps, rest, expected, target_weights, offsets = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        grad_rows = row_gradients(grad, logps, rest, expected, target_weights, offsets, ctx.slope, ctx.rows_dtype)
        return grad_rows, None, None, None


def _slope(head: Head) -> float:
    return head.logit_scale / head.temperature


def _fused(rows: torch.Tensor, head: Head, pairs: DistinctTargets, offsets: torch.Tensor) -> torch.Tensor:
    return fused_logps(rows.contiguous(), head.weight, head.bias, _slope(head), pairs.row, pairs.target, offsets)


def _score(
    rows: torch.Tensor, head: Head, pairs: DistinctTargets, offsets: torch.Tensor, with_expected: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs [U], probability on no target [R], expected embedding [R, E] ([0, E] unless asked), a chunk at a time."""
    picked, logps = (rows.new_empty(pairs.row.shape, dtype=torch.float32) for _ in range(2))
    rest = rows.new_empty(rows.shape[0], dtype=torch.float32)
    expected = rows.new_empty(rows.shape if with_expected else (0, rows.shape[1]), dtype=torch.float32)
    slope = _slope(head)
    for chunk, first_pair in enumerate(pairs.edges[:-1]):
        first_row, pair_span = chunk * pairs.chunk_rows, (first_pair, pairs.edges[chunk + 1])
        chunk_rows = slice(first_row, first_row + pairs.chunk_rows)
        logits = matmul_accumulated(rows[chunk_rows], head.weight.t())
        others = chunk_scores(
            logits, head.bias, slope, pairs.row, pairs.target, offsets, first_row, pair_span, picked, logps
        )
        rest[chunk_rows] = others[2]
        if with_expected:
            probabilities = conditional_probabilities(logits, head.bias, slope, others, rows.dtype)
            scale = others[2] * (slope / PROBABILITY_SCALE)
            expected[chunk_rows] = matmul_accumulated(probabilities, head.weight).mul_(scale.unsqueeze(1))
    return logps, rest, expected
