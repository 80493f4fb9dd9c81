"""Norms, MLPs and rotary encoding of a Transformers model computed by `cpo_kernels.fused_layers`, where Triton runs.

A module is changed only if the bytecode of its class's forward is that of `LlamaRMSNorm` or of `LlamaMLP`, which Mistral,
Qwen2, Qwen3, SmolLM3, Granite and others repeat word for word. An attention module keeps its own code, in which the name
`apply_rotary_pos_emb` stands for the fused function, if what it stood for has the bytecode of Llama's. Norms that add one
to the weight (Gemma) or multiply before they round (Olmo2), MLPs with another activation or with one product for gate
and up, and modules whose forward somebody has replaced stay as they are. What changes is the `forward` of a single module:
classes, parameters and their names do not. The projections are still called as modules, so adapters and hooks on them
(PEFT, ZeRO 3) see what they saw.
"""

import logging
from collections.abc import Callable
from functools import cache
from types import FunctionType, MethodType
from typing import Any

import torch
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from cpo_kernels.fused_layers import resolve_fused_layers, rms_norm, rotary, swiglu
from cpo_kernels.implementation import default_implementation
from cpo_kernels.integrations.transformers.model import model_parts
from cpo_kernels.integrations.transformers.prepare import check_kernels
from cpo_kernels.integrations.transformers.rotary import FUNCTION, RotationWrapper

logger = logging.getLogger(__name__)


def fuse_layers(model: torch.nn.Module, impl: str | None = None) -> int:
    """Let a model's norms, MLPs and attention modules compute by fused kernels, in place, and return how many do.

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
    logger.info("fused layers: %d norms, MLPs and attention modules of %s", count, type(parts.causal_lm).__name__)
    return count


def unfuse_layers(model: torch.nn.Module) -> int:
    """Give every module that `fuse_layers` changed its own forward back, and return how many there were."""
    fused = [module for module in model.modules() if _is_fused(module)]
    for module in fused:
        del module.forward
    return len(fused)


def _rms_norm_forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return rms_norm(hidden_states, self.weight, self.variance_epsilon, impl="triton")


def _apply_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    if unsqueeze_dim != 1 or {k.dtype, cos.dtype, sin.dtype} != {q.dtype} or cos.requires_grad:
        return _rotation_of_llama(q, k, cos, sin, unsqueeze_dim)
    return rotary(q, k, cos, sin, impl="triton")


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
    return _attention_forward(forward) if isinstance(forward, FunctionType) else None


@cache
def _attention_forward(forward: FunctionType) -> Callable[..., torch.Tensor] | None:
    """The same code with the fused rotation under the name of the stock one, or None where that is another."""
    stock = _without_wrapper(forward.__globals__.get(FUNCTION))
    if FUNCTION not in forward.__code__.co_names or not _same_code(stock, _rotation_of_llama):
        return None
    if not _same_code(stock.__globals__.get("rotate_half"), modeling_llama.rotate_half):
        return None
    # a decode forward may still leave the rotation to its attention function
    scope = forward.__globals__ | {FUNCTION: RotationWrapper(_apply_rotary)}
    fused = FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
    fused.__kwdefaults__ = forward.__kwdefaults__
    fused.__module__ = __name__  # by which a proof knows it
    _FUSED.add(fused)
    return fused


def _without_wrapper(function: Any) -> Any:
    return function.original if isinstance(function, RotationWrapper) else function


_rotation_of_llama = _without_wrapper(modeling_llama.apply_rotary_pos_emb)
_FUSED: set[Any] = {_rms_norm_forward, _mlp_forward}


def _is_fused(module: torch.nn.Module) -> bool:
    return getattr(vars(module).get("forward"), "__func__", None) in _FUSED


def _same_code(one: Any, other: Any) -> bool:
    """Whether two functions do the same: equal instructions, constants and names, and `torch` is torch in both."""
    if not isinstance(one, FunctionType) or one.__globals__.get("torch") is not torch:
        return False
    return _code_parts(one) == _code_parts(other)


def _code_parts(function: FunctionType) -> tuple[Any, ...]:
    code = function.__code__
    constants = code.co_consts[function.__doc__ is not None :]  # a docstring is the first
    return code.co_code, constants, code.co_names, code.co_freevars
