"""Tree attention, dense: the specification.

    out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j]   over   { j : j <= i < subtree_end[j] }

Under a window W a row sees only those that are less than W tokens above it: depth[i] - depth[j] < W. Under a soft-cap c
the scores scale * q . k become c * tanh(score / c) before the mask. Sinks, one a head, are one more column of the softmax
without a value: they only add exp(sink) to what a row divides by.
The T x T mask is written out, so this is for small T, any device, any float dtype, and differentiable by autograd.
Scores, softmax and the weighted sum are in float32 (float64 for float64 inputs).
"""

import torch

from cpo_kernels.device import accumulation_dtype
from cpo_kernels.tree_attention.window import Window


def visible(subtree_end: torch.Tensor) -> torch.Tensor:
    """The attention rule as a matrix: entry [i, j] is True where row i may see row j.

    Args:
        subtree_end: [T] integer, first row after the subtree of each row.

    Returns:
        [T, T] bool.
    """
    index = torch.arange(subtree_end.shape[0], device=subtree_end.device)
    return (index[None, :] <= index[:, None]) & (index[:, None] < subtree_end[None, :])


def tree_attention_reference(
    q: torch.Tensor,  # [T, H, D]
    k: torch.Tensor,  # [T, Hkv, D]
    v: torch.Tensor,  # [T, Hkv, D]
    subtree_end: torch.Tensor,  # [T] int32
    scale: float,
    window: Window | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [H]
) -> torch.Tensor:
    """Dense masked softmax attention, [T, H, D] in the dtype of q."""
    dtype = accumulation_dtype(q.dtype)
    group = q.shape[1] // k.shape[1]
    queries = q.to(dtype).transpose(0, 1)  # [H, T, D]
    keys = k.to(dtype).repeat_interleave(group, dim=1).transpose(0, 1)  # [H, T, D]
    values = v.to(dtype).repeat_interleave(group, dim=1).transpose(0, 1)  # [H, T, D]
    mask = visible(subtree_end)
    if window is not None:
        mask &= ~window.hides(slice(None), slice(None))
    scores = (queries @ keys.transpose(1, 2)) * scale  # [H, T, T]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks.to(dtype)[:, None, None].expand(-1, scores.shape[1], 1)
        weights = torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    # a masked score is dropped, but 0 * NaN is NaN: rows that are never seen must not leak through the product
    if not torch.isfinite(values).all():
        return _masked_product(weights, values, mask).transpose(0, 1).to(q.dtype)
    return (weights @ values).transpose(0, 1).to(q.dtype)


def _masked_product(weights: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    rows = [weights[:, i, mask[i]].unsqueeze(1) @ values[:, mask[i]] for i in range(mask.shape[0])]
    return torch.cat(rows, dim=1)
