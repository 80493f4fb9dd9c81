"""What flash-attn's varlen functions promise, on a CPU: their published signatures, checks and results, by SDPA.

flash-attn needs CUDA to be imported. A call that these functions take is one that the packages take: an unknown argument,
another dtype or offsets that do not fit are refused as there. `flash_attn_varlen_func` is that of flash-attn 2.8
(flash_attn/flash_attn_interface.py), `flash_attn_3_varlen_func` that of FlashAttention 3 (hopper/flash_attn_interface.py).
"""

from itertools import pairwise

import torch


def flash_attn_varlen_func(
    q: torch.Tensor,  # [Tq, H, D] float16 or bfloat16
    k: torch.Tensor,  # [Tk, Hkv, D]
    v: torch.Tensor,  # [Tk, Hkv, D]
    cu_seqlens_q: torch.Tensor,  # [S + 1] int32
    cu_seqlens_k: torch.Tensor,  # [S + 1] int32
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention [Tq, H, D] of S sequences laid end to end."""
    unused = (dropout_p, softcap, alibi_slopes, return_attn_probs, block_table)
    assert unused == (0.0, 0.0, None, False, None), unused
    return _varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size
    )  # fmt: skip


def flash_attn_3_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> torch.Tensor:
    """The same by the signature of FlashAttention 3."""
    unused = (seqused_q, seqused_k, qv, q_descale, k_descale, v_descale, attention_chunk, softcap, return_attn_probs)
    assert unused == (None, None, None, None, None, None, 0, 0.0, False), unused
    return _varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size
    )  # fmt: skip


def _varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
) -> torch.Tensor:
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in (torch.float16, torch.bfloat16), f"FlashAttention only supports fp16 and bf16, not {q.dtype}"
    assert q.ndim == 3
    assert k.shape == v.shape == (k.shape[0], k.shape[1], q.shape[2])
    assert q.shape[1] % k.shape[1] == 0
    assert q.shape[2] <= 256
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    bounds = []
    for offsets, longest, rows in ((cu_seqlens_q, max_seqlen_q, len(q)), (cu_seqlens_k, max_seqlen_k, len(k))):
        assert offsets.dtype == torch.int32
        assert offsets.is_contiguous()
        assert type(longest) is int
        bounds.append(list(pairwise(offsets.tolist())))
        assert offsets[0] == 0
        assert offsets[-1] == rows
        assert longest >= max(stop - start for start, stop in bounds[-1])
    assert len(bounds[0]) == len(bounds[1])
    rows = []
    for (q0, q1), (k0, k1) in zip(*bounds, strict=True):
        # aligned to the last key, as both packages say
        distance = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0) - torch.arange(k1 - k0)
        seen = torch.ones_like(distance, dtype=torch.bool)
        if causal:
            seen &= distance >= 0
        if window_size[0] >= 0:
            seen &= distance <= window_size[0]
        if window_size[1] >= 0:
            seen &= distance >= -window_size[1]
        heads = (x.transpose(0, 1)[None] for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
        out = torch.nn.functional.scaled_dot_product_attention(
            *heads, attn_mask=seen, scale=softmax_scale, enable_gqa=True
        )
        rows.append(out[0].transpose(0, 1))
    return torch.cat(rows)
