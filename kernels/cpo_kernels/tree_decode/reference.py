"""Decode attention over tree nodes, in two halves: attention of queries to one node, and the merge of such halves.

A state of the search is a path of nodes. Softmax attention over the path's keys is the merge of softmax attentions over
its nodes, each with its log-sum-exp:

    out = sum_n exp(lse_n - lse) out_n,      lse = log sum_n exp(lse_n)

so a node that many states share is read once for all of their queries. Plain torch; float32 accumulators (float64 for
float64 inputs), merged in the order given: bitwise repeatable. `tree_decode_reference`, the specification of the op,
does without the split: it gathers the keys of each row and takes one softmax over them.
"""

import torch

from cpo_kernels.device import accumulation_dtype
from cpo_kernels.tree_decode.plan import DecodePlan


def tree_decode_reference(
    q: torch.Tensor,  # [N, H, D]
    k_arena: torch.Tensor,  # [C, Hkv, D]
    v_arena: torch.Tensor,  # [C, Hkv, D]
    plan: DecodePlan,
    scale: float,
) -> torch.Tensor:
    """Attention of every row to its visible keys, row by row; [N, H, D] in the dtype of q, 0 for a row without keys.

    Args:
        q: [N, H, D], any float dtype.
        k_arena, v_arena: [C, Hkv, D], the new keys and values written; Hkv divides H.
        plan: of these N rows; read back to the host.
        scale: factor on q . k.
    """
    rows = visible_rows(plan)
    outs = [partial_attention(q[n : n + 1], k_arena[keys], v_arena[keys], scale)[0] for n, keys in enumerate(rows)]
    return torch.cat(outs).to(q.dtype)


def visible_rows(plan: DecodePlan) -> list[torch.Tensor]:
    """The arena rows that each row of a plan sees, int64, in path order and its private suffix last."""
    items = plan.items.tolist()
    seen_by_partial = {}
    for query_start, num_queries, key_start, num_keys, first_visible, partial_start in items:
        for query in range(num_queries):
            seen = range(key_start, key_start + max(0, min(num_keys, first_visible + query)))
            seen_by_partial[partial_start + query] = (query_start + query, seen)
    offsets, index = plan.partial_offsets.tolist(), plan.partial_index.tolist()
    rows = []
    for row, (start, length) in enumerate(zip(plan.suffix_start.tolist(), plan.suffix_len.tolist(), strict=True)):
        keys: list[int] = []
        for partial in index[offsets[row] : offsets[row + 1]]:
            query, seen = seen_by_partial[partial]
            assert query == row, "a partial of another row"
            keys += seen
        rows.append(torch.tensor([*keys, *range(start, start + length)], device=plan.slots.device, dtype=torch.int64))
    return rows


def partial_attention(
    q: torch.Tensor,  # [B, H, D]
    k: torch.Tensor,  # [N, Hkv, D]
    v: torch.Tensor,  # [N, Hkv, D]
    scale: float,
    num_visible: torch.Tensor | None = None,  # [B] int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of B queries to the N tokens of one node.

    Args:
        q: [B, H, D], any float dtype.
        k, v: [N, Hkv, D]; Hkv divides H. N may be 0.
        scale: factor on q . k.
        num_visible: [B], each query sees the node's first so many tokens (prefill inside a node); None: all.

    Returns:
        out [B, H, D] and lse [B, H] in the accumulation dtype; 0 and -inf where a query sees nothing.
    """
    dtype = accumulation_dtype(q.dtype)
    group = q.shape[1] // k.shape[1]
    keys = k.to(dtype).repeat_interleave(group, dim=1)  # [N, H, D]
    values = v.to(dtype).repeat_interleave(group, dim=1)
    scores = torch.einsum("bhd,nhd->bhn", q.to(dtype), keys) * scale  # [B, H, N]
    if num_visible is not None:
        hidden = torch.arange(k.shape[0], device=q.device)[None] >= num_visible[:, None]
        scores = scores.masked_fill(hidden[:, None], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1) if k.shape[0] else scores.new_full(q.shape[:2], float("-inf"))
    # exp(-inf - -inf) is NaN: a query that sees nothing keeps weights of zero
    weights = torch.exp(scores - torch.where(lse.isinf(), 0.0, lse).unsqueeze(-1))
    return torch.einsum("bhn,nhd->bhd", weights, values), lse


def merge_partials(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge M partial attentions of the same queries.

    Args:
        outs: [M, B, H, D] of `partial_attention`.
        lses: [M, B, H].

    Returns:
        out [B, H, D] and lse [B, H] of attention to all M nodes together; 0 and -inf where no node was visible.
    """
    lse = torch.logsumexp(lses, dim=0)
    weights = torch.exp(lses - torch.where(lse.isinf(), 0.0, lse))
    return (weights.unsqueeze(-1) * outs).sum(dim=0), lse
