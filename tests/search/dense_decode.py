"""`tree_decode` by one masked softmax over the whole arena, without a look at a plan's values.

What it computes depends on the contents of tensors only, so a forward through it can be recorded once and replayed, as a
CUDA graph would be; `eager` and `reference` read the plan on the host.
"""

from typing import Any

import torch

from cpo_kernels.tree_decode import DecodePlan


def dense_tree_decode(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    k_arena: torch.Tensor,
    v_arena: torch.Tensor,
    plan: DecodePlan,
    scale: float | None = None,
    impl: Any = None,
) -> torch.Tensor:
    """As `cpo_kernels.tree_decode`, [N, H, D] float32."""
    k_arena.index_copy_(0, plan.slots, k_new)
    v_arena.index_copy_(0, plan.slots, v_new)
    seen = visible_keys(plan, k_arena.shape[0])
    group = q.shape[1] // k_arena.shape[1]
    # what nobody sees may be anything, and 0 times NaN is NaN
    unseen = ~seen.any(dim=0).view(-1, 1, 1)
    keys, values = (arena.masked_fill(unseen, 0) for arena in (k_arena, v_arena))
    scores = torch.einsum("nkgd,ckd->nkgc", q.unflatten(1, (-1, group)), keys) * (scale or q.shape[-1] ** -0.5)
    weights = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(dim=-1).nan_to_num(0.0)
    return torch.einsum("nkgc,ckd->nkgd", weights, values).flatten(1, 2)


def visible_keys(plan: DecodePlan, num_arena_rows: int) -> torch.Tensor:
    """[N, C] bool, from the plan's tensors alone."""
    row = torch.arange(len(plan.slots)).view(-1, 1, 1)  # [N, 1, 1]
    key = torch.arange(num_arena_rows).view(1, -1, 1)  # [1, C, 1]
    query_start, num_queries, key_start, num_keys, first_visible, _ = plan.items.long().unbind(dim=1)  # [W] each
    below = (row >= query_start) & (row < query_start + num_queries)
    stop = key_start + torch.minimum(num_keys, first_visible + row - query_start)
    by_item = (below & (key >= key_start) & (key < stop)).any(dim=2)
    start = plan.suffix_start.long().unsqueeze(1)
    key = key.squeeze(2)
    return by_item | ((key >= start) & (key < start + plan.suffix_len.unsqueeze(1)))
