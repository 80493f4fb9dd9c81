# mypy: disable-error-code="no-untyped-def"
"""SwiGLU in Triton, forward and backward, 1,024 columns of a row a program.

    s = 1 / (1 + exp(-gate)),   silu = round(gate s),   out = round(silu up)

With g the gradient of the output:  dup = g silu,   dgate = round(g up) s (1 + gate (1 - s))
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from cpo_kernels.triton_tiles import INTERPRETED, as_operand, cast

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK = 1024  # columns: a thread of four warps loads 16 bytes of a 16-bit row


class TritonSwiGLU(torch.autograd.Function):
    """gate and up [..., F] of one dtype -> out [..., F]."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if gate.dtype not in DTYPES:
            raise ValueError(f"swiglu: impl='triton' expects bfloat16, float16 or float32, got {gate.dtype}")
        gates, ups = _rows(gate), _rows(up)
        out = torch.empty(gates.shape, dtype=gate.dtype, device=gate.device)
        if out.numel():
            _swiglu_forward[(len(gates), triton.cdiv(out.shape[1], BLOCK))](
                gates, ups, out, gates.stride(0), ups.stride(0),
                COLUMNS=out.shape[1], BLOCK=BLOCK, UPCAST=INTERPRETED,
            )  # fmt: skip
        ctx.save_for_backward(gate, up)
        return out.view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        gates, ups, grad = _rows(gate), _rows(up), _rows(grad_outputs[0])
        grad_gate, grad_up = (torch.empty(gates.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
        if grad_up.numel():
            _swiglu_backward[(len(gates), triton.cdiv(gates.shape[1], BLOCK))](
                gates, ups, grad, grad_gate, grad_up, gates.stride(0), ups.stride(0), grad.stride(0),
                COLUMNS=grad_up.shape[1], BLOCK=BLOCK, UPCAST=INTERPRETED,
            )  # fmt: skip
        return grad_gate.view(gate.shape), grad_up.view(up.shape)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[rows, F] with adjacent columns, copied only where they are not."""
    rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty(0, 0)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


@triton.jit
def _swiglu_forward(
    gate_ptr,  # [N, F], adjacent columns
    up_ptr,  # [N, F], adjacent columns
    out_ptr,  # [N, F] contiguous
    gate_stride, up_stride,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = columns < COLUMNS
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=real, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=real, other=0.0).to(tl.float32)
    silu = as_operand(gate / (1.0 + tl.exp(-gate)), dtype, UPCAST).to(tl.float32)
    tl.store(out_ptr + row * COLUMNS + columns, cast(silu * up, dtype, UPCAST), mask=real)


@triton.jit
def _swiglu_backward(
    gate_ptr,  # [N, F], adjacent columns
    up_ptr,  # [N, F], adjacent columns
    grad_ptr,  # [N, F], adjacent columns
    grad_gate_ptr,  # [N, F] contiguous
    grad_up_ptr,  # [N, F] contiguous
    gate_stride, up_stride, grad_stride,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = columns < COLUMNS
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=real, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=real, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * grad_stride + columns, mask=real, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = as_operand(gate / (1.0 + tl.exp(-gate)), dtype, UPCAST).to(tl.float32)
    grad_silu = as_operand(grad * up, dtype, UPCAST).to(tl.float32)
    grad_gate = grad_silu * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(grad_gate_ptr + row * COLUMNS + columns, cast(grad_gate, dtype, UPCAST), mask=real)
    tl.store(grad_up_ptr + row * COLUMNS + columns, cast(grad * silu, dtype, UPCAST), mask=real)
