# mypy: disable-error-code="no-untyped-def"
"""Tree attention, backward, in Triton.

With p = 2^(scale log2(e) q . k - lse), dp = dout . v and delta = dout . out, over the visible pairs

    dv[j] = sum_i p[i, j] dout[i]       ds = p (dp - delta)
    dq[i] = scale sum_j ds[i, j] k[j]   dk[j] = scale sum_i ds[i, j] q[i]

The probabilities are made again from the forward's log-sum-exp. delta is made here; dk and dv stand in `backward_kv`, dq
in `backward_q`. Every gradient is written once by one program that sums in a fixed order, query heads of a group and
parts of a query range included: no atomics, bitwise repeatable.
"""

import torch
import triton
import triton.language as tl

from cpo_kernels.tree_attention.backward_kv import launch_grad_kv
from cpo_kernels.tree_attention.backward_q import launch_grad_q
from cpo_kernels.tree_attention.schedule import TreeSchedule
from cpo_kernels.tree_attention.tiles import INTERPRETED, LOG2_E, by_rows, load_rows, padded_head_dim

DELTA_ROWS = 64  # rows of one program of the row-wise product; bound by memory at any size


def tree_attention_backward(
    grad_out: torch.Tensor,  # [T, H, D]
    q: torch.Tensor,  # [T, H, D]
    k: torch.Tensor,  # [T, Hkv, D]
    v: torch.Tensor,  # [T, Hkv, D]
    out: torch.Tensor,  # [T, H, D] contiguous
    lse: torch.Tensor,  # [H, T] float32
    schedule: TreeSchedule,
    scale: float,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of q, k and v from the gradient of the output.

    Args:
        grad_out: [T, H, D] in the dtype of q, any strides.
        q, k, v: as given to the forward.
        out, lse: as returned by it.
        schedule: as given to the forward.
        scale: as given to the forward.
        needs: which of dq, dk and dv are wanted; dk and dv come together, so that wanting one makes both.

    Returns:
        dq [T, H, D], dk and dv [T, Hkv, D], contiguous, in the dtype of q; None for what is not wanted.
    """
    num_rows, num_heads, head_dim = q.shape
    grad_out, q, k, v = by_rows(grad_out), by_rows(q), by_rows(k), by_rows(v)
    constants = {"HEAD_DIM": head_dim, "BLOCK_D": padded_head_dim(head_dim), "UPCAST": INTERPRETED}
    delta = torch.empty_like(lse)
    _delta_kernel[(triton.cdiv(num_rows, DELTA_ROWS) * num_heads,)](
        grad_out, out, delta, num_rows, num_heads, *grad_out.stride()[:2], BLOCK_Q=DELTA_ROWS, **constants
    )
    inputs = (q, k, v, grad_out, lse, delta)
    sizes = (num_rows, num_heads, num_heads // k.shape[1], scale * LOG2_E, scale)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *grad_out.stride()[:2])
    grad_q = launch_grad_q(inputs, schedule, sizes, strides, constants) if needs[0] else None
    if not (needs[1] or needs[2]):
        return grad_q, None, None
    grad_k, grad_v = launch_grad_kv(inputs, schedule, sizes, strides, constants)
    return grad_q, grad_k if needs[1] else None, grad_v if needs[2] else None


@triton.jit(do_not_specialize=["num_rows"])
def _delta_kernel(
    grad_out_ptr,  # [T, H, D]
    out_ptr,  # [T, H, D] contiguous
    delta_ptr,  # [H, T] fp32
    num_rows,
    num_heads,
    grad_out_row_stride,
    grad_out_head_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """delta[h, i] = dout[i, h] . out[i, h] in float32."""
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    rows = (tl.program_id(0) // num_heads) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    grad_out = load_rows(
        grad_out_ptr + head * grad_out_head_stride,
        rows,
        grad_out_row_stride,
        num_rows,
        HEAD_DIM,
        BLOCK_D,
        True,
        UPCAST,
    )
    out = load_rows(out_ptr + head * HEAD_DIM, rows, num_heads * HEAD_DIM, num_rows, HEAD_DIM, BLOCK_D, True, UPCAST)
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + head * num_rows + rows, delta, mask=rows < num_rows)
