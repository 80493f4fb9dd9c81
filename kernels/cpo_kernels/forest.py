"""Sequences of token ids -> a forest: their token trie in depth-first preorder, as one packed sequence of rows.

    token i may see token j  <=>  j <= i < subtree_end[j]

Prefixes that sequences share are computed once. A token's position id is its depth, and its log-prob is read at the row
of its parent token. Roots and children stand in order of first appearance, so the rows do not depend on hashing or
sorting. csrc builds the trie. This module turns any mixture of lists, arrays and tensors into its input.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

import cpo_kernels._csrc as _csrc
from cpo_kernels.device import to_device
from cpo_kernels.logprob_plan import LogprobPlan
from cpo_kernels.tree_attention.schedule import TreeSchedule, tree_schedule

TokenSequence = Sequence[int] | np.ndarray | torch.Tensor


@dataclass(frozen=True, eq=False)
class Forest:
    """T rows after padding, S sequences, all tensors contiguous and on one device (the CPU when built).

    Padding rows stand at the end: token 0, position 0, parent -1, subtree_end i + 1, on no path. Do not write to the
    tensors: schedules made from `subtree_end` are kept, and a forest on a GPU keeps the CPU tensor to make them from.
    """

    tokens: torch.Tensor  # [T] int32, token id
    position_ids: torch.Tensor  # [T] int32, depth in tokens
    subtree_end: torch.Tensor  # [T] int32, one past the last row of the row's subtree
    parent_row: torch.Tensor  # [T] int32, row of the preceding token, -1 at a root
    path_rows: torch.Tensor  # int32, rows of sequence s in order at path_offsets[s]:path_offsets[s + 1]
    path_offsets: torch.Tensor  # [S + 1] int64
    num_tokens: int  # rows before padding
    host_subtree_end: torch.Tensor | None = field(default=None, init=False, repr=False)  # the CPU's, where it is known
    _schedules: dict[tuple[int, int, tuple[int, int]], TreeSchedule] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.subtree_end.is_cpu:
            object.__setattr__(self, "host_subtree_end", self.subtree_end)

    def to(self, device: torch.device | str) -> Forest:
        """The same forest with every tensor on `device`, its schedules too, as `to_device` moves them."""
        return to_device(self, device)

    def schedule(self, block_q: int = 128, block_kv: int = 64, heads: tuple[int, int] = (16, 16)) -> TreeSchedule:
        """The block schedule of tree attention over this forest, as `tree_schedule`. Made once for the same arguments."""
        key = (block_q, block_kv, heads)
        if key not in self._schedules:
            host = self.subtree_end if self.host_subtree_end is None else self.host_subtree_end
            schedule = tree_schedule(host, block_q, block_kv, heads).to(self.subtree_end.device, self.subtree_end)
            self._schedules[key] = schedule
        return self._schedules[key]

    def logprob_plan(self, starts: Sequence[int] | np.ndarray | torch.Tensor) -> LogprobPlan:
        """Score tokens starts[s]: of every sequence s into segment s.

        Args:
            starts: [S] integers with 1 <= starts[s] <= length of sequence s. A first token has no parent row and cannot
                be scored. A start equal to the length gives an empty segment.

        Returns:
            A plan in segment-major order with duplicates kept: row = parent row of the token, target = its id.

        Raises:
            ValueError: the number of starts is not S, or a start is out of range (the sequence is named).
        """
        device = self.path_offsets.device
        num_sequences = self.path_offsets.numel() - 1
        start = torch.as_tensor(starts, device=device)
        if start.dim() != 1 or start.numel() != num_sequences:
            raise ValueError(f"starts: expected {num_sequences}, one a sequence, got shape {tuple(start.shape)}")
        if num_sequences > 0 and (start.is_floating_point() or start.is_complex() or start.dtype == torch.bool):
            raise ValueError(f"starts: expected integers, got {start.dtype}")
        start = start.to(torch.int64)
        length = self.path_offsets.diff()
        wrong = ((start < 1) | (start > length)).nonzero()
        if wrong.numel() > 0:
            s = int(wrong[0])
            raise ValueError(
                f"starts[{s}] of sequence {s}: expected 1 <= start <= {int(length[s])}, got {int(start[s])}"
            )

        num_scored = length - start
        segments = torch.repeat_interleave(torch.arange(num_sequences, device=device), num_scored)
        # p-th scored token overall -> its place in path_rows: skip what lies before every segment's start
        skipped = self.path_offsets[:-1] + start - (num_scored.cumsum(0) - num_scored)
        place = torch.arange(segments.numel(), device=device) + skipped[segments]
        row = self.path_rows[place].to(torch.int64)
        return LogprobPlan.build(
            self.parent_row[row].to(torch.int64), self.tokens[row].to(torch.int64), segments, num_sequences
        )


def build_forest(sequences: Sequence[TokenSequence], pad_to_multiple_of: int = 1) -> Forest:
    """Merge sequences of token ids into one forest.

    Args:
        sequences: S lists, 1-D integer arrays or 1-D integer tensors, in any mixture, with ids in [0, 2^31). No sequences
            give a forest of no rows, whatever the padding.
        pad_to_multiple_of: T is rounded up to a multiple of this.

    Returns:
        The forest, on the CPU, its memory owned by csrc and not copied.

    Raises:
        ValueError: a sequence is empty, not 1-D, not of integers, or has an id out of range (the sequence is named), or
            `pad_to_multiple_of` is below 1.
    """
    tokens, position_ids, subtree_end, parent_row, path_rows, path_offsets, num_tokens = _csrc.build_forest(
        *flatten(sequences), pad_to_multiple_of
    )
    return Forest(
        tokens=torch.from_numpy(tokens),
        position_ids=torch.from_numpy(position_ids),
        subtree_end=torch.from_numpy(subtree_end),
        parent_row=torch.from_numpy(parent_row),
        path_rows=torch.from_numpy(path_rows),
        path_offsets=torch.from_numpy(path_offsets),
        num_tokens=num_tokens,
    )


def flatten(sequences: Sequence[TokenSequence]) -> tuple[np.ndarray, np.ndarray]:
    """What csrc reads: tokens [N] int64 of all sequences, and offsets [S + 1] int64 where each begins and ends.

    Raises:
        ValueError: a sequence is not 1-D or not of integers (it is named).
    """
    parts = [_as_int64(sequence, s) for s, sequence in enumerate(sequences)]
    offsets = np.zeros(len(parts) + 1, np.int64)
    np.cumsum([part.size for part in parts], out=offsets[1:])
    return np.concatenate(parts) if parts else np.empty(0, np.int64), offsets


def _as_int64(sequence: TokenSequence, index: int) -> np.ndarray:
    if isinstance(sequence, torch.Tensor | np.ndarray):
        values = sequence.detach().cpu().numpy() if isinstance(sequence, torch.Tensor) else sequence
        if values.ndim != 1 or values.dtype.kind not in "iu":
            raise ValueError(
                f"sequence {index}: expected 1-D integers, got shape {tuple(values.shape)} of {sequence.dtype}"
            )
        return values.astype(np.int64, copy=False)
    try:
        return np.asarray(array("q", sequence))  # several times faster than np.array on a list
    except (TypeError, OverflowError) as error:
        raise ValueError(f"sequence {index}: expected integer token ids below 2^31, got {error}") from None
