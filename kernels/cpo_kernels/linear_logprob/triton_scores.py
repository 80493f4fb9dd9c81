"""Scoring and its gradients by the Triton kernels of `chunk`, `fused` and `backward`; the interface of `eager`.

The same numbers as `eager`, whose docstring has the formulas. Rows that take a gradient, and their reference, go through
stored logits a chunk at a time; others as `dispatch` says. Policy and reference of one call take the same way, kernel for
kernel and variant for variant, so equal hidden states give bitwise equal log-probs. Left out: float64.
"""

import torch

from cpo_kernels.linear_logprob.backward import product_gradients, row_gradients
from cpo_kernels.linear_logprob.chunk import PROBABILITY_SCALE, chunk_scores, conditional_probabilities
from cpo_kernels.linear_logprob.dispatch import choose_path
from cpo_kernels.linear_logprob.eager import add_chunk, cast_gradients, gradient_buffers
from cpo_kernels.linear_logprob.fused import fused_scores
from cpo_kernels.linear_logprob.head import Head
from cpo_kernels.linear_logprob.partials import ENTROPY, MAX_VOCAB, MEAN, NUM_STATS, REST, ROW_MAX, ROW_SUM, Transform
from cpo_kernels.linear_logprob.scores import GRADED, Scores, pair_coefficients
from cpo_kernels.logprob_plan import LogprobPlan
from cpo_kernels.precision import matmul_accumulated


def score(rows: torch.Tensor, head: Head, plan: LogprobPlan, outputs: tuple[str, ...], mode: str) -> Scores:
    """One pass of rows [R, E] over the head. A head that is not contiguous is copied.

    Raises:
        ValueError: float64 inputs, or a vocabulary of 2^24 or more.
    """
    if rows.dtype == torch.float64 or head.weight.shape[0] >= MAX_VOCAB:
        raise ValueError(
            f"linear_logprob: impl='triton' does not take {rows.dtype} and a vocabulary of {head.weight.shape[0]}; "
            "expected 16 or 32 bits and less than 2^24"
        )
    head, transform, rows = _contiguous(head), Transform.of(head), rows.contiguous()
    num_rows, asked = rows.shape[0], bool(outputs)

    def nothing(dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return rows.new_empty(0, dtype=dtype)  # a new one each time: results of an op must not share memory

    slopes, rest, expected, target_weights, normalizer = *(nothing() for _ in range(3)), nothing(rows.dtype), nothing()
    if mode == "none" and num_rows and choose_path(rows.device, rows.shape[1], num_rows) == "fused":
        logps, stats, is_top1 = fused_scores(rows, head.weight, head.bias, transform, plan, asked)
    else:
        picked, logps, stats, expected = _through_chunks(rows, head, transform, plan, asked, mode == "expected")
        is_top1 = picked >= stats[ROW_MAX][plan.pair_row]
        if mode in GRADED:
            slopes, rest = torch.full_like(picked, transform.slope), stats[REST].clone()
            if transform.capped:
                slopes *= 1.0 - (picked / transform.cap).square()
        if mode == "expected":
            target_weights = head.weight[plan.pair_target]
        elif mode == "recompute":
            normalizer = torch.stack((stats[ROW_MAX], stats[ROW_SUM]))
    return Scores(
        logps=logps,
        entropy=stats[ENTROPY][plan.pair_row] if "entropy" in outputs else nothing(),
        mean_logit=stats[MEAN][plan.pair_row] if "mean_logit" in outputs else nothing(),
        is_top1=is_top1 if "is_top1" in outputs else nothing(torch.bool),
        slopes=slopes,
        rest=rest,
        expected=expected,
        target_weights=target_weights,
        normalizer=normalizer,
    )


def rows_gradient(grad: torch.Tensor, saved: Scores, plan: LogprobPlan, dtype: torch.dtype) -> torch.Tensor:
    """Gradient [R, E] of sum grad logps under a frozen head, grad [U]."""
    return row_gradients(
        grad.contiguous(), saved.logps, saved.rest, saved.expected, saved.target_weights, saved.slopes,
        plan.row_offsets, dtype,
    )  # fmt: skip


def head_gradients(
    grad: torch.Tensor,  # [U]
    saved: Scores,
    rows: torch.Tensor,  # [R, E]
    head: Head,
    plan: LogprobPlan,
    needs: tuple[bool, bool, bool],  # of rows, weight, bias
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of rows [R, E], weight [V, E] and bias [V], each if it is needed; one chunk of logits at a time.

    Products of 16-bit operands: the gradient of a chunk's logits is made in float32, targets included, scaled to the size
    of the upstream gradients (on the device, so float16 keeps small ones too) and rounded once.
    """
    head, transform, rows = _contiguous(head), Transform.of(head), rows.contiguous()
    coefficient, row_grad = pair_coefficients(grad, saved.logps, saved.rest, plan)
    coefficient, row_grad = (coefficient * saved.slopes).float(), row_grad.float()
    buffers = gradient_buffers(rows, head, needs)
    if rows.shape[0]:
        size = (coefficient.abs().amax() + row_grad.abs().amax() * abs(transform.slope)).clamp_min(_SMALLEST_SIZE)
        scale = PROBABILITY_SCALE / size
    for first in range(0, rows.shape[0], head.chunk_rows):
        chunk = slice(first, first + head.chunk_rows)
        products = matmul_accumulated(rows[chunk], head.weight.t())
        grad_products = product_gradients(
            products, head.bias, transform, saved.normalizer[:, chunk], row_grad[chunk], coefficient, plan, first,
            scale, rows.dtype,
        )  # fmt: skip
        add_chunk(grad_products, rows[chunk], head, chunk, *buffers)
    for buffer in buffers:
        if buffer is not None and rows.shape[0]:
            buffer.div_(scale)
    return cast_gradients(head, rows.dtype, *buffers)


_SMALLEST_SIZE = 1e-30  # of upstream gradients: below it, all zero perhaps, the scale would not be finite


def _contiguous(head: Head) -> Head:
    bias = None if head.bias is None else head.bias.detach().contiguous()
    return Head(head.weight.detach().contiguous(), bias, head.logit_scale, head.softcap, head.temperature)


def _through_chunks(
    rows: torch.Tensor, head: Head, transform: Transform, plan: LogprobPlan, with_outputs: bool, with_expected: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits and log-probs [U], `stats` [NUM_STATS, R], expected embedding [R, E] ([0] unless asked)."""
    picked, logps = (rows.new_empty(plan.pair_row.shape, dtype=torch.float32) for _ in range(2))
    stats = rows.new_empty(NUM_STATS, rows.shape[0], dtype=torch.float32)
    expected = rows.new_empty(rows.shape if with_expected else (0,), dtype=torch.float32)
    for first in range(0, rows.shape[0], head.chunk_rows):
        chunk = slice(first, first + head.chunk_rows)
        products = matmul_accumulated(rows[chunk], head.weight.t())
        chunk_scores(products, head.bias, transform, plan, first, picked, logps, stats, with_outputs)
        if with_expected:
            probabilities = conditional_probabilities(products, head.bias, transform, stats[:, chunk], rows.dtype)
            scale = stats[REST, chunk] * (transform.slope / PROBABILITY_SCALE)
            expected[chunk] = matmul_accumulated(probabilities, head.weight).mul_(scale.unsqueeze(1))
    return picked, logps, stats, expected
