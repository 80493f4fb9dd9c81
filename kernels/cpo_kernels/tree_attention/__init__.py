"""Attention over a forest laid out in depth-first preorder: row i sees row j iff j <= i < subtree_end[j].

`reference` is the specification (dense), `eager` the same without a T x T matrix, `triton` the GPU kernels (`forward`,
`backward`), which run on a CPU under TRITON_INTERPRET=1. The block schedule that the kernels walk is made once per
forest by `tree_schedule`.
"""

import os
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from cpo_kernels.implementation import resolve_implementation
from cpo_kernels.tree_attention.eager import EagerTreeAttention, TreeTiles, tree_tiles
from cpo_kernels.tree_attention.reference import tree_attention_reference
from cpo_kernels.tree_attention.schedule import TreeSchedule, tree_schedule

__all__ = ["TreeSchedule", "tree_attention", "tree_schedule"]

IMPLEMENTATIONS = ("reference", "eager")


def tree_attention(
    q: torch.Tensor,  # [T, H, D]
    k: torch.Tensor,  # [T, Hkv, D]
    v: torch.Tensor,  # [T, Hkv, D]
    subtree_end: torch.Tensor,  # [T] int32
    schedule: TreeSchedule | None = None,
    scale: float | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Attention in which every row sees its ancestors and itself.

    Args:
        q: [T, H, D] float64, float32, bfloat16 or float16; position encoding applied.
        k: [T, Hkv, D], same dtype; Hkv divides H.
        v: [T, Hkv, D], same dtype.
        subtree_end: [T] int32, laminar, as `Forest.subtree_end`.
        schedule: `forest.schedule()` of the same forest; made here when None.
        scale: factor on q . k, default D ** -0.5.
        impl: "reference", "eager", "triton", or None to choose by device. "triton" takes no float64, head sizes up to
            256, and schedules on the device of q whose block sizes are powers of two from 16 on.

    Returns:
        [T, H, D] in the dtype of q; differentiable in q, k and v. Accumulated in float32 (float64 for float64).

    Raises:
        ValueError: shapes do not fit, the schedule is of another forest, or `impl` cannot run on these inputs.
    """
    _check_shapes(q, k, v, subtree_end)
    chosen = resolve_implementation("tree_attention", impl, q.device.type, _available(q.device.type))
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if schedule is not None:
        _check_schedule(schedule, subtree_end)
    if chosen == "reference":
        return tree_attention_reference(q, k, v, subtree_end, scale)
    if schedule is None:
        schedule = tree_schedule(subtree_end.cpu())
        schedule = schedule.to(q.device) if chosen == "triton" else schedule
    if chosen == "triton":
        return _triton(q, k, v, schedule, scale)
    result: torch.Tensor = EagerTreeAttention.apply(q, k, v, _tiles(schedule, q.shape[1]), scale)
    return result


class TritonTreeAttention(torch.autograd.Function):
    """The kernels of `forward` and `backward`; q [T, H, D], k and v [T, Hkv, D], out [T, H, D]."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, schedule: TreeSchedule, scale: float
    ) -> torch.Tensor:
        """Keeps q, k, v, the output and one float32 per row and head for the backward."""
        from cpo_kernels.tree_attention.forward import tree_attention_forward

        out, lse = tree_attention_forward(q, k, v, schedule, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.schedule, ctx.scale = schedule, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """dq, dk, dv by the schedule of the forward."""
        from cpo_kernels.tree_attention.backward import tree_attention_backward

        q, k, v, out, lse = ctx.saved_tensors
        gradients = tree_attention_backward(grad_outputs[0], q, k, v, out, lse, ctx.schedule, ctx.scale)
        return (*gradients, None, None)


def _available(device_type: str) -> tuple[str, ...]:
    """The Triton kernels need a GPU, or Triton's interpreter, which is chosen before Triton is imported."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return (*IMPLEMENTATIONS, "triton") if device_type == "cuda" or interpreted else IMPLEMENTATIONS


def _triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, schedule: TreeSchedule, scale: float) -> torch.Tensor:
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"tree_attention: expected q, k and v of one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if schedule.subtree_end.device != q.device:
        raise ValueError(
            f"tree_attention: expected a schedule on {q.device} like q, got one on {schedule.subtree_end.device}; "
            "move it once with schedule.to(device)"
        )
    result: torch.Tensor = TritonTreeAttention.apply(q, k, v, schedule, scale)
    return result


def _tiles(schedule: TreeSchedule, num_heads: int) -> TreeTiles:
    """Tiles of a schedule, kept with it: every layer of a forward and of a recomputation uses the same ones."""
    cached = getattr(schedule, "_tiles", None)
    if cached is None or cached[0] != num_heads:
        starts, stops, ends = schedule.segment_start, schedule.segment_stop, schedule.segment_end
        cached = (num_heads, tree_tiles(starts.tolist(), stops.tolist(), ends.tolist(), num_heads))
        object.__setattr__(schedule, "_tiles", cached)
    tiles: TreeTiles = cached[1]
    return tiles


def _check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, subtree_end: torch.Tensor) -> None:
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        raise ValueError(
            "tree_attention: expected q [T, H, D] and k, v [T, Hkv, D], "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"tree_attention: {q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads")
    if subtree_end.shape != (q.shape[0],):
        raise ValueError(f"tree_attention: expected subtree_end [{q.shape[0]}], got {tuple(subtree_end.shape)}")


def _check_schedule(schedule: TreeSchedule, subtree_end: torch.Tensor) -> None:
    if schedule.subtree_end is subtree_end:
        return
    if schedule.num_rows != subtree_end.shape[0] or not torch.equal(
        schedule.subtree_end.to(subtree_end.device), subtree_end
    ):
        raise ValueError("tree_attention: the schedule was made for another forest; use forest.schedule() of this one")
