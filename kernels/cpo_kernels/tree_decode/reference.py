"""Tree decode, row by row: the specification.

    out[n] = sum_j softmax_j(s[n, j]) v[j]   over the keys that the plan gives to row n, its own new one too
    s[n, j] = scale * q[n] . k[j],   or softcap * tanh(scale * q[n] . k[j] / softcap)

A window leaves the last so many keys of a row's path. A sink is one more column of a head's softmax, without a value.

Plain torch, any device, any float dtype. The keys of a row are gathered in path order and one softmax is taken over them,
in float32 (float64 for float64 inputs).
"""

import torch

from cpo_kernels.device import accumulation_dtype
from cpo_kernels.tree_decode.plan import DecodePlan
from cpo_kernels.tree_decode.rotation import rotate


def tree_decode_reference(
    q: torch.Tensor,  # [N, H, D]
    k_new: torch.Tensor,  # [N, Hkv, D]
    v_new: torch.Tensor,  # [N, Hkv, D]
    k_arena: torch.Tensor,  # [C, Hkv, D]
    v_arena: torch.Tensor,  # [C, Hkv, D]
    plan: DecodePlan,
    scale: float,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,  # [N, D] each
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [H]
) -> torch.Tensor:
    """Store the new keys and values, then attend: [N, H, D] in the dtype of q, 0 for a row without keys."""
    if rotary is not None:
        q, k_new = (rotate(x, *rotary) for x in (q, k_new))
    k_arena.index_copy_(0, plan.slots, k_new)
    v_arena.index_copy_(0, plan.slots, v_new)
    outs = [
        _attention(q[n], k_arena[keys], v_arena[keys], scale, softcap, sinks)
        for n, keys in enumerate(path[-window:] if window else path for path in visible_slots(plan))
    ]
    return torch.stack(outs).to(q.dtype)


def visible_slots(plan: DecodePlan) -> list[torch.Tensor]:
    """The arena slots that each row of a plan sees, int64, in path order and its private suffix last."""
    items = plan.items.tolist()
    seen_by_partial = {}
    for query_start, num_queries, key_start, num_keys, first_visible, partial_start in items:
        for query in range(num_queries):
            seen = range(key_start, key_start + max(0, min(num_keys, first_visible + query)))
            seen_by_partial[partial_start + query] = (query_start + query, seen)
    offsets, index = plan.partial_offsets.tolist(), plan.partial_index.tolist()
    slots = []
    for row, (start, length) in enumerate(zip(plan.suffix_start.tolist(), plan.suffix_len.tolist(), strict=True)):
        keys: list[int] = []
        for partial in index[offsets[row] : offsets[row + 1]]:
            query, seen = seen_by_partial[partial]
            assert query == row, "a partial of another row"
            keys += seen
        slots.append(torch.tensor([*keys, *range(start, start + length)], device=plan.slots.device, dtype=torch.int64))
    return slots


def _attention(
    q: torch.Tensor,  # [H, D]
    k: torch.Tensor,  # [n, Hkv, D], n may be 0
    v: torch.Tensor,  # [n, Hkv, D]
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,  # [H]
) -> torch.Tensor:
    """[H, D] in the accumulation dtype."""
    dtype = accumulation_dtype(q.dtype)
    group = q.shape[0] // k.shape[1]
    keys = k.to(dtype).repeat_interleave(group, dim=1)  # [n, H, D]
    values = v.to(dtype).repeat_interleave(group, dim=1)
    scores = torch.einsum("bhd,nhd->bhn", q[None].to(dtype), keys) * scale  # [1, H, n]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    columns = scores if sinks is None else torch.cat([scores, sinks.to(dtype)[None, :, None]], dim=-1)
    weights = torch.exp(scores - columns.logsumexp(-1, keepdim=True)) if k.shape[0] else scores
    return torch.einsum("bhn,nhd->bhd", weights, values)[0]
