"""`trl.kernels.ChunkedLogProbFunction` on top of `linear_logprob`: the same nine arguments, the same five outputs.

    logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1 = ChunkedLogProbFunction.apply(
        hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs)

It is for code that calls TRL's function and wants a frozen head's backward without the head, and logits that are never
rounded to 16 bits. log sum_v p_v^2 needs no kernel of its own: with logp_T the target's log-prob at temperature T,

    log sum_v p_v^2 = LSE(2 z) - 2 LSE(z) = 2 logp_T - logp_{T/2}

It differs from TRL's in three things. `chunk_size` is accepted and unused: logits are held in row chunks of a bounded
size. float64 inputs give float64. Exact ties of the largest logit all count as top-1, where TRL counts the first. A head
sharded by ZeRO-3 must be gathered by the caller.
"""

from typing import Any

import torch

from cpo_kernels.linear_logprob import linear_logprob
from cpo_kernels.linear_logprob.results import Head
from cpo_kernels.logprob_plan import LogprobPlan

OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# TRL's name -> the name in linear_logprob
_SINGLE_PASS = {"entropy": "entropy", "mean_logits": "mean_logit", "is_top1": "is_top1"}


class ChunkedLogProbFunction(torch.autograd.Function):
    """Use by `.apply`. Log-probs and entropy are differentiable in hidden, weight and bias, the rest is not."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,  # [N, H]
        weight: torch.Tensor,  # [V, H]
        bias: torch.Tensor | None,  # [V]
        targets: torch.Tensor,  # [N] int64
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OPTIONAL_OUTPUTS,
    ) -> tuple[torch.Tensor | None, ...]:
        """Five tensors [N] (log-probs, then `OPTIONAL_OUTPUTS`), None for an output that was not asked.

        Raises:
            ValueError: shapes or targets do not fit.
        """
        ctx.set_materialize_grads(False)
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        row = torch.arange(targets.shape[0], device=targets.device)
        plan = LogprobPlan.build(row, targets, torch.zeros_like(row), 1)
        transform: dict[str, Any] = {"logit_scale": logit_scale, "softcap": final_logit_softcapping}
        leaves: list[Any] = [
            None if leaf is None else leaf.detach().requires_grad_(needed)
            for leaf, needed in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        ]
        with torch.enable_grad(), torch.autocast(device, enabled=False):
            cast: list[Any] = [None if leaf is None else leaf.to(dtype) for leaf in leaves]
            h, w, b = cast
            result = linear_logprob(
                h,
                w,
                plan,
                bias=b,
                temperature=temperature,
                outputs=[ours for name, ours in _SINGLE_PASS.items() if name in outputs],
                **transform,
            )
        log_sum_sq_probs = None
        if "log_sum_sq_probs" in outputs:
            with torch.no_grad(), torch.autocast(device, enabled=False):
                sharper = linear_logprob(h, w, plan, bias=b, temperature=temperature / 2, **transform)
                log_sum_sq_probs = 2 * result.token_logps - sharper.token_logps
        # the inner graph is kept whole: for a frozen head it holds no logits and backward is a gather
        ctx.leaves, ctx.logps, ctx.dtype = leaves, result.token_logps, dtype
        ctx.transform = transform | {"temperature": temperature}
        fixed = (log_sum_sq_probs, result.mean_logit, result.is_top1)
        ctx.mark_non_differentiable(*(value for value in fixed if value is not None))
        return result.token_logps.detach(), result.entropy, *fixed

    @staticmethod
    def backward(
        ctx: Any, grad_logps: torch.Tensor | None, grad_entropy: torch.Tensor | None, *_: Any
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients of hidden, weight and bias. An entropy gradient recomputes the logits a chunk of rows at a time."""
        taken = [index for index, leaf in enumerate(ctx.leaves) if leaf is not None and leaf.requires_grad]
        leaves = [ctx.leaves[index] for index in taken]
        parts = []
        if grad_logps is not None:
            parts.append(torch.autograd.grad(ctx.logps, leaves, grad_logps, retain_graph=True))
        if grad_entropy is not None:
            parts += _entropy_gradients(ctx, leaves, grad_entropy)
        grads: list[torch.Tensor | None] = [None] * 9
        for place, index in enumerate(taken):
            total = sum(part[place] for part in parts) if parts else None
            grads[index] = total if isinstance(total, torch.Tensor) else None
        return tuple(grads)


def _entropy_gradients(
    ctx: Any, leaves: list[torch.Tensor], grad_entropy: torch.Tensor
) -> list[tuple[torch.Tensor, ...]]:
    """One tuple of gradients per row chunk, so no [N, V] tensor exists."""
    parts = []
    hidden, weight, bias = ctx.leaves
    with torch.autocast(hidden.device.type, enabled=False):
        step = Head(weight).chunk_rows(hidden.shape[0])
        for first in range(0, hidden.shape[0], step):
            with torch.enable_grad():
                head = Head(weight.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype), **ctx.transform)
                log_probs = torch.log_softmax(head.logits(hidden[first : first + step].to(ctx.dtype)), dim=-1)
                entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
            parts.append(torch.autograd.grad(entropy, leaves, grad_entropy[first : first + step]))
    return parts
