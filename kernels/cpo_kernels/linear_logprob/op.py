"""Scoring as two torch ops, so that `torch.compile` sees one node forward and one backward, whatever runs inside.

`cpo_kernels::linear_logprob` scores a plan; `cpo_kernels::linear_logprob_backward` is its gradient. A plan crosses the
boundary as its tensors. What backward needs of the forward is returned as further outputs, which the public function
drops. The mode (see `scores`) is an argument, because an op cannot ask which of its inputs take a gradient. Left out:
second derivatives, and `impl="reference"`, which autograd differentiates by itself.
"""

import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from cpo_kernels.device import accumulation_dtype
from cpo_kernels.implementation import (
    ENVIRONMENT_VARIABLE,
    available_implementations,
    default_implementation,
    resolve_implementation,
)
from cpo_kernels.linear_logprob import eager
from cpo_kernels.linear_logprob.results import GRADED, OUTPUTS, Head, Scores, pair_gradients, segment_sums
from cpo_kernels.logprob_plan import LogprobPlan

Tensors = tuple[torch.Tensor, ...]
NUM_PUBLIC = 7  # token_logps, segment_logps, ref_token_logps, ref_segment_logps, entropy, mean_logit, is_top1
NUM_SAVED = 6  # logps, slopes, rest, expected, target_weights, normalizer of `Scores`


def _module(impl: str, device: torch.device) -> ModuleType:
    """The module that scores. Inside a compiled graph the choice is made here, at run time, and not while tracing."""
    chosen = impl
    if not chosen:
        wanted = default_implementation(device.type) or os.environ[ENVIRONMENT_VARIABLE]
        chosen = resolve_implementation(
            "linear_logprob", wanted, device.type, available_implementations(device.type)[1:]
        )
    if chosen == "eager":
        return eager
    from cpo_kernels.linear_logprob import triton as triton_scores  # loads Triton: only when it is asked for

    return triton_scores


def score_plan(
    hidden: torch.Tensor,  # [T, E]
    weight: torch.Tensor,  # [V, E]
    bias: torch.Tensor | None,  # [V]
    ref_hidden: torch.Tensor | None,  # [T, E]
    plan: list[torch.Tensor],  # `LogprobPlan.tensors()`
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    outputs: str,  # names, comma-separated
    mode: str,
    impl: str,  # "eager", "triton", or "" for the choice by device
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
]:  # fmt: skip
    """The fields of `LogprobResult`, then the saved ones of `Scores`; one that is not wanted has no elements."""
    head, module = Head(weight, bias, logit_scale, softcap, temperature), _module(impl, hidden.device)
    p, names = LogprobPlan.of(plan, -1, -1), tuple(outputs.split(",")) if outputs else ()
    scores: Scores = module.score(hidden.index_select(0, p.unique_rows), head, p, names, mode)
    logps = scores.logps[p.pair_index]
    ref_logps, ref_sums = logps.new_empty(0), logps.new_empty(0)
    if ref_hidden is not None:
        # The kernels of the policy, variant for variant, so that equal hidden states give equal bits.
        ref_names, ref_mode = () if module is eager else names, "none" if mode == "none" else "reference"
        ref_scores: Scores = module.score(ref_hidden.index_select(0, p.unique_rows), head, p, ref_names, ref_mode)
        ref_logps = ref_scores.logps[p.pair_index]
        ref_sums = segment_sums(ref_logps, p)
    columns = [
        column[p.pair_index] if name in names else column
        for name, column in zip(OUTPUTS, (scores.entropy, scores.mean_logit, scores.is_top1), strict=True)
    ]
    kept = scores.logps if mode in GRADED else logps.new_empty(0)
    return logps, segment_sums(logps, p), ref_logps, ref_sums, *columns, kept, *scores[4:]  # type: ignore[return-value]


def _fake_score_plan(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ref_hidden: torch.Tensor | None,
    plan: list[torch.Tensor],
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    outputs: str,
    mode: str,
    impl: str,
) -> Tensors:
    p, dtype = LogprobPlan.of(plan, -1, -1), accumulation_dtype(hidden.dtype)
    num_tokens, num_pairs, num_rows = p.rows.shape[0], p.pair_row.shape[0], p.unique_rows.shape[0]
    width, graded, expecting = hidden.shape[1], mode in GRADED, mode == "expected"

    def fake(wanted: bool, *shape: Any, dtype: torch.dtype = dtype) -> torch.Tensor:
        return hidden.new_empty(shape if wanted else (0,), dtype=dtype)

    with_ref, asked = ref_hidden is not None, outputs.split(",")
    return (
        fake(True, num_tokens),
        fake(True, p.num_segments),
        fake(with_ref, num_tokens),
        fake(with_ref, p.num_segments),
        fake("entropy" in asked, num_tokens),
        fake("mean_logit" in asked, num_tokens),
        fake("is_top1" in asked, num_tokens, dtype=torch.bool),
        fake(graded, num_pairs),
        fake(graded, num_pairs),
        fake(graded, num_rows),
        fake(expecting, num_rows, width),
        fake(expecting, num_pairs, width, dtype=weight.dtype),
        fake(mode == "recompute", 2, num_rows),
    )


def score_plan_backward(
    grad_tokens: torch.Tensor,  # [P]
    grad_segments: torch.Tensor,  # [S]
    saved: list[torch.Tensor],  # the `NUM_SAVED` last results of `score_plan`
    plan: list[torch.Tensor],
    num_rows: int,  # T
    hidden: torch.Tensor | None,  # [T, E]; it and the head only where the head takes a gradient
    weight: torch.Tensor | None,  # [V, E]
    bias: torch.Tensor | None,  # [V]
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    impl: str,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden [T, E], weight [V, E] and bias [V]; one that is not needed has no elements."""
    p, module = LogprobPlan.of(plan, -1, -1), _module(impl, grad_tokens.device)
    empty = grad_tokens.new_empty(0, dtype=torch.bool)
    scores = Scores(saved[0], empty, empty, empty, *saved[1:])
    grad = pair_gradients(p, grad_tokens, grad_segments)
    grads: tuple[torch.Tensor | None, ...]
    if weight is None or hidden is None:
        grads = module.rows_gradient(grad, scores, p, scores.target_weights.dtype), None, None
    else:
        head, needs = Head(weight, bias, logit_scale, softcap, temperature), (needs_hidden, needs_weight, needs_bias)
        grads = module.head_gradients(grad, scores, hidden.index_select(0, p.unique_rows), head, p, needs)
    grad_rows, grad_weight, grad_bias = (saved[0].new_empty(0) if each is None else each for each in grads)
    if not needs_hidden:
        return grad_rows, grad_weight, grad_bias
    grad_hidden = grad_rows.new_zeros(num_rows, grad_rows.shape[1])
    return grad_hidden.index_copy_(0, p.unique_rows, grad_rows), grad_weight, grad_bias


def _fake_score_plan_backward(
    grad_tokens: torch.Tensor,
    grad_segments: torch.Tensor,
    saved: list[torch.Tensor],
    plan: list[torch.Tensor],
    num_rows: int,
    hidden: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    impl: str,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> Tensors:
    empty = saved[0].new_empty(0)
    if weight is None or hidden is None:
        return saved[4].new_empty(num_rows, saved[4].shape[1]), empty, empty.clone()
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs_hidden else empty,
        torch.empty_like(weight, memory_format=torch.contiguous_format) if needs_weight else empty.clone(),
        bias.new_empty(bias.shape) if needs_bias and bias is not None else empty.clone(),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    hidden, weight, bias, _, plan, logit_scale, softcap, temperature, _, mode, impl = inputs
    again = (hidden, weight, bias) if mode == "recompute" else (None, None, None)  # a frozen head is not kept
    ctx.save_for_backward(*output[NUM_PUBLIC:], *again, *plan)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.transform, ctx.impl = (logit_scale, softcap, temperature), impl
    ctx.sizes = output[0].shape, output[1].shape, hidden.shape[0]


def _backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
    saved, again = ctx.saved_tensors[:NUM_SAVED], ctx.saved_tensors[NUM_SAVED : NUM_SAVED + 3]
    tokens_shape, segments_shape, num_rows = ctx.sizes
    grad_tokens, grad_segments = (
        saved[0].new_zeros(shape) if grad is None else grad
        for grad, shape in zip(grads[:2], (tokens_shape, segments_shape), strict=True)
    )
    needs = ctx.needs_input_grad[:3]
    plan = list(ctx.saved_tensors[NUM_SAVED + 3 :])
    found = _backward_op(
        grad_tokens, grad_segments, list(saved), plan, num_rows, *again, *ctx.transform, ctx.impl, *needs
    )
    grad_inputs = [grad if needed else None for grad, needed in zip(found, needs, strict=True)]
    return *grad_inputs, None, [None] * len(plan), *[None] * 6  # the plan is a list: so must be its gradient


scoring: Callable[..., Tensors] = torch.library.custom_op("cpo_kernels::linear_logprob", score_plan, mutates_args=())
_backward_op: Callable[..., Tensors] = torch.library.custom_op(
    "cpo_kernels::linear_logprob_backward", score_plan_backward, mutates_args=()
)
scoring.register_fake(_fake_score_plan)  # type: ignore[attr-defined]
scoring.register_autograd(_backward, setup_context=_setup_context)  # type: ignore[attr-defined]
_backward_op.register_fake(_fake_score_plan_backward)  # type: ignore[attr-defined]
