"""The check of tree attention's Triton kernels: query ranges in one piece and in parts, forward and backward."""

from collections.abc import Callable
from dataclasses import replace

import torch

from cpo_kernels.kernel_check import FLOAT32_EPS, SEED, ModelShape, Results, error_ratios, random_tensor
from cpo_kernels.tolerances import random_subtree_end
from cpo_kernels.tree_attention.eager import EagerTreeAttention, key_runs
from cpo_kernels.tree_attention.schedule import TreeSchedule, tree_schedule

NUM_ROWS = 331  # prime: several tiles of rows, none of them whole at the end

# q [T, H, D], k and v [T, Hkv, D], a schedule and the scale -> out [T, H, D], differentiable in q, k and v
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, TreeSchedule, float], torch.Tensor]


def check_tree_attention(device: torch.device, shape: ModelShape, kernels: Attention | None = None) -> dict[str, float]:
    """Error over bound of out, dq, dk and dv of `kernels`, by default the Triton kernels."""
    if kernels is None:
        from cpo_kernels.tree_attention.triton import TritonTreeAttention  # loads Triton

        kernels = TritonTreeAttention.apply
    schedule = in_parts(tree_schedule(random_subtree_end(SEED, NUM_ROWS, num_padding=3))).to(device)
    scale = shape.head_dim**-0.5
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads, shape.num_heads)
    inputs = [
        random_tensor((NUM_ROWS, count, shape.head_dim), device, shape.dtype, place)
        for place, count in enumerate(heads)
    ]

    def run(attention: Attention, dtype: torch.dtype) -> Results:
        q, k, v = (tensor.to(dtype).requires_grad_() for tensor in inputs[:3])
        out = attention(q, k, v, schedule, scale)
        gradients = torch.autograd.grad(out, (q, k, v), inputs[3].to(dtype))
        return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}

    q, k, v, upstream = (float(tensor.double().norm(dim=-1).max()) for tensor in inputs)
    # float32 accumulators err too; dq and dk are sums of (dp - delta) k, whose terms cancel, in a lone row to nothing
    product = scale * upstream * v
    sizes = {"out": v, "dq": product * k, "dk": product * q, "dv": upstream}
    bands = {name: 8 * FLOAT32_EPS * size for name, size in sizes.items()}
    return error_ratios(run(_eager, torch.float64), run(_eager, shape.dtype), run(kernels, shape.dtype), bands)


def _eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, schedule: TreeSchedule, scale: float) -> torch.Tensor:
    out: torch.Tensor = EagerTreeAttention.apply(q, k, v, key_runs(schedule, q.shape[1], q.device), scale)
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
