"""Tree decode in plain torch on any device: each row's keys gathered in path order, some rows at a time.

A node that rows share is read once for each of them. The fast ways are `native` on a CPU and `triton` on a GPU; this one
is what the kernels are compared with on a card, and what runs there without them. float32 accumulators (float64 for float64
inputs).
"""

import torch

from cpo_kernels.device import accumulation_dtype
from cpo_kernels.tree_decode.plan import DecodePlan
from cpo_kernels.tree_decode.rotation import rotate
from cpo_kernels.tree_decode.row_keys import row_keys

MAX_GATHERED = 1 << 24  # numbers of keys held at once: 64 MiB in float32, and as many of values


def tree_decode_eager(
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
    dtype = accumulation_dtype(q.dtype)
    num_kv_heads = k_arena.shape[1]
    grouped = (q.to(dtype) * scale).unflatten(1, (num_kv_heads, -1))  # [N, Hkv, G, D]
    sink = None if sinks is None else sinks.to(dtype).view(1, num_kv_heads, -1, 1)
    keys, num_keys = (values.to(q.device) for values in row_keys(plan, "eager").gathered(window))  # [N, L], [N]
    step = max(1, MAX_GATHERED // max(1, keys.shape[1] * num_kv_heads * q.shape[2]))
    outs = [grouped[:0]]
    for first in range(0, len(keys), step):
        some = slice(first, first + step)
        hidden = torch.arange(keys.shape[1], device=q.device) >= num_keys[some, None]  # [n, L]
        k, v = (arena[keys[some]].to(dtype).transpose(1, 2) for arena in (k_arena, v_arena))  # [n, Hkv, L, D]
        v = v.masked_fill(hidden[:, None, :, None], 0.0)  # what stands there may be NaN
        scores = grouped[some] @ k.transpose(2, 3)  # [n, Hkv, G, L]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
        columns = scores if sink is None else torch.cat([scores, sink.expand(len(scores), -1, -1, -1)], dim=-1)
        shift = columns.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(dtype).min)
        weights = (scores - shift).exp_()
        total = (columns - shift).exp_().sum(dim=-1, keepdim=True)
        outs.append((weights @ v).div_(total.masked_fill_(total == 0, 1.0)))
    return torch.cat(outs).flatten(1, 2).to(q.dtype)
