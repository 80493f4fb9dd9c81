"""LoRA layers that keep their input in the base model's dtype instead of a float32 copy of it.

    y = x W^T + s B A x        PEFT: A x = linear(float32(x), A), and autograd keeps float32(x) for dA

On a 16-bit base with float32 adapters PEFT makes that copy in every adapted layer: 4 E bytes a token each, three times
for q, k and v, which share their input. The cast is exact, so backward can make it again. Then autograd keeps x itself,
once for all layers that read it, and every number stays bitwise what PEFT computes. PEFT's own switch
(`cast_input_dtype_enabled`) and a linear module in the place of A do this. Parameters, their names and files do not
change. Layers of another variant than plain LoRA (DoRA reads the cast input itself) or with LoRA dropout stay as they are.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def keep_input_dtype(model: torch.nn.Module) -> int:
    """Change every plain LoRA linear layer of a `PeftModel` in place and return how many there are.

    Call it after the adapters are added: an adapter added later to a changed layer needs another call.

    Args:
        model: a `PeftModel`. Any other module gives 0.
    """
    from peft.tuners.lora.layer import Linear as LoraLinear

    layers = [module for module in model.modules() if isinstance(module, LoraLinear) and _is_plain(module)]
    for layer in layers:
        layer.cast_input_dtype_enabled = False
        for name, linear in layer.lora_A.items():
            if not isinstance(linear, RecastLinear):
                layer.lora_A[name] = RecastLinear.of(linear)
    return len(layers)


class RecastLinear(torch.nn.Linear):
    """A linear layer without bias that takes an input of any dtype and computes in its weight's."""

    @classmethod
    def of(cls, linear: torch.nn.Linear) -> "RecastLinear":
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        layer.weight = linear.weight
        return layer.train(linear.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # [..., E] -> [..., r]
        if input.dtype == self.weight.dtype:
            return super().forward(input)
        output: torch.Tensor = _CastLinear.apply(input, self.weight)
        return output


class _CastLinear(torch.autograd.Function):
    """`F.linear(x.to(weight.dtype), weight)` that keeps x [..., E] as it came. Weight [r, E]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.to(weight.dtype), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grad_outputs[0].flatten(0, -2)  # [T, r]
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).view(x.shape).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = grad.t() @ x.flatten(0, -2).to(weight.dtype)
        return grad_x, grad_weight


def _is_plain(layer: Any) -> bool:
    dropouts = (getattr(dropout, "p", 0.0) for dropout in layer.lora_dropout.values())
    biases = (linear.bias is not None for linear in layer.lora_A.values())
    return not layer.lora_variant and not any(dropouts) and not any(biases)
