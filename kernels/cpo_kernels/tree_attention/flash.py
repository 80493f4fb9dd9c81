"""Tree attention over trees that are single chains, by flash-attn's varlen kernel.

Without a branch, `subtree_end` says what cumulative sequence lengths say: every tree is one sequence under a causal mask,
a padding row a sequence of one. A forest that branches is refused, since a varlen kernel would have to repeat every
shared prefix. The backward is asked to be deterministic, which flash-attn is not by default.
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch

from cpo_kernels.device import to_device
from cpo_kernels.tree_attention.schedule import TreeSchedule

DTYPES = (torch.float16, torch.bfloat16)  # all that its kernels take


class ChainLengths(NamedTuple):
    """Where the N chains of a forest begin and end."""

    cumulative: torch.Tensor  # [N + 1] int32, 0 and one past the last row of each chain
    longest: int  # rows of the longest chain


def load_varlen() -> Callable[..., torch.Tensor]:
    """`flash_attn.flash_attn_varlen_func` (2.6 or newer). ValueError where the package is not installed."""
    try:
        varlen: Callable[..., torch.Tensor] = importlib.import_module("flash_attn").flash_attn_varlen_func
    except (ImportError, AttributeError) as error:  # flash-attn-4 has a module of the same name without this function
        raise ValueError(
            f"tree_attention: impl='flash' needs flash-attn 2, which cannot be imported ({error}); it is the "
            "extra cpo-fast[flash]"
        ) from error
    return varlen


def chain_lengths(schedule: TreeSchedule, device: torch.device) -> ChainLengths:
    """The chains of a schedule, made on the host and kept with it. ValueError naming a row below which a tree branches."""
    key = ("flash", device)
    if key not in schedule.host_derived:
        stops, ends = schedule.host_segment_stop, schedule.host_segment_end
        branching = (stops != ends).nonzero()
        if branching.numel() > 0:
            row = int(stops[branching[0]]) - 1
            raise ValueError(
                f"tree_attention: impl='flash' expects chains, but the tree with row {row} branches below that row; use "
                "impl='triton' or 'eager'"
            )
        lengths = stops - schedule.host_segment_start
        cumulative = torch.cat([torch.zeros(1, dtype=torch.int32), stops])
        longest = int(lengths.max()) if lengths.numel() > 0 else 0
        schedule.host_derived[key] = ChainLengths(to_device(cumulative, device), longest)
    chains: ChainLengths = schedule.host_derived[key]
    return chains


def flash_tree_attention(
    varlen: Callable[..., torch.Tensor],  # `load_varlen()`, or a function of the same signature
    q: torch.Tensor,  # [T, H, D] float16 or bfloat16
    k: torch.Tensor,  # [T, Hkv, D] same dtype
    v: torch.Tensor,  # [T, Hkv, D] same dtype
    schedule: TreeSchedule,
    scale: float,
) -> torch.Tensor:
    """Attention [T, H, D] of a forest of chains, differentiable as `varlen` is. ValueError for other dtypes or a branch."""
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            "tree_attention: impl='flash' expects q, k and v all float16 or all bfloat16, "
            f"got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    chains = chain_lengths(schedule, q.device)
    lengths = {"cu_seqlens_q": chains.cumulative, "cu_seqlens_k": chains.cumulative}
    longest = {"max_seqlen_q": chains.longest, "max_seqlen_k": chains.longest}
    return varlen(q, k, v, **lengths, **longest, softmax_scale=scale, causal=True, deterministic=True)
