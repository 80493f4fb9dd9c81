"""Which log-probs are wanted: P triples (row, target, segment).

    token_logps[p]   = log softmax(head(hidden[rows[p]]))[targets[p]]
    segment_logps[s] = sum of token_logps[p] over the p with segments[p] == s

One row may have many targets (the first tokens of siblings are all predicted by the hidden state of their common
parent) and one token may count in many segments. `unique_rows` lists the rows that the head must see, each once. The
plan knows nothing of trees: `Forest.logprob_plan` makes one from paths, `LogprobPlan.build` takes any.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class LogprobPlan:
    """Scored tokens and the segments they are summed into. Make it with `build`, which validates.

    P scored tokens, R distinct rows; all tensors on one device.
    """

    rows: torch.Tensor  # [P] int64, row of the hidden state that predicts the token
    targets: torch.Tensor  # [P] int64, token id
    segments: torch.Tensor  # [P] int64, in [0, num_segments)
    num_segments: int
    unique_rows: torch.Tensor  # [R] int64, ascending
    row_index: torch.Tensor  # [P] int64, rows == unique_rows[row_index]

    @classmethod
    def build(cls, rows: torch.Tensor, targets: torch.Tensor, segments: torch.Tensor, num_segments: int) -> LogprobPlan:
        """Validate the triples and list their distinct rows.

        Args:
            rows: [P] int64, >= 0. Any order, repeats allowed. That they lie below the number of hidden rows is checked
                where the hidden states are.
            targets: [P] int64, >= 0.
            segments: [P] int64, in [0, num_segments).
            num_segments: how many sums there are; a segment without tokens sums to exactly 0.

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
        unique_rows, row_index = torch.unique(rows, sorted=True, return_inverse=True)
        return cls(rows, targets, segments, num_segments, unique_rows, row_index)

    def to(self, device: torch.device | str) -> LogprobPlan:
        """The same plan with every tensor on `device`."""
        return LogprobPlan(
            rows=self.rows.to(device),
            targets=self.targets.to(device),
            segments=self.segments.to(device),
            num_segments=self.num_segments,
            unique_rows=self.unique_rows.to(device),
            row_index=self.row_index.to(device),
        )
