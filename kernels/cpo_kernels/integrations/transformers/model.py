"""A causal language model as a packed forward needs it: its parts, its adapters, and what is refused by name.

A `PeftModel` with LoRA injects its layers into the base model in place, so calling the backbone directly includes the
adapters. Nothing else of the wrapper's forward matters here.

What a packed forward cannot compute exactly is refused before anything runs. The probe of `prepare` catches what differs
in numbers. The checks here catch what a random 32-token forest would not show: a soft-cap far above today's scores, an
adapter on the head that is still zero, dropout in evaluation mode, a window or a rotary table that a row outgrows.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

# classes of modules whose output at a token depends on its neighbours in the row
_ROW_STATE = re.compile(
    r"Mamba(2?Mixer|2|Layer|Block)?$|MambaMixer|Mamba2|SSM|Rwkv|Rglru|RecurrentBlock|Delta(Net|Attention)|ShortConv"
    r"|LinearAttention|LightningAttention|Retention|[xms]LSTM|Compressor$"
)


@dataclass(frozen=True)
class ModelParts:
    """Views into a model, whose modules these are."""

    causal_lm: PreTrainedModel
    backbone: torch.nn.Module
    head: torch.nn.Module
    config: Any  # the text configuration
    defers_rotation: bool = False  # a decode forward leaves rotary position encoding to the attention function


def model_parts(model: torch.nn.Module) -> ModelParts:
    """Find backbone and head of a `PreTrainedModel` or a `PeftModel` around one.

    Raises:
        TypeError: any other module, such as DDP, FSDP or a DeepSpeed engine.
        ValueError: the model has no output embeddings or no separate backbone.
    """
    causal_lm = unwrap_peft(model)
    if not isinstance(causal_lm, PreTrainedModel):
        raise TypeError(
            f"expected a transformers PreTrainedModel or a PeftModel, got {type(model).__name__}; "
            "call this inside the module that you wrap, not on the wrapper"
        )
    backbone, head = causal_lm.base_model, causal_lm.get_output_embeddings()
    if backbone is causal_lm:  # its class names another attribute than it has
        inner = [child for child in causal_lm.children() if isinstance(child, PreTrainedModel)]
        backbone = inner[0] if len(inner) == 1 else causal_lm
    if head is None or backbone is causal_lm:
        raise ValueError(
            f"{type(causal_lm).__name__} is not a causal language model with a backbone and an output head"
        )
    return ModelParts(causal_lm, backbone, head, causal_lm.config.get_text_config(decoder=True))


def decoder_layers(parts: ModelParts) -> list[torch.nn.Module]:
    """The decoder layers in the order they run.

    Raises:
        ValueError: the model holds no list of them.
    """
    num_layers: int | None = getattr(parts.config, "num_hidden_layers", None)
    decoder: Any = parts.causal_lm.get_decoder() or parts.backbone
    for module in (
        parts.backbone,
        decoder,
        *decoder.modules(),
    ):  # OPT and multimodal models hold them one module deeper
        for child in module.children():
            if isinstance(child, torch.nn.ModuleList) and len(child) == num_layers:
                return list(child)
    raise ValueError(
        f"{type(parts.causal_lm).__name__} cannot be checked layer by layer: its backbone holds no list of its "
        f"{'' if num_layers is None else f'{num_layers} '}decoder layers"
    )


def kv_shape(config: Any) -> tuple[int, int]:
    """Number of key heads and head size of a text configuration."""
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return num_heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def unwrap_peft(model: torch.nn.Module) -> torch.nn.Module:
    """The base model inside a `PeftModel`, or the module itself."""
    if peft_configs(model):
        base: torch.nn.Module = model.get_base_model()  # type: ignore[operator]
        return base
    return model


def peft_configs(model: torch.nn.Module) -> dict[str, Any]:
    """Adapter configurations by name, none when the model is no `PeftModel`. Does not import peft."""
    configs = getattr(model, "peft_config", None)
    return configs if isinstance(configs, dict) and hasattr(model, "get_base_model") else {}


@contextmanager
def reference_adapter(model: torch.nn.Module, name: str | None) -> Iterator[None]:
    """Run with adapter `name` active, or with every adapter off (None). Afterwards all is as it was.

    PEFT's own switches also turn `requires_grad` on and off. The flags are put back exactly.
    """
    if name is None and (layers := _plain_adapter_layers(model)):
        with _switched_off(model, layers):
            yield
        return
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        if name is None:
            with model.disable_adapter():  # type: ignore[operator]
                yield
        else:
            active = list(model.active_adapters)  # type: ignore[arg-type]
            model.set_adapter(name)  # type: ignore[operator]
            try:
                yield
            finally:
                model.base_model.set_adapter(active)  # type: ignore[union-attr, operator]
                model.active_adapter = active[0]
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _plain_adapter_layers(model: torch.nn.Module) -> list[Any]:
    """Layers whose adapters are off where their own flag says so. Empty where some layer does more than that."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    is_plain = all(getattr(type(layer), "enable_adapters", None) is BaseTunerLayer.enable_adapters for layer in layers)
    return layers if is_plain else []


@contextmanager
def _switched_off(model: Any, layers: Sequence[Any]) -> Iterator[None]:
    """As `PeftModel.disable_adapter`, which asks for the status of every layer: a tenth of a second for 32 layers."""
    before = [layer._disable_adapters for layer in layers]
    was_off = model._adapters_disabled
    try:
        model._adapters_disabled = True
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        model._adapters_disabled = was_off
        for layer, flag in zip(layers, before, strict=True):
            layer._disable_adapters = flag


def check_adapters(model: torch.nn.Module) -> None:
    """Raise ValueError for adapters of a `PeftModel` that live around its forward, which packed forwards go past."""
    for name, config in peft_configs(model).items():
        if getattr(config, "is_prompt_learning", False) or getattr(config, "is_adaption_prompt", False):
            raise ValueError(f"adapter '{name}' uses prompt learning: its virtual tokens have no place in a forest")


def moves_weights_only(hook: Any) -> bool:
    """Whether a forward hook is one of a library that fetches weights or asks for gradients and changes no number."""
    name = getattr(getattr(hook, "func", hook), "__name__", "")
    return comes_from(hook, ("accelerate", "deepspeed")) or name == "make_inputs_require_grads"


def comes_from(function: Any, libraries: tuple[str, ...]) -> bool:
    """Whether a function, a method, a partial call or a callable object is defined in one of some libraries.

    A wrapper often bears the name of what it wraps, so the module whose names it reads counts as well.
    """
    function = getattr(function, "func", function)
    own = getattr(function, "__module__", None) or type(function).__module__
    scope = getattr(getattr(function, "__func__", function), "__globals__", {}).get("__name__", own)
    return any(module.partition(".")[0] in libraries for module in (own, scope))


def fetches_weights(module: torch.nn.Module) -> bool:
    """Whether a hook of a library gives a module its weights only while it runs, as under ZeRO 3."""
    return any(map(moves_weights_only, (*module._forward_hooks.values(), *module._forward_pre_hooks.values())))


def check_layers(parts: ModelParts) -> None:
    """Raise ValueError for a decoder layer with a state that runs along the row: a recurrence or a convolution."""
    names = {id(module): name for name, module in parts.causal_lm.named_modules()}
    for layer in decoder_layers(parts):
        for module in layer.modules():
            if isinstance(module, torch.nn.RNNBase | torch.nn.Conv1d) or _ROW_STATE.search(type(module).__name__):
                raise ValueError(
                    f"{names[id(module)]} ({type(module).__name__}) carries a state from token to token, which in a forest "
                    "would run from one branch into the next; use a model whose layers are all attention"
                )


def check_supported(model: torch.nn.Module) -> ModelParts:
    """Raise ValueError, naming the reason, for a model that packed forwards would compute wrongly."""
    check_adapters(model)
    parts = model_parts(model)
    _check_head(parts.head)
    for name, module in parts.causal_lm.named_modules():
        for adapter, variant in getattr(module, "lora_variant", {}).items():
            if "ALora" in getattr(variant, "__name__", type(variant).__name__):
                raise ValueError(
                    f"adapter '{adapter}' on {name} is an activated LoRA: PEFT tells it around the model's forward where "
                    "it begins in a row, which a forest has no place for; use a plain LoRA (alora_invocation_tokens=None)"
                )
    check_layers(parts)
    return parts


def _check_head(head: torch.nn.Module) -> None:
    """Raise ValueError for a head that is more than the weight and bias that are read from it."""
    if isinstance(head, torch.nn.ModuleList):
        raise ValueError(
            f"the output head is a list of {len(head)}, one for each of several tokens that the model gives at a place: a "
            "forest has one; use another model"
        )
    if type(head) is not torch.nn.Linear:
        raise ValueError(
            f"the output head is a {type(head).__name__}: an adapter, a trained copy or a replacement of the head is not "
            "supported; leave it out of target_modules and modules_to_save"
        )
    for hook in (*head._forward_hooks.values(), *head._forward_pre_hooks.values()):
        if not moves_weights_only(hook):
            raise ValueError(
                f"the output head has a forward hook ({getattr(hook, '__qualname__', type(hook).__name__)}): its weight is "
                "read directly, so what the hook does to the logits would be left out; remove the hook"
            )


def rope_limit(config: Any) -> tuple[int, str] | None:
    """The longest path in tokens that leaves the rotary table what it is, and the kind of RoPE. None: any length.

    Tables of these kinds change when the longest row of a call outgrows the length that the model was trained at. A
    forest has one table for all its rows, so they are exact up to there. Read from `dynamic_rope_update` of Transformers.
    """
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    limits = []
    # some models have one entry for each type of layer
    for entry in [parameters, *(value for value in parameters.values() if isinstance(value, dict))]:
        kind = entry.get("rope_type") or entry.get("type") or ""
        if kind == "longrope":
            limits.append((entry.get("original_max_position_embeddings") or config.max_position_embeddings, kind))
        elif "dynamic" in kind:
            # a row as long as the model's positions keeps the table of a longer one before it
            limits.append((config.max_position_embeddings - 1, kind))
    return min(limits, default=None)
