"""Who is measured by the attention benchmark: our op and what one would use in its place.

On the packed line: FlexAttention with the same mask, and `scaled_dot_product_attention` with the mask written out. On
the sequences as they were before packing, where every shared token is computed once a sequence: the same function on
padded rows, and flash attention over variable lengths. These get their inputs gathered beforehand, and the upstream
gradient of a shared row is divided among its copies, so that their gradients add up to ours.

A contestant is built from a case; it returns the output [T, H, D] of the packed line, or of every copy, and can be put
back with `Contestant.packed`. Masks and schedules are made when it is built, and that is timed apart.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from cpo_kernels import Forest, tree_attention, tree_schedule
from cpo_kernels.tree_attention.reference import visible

OURS = ("ours triton", "ours native", "ours eager")
FLEX, DENSE = "FlexAttention", "SDPA, dense mask"
PADDED, VARLEN, FLASH = "SDPA, padded sequences", "torch varlen, sequences", "flash-attn varlen, sequences"
NAMES = (*OURS, FLEX, DENSE, PADDED, VARLEN, FLASH)


@dataclass(frozen=True)
class AttentionCase:
    """One forest and the tensors that attend over it. T rows, H heads, G key heads, D head size."""

    forest: Forest  # on the device
    q: torch.Tensor  # [T, H, D]
    k: torch.Tensor  # [T, G, D]
    v: torch.Tensor  # [T, G, D]
    upstream: torch.Tensor  # [T, H, D], dloss / dout


@dataclass(frozen=True)
class Contestant:
    """Inputs, an attention over them, and the way back to the packed line."""

    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # leaves, any layout
    upstream: torch.Tensor  # layout of the output
    attend: Callable[..., torch.Tensor]
    packed: Callable[[torch.Tensor, bool], torch.Tensor]  # (values, whether copies add up) -> [T, heads, D]

    def forward(self) -> torch.Tensor:
        """Output without gradient, in the contestant's own layout."""
        with torch.no_grad():
            return self.attend(*self.inputs)

    def both(self) -> tuple[torch.Tensor, ...]:
        """Output and the gradients of q, k and v, in the contestant's own layout."""
        leaves = [tensor.detach().requires_grad_() for tensor in self.inputs]
        out = self.attend(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, self.upstream)


def build(name: str, case: AttentionCase) -> Contestant:
    """Make a contestant, masks and all.

    Raises:
        ImportError: its library is not installed.
    """
    if name in OURS:
        return _ours(name.removeprefix("ours "), case)
    return {FLEX: _flex, DENSE: _dense, PADDED: _padded, VARLEN: _varlen, FLASH: _flash}[name](case)


def _same(values: torch.Tensor, add: bool) -> torch.Tensor:
    return values


def _batched(values: torch.Tensor, add: bool) -> torch.Tensor:
    return values[0].transpose(0, 1)


def _ours(impl: str, case: AttentionCase) -> Contestant:
    # made anew, so that its cost is seen; training makes it once a forest
    heads = (case.q.shape[1], case.k.shape[1])
    schedule = tree_schedule(case.forest.subtree_end.cpu(), heads=heads).to(case.q.device)
    subtree_end = schedule.subtree_end

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return tree_attention(q, k, v, subtree_end, schedule=schedule, impl=impl)

    return Contestant((case.q, case.k, case.v), case.upstream, attend, _same)


def _heads_first(case: AttentionCase) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """[1, heads, T, D] each, contiguous: what the batched functions like best."""
    q, k, v, upstream = (x.transpose(0, 1).unsqueeze(0).contiguous() for x in (case.q, case.k, case.v, case.upstream))
    return (q, k, v), upstream


def _flex(case: AttentionCase) -> Contestant:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    end, num_rows = case.forest.subtree_end, case.q.shape[0]
    inputs, upstream = _heads_first(case)

    def rule(b: Any, h: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & (query < end[key])

    compiled = case.q.is_cuda  # compilation for a CPU takes half a minute and has no backward either
    make = torch.compile(create_block_mask) if compiled else create_block_mask
    mask = make(rule, None, None, num_rows, num_rows, device=case.q.device)
    attention = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
    grouped = case.q.shape[1] != case.k.shape[1]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, block_mask=mask, enable_gqa=grouped)

    return Contestant(inputs, upstream, attend, _batched)


def _dense(case: AttentionCase) -> Contestant:
    inputs, upstream = _heads_first(case)
    mask = visible(case.forest.subtree_end)
    grouped = case.q.shape[1] != case.k.shape[1]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)

    return Contestant(inputs, upstream, attend, _batched)


def _copies(case: AttentionCase) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of all sequences one after another [N], their offsets [S + 1] int32, and upstream [N, H, D] shared out."""
    rows = case.forest.path_rows.long()
    count = torch.bincount(rows, minlength=case.q.shape[0]).clamp(min=1)
    upstream = (case.upstream / count.view(-1, 1, 1)).to(case.upstream.dtype)
    return rows, case.forest.path_offsets.int(), upstream[rows]


def _gathered(values: torch.Tensor, rows: torch.Tensor, num_rows: int, add: bool) -> torch.Tensor:
    """[N, heads, D] -> [T, heads, D]: the sum over copies, or the last copy of each row."""
    packed = values.new_zeros((num_rows, *values.shape[1:]), dtype=torch.float32)
    if add:
        return packed.index_add_(0, rows, values.float())
    packed[rows] = values.float()
    return packed


def _padded(case: AttentionCase) -> Contestant:
    rows, offsets, upstream = _copies(case)
    lengths = offsets.diff().long()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=rows.device), lengths)
    place = torch.arange(len(rows), device=rows.device) - offsets[:-1].long()[sequence]
    longest = int(lengths.max())

    def pad(values: torch.Tensor) -> torch.Tensor:
        out = values.new_zeros(len(lengths), values.shape[1], longest, values.shape[2])
        out[sequence, :, place] = values
        return out

    inputs = tuple(pad(x[rows]) for x in (case.q, case.k, case.v))
    grouped = case.q.shape[1] != case.k.shape[1]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

    def packed(values: torch.Tensor, add: bool) -> torch.Tensor:
        return _gathered(values[sequence, :, place], rows, case.q.shape[0], add)

    return Contestant(inputs, pad(upstream), attend, packed)


def _sequences(case: AttentionCase, attention: Callable[..., torch.Tensor]) -> Contestant:
    """Variable lengths on one line; `attention` takes q, k, v, offsets and the longest length."""
    rows, offsets, upstream = _copies(case)
    longest = int(offsets.diff().max())
    inputs = tuple(x[rows].contiguous() for x in (case.q, case.k, case.v))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, offsets, longest)

    return Contestant(
        inputs, upstream, attend, lambda values, add: _gathered(values, rows, case.q.shape[0], add)
    )  # fmt: skip


def _varlen(case: AttentionCase) -> Contestant:
    from torch.nn.attention.varlen import varlen_attn

    causal: dict[str, Any] = {"window_size": (-1, 0)}
    if case.q.shape[1] != case.k.shape[1]:
        causal["enable_gqa"] = True
    return _sequences(case, lambda q, k, v, at, longest: varlen_attn(q, k, v, at, at, longest, longest, **causal))


def _flash(case: AttentionCase) -> Contestant:
    from flash_attn import flash_attn_varlen_func

    return _sequences(
        case, lambda q, k, v, at, longest: flash_attn_varlen_func(q, k, v, at, at, longest, longest, causal=True)
    )  # fmt: skip
