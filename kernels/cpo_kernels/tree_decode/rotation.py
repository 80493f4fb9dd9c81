"""Rotary position encoding (Su et al. 2021) of heads that lie row by row, in plain torch."""

import torch


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Heads [N, H, D] under rotary position encoding, as Transformers' `apply_rotary_pos_emb` computes it.

    Element i < D / 2 and element i + D / 2 turn together: x cos + (-second half, first half) sin. In the dtype of x, each
    product and the sum rounded.

    Args:
        cos, sin: [N, D] of each row's position, same dtype.
    """
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)
