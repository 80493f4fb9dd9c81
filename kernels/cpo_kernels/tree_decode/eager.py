"""Tree decode by the items of a plan in plain torch: tiles of one shape in one product, partials merged by maximum and sum.

    partial p of a row:  m_p = max_j s_j,  l_p = sum_j exp(s_j - m_p),  o_p = sum_j exp(s_j - m_p) v_j
    the row:             out = sum_p exp(m_p - m) o_p / sum_p exp(m_p - m) l_p,   m = max_p m_p

A row's result has the same bits whichever rows share its forward, because keys are cut by the plan, the same way for
every row, because a matrix library sums each row of a product alike that has enough rows, and each product of a batch
like one alone, and because sums over partials run in path order, where a partial that a row lacks adds exactly 0. So does
one that a sliding window hides from it, which is why items that no row of theirs reaches, and blocks of a suffix that its
row does not, are left out. float32 accumulators (float64 for float64 inputs).

How many calls a layer makes follows from how many shapes the tiles have, not from how many nodes there are: a small model
spends its time on calls, not on numbers.
"""

import torch

from cpo_kernels.device import accumulation_dtype
from cpo_kernels.tree_decode.eager_tables import ROUND_NUMBERS, HeadShape, Round, Tables, tables_of
from cpo_kernels.tree_decode.plan import DecodePlan
from cpo_kernels.tree_decode.rotation import rotate


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
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = k_arena.shape[1]
    dtype = accumulation_dtype(q.dtype)
    tables = tables_of(plan, HeadShape(num_kv_heads, num_heads // num_kv_heads, head_dim), dtype, window)
    scaled = (q.to(dtype) * scale).reshape(-1, head_dim)  # [N * H, D]
    for some in tables.rounds:
        _attend(some, scaled, k_arena, v_arena, softcap)
    sink = None if sinks is None else sinks.to(dtype).repeat(num_rows)  # [N * H]
    return _merge(tables, sink).view(num_rows, num_heads, head_dim).to(q.dtype)


def _attend(
    some: Round, queries: torch.Tensor, k_arena: torch.Tensor, v_arena: torch.Tensor, softcap: float | None
) -> None:
    """The partials of a round, from queries [N * H, D]."""
    torch.index_select(queries, 0, some.query_rows, out=some.queries)
    shapes = some.shapes
    if some.key_rows is not None:
        _gather(k_arena, some.key_rows, some.keys)
        _gather(v_arena, some.key_rows, some.values)
    else:
        keys, values = (arena[slice(*some.key_range)].to(queries.dtype) for arena in (k_arena, v_arena))
        shapes = [shapes[0]._replace(keys=keys.permute(1, 2, 0), values=values.transpose(0, 1))]
    for shape in shapes:
        torch.bmm(shape.queries, shape.keys, out=shape.scores)
    if softcap is not None:
        some.scores.div_(softcap).tanh_().mul_(softcap)
    if some.hidden is not None:
        some.scores.masked_fill_(some.hidden, float("-inf"))
    for shape in shapes:
        torch.amax(shape.scores, dim=-1, keepdim=True, out=shape.maximum)
    some.maximum.clamp_min_(torch.finfo(queries.dtype).min)  # finite also where all are -inf
    for shape in shapes:
        shape.scores.sub_(shape.maximum)
    some.scores.exp_()
    for shape in shapes:
        torch.sum(shape.scores, dim=-1, out=shape.total)
        torch.bmm(shape.scores, shape.values, out=shape.out)


def _gather(arena: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> None:
    """Rows of an arena [C * Hkv, D] into `out`."""
    num_kv_heads = arena.shape[1]
    if arena.stride(0) != num_kv_heads * arena.stride(1):  # it is no such matrix
        out.copy_(arena[rows // num_kv_heads, rows % num_kv_heads])
    elif arena.dtype == out.dtype:
        torch.index_select(arena.flatten(0, 1), 0, rows, out=out)
    else:
        out.copy_(arena.flatten(0, 1).index_select(0, rows))


def _merge(tables: Tables, sink: torch.Tensor | None) -> torch.Tensor:
    """[N * H, D]: level after level, each row's next partial is added. `sink` [N * H] joins the denominators."""
    levels, out = tables.levels, tables.out
    num_levels, num_rows = levels.shape
    merged, denominator = out.new_zeros((num_rows, out.shape[1])), out.new_zeros(num_rows)
    if num_levels:
        flat = levels.flatten()
        weight = tables.maximum.index_select(0, flat).view(num_levels, num_rows)
        largest = weight.amax(dim=0)
        if sink is not None:
            largest = torch.maximum(largest, sink)
            denominator += torch.exp(sink - largest)
        weight.sub_(largest).exp_()
        for part in tables.total.index_select(0, flat).view(num_levels, num_rows).mul_(weight):
            denominator += part
        at_once = max(1, ROUND_NUMBERS // merged.numel())
        for first in range(0, num_levels, at_once):
            some = slice(first, first + at_once)
            parts = out.index_select(0, levels[some].flatten()).view(-1, *merged.shape)
            for part in parts.mul_(weight[some].unsqueeze(-1)):
                merged += part
    return merged.div_(denominator.masked_fill_(denominator == 0, 1.0).unsqueeze(-1))
