"""Attention over a forest laid out in depth-first preorder: row i sees row j iff j <= i < subtree_end[j].

`reference` is the specification (dense), `eager` the same without a T x T matrix. The block schedule that GPU kernels
walk is made once per forest by `tree_schedule`.
"""

import torch

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
        impl: "reference", "eager", or None to choose by device.

    Returns:
        [T, H, D] in the dtype of q; differentiable in q, k and v. Accumulated in float32 (float64 for float64).

    Raises:
        ValueError: shapes do not fit, or the schedule is of another forest.
    """
    _check_shapes(q, k, v, subtree_end)
    chosen = resolve_implementation("tree_attention", impl, q.device.type, IMPLEMENTATIONS)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if schedule is not None:
        _check_schedule(schedule, subtree_end)
    if chosen == "reference":
        return tree_attention_reference(q, k, v, subtree_end, scale)
    if schedule is None:
        schedule = tree_schedule(subtree_end.cpu())
    result: torch.Tensor = EagerTreeAttention.apply(q, k, v, _tiles(schedule, q.shape[1]), scale)
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
