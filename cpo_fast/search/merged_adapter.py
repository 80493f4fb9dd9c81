"""Search with the adapter inside the base weights, and put those back bit for bit afterwards.

    W' = round(W + sum_a s_a B_a A_a)      a: the active adapters; float32, rounded once to the dtype of W

A live adapter costs two small products more in every layer that it changes, for every token; a merged one costs none.
The original weights wait in host memory and are copied back: subtracting the update again would leave a 16-bit W a little
different after every search. The rounding makes it another policy than base plus live adapter, so the option counts among
what decides the trees (`SearchConfig.deciding`). `train.merge` writes a merged model for good; nothing is written here.

torch and peft are imported inside the functions: this module is cheap to import.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpo_fast.errors import ConfigError

if TYPE_CHECKING:
    import torch

OPTION = "search.merge_adapter"


@dataclass(frozen=True, eq=False)
class _Target:
    """A layer that is merged: PEFT's module, the base weight inside it [out, in], and the adapters that change it."""

    layer: Any
    weight: "torch.Tensor"
    adapters: list[str]


@contextmanager
def merged_adapter(model: Any) -> Iterator[None]:
    """Merge the active LoRA adapters of a PEFT model for the length of a `with`; no live product is computed in it.

    However the block ends, every weight is then as it was, bit for bit, and the adapters are live again. Each way a
    weight's counter of changes moves on and PEFT's `merged_adapters` differ, so an engine drops what it had stored.

    Raises:
        ConfigError: there is no active adapter, or one that is no plain sum onto a weight of its own.
    """
    import torch

    targets = _targets(model)
    originals: list[torch.Tensor] = []
    try:
        for target in targets:
            originals.append(target.weight.detach().to("cpu", copy=True))
            _write(target.weight, _sum(target))
            target.layer.merged_adapters = list(target.adapters)
        yield
    finally:
        for target, original in zip(targets, originals, strict=False):
            _write(target.weight, original)
            target.layer.merged_adapters = []


def _write(weight: "torch.Tensor", values: "torch.Tensor") -> None:
    """Change a weight in place: its address stays, its counter of changes moves on."""
    import torch

    with torch.no_grad():
        weight.copy_(values)


def _sum(target: _Target) -> "torch.Tensor":
    """The merged weight [out, in], rounded once."""
    import torch

    layer, weight = target.layer, target.weight
    with torch.no_grad():
        dtype = torch.promote_types(weight.dtype, torch.float32)
        total = weight.detach().to(dtype, copy=True)
        for name in target.adapters:
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight  # [r, in], [out, r]
            update = (b.to(weight.device, dtype) @ a.to(weight.device, dtype)) * layer.scaling[name]
            total += update.T if layer.fan_in_fan_out else update
        return total.to(weight.dtype)


def _targets(model: Any) -> list[_Target]:
    """Every layer that an active adapter changes; refuses what a sum of weights would not compute exactly."""
    if not getattr(model, "peft_config", None):
        raise ConfigError(
            f"{OPTION}: the model has no adapter to merge; set model.adapter to its folder, or {OPTION}=false"
        )
    from peft.tuners.tuners_utils import BaseTunerLayer

    # how many modules hold a parameter at this address
    holders = Counter(parameter.data_ptr() for _, parameter in model.named_parameters(remove_duplicate=False))
    targets: list[_Target] = []
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            _check(name, layer, holders)
            adapters = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
            if adapters:
                targets.append(_Target(layer, layer.get_base_layer().weight, adapters))
    if not targets:
        raise ConfigError(
            f"{OPTION}: no active LoRA adapter changes a layer of the model; activate one, or set {OPTION}=false"
        )
    return targets


def _check(name: str, layer: Any, holders: "Counter[int]") -> None:
    reason = _reason_against(layer, holders)
    if reason is not None:
        raise ConfigError(f"{OPTION}: {name} {reason}; set {OPTION}=false to search with the adapter live")


def _reason_against(layer: Any, holders: "Counter[int]") -> str | None:
    import torch
    from peft.tuners.lora.layer import Linear

    # quantised layers, embeddings and other methods than LoRA have classes of their own
    if type(layer) is not Linear:
        return f"holds an adapter of kind {type(layer).__module__}.{type(layer).__name__}, not LoRA on a plain linear layer"
    if layer.merged:
        return "has its adapter merged already"
    if layer.disable_adapters:
        return "has its adapters switched off"
    for adapter in layer.active_adapters:
        if adapter in layer.lora_variant:
            variant = type(layer.lora_variant[adapter]).__name__
            return (
                f"has a LoRA variant ({variant} in adapter '{adapter}') whose update is not a plain sum onto the weight"
            )
        if layer.lora_bias.get(adapter):
            return f"has a bias in adapter '{adapter}', which no weight can take up"
    weight = layer.get_base_layer().weight
    if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return f"has a quantised weight ({weight.dtype}), which cannot take up the update exactly"
    if holders[weight.data_ptr()] > 1:
        return "shares its weight with another module, which would change too"
    return None
