"""Tree attention over trees that are single chains, by flash-attn's varlen kernel.

Without a branch, `subtree_end` says what cumulative sequence lengths say: every tree is one sequence under a causal mask,
a padding row a sequence of one. That is prefill, and training on unshared rows. Backward is asked to be deterministic,
which flash-attn is not by default.

Left out: forests that branch, which a varlen kernel could only compute by repeating every shared prefix.
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch

from cpo_kernels.tree_attention.schedule import TreeSchedule, moved

DTYPES = (torch.float16, torch.bfloat16)  # all that its kernels take


class ChainLengths(NamedTuple):
    """Where the N chains of a line begin and end."""

    cumulative: torch.Tensor  # [N + 1] int32, 0 and one past the last row of each chain
    longest: int  # rows of the longest chain


def load_varlen() -> Callable[..., torch.Tensor]:
    """`flash_attn.flash_attn_varlen_func`.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        varlen: Callable[..., torch.Tensor] = importlib.import_module("flash_attn").flash_attn_varlen_func
    except ImportError as error:
        raise ValueError(
            f"tree_attention: impl='flash' needs the package flash-attn, which cannot be imported ({error})"
        ) from error
    return varlen


def chain_lengths(schedule: TreeSchedule, device: torch.device) -> ChainLengths:
    """The chains of a schedule, made on the host and kept with it.

    Raises:
        ValueError: a tree branches; its first row is named.
    """
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
        schedule.host_derived[key] = ChainLengths(moved(cumulative, device), longest)
    chains: ChainLengths = schedule.host_derived[key]
    return chains


def flash_tree_attention(
    varlen: Callable[..., torch.Tensor],
    q: torch.Tensor,  # [T, H, D]
    k: torch.Tensor,  # [T, Hkv, D]
    v: torch.Tensor,  # [T, Hkv, D]
    schedule: TreeSchedule,
    scale: float,
) -> torch.Tensor:
    """Attention [T, H, D] of a line of chains by `varlen`, differentiable as that is.

    Args:
        varlen: `load_varlen()`, or a function of the same signature.
        q, k, v: float16 or bfloat16, all the same; Hkv divides H.
        schedule: of the same line.
        scale: factor on q . k.

    Raises:
        ValueError: the dtype is another, or a tree branches.
    """
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            "tree_attention: impl='flash' expects q, k and v all float16 or all bfloat16, "
            f"got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    chains = chain_lengths(schedule, q.device)
    return varlen(
        q,
        k,
        v,
        cu_seqlens_q=chains.cumulative,
        cu_seqlens_k=chains.cumulative,
        max_seqlen_q=chains.longest,
        max_seqlen_k=chains.longest,
        softmax_scale=scale,
        causal=True,
        deterministic=True,
    )
