"""Search with the adapter inside the base weights, and put those back bit for bit afterwards.

    W' = round(W + sum_a s_a B_a A_a)      a: the active adapters; float32, rounded once to the dtype of W

A live adapter costs two small products more in every layer that it changes, for every token; a merged one costs none.
The original weights wait in host memory and are copied back: subtracting the update again would leave a 16-bit W a little
different after every search. The rounding makes it another policy than base plus live adapter, so the option counts among
what decides the trees (`SearchConfig.deciding`). `train.merge` writes a merged model for good; nothing is written here.

torch and peft are imported inside the functions: this module is cheap to import.

Saving the adapter in PEFT's own format, gathered from ZeRO-3 shards, whole or not at all.

Merge an adapter into its base model, and measure what the merge changed before anything is kept.

    W' = round(W + (alpha / r) B A)

The sum is made in float32 and rounded once to the base dtype. Rounding is a change: the merged model is compared with base
plus adapter, token by token, as KL divergence of their next-token distributions on real prompts, and refused above a limit.
"""

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model_state_dict
from safetensors import safe_open

from cpo_fast.config import Config
from cpo_fast.errors import CheckpointError, ConfigError
from cpo_fast.models import load_model
from cpo_fast.train.policy import ADAPTER

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


def save_adapter(model: Any, folder: Path, zero_stage: int) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` beside `folder`, check them, then rename.

    Raises:
        CheckpointError: the written file lacks a tensor or holds an empty one.
    """
    with _gathered(model, zero_stage):
        state = {
            key: value.detach().to("cpu", copy=True)
            for key, value in get_peft_model_state_dict(
                model, adapter_name=ADAPTER, save_embedding_layers=False
            ).items()
        }
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside, selected_adapters=[ADAPTER], state_dict=state, save_embedding_layers=False)
    with safe_open(aside / "adapter_model.safetensors", framework="pt") as file:
        written = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - not a mapping
    if {key: list(value.shape) for key, value in state.items()} != written or any(0 in s for s in written.values()):
        raise CheckpointError(f"{aside}: the written adapter does not hold the {len(state)} tensors that were trained")
    _replace(aside, folder)


def copy_adapter(source: Path, target: Path) -> None:
    """Copy an adapter folder over another, whole or not at all."""
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(source, aside)
    _replace(aside, target)


def _replace(aside: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(aside, folder)
    shutil.rmtree(old, ignore_errors=True)


def _gathered(model: Any, zero_stage: int) -> AbstractContextManager[Any]:
    if zero_stage < 3:
        return nullcontext()
    import deepspeed

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(trainable, modifier_rank=None)
    return context


MAX_PROMPTS = 16  # texts that are compared; a few thousand positions


@dataclass(frozen=True)
class MergeResult:
    """Where the merged model is, and KL(adapter || merged) per position in nats."""

    path: Path
    mean_kl: float
    max_kl: float
    num_positions: int


def merge(config: Config, target: Path, texts: Sequence[str], max_mean_kl: float) -> MergeResult:
    """Write `config.model.path` with `config.model.adapter` merged in to `target`.

    Args:
        config: section `model`; its dtype is the dtype of the merged weights.
        target: folder that must not hold a model yet.
        texts: prompts on which the two models are compared; the first 16 are used.
        max_mean_kl: limit on the mean divergence, in nats.

    Raises:
        ConfigError: no adapter is set, or the target exists.
        CheckpointError: the merged model differs by more than the limit; nothing is written.
    """
    if config.model.adapter is None:
        raise ConfigError("model.adapter is not set; give the folder of the adapter to merge")
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target}: the folder is not empty; choose another one for the merged model")
    model, tokenizer = load_model(config.model)
    batches = [tokenizer(text, return_tensors="pt").input_ids.to(model.device) for text in texts[:MAX_PROMPTS]]
    expected = _log_probs(model, batches)
    dtype = model.get_base_model().dtype
    del model
    model, _ = load_model(config.model.model_copy(update={"dtype": "float32"}))
    merged = model.merge_and_unload().to(dtype)
    divergences = torch.cat(
        [
            (left.exp() * (left - right)).sum(dim=-1).flatten()
            for left, right in zip(expected, _log_probs(merged, batches), strict=True)
        ]
    ).clamp_min(0)
    mean_kl, max_kl = float(divergences.mean()), float(divergences.max())
    if not mean_kl <= max_mean_kl:
        raise CheckpointError(
            f"the merged model differs from base plus adapter by {mean_kl:.2e} nats a token on average, more than "
            f"{max_mean_kl:.2e}; merge in float32 (model.dtype=float32) or keep the adapter apart"
        )
    target.mkdir(parents=True, exist_ok=True)
    merged.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return MergeResult(target, mean_kl, max_kl, divergences.numel())


def _log_probs(model: Any, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [torch.log_softmax(model(ids).logits.double(), dim=-1) for ids in batches]
