"""LoRA layers that keep their input in the base model's dtype instead of a float32 copy of it.

    y = x W^T + s B A x        PEFT: A x = linear(float32(x), A), and autograd keeps float32(x) for dA

On a 16-bit base with float32 adapters PEFT makes that copy in every adapted layer: 4 E bytes a token each, three times
for q, k and v, which share their input. The cast is exact, so backward can make it again. Then autograd keeps x itself,
once for all layers that read it, and every number stays bitwise what PEFT computes. PEFT's own switch
(`cast_input_dtype_enabled`) and a linear module in the place of A do this. Parameters, their names and files do not
change. Layers of another variant than plain LoRA (DoRA reads the cast input itself) or with LoRA dropout stay as they are.

That is `keep_input_dtype`. `fuse_lora` goes further where Triton runs: to the output of a bfloat16 layer with one plain
float32 adapter `cpo_kernels.fused_layers.add_lora` adds the adapter's in two kernels. PEFT takes seven, and four float32
passes over the output. The results differ by rounding, as is stated there. What it cannot compute goes PEFT's way at each
call: several active adapters, another dtype, autocast, dropout, biases, hooks on A or B (by which ZeRO 3 gathers them).
Merged and disabled adapters are PEFT's too.
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from cpo_kernels.fused_layers import add_lora, resolve_fused_layers

MAX_FUSED_RANK = 64  # of `add_lora`


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


def fuse_lora(model: torch.nn.Module, impl: str | None = None) -> int:
    """Let the LoRA linear layers of a model compute by fused kernels, in place, and return how many may.

    Nothing is changed where the implementation is not "triton", as on a CPU. Every call decides anew whether its dtypes and
    adapters allow it, so adapters may be added, switched, merged and changed afterwards.

    Args:
        model: a `PeftModel` on its device. Any other module gives 0.
        impl: implementation of `fused_layers`, None to choose by device.

    Raises:
        ValueError: `impl` cannot run on the model's device.
        KernelCheckError: nobody chose an implementation, and the Triton kernels are not right on the model's device.
    """
    from peft.tuners.lora.layer import Linear as LoraLinear

    layers = [module for module in model.modules() if getattr(type(module), "forward", None) is LoraLinear.forward]
    if not layers or resolve_fused_layers(impl, next(model.parameters()).device.type) != "triton":
        return 0
    for layer in layers:
        if "forward" not in vars(layer):
            layer.forward = MethodType(_fused_forward, layer)
    return sum(getattr(layer.forward, "__func__", None) is _fused_forward for layer in layers)


def _fused_forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    pair = None if args or kwargs else _fused_pair(self, x)
    if pair is None:
        output: torch.Tensor = type(self).forward(self, x, *args, **kwargs)
        return output
    base = self.base_layer(x)
    return add_lora(base, x, pair[0].weight, pair[1].weight, self.scaling[self.active_adapters[0]], impl="triton")


def _fused_pair(layer: Any, x: torch.Tensor) -> tuple[torch.nn.Linear, torch.nn.Linear] | None:
    """A and B of a layer whose output is its base's plus one plain float32 adapter's, both in bfloat16. Else None."""
    adapters = layer.active_adapters
    if layer.disable_adapters or layer.merged or len(adapters) != 1 or adapters[0] not in layer.lora_A:
        return None
    adapter = adapters[0]
    if adapter in layer.lora_variant or getattr(layer.lora_dropout[adapter], "p", False):
        return None
    if x.dtype != torch.bfloat16 or torch.is_autocast_enabled(x.device.type):
        return None
    pair = layer.lora_A[adapter], layer.lora_B[adapter]
    shapes = (layer.r[adapter], layer.in_features), (layer.out_features, layer.r[adapter])
    if layer.r[adapter] > MAX_FUSED_RANK or not all(map(_is_simple, pair, shapes)):
        return None
    return pair if layer.get_base_layer().weight.dtype == torch.bfloat16 else None


def _is_simple(linear: torch.nn.Linear, shape: tuple[int, int]) -> bool:
    """Whether a module computes with a whole float32 weight and nothing else, so that it need not be called."""
    if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks:
        return False  # before the weight is touched: ZeRO 3 may gather it for that
    return linear.bias is None and linear.weight.dtype == torch.float32 and linear.weight.shape == shape


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
