"""A causal language model as a packed forward needs it: its parts, its adapters, and what is refused by name.

A `PeftModel` with LoRA injects its layers into the base model in place, so calling the backbone directly includes the
adapters. Nothing else of the wrapper's forward matters here.

What a packed forward cannot compute exactly is refused before anything runs. The probe of `prepare` catches what differs
in numbers. The checks here catch what a random 32-token forest would not show: a soft-cap far above today's scores, an
adapter on the head that is still zero, dropout in evaluation mode, a window or a rotary table that a row outgrows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel


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
    if head is None or backbone is causal_lm:
        raise ValueError(
            f"{type(causal_lm).__name__} is not a causal language model with a backbone and an output head"
        )
    return ModelParts(causal_lm, backbone, head, causal_lm.config.get_text_config(decoder=True))


def kv_shape(config: Any) -> tuple[int, int]:
    """Number of key heads and head size of a text configuration."""
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return num_heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def attention_heads(config: Any) -> tuple[int, int]:
    """Number of query heads and of key heads of a text configuration."""
    return config.num_attention_heads, kv_shape(config)[0]


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


def check_supported(model: torch.nn.Module) -> ModelParts:
    """Raise ValueError, naming the reason, for a model that packed forwards would compute wrongly."""
    for name, config in peft_configs(model).items():
        if getattr(config, "is_prompt_learning", False) or getattr(config, "is_adaption_prompt", False):
            raise ValueError(f"adapter '{name}' uses prompt learning: its virtual tokens have no place in a forest")
    parts = model_parts(model)
    config = parts.config
    softcap = getattr(config, "attn_logit_softcapping", None)
    if softcap is not None:
        raise ValueError(
            f"{type(parts.causal_lm).__name__} has a soft-cap on the attention scores (attn_logit_softcapping={softcap}), "
            "which is not supported"
        )
    if type(parts.head) is not torch.nn.Linear:
        raise ValueError(
            f"the output head is a {type(parts.head).__name__}: an adapter or a replacement on the head is not supported"
        )
    return parts


def check_forward(model: torch.nn.Module, parts: ModelParts, longest_path: int, computes_windows: bool = False) -> None:
    """Raise ValueError for what depends on the call: dropout in training mode, a path that is too long for the model.

    Args:
        longest_path: in tokens.
        computes_windows: the attention that will run lets no row see beyond its layer's window.
    """
    if parts.causal_lm.training:
        for key in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout", "dropout"):
            if getattr(parts.config, key, 0.0):
                raise ValueError(
                    f"dropout is on ({key}={getattr(parts.config, key)}): branches share their prefix's activations, "
                    "so it would not match padded training; set it to 0 or call model.eval()"
                )
        for name, config in peft_configs(model).items():
            if getattr(config, "lora_dropout", 0.0):
                raise ValueError(
                    f"adapter '{name}' has LoRA dropout {config.lora_dropout}: branches share their prefix's activations, "
                    "so it would not match padded training; set lora_dropout=0"
                )
    window = sliding_window(parts.config)
    if window is not None and longest_path > window and not computes_windows:
        raise ValueError(
            f"a path of {longest_path} tokens is longer than the model's sliding window of {window}, which is computed in "
            "training by impl='eager' only; shorten the rows or use a model without a sliding window"
        )
    rope = rope_limit(parts.config)
    if rope is not None and longest_path > rope[0]:
        raise ValueError(
            f"a path of {longest_path} tokens is longer than {rope[0]}, up to which RoPE of type {rope[1]} is the same for "
            "rows of any length; shorten the rows"
        )


def sliding_window(config: Any) -> int | None:
    """The shortest attention window over the layers in tokens, or None when every layer sees everything."""
    if getattr(config, "use_sliding_window", True) is False:
        return None
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and all(kind == "full_attention" for kind in layer_types):
        return None
    return shortest_window(config)


def shortest_window(config: Any) -> int | None:
    """The shortest window in tokens that a layer may have, whatever else the configuration says of its layers."""
    windows = [getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size")]
    return min((window for window in windows if window), default=None)


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


def path_limit(config: Any) -> tuple[int, str] | None:
    """The longest path in tokens that is computed exactly, and what of the model sets it. None: any length."""
    limits = []
    if (window := sliding_window(config)) is not None:
        limits.append((window, f"a sliding window of {window}"))
    if (rope := rope_limit(config)) is not None:
        limits.append((rope[0], f"RoPE of type {rope[1]}, the same up to {rope[0]}"))
    return min(limits, default=None)
