"""Tree attention on a CPU in C++ (csrc/tree_attention.cpp): depth first, with the keys and values of a path on a stack.

Every visible pair is computed once in each direction, in dense products of small blocks. Trees and key heads are shared
out among threads, and the result has the same bits with any number of them. float32 accumulators (float64 for float64).
"""

from typing import Any, NamedTuple

import numpy as np
import torch

import cpo_kernels._csrc as _csrc
from cpo_kernels.device import accumulation_dtype
from cpo_kernels.tree_attention.schedule import TreeSchedule
from cpo_kernels.tree_attention.window import Window, sink_gradient


class NativeTreeAttention(torch.autograd.Function):
    """Forward and backward over the runs of a schedule: q [T, H, D], k and v [T, Hkv, D], out [T, H, D], dtype of q."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        schedule: TreeSchedule,
        scale: float,
        window: Window | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,  # [H]
    ) -> torch.Tensor:
        dtype = accumulation_dtype(q.dtype)
        out = torch.empty(q.shape, dtype=dtype)
        log_sum_exp = torch.empty((q.shape[1], q.shape[0]), dtype=dtype)
        options = _Options(scale, 0 if window is None else window.size, softcap or 0.0)
        _csrc.tree_attention_forward(
            *_arrays(q, k, v, dtype),
            *_runs(schedule),
            *options,
            None if sinks is None else _array(sinks, dtype),
            out.numpy(),
            log_sum_exp.numpy(),
            torch.get_num_threads(),
        )
        result = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, result, log_sum_exp, sinks)
        ctx.schedule, ctx.options = schedule, options
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """dq, dk, dv: p = exp(s - lse), ds = p * (dp - sum(dout * out)). `sink_gradient` says what the sinks get."""
        q, k, v, out, log_sum_exp, sinks = ctx.saved_tensors
        dtype = log_sum_exp.dtype
        grad_out = grad_outputs[0].to(dtype)
        delta = (grad_out * out.to(dtype)).sum(dim=-1).t().contiguous()  # [H, T]
        wanted = [
            torch.empty(x.shape, dtype=dtype) if wants else None
            for x, wants in zip((q, k, v), ctx.needs_input_grad, strict=False)
        ]
        options: _Options = ctx.options
        grad_q, grad_k, grad_v = (None if gradient is None else gradient.numpy() for gradient in wanted)
        _csrc.tree_attention_backward(
            *_arrays(q, k, v, dtype),
            *_runs(ctx.schedule),
            *options,
            None if sinks is None else _array(sinks, dtype),
            log_sum_exp.numpy(),
            delta.numpy(),
            _array(grad_out, dtype),
            grad_q,
            grad_k,
            grad_v,
            torch.get_num_threads(),
        )
        grads = [
            None if gradient is None else gradient.to(x.dtype) for gradient, x in zip(wanted, (q, k, v), strict=True)
        ]
        grad_sinks = None
        if sinks is not None and ctx.needs_input_grad[7]:
            grad_sinks = sink_gradient(sinks, log_sum_exp, delta, grad_outputs[0])
        return (*grads, None, None, None, None, grad_sinks)


def check_depths(window: Window, schedule: TreeSchedule) -> None:
    """A row's depth is found on the way here, so that the window's must be the same.

    Raises:
        ValueError: it is not.
    """
    key = ("native", "depths")
    if key not in schedule.host_derived:
        lengths = schedule.host_segment_stop - schedule.host_segment_start
        ends = torch.repeat_interleave(schedule.host_segment_end, lengths)
        ended = torch.bincount(ends, minlength=len(ends) + 1)[: len(ends)].cumsum(0)  # subtrees, up to each row
        schedule.host_derived[key] = torch.arange(len(ends)) - ended
    depths: torch.Tensor = schedule.host_derived[key]
    if not torch.equal(window.depths.to(depths), depths):
        raise ValueError("tree_attention: expected window.depths to be each row's place on its own path")


class _Options(NamedTuple):
    scale: float
    window: int  # 0: none
    softcap: float  # 0: none


def _array(x: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """A tensor as csrc reads it: numbers of one dtype, the last dimension contiguous."""
    x = x.detach().to(dtype)
    array: np.ndarray = (x if x.stride(-1) == 1 else x.contiguous()).numpy()
    return array


def _arrays(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return _array(q, dtype), _array(k, dtype), _array(v, dtype)


def _runs(schedule: TreeSchedule) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = schedule.host_segment_start, schedule.host_segment_stop, schedule.host_segment_end
    starts, stops, ends = (tensor.numpy() for tensor in rows)
    return starts, stops, ends
