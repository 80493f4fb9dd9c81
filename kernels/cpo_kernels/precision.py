"""The one rule about accumulation: float64 stays float64, everything else is accumulated and returned in float32."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of accumulators and log-probabilities for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def matmul_accumulated(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` for 2-D inputs of one dtype, returned in the accumulation dtype without rounding to 16 bits on the way.

    Args:
        a: [M, K] floating point.
        b: [K, N] same dtype.

    Returns:
        [M, N] float32, or float64 for float64 inputs.
    """
    dtype = accumulation_dtype(a.dtype)
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)
