"""TRL's tree-packed rows on `tree_attention`: `AsyncGRPOTrainer` without FlashAttention 3.

    from cpo_kernels.integrations.trl_tree import register_tree_attention
    register_tree_attention()  # once, before or after AsyncGRPOTrainer(...) is made

TRL lays the prefix tries of a row out in depth-first preorder, cut into segments without a branch. Its own attention
gathers, in every layer, the keys and values of each segment's root-to-segment path for a kernel that exists on Hopper
only. The paths determine `subtree_end`, which is all that `tree_attention` needs, so nothing is gathered, and it runs
wherever that op does: Ampere too, and a CPU.

What is relied upon is verified once a row on the host, from one copy of TRL's index tensors, and a row that is anything
else is refused. The schedule is then kept for as long as those tensors live: layers, recomputation under gradient
checkpointing and backward find it by their identity, and wait for no device.
"""

import importlib
import inspect
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface
from transformers.integrations.flash_attention import get_target_dtype

from cpo_kernels.integrations.transformers.hook import cpo_tree_attention
from cpo_kernels.tree_attention import TreeSchedule, resolve_tree_attention, tree_schedule

MODULE = "trl.experimental.async_grpo.packing"
# the keyword-only arguments of TRL's function, which are those of ours
ARGUMENTS = (
    "tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k", "tree_max_seqlen_q", "tree_max_seqlen_k",
    "scaling", "sliding_window", "softcap",
)  # fmt: skip


def register_tree_attention() -> None:
    """Let TRL's `AsyncGRPOTrainer` attend by `tree_attention`, now and in every trainer made later in this process.

    TRL's trainer registers its own function whenever one is made. So ours is put in the place where that registration
    finds it.

    Raises:
        ImportError: TRL is missing, or this version has no tree attention of the form that is known (1.16 has).
    """
    packing = _packing()
    packing.tree_attention = tree_row_attention
    packing.register_tree_attention()
    if AttentionInterface().get(packing.TREE_ATTENTION) is not tree_row_attention:
        raise _unknown("registers its tree attention in another way")


def tree_row_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, H, T, D]
    key: torch.Tensor,  # [1, Hkv, T, D]
    value: torch.Tensor,  # [1, Hkv, T, D]
    attention_mask: torch.Tensor | None,
    *,
    tree_kv_index: torch.Tensor,  # [K] int64, rows of the paths of all segments, end to end
    tree_cu_seqlens_q: torch.Tensor,  # [S + 1] int32, where segments begin and end in the row
    tree_cu_seqlens_k: torch.Tensor,  # [S + 1] int32, where paths begin and end in tree_kv_index
    tree_max_seqlen_q: int,
    tree_max_seqlen_k: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`trl.experimental.async_grpo.packing.tree_attention`, with the same arguments: attention of one layer.

    Returns:
        [1, T, H, D] in the dtype in which TRL's function computes (float32 queries of a 16-bit layer become 16-bit), None.

    Raises:
        ValueError: the index tensors do not describe segments of tries in depth-first preorder, or the layer asks for
            what is not computed on such a row: a window shorter than a path, a mask, dropout.
    """
    heads = (query.shape[1], key.shape[1])
    row = _row(tree_kv_index, tree_cu_seqlens_q, tree_cu_seqlens_k, query.shape[2], heads, query.device)
    if tree_max_seqlen_q < row.longest_segment or tree_max_seqlen_k < row.longest_path:
        raise ValueError(
            f"tree-packed row: its longest segment has {row.longest_segment} tokens and its longest path "
            f"{row.longest_path}, but tree_max_seqlen_q={tree_max_seqlen_q} and tree_max_seqlen_k={tree_max_seqlen_k}"
        )
    if sliding_window and row.longest_path > sliding_window:
        raise ValueError(
            f"tree-packed row: a path of {row.longest_path} tokens is longer than the layer's sliding window of "
            f"{sliding_window}, and windows are not computed here"
        )
    if attention_mask is not None:
        raise ValueError("tree-packed row: it comes with an attention mask, but its paths alone say what is seen")
    dtype = get_target_dtype(query, module) or query.dtype
    query, key, value = (heads.to(dtype) for heads in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):  # it would round what is accumulated in float32
        return cpo_tree_attention(
            module,
            query,
            key,
            value,
            None,
            scaling=scaling,
            softcap=softcap or None,
            subtree_end=row.schedule.subtree_end,
            tree_schedule=row.schedule,
            tree_impl=row.impl,
            **kwargs,
        )


def subtree_end_of_row(
    kv_index: np.ndarray,  # [K] integer
    cu_seqlens_q: np.ndarray,  # [S + 1] integer
    cu_seqlens_k: np.ndarray,  # [S + 1] integer
    num_rows: int,
) -> np.ndarray:
    """Find `subtree_end` [T] int32 of a tree-packed row of T = `num_rows` tokens, in O(K + S) on the host.

    Segment s is rows cu_seqlens_q[s]:cu_seqlens_q[s + 1], its path kv_index[cu_seqlens_k[s]:cu_seqlens_k[s + 1]]. Its
    parent is the segment with the row that stands before its own rows in its path. By induction over the segments all
    paths are those of tries if each is its parent's path and its own rows, and the layout is depth-first preorder if each
    parent is open, that is the segment before or above it.

    Raises:
        ValueError: naming the first segment of which that is not true, or the offsets do not fit.
    """
    starts, stops, firsts = cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1]
    own, length = np.diff(cu_seqlens_q), np.diff(cu_seqlens_k)
    if cu_seqlens_q[0] != 0 or cu_seqlens_q[-1] != num_rows or (own < 1).any():
        raise ValueError(f"tree-packed row: tree_cu_seqlens_q does not cut its {num_rows} tokens into segments")
    if cu_seqlens_k[0] != 0 or cu_seqlens_k[-1] != len(kv_index) or (length < own).any():
        raise ValueError(
            f"tree-packed row: tree_cu_seqlens_k does not cut the {len(kv_index)} entries of tree_kv_index into paths that "
            "hold their segments"
        )
    before = length - own  # rows of the path that belong to the segments above
    last = np.where(before > 0, kv_index[firsts + np.maximum(before - 1, 0)], 0)
    _refuse_first((before > 0) & (last >= starts), "does not continue an earlier segment")
    parent = np.where(before > 0, np.searchsorted(stops, last, side="right"), -1)
    _refuse_first((before > 0) & (before != length[parent]), "does not begin with the whole path of its parent")
    segment = np.repeat(np.arange(len(own)), length)
    place = np.arange(len(kv_index)) - firsts[segment]
    inherited = place < before[segment]
    expected = (starts - before)[segment] + place
    expected[inherited] = kv_index[(firsts[parent[segment]] + place)[inherited]]
    differs = np.zeros(len(own), dtype=bool)
    differs[segment[kv_index != expected]] = True
    _refuse_first(differs, "is not the path of its parent and then its own tokens")

    end = np.full(len(own), num_rows, dtype=np.int32)
    opened: list[int] = []
    for s, above in enumerate(parent.tolist()):
        while opened and opened[-1] != above:
            end[opened.pop()] = starts[s]
        if above >= 0 and not opened:
            raise ValueError(f"tree-packed row: segment {s} is not in depth-first order: its parent {above} is closed")
        opened.append(s)
    return np.repeat(end, own)


def _refuse_first(wrong: np.ndarray, what: str) -> None:
    if wrong.any():
        raise ValueError(f"tree-packed row: the path of segment {int(wrong.argmax())} {what}")


@dataclass(frozen=True, eq=False)
class _Row:
    """What all layers need of a row."""

    schedule: TreeSchedule
    longest_segment: int
    longest_path: int
    impl: str


# tree_kv_index, by identity -> what the row was made from, by identity and version; the offsets, kept so that nothing else
# gets their identity; the row
_rows: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _row(
    kv_index: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    num_rows: int,
    heads: tuple[int, int],
    device: torch.device,
) -> _Row:
    tensors = (kv_index, cu_seqlens_q, cu_seqlens_k)
    # whatever writes to a tensor raises its version; those of inference mode have none
    versions = tuple((id(x), 0 if x.is_inference() else x._version) for x in tensors)
    source = (versions, heads, device)
    kept = _rows.get(kv_index)
    if kept is None or kept[0] != source:
        row = _build_row(kv_index, cu_seqlens_q, cu_seqlens_k, num_rows, heads, device)
        kept = _rows[kv_index] = (source, (cu_seqlens_q, cu_seqlens_k), row)
    result: _Row = kept[2]
    return result


def _build_row(
    kv_index: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    num_rows: int,
    heads: tuple[int, int],
    device: torch.device,
) -> _Row:
    tensors = (cu_seqlens_q, cu_seqlens_k, kv_index)
    if any(x.dim() != 1 or x.is_floating_point() for x in tensors) or not 1 < len(cu_seqlens_q) == len(cu_seqlens_k):
        raise ValueError(
            "tree-packed row: expected integers tree_cu_seqlens_q and tree_cu_seqlens_k [S + 1] and tree_kv_index [K], got "
            + ", ".join(f"{tuple(x.shape)} of {x.dtype}" for x in tensors)
        )
    host = torch.cat([x.long() for x in tensors]).cpu().numpy()  # one copy, whatever the device
    bounds = len(cu_seqlens_q)
    offsets_q, offsets_k = host[:bounds], host[bounds : 2 * bounds]
    subtree_end = torch.from_numpy(subtree_end_of_row(host[2 * bounds :], offsets_q, offsets_k, num_rows))
    return _Row(
        schedule=tree_schedule(subtree_end, heads=heads).to(device),
        longest_segment=int(np.diff(offsets_q).max()),
        longest_path=int(np.diff(offsets_k).max()),
        impl=resolve_tree_attention(None, device.type),
    )


def _packing() -> Any:
    """TRL's module of tree-packed rows. ImportError, naming the version, where it is not as known."""
    try:
        packing = importlib.import_module(MODULE)
    except ImportError as error:
        raise _unknown(f"has no {MODULE}") from error
    if not all(hasattr(packing, name) for name in ("tree_attention", "register_tree_attention", "TREE_ATTENTION")):
        raise _unknown(f"has no tree attention in {MODULE}")
    parameters = inspect.signature(packing.tree_attention).parameters.values()
    keywords = tuple(each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY)
    if keywords != ARGUMENTS:
        raise _unknown(f"calls its tree attention with {', '.join(keywords)}")
    return packing


def _unknown(what: str) -> ImportError:
    try:
        version = f"TRL {metadata.version('trl')}"
    except metadata.PackageNotFoundError:
        version = "TRL, which is not installed,"
    return ImportError(f"register_tree_attention is for the tree-packed rows of TRL 1.16: {version} {what}")
