"""The check of tree attention's kernels: query ranges in one piece and in parts, forward and backward."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from cpo_kernels.kernel_check import FLOAT32_EPS, SEED, ModelShape, Results, error_ratios, random_tensor
from cpo_kernels.tolerances import random_subtree_end
from cpo_kernels.tree_attention.eager import EagerTreeAttention, key_runs
from cpo_kernels.tree_attention.native import NativeTreeAttention
from cpo_kernels.tree_attention.schedule import TreeSchedule, tree_schedule, window_schedule

NUM_ROWS = 331  # prime: several tiles of rows, none of them whole at the end
NUM_PADDING = 3
WINDOW = 192  # the rows of one query block of a chain see all keys of one key block, and others in part or not at all
SOFTCAP = 2.0  # bends scores of one, as random rows have them

# q [T, H, D], k and v [T, Hkv, D], a schedule, the scale, and what there is of a window, a soft-cap and sinks [H]
# -> out [T, H, D], differentiable in q, k, v and sinks
Attention = Callable[..., torch.Tensor]


def check_tree_attention(device: torch.device, shape: ModelShape, kernels: Attention | None = None) -> dict[str, float]:
    """Error over bound of out, dq, dk and dv of `kernels`, by default the Triton kernels.

    Once without, and again with the soft-cap and sinks that the shape has, and dsinks, with the window and without.
    """
    if kernels is None:
        from cpo_kernels.tree_attention.triton import TritonTreeAttention  # loads Triton

        kernels = TritonTreeAttention.apply
    cases = check_cases(shape, device)
    scale = shape.head_dim**-0.5
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads, shape.num_heads)
    inputs = [
        random_tensor((NUM_ROWS, count, shape.head_dim), device, shape.dtype, place)
        for place, count in enumerate(heads)
    ]
    inputs.append(random_tensor((shape.num_heads,), device, shape.dtype, len(inputs)))

    def run(attention: Attention, dtype: torch.dtype) -> Results:
        results: Results = {}
        for case, (schedule, options) in cases.items():
            q, k, v, sinks = (inputs[place].to(dtype, copy=True).requires_grad_() for place in (0, 1, 2, 4))
            leaves = {"dq": q, "dk": k, "dv": v}
            if options and shape.has_sinks:
                leaves["dsinks"], options = sinks, (*options[:2], sinks)
            out = attention(q, k, v, schedule, scale, *options)
            gradients = torch.autograd.grad(out, tuple(leaves.values()), inputs[3].to(dtype))
            results[f"{case}out"] = out.detach()
            results |= {f"{case}{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
        return results

    q, k, v, upstream = (float(tensor.double().norm(dim=-1).max()) for tensor in inputs[:4])
    # float32 accumulators err too; dq and dk are sums of (dp - delta) k, whose terms cancel, in a lone row to nothing
    product = scale * upstream * v
    sizes = {"out": v, "dq": product * k, "dk": product * q, "dv": upstream, "dsinks": upstream * v}
    bands = {f"{case}{name}": 8 * FLOAT32_EPS * size for case in cases for name, size in sizes.items()}
    return error_ratios(run(_eager, torch.float64), run(_eager, shape.dtype), run(kernels, shape.dtype), bands)


def check_native_tree_attention(device: torch.device, shape: ModelShape) -> dict[str, float]:
    """`check_tree_attention` of the C++ kernels, on the CPU."""
    return check_tree_attention(device, shape, NativeTreeAttention.apply)


def check_cases(shape: ModelShape, device: torch.device) -> dict[str, tuple[TreeSchedule, tuple[Any, ...]]]:
    """What a shape is checked with, by the names that results start with: a schedule, a window, a soft-cap and no sinks.

    The forest is a trunk, below it random branches, and padding rows.
    """
    subtree_end = random_subtree_end(SEED, NUM_ROWS, NUM_PADDING)
    subtree_end[: NUM_ROWS * 3 // 4] = NUM_ROWS - NUM_PADDING
    schedule = tree_schedule(subtree_end)
    cases: dict[str, tuple[TreeSchedule, tuple[Any, ...]]] = {"": (in_parts(schedule).to(device), ())}
    softcap = SOFTCAP if shape.capped else None
    if shape.capped or shape.has_sinks:
        cases["changed scores "] = (cases[""][0], (None, softcap, None))
    if shape.windowed:
        windowed, window = window_schedule(schedule, WINDOW, (shape.num_heads, shape.num_kv_heads))
        there = window._replace(depths=window.depths.to(device))
        cases["windowed "] = (in_parts(windowed).to(device), (there, softcap, None))
    return cases


def _eager(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, schedule: TreeSchedule, scale: float, *options: Any
) -> torch.Tensor:
    out: torch.Tensor = EagerTreeAttention.apply(q, k, v, key_runs(schedule, q.shape[1], q.device), scale, *options)
    return out


def in_parts(schedule: TreeSchedule) -> TreeSchedule:
    """The same schedule with the query range of every second key block cut at its query blocks.

    A range is cut by itself where thousands of rows see a block, as they do a prompt, which is too long for a check. The
    schedule is on the CPU.
    """
    work: list[tuple[int, int, int, int]] = []  # block, start, stop, part
    split_block, split_offsets = [], [0]
    ranges = zip(schedule.kv_query_start.tolist(), schedule.kv_query_stop.tolist(), strict=True)
    for block, (start, stop) in enumerate(ranges):
        starts = list(range(start, stop, schedule.block_q if block % 2 == 0 else stop - start))
        first_part = split_offsets[-1]
        for place, (piece, piece_stop) in enumerate(zip(starts, [*starts[1:], stop], strict=True)):
            work.append((block, piece, piece_stop, first_part + place if len(starts) > 1 else -1))
        if len(starts) > 1:
            split_block.append(block)
            split_offsets.append(first_part + len(starts))
    columns = zip(("work_block", "work_start", "work_stop", "work_part"), zip(*work, strict=True), strict=True)
    tensors = {name: torch.tensor(column, dtype=torch.int32) for name, column in columns}
    tensors["split_block"] = torch.tensor(split_block, dtype=torch.int32)
    tensors["split_offsets"] = torch.tensor(split_offsets, dtype=torch.int32)
    return replace(schedule, num_parts=split_offsets[-1], **tensors)  # type: ignore[arg-type]
