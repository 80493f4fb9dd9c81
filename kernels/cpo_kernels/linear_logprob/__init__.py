"""LM head, log-softmax and gather in one op: log-probs of any number of targets per hidden row, summed by segment.

Only the rows that a plan names meet the head, logits are never rounded to 16 bits, and no [T, V] tensor exists beyond
one bounded chunk. `reference` is the specification by autograd. `eager` makes the expected embedding in the forward, so
that the backward of a frozen head needs no head. `triton` does the same by kernels on a GPU. Tests run them on a CPU in
Triton's interpreter (TRITON_INTERPRET=1). T rows, E hidden, V vocabulary, P scored tokens, S segments.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch.autograd.function import once_differentiable

from cpo_kernels.implementation import available_implementations, resolve_implementation
from cpo_kernels.linear_logprob import eager
from cpo_kernels.linear_logprob.check import check_linear_logprob
from cpo_kernels.linear_logprob.reference import reference_linear_logprob
from cpo_kernels.linear_logprob.results import (
    GRADED,
    NUM_SAVED,
    OUTPUTS,
    Head,
    LogprobResult,
    PairScores,
    pair_gradients,
    segment_sums,
)
from cpo_kernels.logprob_plan import LogprobPlan

__all__ = ["LogprobResult", "linear_logprob", "resolve_linear_logprob", "selective_linear_logprob"]

Function = TypeVar("Function", bound=Callable[..., Any])


def _outside_graphs(function: Function) -> Function:
    """Keep torch.compile from tracing a function: the graph breaks around it, and fullgraph=True is refused.

    torch 2.11 traced an autograd function of ours to a graph whose gradients were zero, without a word (docs/log.md).
    """
    reason = "its kernels are chosen and its chunks of rows are cut when it runs; compile with fullgraph=False"
    untraced: Function = torch.compiler.disable(function, reason=reason)
    return untraced


@_outside_graphs
def linear_logprob(
    hidden: torch.Tensor,  # [T, E]
    weight: torch.Tensor,  # [V, E]
    plan: LogprobPlan,
    ref_hidden: torch.Tensor | None = None,  # [T, E]
    *,
    bias: torch.Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    outputs: Sequence[str] = (),
    impl: str | None = None,
) -> LogprobResult:
    """Log-probabilities of a plan's tokens under softmax(z), z = softcap tanh(scale (h W^T + b) / softcap) / temperature.

    A function under `torch.compile` may call this: the graph breaks here, so `fullgraph=True` is refused.

    Args:
        hidden: [T, E] float64, float32, bfloat16 or float16, the last hidden states of the policy.
        weight: [V, E] of the same dtype.
        plan: which target is scored at which row, and which segment it adds to.
        ref_hidden: [T, E], hidden states of the reference on the same rows, scored without gradient.
        bias: [V] or None.
        logit_scale: factor on the products before the soft-cap.
        softcap: bound of the tanh soft-cap, or None.
        temperature: divisor of the final logits.
        outputs: any of "entropy", "mean_logit", "is_top1", per token of the policy, without gradient.
        impl: "reference", "eager", "triton" (CUDA tensors), or None to choose by device. With a weight or bias that
            requires a gradient, "eager" recomputes a chunk's logits in backward as "reference" does.

    Returns:
        `LogprobResult` in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes or dtypes do not fit, the plan points outside hidden or the vocabulary, an unknown output, or
            what "triton" does not take: float64, or a vocabulary of 2^24 and more.
    """
    _check(hidden, weight, plan, ref_hidden, outputs)
    device = hidden.device
    chosen = resolve_linear_logprob(impl, device.type)
    head = Head(weight, bias, logit_scale, softcap, temperature)
    if plan.rows.device != device:
        plan = plan.to(device)
    if chosen == "reference":
        return reference_linear_logprob(hidden, ref_hidden, head, plan, outputs)
    if chosen == "triton" and hidden.dtype == torch.float64:
        raise ValueError("linear_logprob: impl='triton' does not take float64 inputs; use impl='eager'")
    mode = "none"
    if torch.is_grad_enabled():
        mode = "recompute" if head.trainable else "expected" if hidden.requires_grad else "none"
    names, transform = tuple(name for name in OUTPUTS if name in outputs), (logit_scale, softcap, temperature)
    # detached: an input that takes a gradient would give one to every result
    frozen = None if ref_hidden is None else ref_hidden.detach()
    return LogprobResult(*_LinearLogprob.apply(hidden, weight, bias, frozen, plan, transform, names, mode, chosen))


def resolve_linear_logprob(impl: str | None, device_type: str) -> str:
    """The name of the implementation that runs on a device. See `resolve_implementation`."""
    available = available_implementations(device_type)
    return resolve_implementation("linear_logprob", impl, device_type, available, check_linear_logprob)


def selective_linear_logprob(
    hidden: torch.Tensor,  # [B, L, E]
    weight: torch.Tensor,  # [V, E]
    labels: torch.Tensor,  # [B, L] int64
    mask: torch.Tensor | None = None,  # [B, L] bool
    impl: str | None = None,
) -> torch.Tensor:
    """Dense drop-in: log-prob of each label under the head at its own position, [B, L].

    Labels are already shifted by the caller. A label of -100 or a false mask gives exactly 0 and no gradient, and its
    row never meets the head.

    Raises:
        ValueError: shapes do not fit, or a label that is scored lies outside the vocabulary.
    """
    if hidden.ndim != 3 or labels.shape != hidden.shape[:2] or (mask is not None and mask.shape != labels.shape):
        raise ValueError(
            "selective_linear_logprob: expected hidden [B, L, E], labels and mask [B, L], "
            f"got {tuple(hidden.shape)}, {tuple(labels.shape)}, {None if mask is None else tuple(mask.shape)}"
        )
    scored = labels != -100
    if mask is not None:
        scored &= mask.bool()
    rows = scored.flatten().nonzero().squeeze(1)
    plan = LogprobPlan.build(rows, labels.flatten()[rows], torch.zeros_like(rows), 1)
    result = linear_logprob(hidden.flatten(0, 1), weight, plan, impl=impl)
    dense = torch.zeros(labels.numel(), dtype=result.token_logps.dtype, device=hidden.device)
    return dense.index_copy(0, rows, result.token_logps).view(labels.shape)


class _LinearLogprob(torch.autograd.Function):
    """The fields of `LogprobResult` by `eager` or `triton`, and the gradients of hidden, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        ref_hidden: torch.Tensor | None,
        plan: LogprobPlan,
        transform: tuple[float, float | None, float],  # the last fields of `Head`
        outputs: tuple[str, ...],
        mode: str,  # see `results`
        impl: str,
    ) -> tuple[torch.Tensor | None, ...]:
        head, module = Head(weight, bias, *transform), _module(impl)
        scores: PairScores = module.score(hidden.index_select(0, plan.unique_rows), head, plan, outputs, mode)
        token_logps, ref_logps, ref_sums = scores.logps[plan.pair_index], None, None
        if ref_hidden is not None:
            # the kernels of the policy, variant for variant, so that equal hidden states give equal bits
            ref_outputs, ref_mode = () if impl == "eager" else outputs, "none" if mode == "none" else "reference"
            ref_rows = ref_hidden.index_select(0, plan.unique_rows)
            ref_logps = module.score(ref_rows, head, plan, ref_outputs, ref_mode).logps[plan.pair_index]
            ref_sums = segment_sums(ref_logps, plan)
        columns = [None if column is None else column[plan.pair_index] for column in scores[NUM_SAVED:]]
        if mode in GRADED:
            again = (hidden, weight, bias) if mode == "recompute" else (None, None, None)  # a frozen head is not kept
            ctx.save_for_backward(*scores[:NUM_SAVED], *again)
            ctx.plan, ctx.transform, ctx.impl, ctx.num_rows = plan, transform, impl, hidden.shape[0]
        fixed = (ref_logps, ref_sums, *columns)
        ctx.mark_non_differentiable(*(value for value in fixed if value is not None))
        return token_logps, segment_sums(token_logps, plan), *fixed

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_tokens: torch.Tensor, grad_segments: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor | None, ...]:
        scores, (hidden, weight, bias) = PairScores(*ctx.saved_tensors[:NUM_SAVED]), ctx.saved_tensors[NUM_SAVED:]
        plan, module = ctx.plan, _module(ctx.impl)
        grad = pair_gradients(plan, grad_tokens, grad_segments)
        grad_hidden = grad_weight = grad_bias = None
        if weight is None:
            grad_rows = module.row_gradients(grad, scores, plan)
        else:
            rows, head = hidden.index_select(0, plan.unique_rows), Head(weight, bias, *ctx.transform)
            grad_rows, grad_weight, grad_bias = module.head_gradients(
                grad, scores, rows, head, plan, ctx.needs_input_grad[:3]
            )
        if grad_rows is not None:
            grad_hidden = grad_rows.new_zeros(ctx.num_rows, grad_rows.shape[1])
            grad_hidden.index_copy_(0, plan.unique_rows, grad_rows)
        return grad_hidden, grad_weight, grad_bias, *[None] * 6


def _module(impl: str) -> ModuleType:
    if impl == "eager":
        return eager
    from cpo_kernels.linear_logprob import triton  # loads Triton: only when it is asked for

    return triton


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    plan: LogprobPlan,
    ref_hidden: torch.Tensor | None,
    outputs: Sequence[str],
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_logprob: expected hidden [T, E] and weight [V, E], got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"linear_logprob: hidden is {hidden.dtype} but weight is {weight.dtype}; cast one of them")
    if ref_hidden is not None and (ref_hidden.shape != hidden.shape or ref_hidden.dtype != hidden.dtype):
        raise ValueError(
            f"linear_logprob: expected ref_hidden {tuple(hidden.shape)} {hidden.dtype}, "
            f"got {tuple(ref_hidden.shape)} {ref_hidden.dtype}"
        )
    if plan.max_row >= hidden.shape[0]:
        raise ValueError(f"linear_logprob: the plan names row {plan.max_row} of {hidden.shape[0]} hidden rows")
    if plan.max_target >= weight.shape[0]:
        raise ValueError(f"linear_logprob: target {plan.max_target} is outside a vocabulary of {weight.shape[0]}")
    unknown = [name for name in outputs if name not in OUTPUTS]
    if unknown:
        raise ValueError(f"linear_logprob: unknown outputs {unknown}; expected any of {list(OUTPUTS)}")
