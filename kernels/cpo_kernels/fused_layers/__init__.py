"""Parts of a transformer layer in few kernels: RMSNorm, rotary encoding, SwiGLU, a LoRA adapter's share of a linear layer.

    rms_norm:  out = weight * round(x / sqrt(mean(x^2) + eps))     statistics in float32, rounded to the dtype of x
    rotary:    out = round(x cos) + round(rotate_half(x) sin)      of queries and keys
    swiglu:    out = round(silu(gate)) * up
    add_lora:  out = round(base + scaling * x A^T B^T)             A and B in float32, rounded to the dtype of base

`eager` computes them as the modules of Transformers and PEFT do, to the bit, and is the specification (`reference` names
the same function). `triton` are the GPU kernels of the modules `triton_*`, which TRITON_INTERPRET=1 runs on a CPU. They
round where eager rounds, forward and backward, so results differ where a float32 sum or exponential that is a few units
off lands on the other side of a rounding.
"""

from typing import Any

import torch

from cpo_kernels.fused_layers.check import check_fused_layers
from cpo_kernels.fused_layers.eager import add_lora_eager, rms_norm_eager, rotary_eager, swiglu_eager
from cpo_kernels.implementation import available_implementations, resolve_implementation

__all__ = ["add_lora", "resolve_fused_layers", "rms_norm", "rotary", "swiglu"]


def rms_norm(
    x: torch.Tensor,  # [..., E]
    weight: torch.Tensor,  # [E]
    eps: float,
    *,
    impl: str | None = None,
) -> torch.Tensor:
    """Root mean square normalisation of rows (Zhang and Sennrich 2019) as Llama's: the weight multiplies the rounded row.

    Args:
        x: [..., E] float64, float32, bfloat16 or float16.
        weight: [E], same dtype or float32.
        eps: added to the mean square.
        impl: "reference", "eager", "triton", or None to choose by device. "triton" takes no float64 and E up to 32768.

    Returns:
        [..., E] in the wider dtype of x and weight, differentiable in both. "triton" against "eager": 1e-6 relative in
        float32. In 16 bits the normalised row may be its neighbour before the weight multiplies.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `impl` cannot run on them.
        KernelCheckError: `impl` is None, and the Triton kernels are wrong on this device, whose default they are.
    """
    if x.ndim < 1 or weight.shape != x.shape[-1:] or weight.device != x.device:
        raise ValueError(
            f"rms_norm: expected x [..., E] and weight [E] on one device, got {tuple(x.shape)} on {x.device} and "
            f"{tuple(weight.shape)} on {weight.device}"
        )
    if resolve_fused_layers(impl, x.device.type) != "triton":
        return rms_norm_eager(x, weight, eps)
    from cpo_kernels.fused_layers.triton_rms_norm import TritonRMSNorm  # loads Triton: only when it is asked for

    out: torch.Tensor = _apply(TritonRMSNorm, x, weight, eps)
    return out


def rotary(
    q: torch.Tensor,  # [B, H, T, D]
    k: torch.Tensor,  # [B, Hkv, T, D]
    cos: torch.Tensor,  # [B or 1, T, D]
    sin: torch.Tensor,  # [B or 1, T, D]
    *,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary position encoding (Su et al. 2021) that pairs element i of a head with i + D / 2, as Llama's.

    Args:
        q, k: [B, H, T, D] and [B, Hkv, T, D] float64, float32, bfloat16 or float16, both the same.
        cos, sin: [B or 1, T, D], same dtype, constants.
        impl: "reference", "eager", "triton", or None to choose by device. "triton" takes no float64.

    Returns:
        q and k rotated, differentiable in both. "triton" has the bits of "eager" in 16 bits, and 1e-6 of the larger of the
        two products in float32.

    Raises:
        ValueError: shapes do not fit, or `impl` cannot run on them.
        KernelCheckError: `impl` is None, and the Triton kernels are wrong on this device, whose default they are.
    """
    fit = q.ndim == 4 and k.shape == (q.shape[0], *k.shape[1:2], *q.shape[2:]) and q.shape[3] % 2 == 0
    if not fit or cos.shape != sin.shape or cos.shape not in ((1, *q.shape[2:]), (q.shape[0], *q.shape[2:])):
        raise ValueError(
            "rotary: expected q [B, H, T, D], k [B, Hkv, T, D] and cos and sin [B or 1, T, D] with an even D, got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if resolve_fused_layers(impl, q.device.type) != "triton":
        return rotary_eager(q, k, cos, sin)
    from cpo_kernels.fused_layers.triton_rotary import TritonRotary  # loads Triton: only when it is asked for

    out_q, out_k = _apply(TritonRotary, q, k, cos, sin)
    return out_q, out_k


def swiglu(
    gate: torch.Tensor,  # [..., F]
    up: torch.Tensor,  # [..., F]
    *,
    impl: str | None = None,
) -> torch.Tensor:
    """silu(gate) * up, the gated unit of Shazeer 2020, with silu(x) = x / (1 + exp(-x)) rounded to the dtype of gate.

    Args:
        gate, up: [..., F] float64, float32, bfloat16 or float16, both the same. Halves of one product's columns need no
            copy.
        impl: "reference", "eager", "triton", or None to choose by device. "triton" takes no float64.

    Returns:
        [..., F] in their dtype, differentiable in both. "triton" against "eager": 1e-6 relative in float32. In 16 bits
        silu may be its neighbour before `up` multiplies.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `impl` cannot run on them.
        KernelCheckError: `impl` is None, and the Triton kernels are wrong on this device, whose default they are.
    """
    if gate.shape != up.shape or gate.ndim < 1 or gate.dtype != up.dtype or gate.device != up.device:
        raise ValueError(
            f"swiglu: expected gate and up [..., F] of one dtype on one device, got {tuple(gate.shape)} {gate.dtype} on "
            f"{gate.device} and {tuple(up.shape)} {up.dtype} on {up.device}"
        )
    if resolve_fused_layers(impl, gate.device.type) != "triton":
        return swiglu_eager(gate, up)
    from cpo_kernels.fused_layers.triton_swiglu import TritonSwiGLU  # loads Triton: only when it is asked for

    out: torch.Tensor = _apply(TritonSwiGLU, gate, up)
    return out


def add_lora(
    base: torch.Tensor,  # [..., N]
    x: torch.Tensor,  # [..., E]
    a: torch.Tensor,  # [R, E]
    b: torch.Tensor,  # [N, R]
    scaling: float,
    *,
    impl: str | None = None,
) -> torch.Tensor:
    """base + scaling * x a^T b^T, the output of a linear layer with its LoRA adapter (Hu et al. 2021) added.

    Args:
        base: [..., N], the layer's output without the adapter.
        x: [..., E], the layer's input, of base's dtype.
        a, b: [R, E] and [N, R], any floating dtype, that of the product.
        scaling: factor on the product.
        impl: "reference", "eager", "triton", or None to choose by device. "triton" takes bfloat16 base and x, float32 a
            and b, and R up to 64.

    Returns:
        [..., N] in the dtype of base, differentiable in all four tensors. "triton" multiplies bfloat16 numbers with pairs
        of them and sums in float32: the product and the gradients of a and b are within 2^-16 of the sum of their terms'
        magnitudes, and what is rounded to bfloat16 may be its neighbour.

    Raises:
        ValueError: shapes do not fit, or `impl` cannot run on these inputs.
        KernelCheckError: `impl` is None, and the Triton kernels are wrong on this device, whose default they are.
    """
    if (
        a.ndim != 2
        or b.shape != (base.shape[-1], len(a))
        or x.shape != (*base.shape[:-1], a.shape[1])
        or x.dtype != base.dtype
    ):
        raise ValueError(
            "add_lora: expected base [..., N], x [..., E] of its dtype, a [R, E] and b [N, R], got "
            f"{tuple(base.shape)} {base.dtype}, {tuple(x.shape)} {x.dtype}, {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if resolve_fused_layers(impl, x.device.type) != "triton":
        return add_lora_eager(base, x, a, b, scaling)
    from cpo_kernels.fused_layers.triton_lora import TritonLora  # loads Triton: only when it is asked for

    out: torch.Tensor = _apply(TritonLora, base, x, a, b, scaling)
    return out


def resolve_fused_layers(impl: str | None, device_type: str) -> str:
    """The name of the implementation that runs on a device. See `resolve_implementation`."""
    available = available_implementations(device_type)
    return resolve_implementation("fused_layers", impl, device_type, available, check_fused_layers)


@torch.compiler.disable  # as `tree_attention` does: torch 2.11 compiles a Function to a graph whose gradients are zero
def _apply(function: Any, *arguments: Any) -> Any:
    return function.apply(*arguments)
