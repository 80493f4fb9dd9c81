"""The parts of a causal language model that a packed forward needs: backbone, output head, configuration.

A `PeftModel` with LoRA injects its layers into the base model in place, so calling the backbone directly includes the
adapters. Nothing else of the wrapper's forward matters here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True)
class ModelParts:
    """Views into a model; the modules are the model's own."""

    causal_lm: PreTrainedModel
    backbone: torch.nn.Module
    head: torch.nn.Module
    config: Any  # the text configuration


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


def unwrap_peft(model: torch.nn.Module) -> torch.nn.Module:
    """The base model inside a `PeftModel`, or the module itself."""
    if peft_configs(model):
        base: torch.nn.Module = model.get_base_model()  # type: ignore[operator]
        return base
    return model


def peft_configs(model: torch.nn.Module) -> dict[str, Any]:
    """Adapter configurations by name; empty when the model is no `PeftModel`. Does not import peft."""
    configs = getattr(model, "peft_config", None)
    return configs if isinstance(configs, dict) and hasattr(model, "get_base_model") else {}


@contextmanager
def reference_adapter(model: torch.nn.Module, name: str | None) -> Iterator[None]:
    """Run with adapter `name` active, or with every adapter off (None); afterwards all is as it was.

    PEFT's own switches also turn `requires_grad` on and off; the flags are put back exactly.
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
