"""Which log-probs are wanted: P triples (row, target, segment).

    token_logps[p]   = log softmax(head(hidden[rows[p]]))[targets[p]]
    segment_logps[s] = sum of token_logps[p] over the p with segments[p] == s

One row may have many targets: the first tokens of siblings are all predicted by the hidden state of their common parent.
One token may count in many segments. The head must see each of `unique_rows` once, and each distinct pair of a row and a
target (`pair_row`, `pair_target`) is scored once. All orders and counts that scoring and its backward need are found here,
so that neither waits for a GPU. The plan knows nothing of trees: `Forest.logprob_plan` makes one from paths,
`LogprobPlan.build` takes any.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cpo_kernels.device import to_device


@dataclass(frozen=True, eq=False)
class LogprobPlan:
    """Scored tokens and the segments they are summed into. Make it with `build`, which validates.

    P scored tokens, R distinct rows, U distinct (row, target) pairs, S segments. All tensors but `host_offsets` are on one
    device.
    """

    rows: torch.Tensor  # [P] int64, row of the hidden state that predicts the token
    targets: torch.Tensor  # [P] int64, token id
    segments: torch.Tensor  # [P] int64, in [0, num_segments)
    unique_rows: torch.Tensor  # [R] int64, ascending
    pair_row: torch.Tensor  # [U] int64, index into unique_rows, ascending
    pair_target: torch.Tensor  # [U] int64, ascending within a row
    pair_index: torch.Tensor  # [P] int64, the token's pair
    pair_order: torch.Tensor  # [P] int64, tokens by pair, in the order of the plan
    pair_lengths: torch.Tensor  # [U] int64, tokens of each pair
    row_offsets: torch.Tensor  # [R + 1] int64, pairs [row_offsets[r], row_offsets[r + 1]) are of unique row r
    segment_order: torch.Tensor  # [P] int64, tokens by segment, in the order of the plan
    segment_lengths: torch.Tensor  # [S] int64
    host_offsets: torch.Tensor  # [R + 1] int64, row_offsets, always on the CPU
    max_row: int  # largest entry of rows, -1 without tokens
    max_target: int  # largest entry of targets, -1 without tokens

    @classmethod
    def build(cls, rows: torch.Tensor, targets: torch.Tensor, segments: torch.Tensor, num_segments: int) -> LogprobPlan:
        """Validate the triples and list their distinct rows and pairs.

        On a GPU this waits for the device. Build it on the CPU and move it with `to`.

        Args:
            rows: [P] int64, >= 0. Any order, repeats allowed. That they lie below the number of hidden rows is checked
                where the hidden states are.
            targets: [P] int64, >= 0.
            segments: [P] int64, in [0, num_segments).
            num_segments: how many sums there are. A segment without tokens sums to exactly 0.

        Raises:
            ValueError: a shape, dtype, device or range is not the expected one.
        """
        for name, tensor in (("rows", rows), ("targets", targets), ("segments", segments)):
            if tensor.dtype != torch.int64 or tensor.dim() != 1:
                raise ValueError(f"{name}: expected a 1-D int64 tensor, got {tuple(tensor.shape)} of {tensor.dtype}")
            if tensor.numel() != rows.numel():
                raise ValueError(f"{name}: expected {rows.numel()} entries like rows, got {tensor.numel()}")
            if tensor.device != rows.device:
                raise ValueError(f"{name}: expected a tensor on {rows.device} like rows, got {tensor.device}")
            if tensor.numel() > 0 and int(tensor.min()) < 0:
                raise ValueError(f"{name}: expected values >= 0, got {int(tensor.min())}")
        if num_segments < 0:
            raise ValueError(f"num_segments: expected >= 0, got {num_segments}")
        if segments.numel() > 0 and int(segments.max()) >= num_segments:
            raise ValueError(f"segments: expected values < num_segments = {num_segments}, got {int(segments.max())}")
        max_row, max_target = (int(tensor.max()) if tensor.numel() else -1 for tensor in (rows, targets))
        unique_rows, row_index = torch.unique(rows, sorted=True, return_inverse=True)
        base = max_target + 1
        pairs, pair_index = torch.unique(row_index * base + targets, sorted=True, return_inverse=True)
        pair_row = pairs // max(base, 1)
        row_offsets = torch.searchsorted(pair_row, torch.arange(unique_rows.shape[0] + 1, device=rows.device))
        return cls(
            rows=rows,
            targets=targets,
            segments=segments,
            unique_rows=unique_rows,
            pair_row=pair_row,
            pair_target=pairs - pair_row * base,
            pair_index=pair_index,
            pair_order=torch.argsort(pair_index, stable=True),
            pair_lengths=torch.bincount(pair_index, minlength=pairs.shape[0]),
            row_offsets=row_offsets,
            segment_order=torch.argsort(segments, stable=True),
            segment_lengths=torch.bincount(segments, minlength=num_segments),
            host_offsets=row_offsets.cpu(),
            max_row=max_row,
            max_target=max_target,
        )

    @property
    def num_segments(self) -> int:
        return self.segment_lengths.shape[0]

    def to(self, device: torch.device | str) -> LogprobPlan:
        """The same plan with every tensor but `host_offsets` on `device`, as `to_device` moves them."""
        return to_device(self, device)
