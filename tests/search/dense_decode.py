"""`tree_decode` by one masked softmax over the whole arena, without a look at a plan's values.

What it computes depends on the contents of tensors only, so a forward through it can be recorded once and replayed, as a
CUDA graph would be. `eager` and `reference` read the plan on the host.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AttentionInterface

from cpo_fast.search.engine.forward_plans import ModelRunner
from cpo_kernels.integrations.transformers.hook import IMPLEMENTATION, register
from cpo_kernels.tree_decode import DecodePlan


class DenseRunner(ModelRunner):
    """The same model and arena as another runner's; its layers attend by `dense_tree_decode`."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__(runner.parts, runner.arena, runner.impl)

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, plan: DecodePlan) -> torch.Tensor:
        AttentionInterface.register(IMPLEMENTATION, _attention)
        try:
            return super().forward(token_ids, positions, plan)
        finally:
            register()


def traced(run: Callable[[], None]) -> Callable[[], Any]:
    """What repeats a step: the operators that it runs on its tensors, without Python, as a CUDA graph would be."""
    graph = make_fx(lambda: run())()
    has_run = True  # tracing has run the step, which recording a CUDA graph does not

    def replay() -> None:
        nonlocal has_run
        if has_run:
            has_run = False
        else:
            graph()

    return replay


def repeated(run: Callable[[], None]) -> Callable[[], Any]:
    """What repeats a step: the step itself."""
    return run


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, H, N, D]
    key: torch.Tensor,  # [1, Hkv, N, D]
    value: torch.Tensor,  # [1, Hkv, N, D]
    attention_mask: torch.Tensor,
    *,
    scaling: float,
    decode_plan: DecodePlan,
    decode_arena: list[tuple[torch.Tensor, torch.Tensor]],
    layers_seen: set[int],
    decode_windows: dict[int, int],
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    layers_seen.add(module.layer_idx)
    q, k_new, v_new = (heads[0].transpose(0, 1) for heads in (query, key, value))
    window = decode_windows.get(module.layer_idx)
    out = dense_tree_decode(q, k_new, v_new, *decode_arena[module.layer_idx], decode_plan, scaling, window)
    return out.unsqueeze(0), None


def dense_tree_decode(
    q: torch.Tensor,  # [N, H, D]
    k_new: torch.Tensor,  # [N, Hkv, D]
    v_new: torch.Tensor,  # [N, Hkv, D]
    k_arena: torch.Tensor,  # [C, Hkv, D]
    v_arena: torch.Tensor,  # [C, Hkv, D]
    plan: DecodePlan,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """As `cpo_kernels.tree_decode`, [N, H, D] float32."""
    k_arena.index_copy_(0, plan.slots, k_new)
    v_arena.index_copy_(0, plan.slots, v_new)
    seen = visible_keys(plan, k_arena.shape[0], window)
    group = q.shape[1] // k_arena.shape[1]
    # what no row sees may be anything, and 0 times NaN is NaN
    unseen = ~seen.any(dim=0).view(-1, 1, 1)
    keys, values = (arena.masked_fill(unseen, 0) for arena in (k_arena, v_arena))
    scores = torch.einsum("nkgd,ckd->nkgc", q.unflatten(1, (-1, group)), keys) * scale
    weights = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(dim=-1).nan_to_num(0.0)
    return torch.einsum("nkgc,ckd->nkgd", weights, values).flatten(1, 2)


def visible_keys(plan: DecodePlan, num_slots: int, window: int | None) -> torch.Tensor:
    """[N, C] bool, from the plan's tensors alone."""
    row = torch.arange(len(plan.slots)).view(-1, 1, 1)  # [N, 1, 1]
    key = torch.arange(num_slots).view(1, -1, 1)  # [1, C, 1]
    query_start, num_queries, key_start, num_keys, first_visible, _ = plan.items.long().unbind(dim=1)  # [W] each
    below = (row >= query_start) & (row < query_start + num_queries)
    stop = key_start + torch.minimum(num_keys, first_visible + row - query_start)
    oldest = torch.zeros(len(plan.slots), dtype=torch.int64)  # depth of the first key that a row sees
    if window is not None:
        oldest = plan.suffix_depth + plan.suffix_len - window
    near = key - key_start + plan.item_depth >= oldest.view(-1, 1, 1)
    by_item = (below & (key >= key_start) & (key < stop) & near).any(dim=2)
    start = plan.suffix_start.long().unsqueeze(1)
    key = key.squeeze(2)
    near = key - start + plan.suffix_depth.unsqueeze(1) >= oldest.unsqueeze(1)
    return by_item | ((key >= start) & (key < start + plan.suffix_len.unsqueeze(1)) & near)
