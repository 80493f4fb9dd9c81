"""The check of tree decode's kernels: rows that decode and rows that are prefilled in one forward."""

from collections.abc import Callable
from typing import Any

import torch

from cpo_kernels.kernel_check import FLOAT32_EPS, ModelShape, Results, error_ratios, random_tensor
from cpo_kernels.tree_decode.eager import tree_decode_eager
from cpo_kernels.tree_decode.native import tree_decode_native
from cpo_kernels.tree_decode.plan import DecodePlan

ROOT_KEYS = 291  # of the node under all rows that decode: more than the 256 keys of one item
PREFILLED_ROWS = 70  # more than the 64 queries of one item
SUFFIX_STEP = 11  # the twelfth row has decoded 122 keys, more than one step of a merge
WINDOW = 90  # ends in the root for rows that have decoded little, in the suffix of the last
SOFTCAP = 5.0

# q [N, H, D], k_new, v_new [N, Hkv, D], k_arena, v_arena [C, Hkv, D], a plan, the scale and rotary tables or None, and
# where the shape has them window, softcap and sinks -> out [N, H, D]
Forward = Callable[..., torch.Tensor]


def check_tree_decode(device: torch.device, shape: ModelShape, kernels: Forward | None = None) -> dict[str, float]:
    """Error over bound of the output of `kernels`, by default the Triton kernels, and of the keys and values stored.

    Once as they come, and once rotated. With the window, soft-cap and sinks that the shape has, and without the window.
    """
    if kernels is None:
        from cpo_kernels.tree_decode.triton_forward import tree_decode_forward  # loads Triton

        kernels = tree_decode_forward
    plan, num_arena_rows, unseen = _frontier()
    plan = plan.to(device)
    num_rows, num_kv_heads = len(plan.slots), shape.num_kv_heads
    q, k_new, v_new = (
        random_tensor((num_rows, count, shape.head_dim), device, shape.dtype, 9 + place)
        for place, count in enumerate((shape.num_heads, num_kv_heads, num_kv_heads))
    )
    arena_shape = (num_arena_rows, num_kv_heads, shape.head_dim)
    arenas = [random_tensor(arena_shape, device, shape.dtype, 12 + place) for place in (0, 1)]
    for arena in arenas:
        arena[unseen.to(device)] = float("nan")  # a key too many shows, and one that was not stored

    # angles that differ between the halves of a head too, which a model's do not
    angles = random_tensor((num_rows, shape.head_dim), device, torch.float32, 14)
    tables = [table.to(shape.dtype) for table in (angles.cos(), angles.sin())]

    scores: dict[str, Any] = {"softcap": SOFTCAP} if shape.capped else {}
    if shape.has_sinks:
        scores["sinks"] = random_tensor((shape.num_heads,), device, shape.dtype, 15)
    optioned = {"changed scores out": scores} if scores else {}
    if shape.windowed:
        optioned["windowed out"] = scores | {"window": WINDOW}

    def run(forward: Forward, dtype: torch.dtype) -> Results:
        results: Results = {}
        for name, rotary in (("", None), ("rotated ", tuple(table.to(dtype) for table in tables))):
            k_arena, v_arena = (arena.to(dtype, copy=True) for arena in arenas)
            new = (x.to(dtype) for x in (q, k_new, v_new))
            results[f"{name}out"] = forward(*new, k_arena, v_arena, plan, shape.head_dim**-0.5, rotary)
            results[f"{name}stored keys"], results[f"{name}stored values"] = (x[plan.slots] for x in (k_arena, v_arena))
        for name, options in optioned.items():
            k_arena, v_arena = (arena.to(dtype, copy=True) for arena in arenas)
            new = (x.to(dtype) for x in (q, k_new, v_new))
            results[name] = forward(*new, k_arena, v_arena, plan, shape.head_dim**-0.5, None, **options)
        return results

    largest = max(float(x.double().norm(dim=-1).nan_to_num().max()) for x in (v_new, arenas[1]))
    bands = {"out": 8 * FLOAT32_EPS * largest, "rotated out": 16 * FLOAT32_EPS * largest}
    bands |= dict.fromkeys(optioned, 16 * FLOAT32_EPS * largest)
    exact, eager = run(tree_decode_eager, torch.float64), run(tree_decode_eager, shape.dtype)
    return error_ratios(exact, eager, run(kernels, shape.dtype), bands)


def check_native_tree_decode(device: torch.device, shape: ModelShape) -> dict[str, float]:
    """`check_tree_decode` of the C++ kernels, on the CPU."""
    return check_tree_decode(device, shape, tree_decode_native)


def _frontier() -> tuple[DecodePlan, int, torch.Tensor]:
    """Nine rows that decode under one node and three under another, both below a root, then a node that is prefilled.

    Returns:
        The plan, the number of arena slots, and which of them hold nothing that is read before the call, [C] bool.
    """
    nodes, end = [], 0
    for length in (ROOT_KEYS, 37, 1, PREFILLED_ROWS):
        nodes.append((end + 3, length))
        end += 3 + length
    root, left, right, prefilled = nodes
    lengths = [1 + SUFFIX_STEP * row for row in range(12)]
    starts = [end + 2 * row + sum(lengths[:row]) for row in range(12)]
    items = [
        (0, 12, *root, root[1]),
        (0, 9, *left, left[1]),
        (9, 3, *right, right[1]),
        (12, PREFILLED_ROWS, *root, root[1]),
        (12, PREFILLED_ROWS, *prefilled, 1),
    ]
    slots = [start + length - 1 for start, length in zip(starts, lengths, strict=True)]
    slots += range(prefilled[0], prefilled[0] + PREFILLED_ROWS)
    nothing = [0] * PREFILLED_ROWS
    plan = DecodePlan.build(slots, items, starts + nothing, lengths + nothing)
    unseen = torch.ones(starts[-1] + lengths[-1] + 2, dtype=torch.bool)
    for start, length in (*nodes, *zip(starts, lengths, strict=True)):
        unseen[start : start + length] = False
    unseen[slots] = True
    return plan, len(unseen), unseen
