"""Tree attention by the Triton kernels, with its gradients. Importing this module loads Triton."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from cpo_kernels.tree_attention.schedule import TreeSchedule
from cpo_kernels.tree_attention.triton_backward import tree_attention_backward
from cpo_kernels.tree_attention.triton_forward import tree_attention_forward
from cpo_kernels.tree_attention.window import Window


class TritonTreeAttention(torch.autograd.Function):
    """q [T, H, D], k and v [T, Hkv, D] -> out [T, H, D], as the launchers of the kernels take and give them."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        schedule: TreeSchedule,  # under a window, as `window_schedule` gives both
        scale: float,
        window: Window | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,  # [H]
    ) -> torch.Tensor:
        """Keeps q, k, v, the output and one float32 per row and head for the backward."""
        out, lse = tree_attention_forward(q, k, v, schedule, scale, window, softcap, sinks)
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        ctx.schedule, ctx.scale, ctx.window, ctx.softcap = schedule, scale, window, softcap
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse, sinks = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        sinks = sinks if sinks is not None and ctx.needs_input_grad[7] else None
        grad_q, grad_k, grad_v, grad_sinks = tree_attention_backward(
            grad_outputs[0], q, k, v, out, lse, ctx.schedule, ctx.scale, needs, ctx.window, ctx.softcap, sinks
        )
        return grad_q, grad_k, grad_v, None, None, None, None, grad_sinks
