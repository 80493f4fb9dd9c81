"""Adapters: found and named, loaded onto a base, saved, copied, and merged into the base weights for a search.

    W' = round(W + sum_a s_a B_a A_a)      a: the active adapters. Float32, rounded once to the dtype of W

A live adapter costs two small products in every layer that it changes, for every token. A merged one costs none, but the
rounding makes it another policy. `models.merge` writes a merged model for good.

torch and peft are imported inside the functions: this module is cheap to import.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpo_fast.adapter_kinds import reason_against_loading
from cpo_fast.base_sample import keep_sample
from cpo_fast.errors import CheckpointError, ConfigError, EnvironmentProblem, first_line, require_library
from cpo_fast.files import aside_of, file_digest, files_hash, removed_on_error

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

ADAPTER = "default"  # the name, inside a model, of the adapter that is trained or loaded
_SAVES_EMBEDDINGS = (
    "_cpo_saves_embeddings"  # attribute of a PeftModel whose adapter's file holds embeddings of the base
)


def adapter_folder(path: str) -> Path:
    """The folder of a PEFT adapter. Raises CheckpointError when it holds none in safetensors."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"model.adapter: there is no folder {path}; give the folder that training wrote")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise CheckpointError(f"model.adapter: {path} holds no {name}; give a PEFT adapter saved as safetensors")
    return folder


def adapter_hash(path: str | Path | None) -> str:
    """16 hex digits that name a PEFT adapter by its weights and settings, or the empty string when there is none.

    Raises:
        CheckpointError: the folder is not a PEFT adapter in safetensors.
    """
    if path is None:
        return ""
    folder, settings = adapter_folder(str(path)), adapter_settings(str(path))
    settings.pop("base_model_name_or_path", None)  # trained elsewhere, the same adapter is the same
    canonical = json.dumps(settings, sort_keys=True).encode()
    return files_hash(
        {
            "adapter_config.json": hashlib.sha256(canonical).hexdigest(),
            "adapter_model.safetensors": file_digest(folder / "adapter_model.safetensors"),
        }
    )


def adapter_settings(path: str) -> dict[str, Any]:
    """What `adapter_config.json` says. Raises CheckpointError where there is none."""
    file = adapter_folder(path) / "adapter_config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({first_line(error)})") from None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file} cannot be read (it holds no JSON object)")
    return settings


def check_adapter(path: str, *reasons_against: Callable[[Mapping[str, Any]], str | None]) -> None:
    """Refuse an adapter by its settings, before a model is loaded.

    Args:
        path: its folder.
        reasons_against: of `adapter_kinds`. Why it cannot be loaded is asked first.

    Raises:
        CheckpointError: the folder holds no adapter. ConfigError: it holds one of a kind that is not computed.
    """
    settings = adapter_settings(path)
    for reason_against in (reason_against_loading, *reasons_against):
        reason = reason_against(settings)
        if reason is not None:
            raise ConfigError(f"model.adapter: {path} {reason}")


def load_adapter(model: Any, path: str) -> Any:
    """Wrap `model` by the adapter in folder `path`, refusing one whose weights are not exactly the ones needed."""
    check_adapter(path)
    peft, safetensors, torch = (require_library(name) for name in ("peft", "safetensors", "torch"))
    folder = adapter_folder(path)
    _check_known(path, peft)
    try:
        wrapped = peft.PeftModel.from_pretrained(model, str(folder))
        with safetensors.safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            saved = set(file.keys())
            integers = {name for name in saved if not file.get_tensor(name).is_floating_point()}
            damaged = sorted(name for name in saved - integers if not torch.isfinite(file.get_tensor(name)).all())
    except torch.OutOfMemoryError:  # a RuntimeError, but the folder is not to blame
        raise
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"model.adapter: the weights in {path} are damaged ({first_line(error)})") from error
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ArithmeticError, AssertionError, re.error
    ) as error:  # fmt: skip
        raise CheckpointError(
            f"model.adapter: {path} does not fit the model ({first_line(error)}); it was trained on another one, or its "
            "adapter_config.json is damaged"
        ) from error
    if damaged:
        raise CheckpointError(f"model.adapter: {damaged[0]} in {path} has NaN or infinity; the adapter is damaged")
    needed = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    saves_embeddings = False
    if saved != needed.keys():
        more = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=True)
        saves_embeddings = saved >= more.keys()  # PEFT has put them into the base
        needed = more if saves_embeddings else needed
    # PEFT only warns here, and an adapter that is half applied looks like one that learnt nothing
    wrong_kind = {name for name, value in needed.items() if value.is_floating_point() == (name in integers)}
    astray = sorted(needed.keys() ^ saved | wrong_kind)
    if astray:
        raise CheckpointError(
            f"model.adapter: {len(astray)} weight(s) in {path} do not fit the model, the first {astray[0]}; "
            "the adapter was trained on another model"
        )
    setattr(wrapped, _SAVES_EMBEDDINGS, saves_embeddings)
    return wrapped


def _check_known(path: str, peft: Any) -> None:
    """Refuse settings of a newer PEFT, which the installed one would leave out with no more than a warning."""
    settings = adapter_settings(path)
    fields = peft.PEFT_TYPE_TO_CONFIG_MAPPING[settings["peft_type"]].__dataclass_fields__
    unknown = [f"{key}={value!r}" for key, value in sorted(settings.items()) if value and key not in fields]
    if unknown:
        raise EnvironmentProblem(
            f"model.adapter: {path} was saved by a newer PEFT than {peft.__version__}, which does not know its setting "
            f"{unknown[0][:60]}; pip install -U peft"
        )


def brings_embeddings(model: Any) -> bool:
    """Whether the adapter of a `PeftModel` came with embeddings, which stand in the base since it was loaded."""
    return bool(getattr(model, _SAVES_EMBEDDINGS, False))


def switch_off_dropout(model: Any) -> None:
    """Set every dropout of a PEFT model's adapters to 0, in their configurations and in their modules, with a warning."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[str, float] = {}
    for config in model.peft_config.values():
        for key, value in vars(config).items():
            if key.endswith("dropout") and isinstance(value, int | float) and value:
                found[key] = value
                setattr(config, key, 0.0)
    for layer in (module for module in model.modules() if isinstance(module, BaseTunerLayer)):
        for key, children in layer.named_children():
            for name, dropout in children.named_children() if key.endswith("dropout") else ():
                if getattr(dropout, "p", 0.0):
                    found.setdefault(key, dropout.p)
                    setattr(children, name, _no_dropout())
    for key, value in found.items():
        logger.warning(
            "%s=%g of the adapter is set to 0: branches of a forest share their prefix's activations, so that none can be "
            "dropped for one of them alone",
            key,
            value,
        )


def _no_dropout() -> Any:
    import torch

    return torch.nn.Identity()  # as PEFT makes of 0: a Dropout of 0 draws numbers all the same


def save_adapter(model: Any, folder: Path, zero_stage: int, writes: bool = True, card: str | None = None) -> None:
    """Write PEFT's two files, README.md and `base_sample.json` beside `folder`, check them, then rename.

    `card` is what the README.md says (see `cpo_fast.model_card`); None leaves PEFT's.

    Raises:
        CheckpointError: the written file lacks a tensor or holds an empty one.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    options = {"save_embedding_layers": brings_embeddings(model)}
    saved_parameters = _saved_parameters(model)
    with _gathered(list(saved_parameters.values()), zero_stage):  # every rank takes part, whether it writes or not
        # copies outlive the gathering
        copies = {name: each.detach().to("cpu", copy=True) for name, each in saved_parameters.items()}
        whole = {name: copies.get(name, value) for name, value in model.state_dict().items()}
    if not writes:
        return
    state = get_peft_model_state_dict(model, whole, ADAPTER, **options)
    aside = aside_of(folder)
    shutil.rmtree(aside, ignore_errors=True)
    with removed_on_error(aside):
        # names as the model has them: PEFT makes those of the file out of them
        model.save_pretrained(aside, selected_adapters=[ADAPTER], state_dict=whole, **options)
        with safe_open(aside / "adapter_model.safetensors", framework="pt") as file:
            written = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - not a mapping
        # a tensor that ZeRO-3 holds in parts and that was not gathered has no elements
        if {key: list(value.shape) for key, value in state.items()} != written or any(0 in s for s in written.values()):
            raise CheckpointError(
                f"{aside}: the written adapter does not hold the {len(state)} tensors that were trained"
            )
        if card is not None:
            (aside / "README.md").write_text(card, encoding="utf-8")
        keep_sample(aside, model.get_base_model())
        _replace(aside, folder)


def copy_adapter(source: Path, target: Path) -> None:
    """Copy an adapter folder over another, whole or not at all."""
    aside = aside_of(target)
    shutil.rmtree(aside, ignore_errors=True)
    with removed_on_error(aside):
        shutil.copytree(source, aside)
        _replace(aside, target)


def _replace(aside: Path, folder: Path) -> None:
    old = aside_of(folder).with_suffix(".old")
    try:
        if folder.exists():  # a folder that is not empty cannot be renamed over
            os.replace(folder, old)
        os.replace(aside, folder)
    except BaseException:  # a signal, too
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _saved_parameters(model: Any) -> "dict[str, torch.Tensor]":
    """By name, the parameters that may go into the adapter's file."""
    saved = {name: each for name, each in model.named_parameters() if each.requires_grad}
    if brings_embeddings(model):
        base = model.get_base_model()
        embeddings = (base.get_input_embeddings(), base.get_output_embeddings())
        addresses = {id(each) for module in embeddings if module is not None for each in module.parameters()}
        every = model.named_parameters(remove_duplicate=False)  # tied ones have two names
        saved |= {name: each for name, each in every if id(each) in addresses}
    return saved


def _gathered(parameters: "list[torch.Tensor]", zero_stage: int) -> AbstractContextManager[Any]:
    if zero_stage < 3:
        return nullcontext()
    import deepspeed

    # no rank changes what is gathered
    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parameters, modifier_rank=None)
    return context


OPTION = "search.merge_adapter"


@dataclass(frozen=True, eq=False)
class _Target:
    """A layer that is merged: PEFT's module, the base weight inside it [out, in], and the adapters that change it."""

    name: str
    layer: Any
    weight: "torch.Tensor"
    adapters: list[str]


@contextmanager
def merged_adapter(model: Any) -> Iterator[None]:
    """Merge the active LoRA adapters of a PEFT model for the length of a `with`. No live product is computed in it.

    However the block ends, every weight is then as it was, bit for bit, and the adapters are live again.

    Raises:
        ConfigError: there is no active adapter, or one that is no plain sum onto a weight of its own.
    """
    import torch

    targets = _targets(model)
    originals: list[torch.Tensor] = []
    try:
        for target in targets:
            # kept aside, because subtracting the update again would leave a 16-bit weight a little different
            originals.append(target.weight.detach().to("cpu", copy=True))
            _write(target.weight, _sum(target))
            target.layer.merged_adapters = list(target.adapters)  # PEFT computes no live product for these
        yield
    finally:
        # where something raised half way, only the first layers have been changed
        for target, original in zip(targets, originals, strict=False):
            _write(target.weight, original)
            target.layer.merged_adapters = []


def _write(weight: "torch.Tensor", values: "torch.Tensor") -> None:
    import torch

    # in place: the address stays, and the counter of changes that moves on lets an engine drop what it had stored
    with torch.no_grad():
        weight.copy_(values)


def _sum(target: _Target) -> "torch.Tensor":
    """The merged weight [out, in], rounded once."""
    import torch

    layer, weight = target.layer, target.weight
    with torch.no_grad():
        dtype = torch.promote_types(weight.dtype, torch.float32)  # float64 stays float64
        total = weight.detach().to(dtype, copy=True)
        for name in target.adapters:
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight  # [r, in], [out, r]
            update = (b.to(weight.device, dtype) @ a.to(weight.device, dtype)) * layer.scaling[name]
            total += update.T if layer.fan_in_fan_out else update
        rounded = total.to(weight.dtype)
        if not torch.isfinite(rounded).all():
            raise ConfigError(
                f"{OPTION}: {target.name} has NaN or infinity in {weight.dtype} after merging; the adapter or the base is "
                f"damaged, or outgrows its dtype; set {OPTION}=false to search with the adapter live"
            )
        return rounded


def _targets(model: Any) -> list[_Target]:
    """Every layer that an active adapter changes. Refuses what a sum of weights would not compute exactly."""
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
                targets.append(_Target(name, layer, layer.get_base_layer().weight, adapters))
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
