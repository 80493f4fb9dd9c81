"""What limits or shares a row's attention beside the tree: a sliding window, and sinks.

A window over a forest is counted in depth on a row's own path, because siblings stand between rows.
"""

import math
from typing import NamedTuple

import torch

LOG2_E = math.log2(math.e)


class Window(NamedTuple):
    """A row sees those of its ancestors that are less than `size` tokens above it, itself included."""

    depths: torch.Tensor  # [T] integer, each row's place on its own path
    size: int

    def hides(self, queries: slice, keys: slice) -> torch.Tensor:
        """[queries, keys] bool, True where a key is too far above a query."""
        return self.depths[queries, None] - self.depths[None, keys] >= self.size


def sink_gradient(
    sinks: torch.Tensor,  # [H]
    log_sum_exp: torch.Tensor,  # [H, T] float, natural logarithm, the sink's exp in the sum
    delta: torch.Tensor,  # [H, T] float, sum of dout * out over a row's head
    grad_out: torch.Tensor,  # [T, H, D]
) -> torch.Tensor:
    """Gradient [H] of sinks, in their dtype: dsink[h] = -sum_i exp(sink[h] - lse[h, i]) delta[h, i].

    The softmax over scores and sink has ds_c = p_c (dp_c - sum_j p_j dp_j) in every column c. A sink has no value, so that
    its own dp is zero, and what is left in the sum is dout . out = delta. A row whose dout is zero adds nothing, even where
    it holds NaN, as a padding row may: no other row sees it, but this sum would.
    """
    weights = torch.exp(sinks.to(delta.dtype).unsqueeze(1) - log_sum_exp)
    unused = ~grad_out.any(dim=-1).t()  # [H, T]
    return -(weights * delta).masked_fill_(unused, 0.0).sum(dim=1).to(sinks.dtype)


def score_factor(scale: float, softcap: float | None) -> float:
    """What kernels multiply q . k by: scores in base 2, or what a soft-cap takes the tanh of."""
    return scale * LOG2_E if softcap is None else scale / softcap


def feature_arguments(window: Window | None, softcap: float | None) -> dict[str, torch.Tensor | int | float | None]:
    """Arguments of the kernels of both directions for a window and a soft-cap, None for what is not there."""
    return {
        "depths_ptr": None if window is None else window.depths,
        "window": None if window is None else window.size,
        "cap_log2": None if softcap is None else softcap * LOG2_E,
    }
