# mypy: disable-error-code="no-untyped-def"
"""Rotary position encoding of queries and keys in Triton, forward and backward, both in one launch.

With x = (x1, x2) the halves of a head, c = (c1, c2) and s = (s1, s2) those of the tables:

    out1 = round(x1 c1) - round(x2 s1),    out2 = round(x2 c2) + round(x1 s2)
    dx1  = round(g1 c1) + round(g2 s2),    dx2  = round(g2 c2) - round(g1 s1)

Products are rounded to the dtype of x and so are the sums, as in plain torch, so 16-bit results have the same bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from cpo_kernels.triton_tiles import INTERPRETED, as_operand, cast

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK_H = 16  # heads of a program


class TritonRotary(torch.autograd.Function):
    """q [B, H, T, D], k [B, Hkv, T, D], cos and sin [B or 1, T, D] -> rotated q and k."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if q.dtype not in DTYPES or {k.dtype, cos.dtype, sin.dtype} != {q.dtype}:
            raise ValueError(
                "rotary: impl='triton' expects bfloat16, float16 or float32, the same for q, k, cos and sin, got "
                f"{q.dtype}, {k.dtype}, {cos.dtype} and {sin.dtype}"
            )
        ctx.save_for_backward(cos, sin)
        return _rotated(q, k, cos, sin, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_q, grad_k), (cos, sin) = grad_outputs, ctx.saved_tensors
        return (*_rotated(grad_q, grad_k, cos, sin, backward=True), None, None)


def _rotated(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backward: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """New tensors, whose heads of one token are adjacent, as projections leave them."""
    batch, num_heads, num_rows, head_dim = q.shape
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    out_q, out_k = (
        torch.empty((batch, num_rows, x.shape[1], head_dim), dtype=x.dtype, device=x.device).transpose(1, 2)
        for x in (q, k)
    )
    total = num_heads + k.shape[1]
    if q.numel():
        _rotate[(batch * num_rows, triton.cdiv(total, BLOCK_H))](
            q, k, cos, sin, out_q, out_k, num_rows,
            *q.stride()[:3], *k.stride()[:3], *out_q.stride()[:3], *out_k.stride()[:3],
            *(cos.stride(0) * (len(cos) > 1), cos.stride(1)), *(sin.stride(0) * (len(sin) > 1), sin.stride(1)),
            HEADS=num_heads, TOTAL=total, HALF=head_dim // 2, BACKWARD=backward,
            UPCAST=INTERPRETED, **_block(head_dim),
        )  # fmt: skip
    return out_q, out_k


def _block(head_dim: int) -> dict[str, int]:
    """Extent of a program, whose threads take 8 elements of each half."""
    half = triton.next_power_of_2(head_dim // 2)
    return {"BLOCK_H": BLOCK_H, "BLOCK_D": half, "num_warps": max(1, BLOCK_H * half // 256)}


@triton.jit
def _rounded_product(
    a,  # fp32
    b,  # fp32
    dtype: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    return as_operand(a * b, dtype, UPCAST).to(tl.float32)


@triton.jit(
    do_not_specialize=["num_rows", "q_batch", "k_batch", "out_q_batch", "out_k_batch", "cos_batch", "sin_batch"]
)
def _rotate(
    q_ptr, k_ptr,  # [B, H, T, D] and [B, Hkv, T, D], adjacent elements
    cos_ptr, sin_ptr,  # [B or 1, T, D], adjacent elements
    out_q_ptr, out_k_ptr,  # as q and k
    num_rows,
    q_batch, q_head, q_row, k_batch, k_head, k_row,
    out_q_batch, out_q_head, out_q_row, out_k_batch, out_k_head, out_k_row,
    cos_batch, cos_row, sin_batch, sin_row,
    HEADS: tl.constexpr, TOTAL: tl.constexpr, HALF: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Some heads of one token; those from HEADS on are of k."""
    batch = (tl.program_id(0) // num_rows).to(tl.int64)
    row = (tl.program_id(0) % num_rows).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    of_q = (head < HEADS) & (column < HALF)
    of_k = (head >= HEADS) & (head < TOTAL) & (column < HALF)
    dtype: tl.constexpr = q_ptr.dtype.element_ty

    q_place = q_ptr + batch * q_batch + head * q_head + row * q_row + column
    k_place = k_ptr + batch * k_batch + (head - HEADS) * k_head + row * k_row + column
    first = tl.load(q_place, mask=of_q, other=0.0).to(tl.float32) + tl.load(k_place, mask=of_k, other=0.0).to(
        tl.float32
    )
    second = tl.load(q_place + HALF, mask=of_q, other=0.0).to(tl.float32)
    second += tl.load(k_place + HALF, mask=of_k, other=0.0).to(tl.float32)
    cos_place = cos_ptr + batch * cos_batch + row * cos_row + column
    sin_place = sin_ptr + batch * sin_batch + row * sin_row + column
    cos1 = tl.load(cos_place, mask=column < HALF, other=0.0).to(tl.float32)
    cos2 = tl.load(cos_place + HALF, mask=column < HALF, other=0.0).to(tl.float32)
    sin1 = tl.load(sin_place, mask=column < HALF, other=0.0).to(tl.float32)
    sin2 = tl.load(sin_place + HALF, mask=column < HALF, other=0.0).to(tl.float32)
    if BACKWARD:
        out1 = _rounded_product(first, cos1, dtype, UPCAST) + _rounded_product(second, sin2, dtype, UPCAST)
        out2 = _rounded_product(second, cos2, dtype, UPCAST) - _rounded_product(first, sin1, dtype, UPCAST)
    else:
        out1 = _rounded_product(first, cos1, dtype, UPCAST) - _rounded_product(second, sin1, dtype, UPCAST)
        out2 = _rounded_product(second, cos2, dtype, UPCAST) + _rounded_product(first, sin2, dtype, UPCAST)
    out1, out2 = cast(out1, dtype, UPCAST), cast(out2, dtype, UPCAST)
    q_place = out_q_ptr + batch * out_q_batch + head * out_q_head + row * out_q_row + column
    k_place = out_k_ptr + batch * out_k_batch + (head - HEADS) * out_k_head + row * out_k_row + column
    tl.store(q_place, out1, mask=of_q)
    tl.store(q_place + HALF, out2, mask=of_q)
    tl.store(k_place, out1, mask=of_k)
    tl.store(k_place + HALF, out2, mask=of_k)
