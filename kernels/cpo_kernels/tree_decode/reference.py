"""Decode attention over tree nodes, in two halves: attention of queries to one node, and the merge of such halves.

A state of the search is a path of nodes. Softmax attention over the path's keys is the merge of softmax attentions over
its nodes, each with its log-sum-exp:

    out = sum_n exp(lse_n - lse) out_n,      lse = log sum_n exp(lse_n)

so a node that many states share is read once for all of their queries. Plain torch, the specification; float32
accumulators (float64 for float64 inputs), merged in the order given: bitwise repeatable.
"""

import torch

from cpo_kernels.precision import accumulation_dtype


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
