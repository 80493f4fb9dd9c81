"""The check of the Triton kernels of RMSNorm, SwiGLU and LoRA: rows and blocks that end ragged, forward and backward."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from cpo_kernels.fused_layers.eager import add_lora_eager, rms_norm_eager, rotary_eager, swiglu_eager
from cpo_kernels.kernel_check import FLOAT32_EPS, ModelShape, Results, error_ratios, random_tensor

NUM_ROWS = 601  # more than the programs that sum a weight's gradient, and not a multiple of them
GATED_COLUMNS = 1100  # one whole block of columns and a part
LORA_ROWS = 131
RANKS = (8, 20)
# of the largest number: pairs of bfloat16 err by 2^-18 of the terms, and matrix units cut a float32 sum off where they add
LORA_BAND = 2.0**-14
EPS = 1e-5


class FusedLayers(NamedTuple):
    """Differentiable functions, as those of `eager`."""

    rms_norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    swiglu: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    rotary: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    add_lora: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


EAGER = FusedLayers(rms_norm_eager, swiglu_eager, rotary_eager, add_lora_eager)


def check_fused_layers(device: torch.device, shape: ModelShape, kernels: FusedLayers | None = None) -> dict[str, float]:
    """Error over bound of outputs and gradients of `kernels`, by default the Triton kernels."""
    if kernels is None:
        from cpo_kernels.fused_layers.triton_lora import TritonLora  # loads Triton
        from cpo_kernels.fused_layers.triton_rms_norm import TritonRMSNorm
        from cpo_kernels.fused_layers.triton_rotary import TritonRotary
        from cpo_kernels.fused_layers.triton_swiglu import TritonSwiGLU

        kernels = FusedLayers(TritonRMSNorm.apply, TritonSwiGLU.apply, TritonRotary.apply, TritonLora.apply)
    ratios: dict[str, float] = {}
    # some models normalise heads too
    for place, columns in enumerate(sorted({shape.hidden_size, shape.head_dim})):
        shapes = ((NUM_ROWS, columns), (columns,), (NUM_ROWS, columns))
        x, weight, upstream = (
            random_tensor(s, device, shape.dtype, 20 + 3 * place + at) for at, s in enumerate(shapes)
        )
        for trained in (False, True):
            norm = partial(_norm_results, x=x, weight=weight, upstream=upstream, trained=trained)
            ratios |= _ratios(norm, kernels, shape.dtype)
    tensors = [random_tensor((7, GATED_COLUMNS), device, shape.dtype, 26 + at, scale=3.0) for at in range(3)]
    ratios |= _ratios(partial(_gated_results, tensors=tensors), kernels, shape.dtype)
    heads = (shape.num_heads, shape.num_kv_heads)
    tensors = [
        random_tensor((2, count, 5, shape.head_dim), device, shape.dtype, 40 + at) for at, count in enumerate(heads * 2)
    ]
    tables = [random_tensor((2, 5, shape.head_dim), device, shape.dtype, place) for place in (38, 39)]
    rotary = partial(_rotary_results, tensors=[*tensors, *tables])
    ratios |= _ratios(rotary, kernels, shape.dtype)
    if shape.dtype == torch.bfloat16:  # the one dtype that LoRA's kernels take
        for place, rank in enumerate(RANKS):
            tensors = _lora_tensors(device, shape.hidden_size, rank, 30 + 5 * place)
            ratios |= _ratios(partial(_lora_results, tensors=tensors), kernels, shape.dtype, LORA_BAND)
    return ratios


def _norm_results(
    layers: FusedLayers,
    dtype: torch.dtype,
    x: torch.Tensor,  # [N, E]
    weight: torch.Tensor,  # [E]
    upstream: torch.Tensor,  # [N, E]
    trained: bool,
) -> Results:
    x, weight = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(trained)
    out = layers.rms_norm(x, weight, EPS)
    gradients = torch.autograd.grad(out, (x, weight) if trained else (x,), upstream.to(dtype))
    name = f"rms_norm of {x.shape[1]} columns with a weight that is {'trained' if trained else 'frozen'}"
    results = {f"{name}: out": out.detach()}
    return results | {f"{name}: gradient {place}": gradient for place, gradient in enumerate(gradients)}


def _gated_results(layers: FusedLayers, dtype: torch.dtype, tensors: list[torch.Tensor]) -> Results:
    gate, up, upstream = (tensor.to(dtype) for tensor in tensors)
    out = layers.swiglu(gate.requires_grad_(), up.requires_grad_())
    gradients = torch.autograd.grad(out, (gate, up), upstream)
    return {"swiglu: out": out.detach()} | {
        f"swiglu: gradient of {name}": gradient for name, gradient in zip(("gate", "up"), gradients, strict=True)
    }


def _rotary_results(layers: FusedLayers, dtype: torch.dtype, tensors: list[torch.Tensor]) -> Results:
    q, k, grad_q, grad_k, cos, sin = (tensor.to(dtype) for tensor in tensors)
    outputs = layers.rotary(q.requires_grad_(), k.requires_grad_(), cos, sin)
    gradients = torch.autograd.grad(outputs, (q, k), (grad_q, grad_k))
    names = ("rotary: q", "rotary: k", "rotary: gradient of q", "rotary: gradient of k")
    return dict(zip(names, (*(out.detach() for out in outputs), *gradients), strict=True))


def _lora_tensors(device: torch.device, hidden_size: int, rank: int, place: int) -> list[torch.Tensor]:
    """base [T, N], x [T, E], a [R, E], b [N, R] and the output's gradient [T, N], all float32."""
    num_outputs = 2 * hidden_size + 30
    sizes = [(LORA_ROWS, num_outputs), (LORA_ROWS, hidden_size), (rank, hidden_size), (num_outputs, rank)]
    scales = (1.0, 1.0, 1 / rank, 1 / rank, 1.0)
    return [
        random_tensor(size, device, torch.float32, place + at, scale)
        for at, (size, scale) in enumerate(zip([*sizes, sizes[0]], scales, strict=True))
    ]


def _lora_results(layers: FusedLayers, dtype: torch.dtype, tensors: list[torch.Tensor]) -> Results:
    """Base and input in `dtype`, adapters in float32 at least."""
    base, x, upstream = (tensors[place].bfloat16().to(dtype) for place in (0, 1, 4))
    a, b = (tensor.to(torch.promote_types(dtype, torch.float32)) for tensor in tensors[2:4])
    inputs = [tensor.requires_grad_() for tensor in (base, x, a, b)]
    out = layers.add_lora(base, x, a, b, 2.0)
    gradients = torch.autograd.grad(out, inputs, upstream)
    return {f"add_lora of rank {len(a)}: out": out.detach()} | {
        f"add_lora of rank {len(a)}: gradient of {name}": gradient
        for name, gradient in zip(("base", "x", "a", "b"), gradients, strict=True)
    }


def _ratios(
    run: Callable[[FusedLayers, torch.dtype], Results],
    kernels: FusedLayers,
    dtype: torch.dtype,
    band: float = 8 * FLOAT32_EPS,
) -> dict[str, float]:
    """`band` of the largest number is allowed on top: terms that cancel, or what a pair of bfloat16 leaves out."""
    exact = run(EAGER, torch.float64)
    bands = {name: band * float(value.abs().max()) for name, value in exact.items()}
    return error_ratios(exact, run(EAGER, dtype), run(kernels, dtype), bands)
