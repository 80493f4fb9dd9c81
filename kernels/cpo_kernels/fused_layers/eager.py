"""What is fused, in plain torch, operation by operation as in Transformers' Llama and in PEFT's LoRA layer."""

import torch
import torch.nn.functional as F

from cpo_kernels.device import accumulation_dtype


def rms_norm_eager(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., E], weight [E] -> [..., E]. float64 stays float64, where `LlamaRMSNorm` goes through float32."""
    hidden = x.to(accumulation_dtype(x.dtype))
    variance = hidden.pow(2).mean(-1, keepdim=True)
    hidden = hidden * torch.rsqrt(variance + eps)
    return weight * hidden.to(x.dtype)


def rotary_eager(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, H, T, D], k [B, Hkv, T, D], cos and sin [B or 1, T, D] -> rotated q and k."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return (x * cos) + (torch.cat((-second, first), dim=-1) * sin)

    return rotated(q), rotated(k)


def swiglu_eager(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate and up [..., F] -> [..., F]."""
    return F.silu(gate) * up


def add_lora_eager(
    base: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """base [..., N], x [..., E], a [R, E], b [N, R] -> [..., N]."""
    return (base + F.linear(F.linear(x.to(a.dtype), a), b) * scaling).to(base.dtype)
