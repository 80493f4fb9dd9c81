"""LM head, log-softmax and gather in one op: log-probs of any number of targets per hidden row, summed by segment.

Only the rows that a plan names meet the head, logits are never rounded to 16 bits, and no [T, V] tensor exists beyond
one bounded chunk. `reference` is the specification by autograd; `eager` makes the expected embedding in the forward, so
that the backward of a frozen head needs no head; `triton` does the same by kernels on a GPU, and on a CPU in Triton's
interpreter (TRITON_INTERPRET=1), which is for tests.
"""

from collections.abc import Sequence

import torch

from cpo_kernels.implementation import available_implementations, resolve_implementation
from cpo_kernels.linear_logprob.check import check_linear_logprob
from cpo_kernels.linear_logprob.op import NUM_PUBLIC, scoring
from cpo_kernels.linear_logprob.reference import reference_token_logps
from cpo_kernels.linear_logprob.results import OUTPUTS, Head, LogprobResult, segment_sums
from cpo_kernels.logprob_plan import LogprobPlan

__all__ = ["LogprobResult", "linear_logprob", "resolve_linear_logprob", "selective_linear_logprob"]


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

    Args:
        hidden: [T, E] float64, float32, bfloat16 or float16; the last hidden states of the policy.
        weight: [V, E] of the same dtype.
        plan: which target is scored at which row, and which segment it adds to.
        ref_hidden: [T, E], hidden states of the reference on the same rows; scored without gradient.
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
            what "triton" does not take: float64, a soft-cap, a head that requires a gradient, outputs.
    """
    _check(hidden, weight, plan, ref_hidden, outputs)
    if not torch.compiler.is_compiling() or impl is not None:
        chosen = resolve_linear_logprob(impl, hidden.device.type)
    else:
        chosen = ""  # a graph outlives the environment it was traced in: the op looks the default up when it runs
    head = Head(weight, bias, logit_scale, softcap, temperature)
    if plan.rows.device != hidden.device:
        plan = plan.to(hidden.device)
    if chosen == "reference":
        return _by_autograd(hidden, ref_hidden, plan, head, outputs)
    if chosen == "triton" and hidden.dtype == torch.float64:
        raise ValueError("linear_logprob: impl='triton' does not take float64 inputs; use impl='eager'")
    mode = "none"
    if torch.is_grad_enabled():
        mode = "recompute" if head.trainable else "expected" if hidden.requires_grad else "none"
    names = [name for name in OUTPUTS if name in outputs]
    found = scoring(
        hidden, weight, bias, None if ref_hidden is None else ref_hidden.detach(), plan.tensors(),
        logit_scale, softcap, temperature, ",".join(names), mode, chosen,
    )  # fmt: skip
    token_logps, segment_logps, ref_token_logps, ref_segment_logps, *columns = found[:NUM_PUBLIC]
    return LogprobResult(
        token_logps,
        segment_logps,
        None if ref_hidden is None else ref_token_logps,
        None if ref_hidden is None else ref_segment_logps,
        *(column if name in names else None for name, column in zip(OUTPUTS, columns, strict=True)),
    )


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


def _by_autograd(
    hidden: torch.Tensor,  # [T, E]
    ref_hidden: torch.Tensor | None,  # [T, E]
    plan: LogprobPlan,
    head: Head,
    outputs: Sequence[str],
) -> LogprobResult:
    """The specification, outside of any op of ours: autograd sees every step."""
    rows = hidden.index_select(0, plan.unique_rows)
    logps, extra = reference_token_logps(rows, plan.row_index, plan.targets, head)
    ref_logps = None
    if ref_hidden is not None:
        with torch.no_grad():
            ref_rows = ref_hidden.index_select(0, plan.unique_rows)
            ref_logps, _ = reference_token_logps(ref_rows, plan.row_index, plan.targets, head)
    return LogprobResult(
        logps,
        segment_sums(logps, plan),
        ref_logps,
        None if ref_logps is None else segment_sums(ref_logps, plan),
        **{name: extra[name] for name in outputs},
    )


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
