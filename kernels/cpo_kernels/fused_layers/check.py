"""The check of the Triton kernels of RMSNorm and SwiGLU: rows and blocks that end ragged, forward and backward."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from cpo_kernels.fused_layers.eager import rms_norm_eager, swiglu_eager
from cpo_kernels.kernel_check import FLOAT32_EPS, ModelShape, Results, error_ratios, random_tensor

NUM_ROWS = 601  # more than the programs that sum a weight's gradient, and not a multiple of them
GATED_COLUMNS = 1100  # one whole block of columns and a part
EPS = 1e-5


class FusedLayers(NamedTuple):
    """Differentiable functions, as those of `eager`."""

    rms_norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    swiglu: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


EAGER = FusedLayers(rms_norm_eager, swiglu_eager)


def check_fused_layers(device: torch.device, shape: ModelShape, kernels: FusedLayers | None = None) -> dict[str, float]:
    """Error over bound of outputs and gradients of `kernels`, by default the Triton kernels."""
    if kernels is None:
        from cpo_kernels.fused_layers.triton_rms_norm import TritonRMSNorm  # loads Triton
        from cpo_kernels.fused_layers.triton_swiglu import TritonSwiGLU

        kernels = FusedLayers(TritonRMSNorm.apply, TritonSwiGLU.apply)
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
    return ratios | _ratios(partial(_gated_results, tensors=tensors), kernels, shape.dtype)


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


def _ratios(
    run: Callable[[FusedLayers, torch.dtype], Results], kernels: FusedLayers, dtype: torch.dtype
) -> dict[str, float]:
    exact = run(EAGER, torch.float64)
    bands = {name: 8 * FLOAT32_EPS * float(value.abs().max()) for name, value in exact.items()}  # terms that cancel
    return error_ratios(exact, run(EAGER, dtype), run(kernels, dtype), bands)
