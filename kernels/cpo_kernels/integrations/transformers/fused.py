"""RMSNorm and MLP modules of a Transformers model computed by `cpo_kernels.fused_layers`, where Triton runs.

A module is changed only if the bytecode of its class's forward is that of `LlamaRMSNorm` or of `LlamaMLP`, which Mistral,
Qwen2, Qwen3, SmolLM3, Granite and others repeat word for word. Norms that add one to the weight (Gemma) or multiply before
they round (Olmo2), MLPs with another activation or with one product for gate and up, and modules whose forward somebody
has replaced stay as they are. What changes is the `forward` of the single module: classes, parameters and their names do
not. The projections are still called as modules, so adapters and hooks on them (PEFT, ZeRO 3) see what they saw.
"""

import logging
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from cpo_kernels.fused_layers import resolve_fused_layers, rms_norm, swiglu
from cpo_kernels.implementation import default_implementation
from cpo_kernels.integrations.transformers.model import model_parts
from cpo_kernels.integrations.transformers.prepare import check_kernels

logger = logging.getLogger(__name__)


def fuse_layers(model: torch.nn.Module, impl: str | None = None) -> int:
    """Let a model's RMSNorm and MLP modules compute by fused kernels, in place, and return how many do.

    Nothing is changed where the implementation is not "triton", as on a CPU: plain torch is what the modules are already.

    Args:
        model: a `PreTrainedModel` or a `PeftModel` around one, on its device.
        impl: implementation of `fused_layers`, None to choose by device.

    Raises:
        TypeError: not such a model.
        ValueError: `impl` cannot run on the model's device.
        KernelCheckError: nobody chose an implementation, and the Triton kernels are not right on the model's device.
    """
    parts = model_parts(model)
    device_type = next(parts.causal_lm.parameters()).device.type
    if impl is None and default_implementation(device_type) == "triton":
        check_kernels(parts, ("fused_layers",))
    if resolve_fused_layers(impl, device_type) != "triton":
        return 0
    for module in parts.causal_lm.modules():
        forward = _fused_forward(module)
        if forward is not None:
            module.forward = MethodType(forward, module)
    count = sum(map(_is_fused, parts.causal_lm.modules()))
    logger.info("fused layers: %d norms and MLPs of %s", count, type(parts.causal_lm).__name__)
    return count


def unfuse_layers(model: torch.nn.Module) -> int:
    """Give every module that `fuse_layers` changed its own forward back, and return how many there were."""
    fused = [module for module in model.modules() if _is_fused(module)]
    for module in fused:
        del module.forward
    return len(fused)


def _rms_norm_forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return rms_norm(hidden_states, self.weight, self.variance_epsilon, impl="triton")


def _mlp_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x), impl="triton"))
    return output


def _fused_forward(module: torch.nn.Module) -> Callable[..., torch.Tensor] | None:
    """What computes the same as a module, or None."""
    if "forward" in vars(module):  # fused already, or replaced by somebody else
        return None
    forward = type(module).forward
    if _same_code(forward, LlamaRMSNorm.forward):
        return _rms_norm_forward
    if _same_code(forward, LlamaMLP.forward) and type(module.act_fn) in (SiLUActivation, torch.nn.SiLU):
        return _mlp_forward
    return None


def _is_fused(module: torch.nn.Module) -> bool:
    forward = vars(module).get("forward")
    return getattr(forward, "__func__", None) in (_rms_norm_forward, _mlp_forward)


def _same_code(one: Any, other: Any) -> bool:
    """Whether two functions do the same: equal instructions, constants and names, and `torch` is torch in both."""
    codes = [getattr(function, "__code__", None) for function in (one, other)]
    if any(code is None for code in codes) or one.__globals__.get("torch") is not torch:
        return False
    first, second = ((code.co_code, code.co_consts, code.co_names, code.co_freevars) for code in codes)  # type: ignore[union-attr]
    return bool(first == second)
