"""The policy: base model, LoRA adapter and reference, ready for packed forwards.

The base keeps its dtype and is frozen. Adapters are float32 and their own master copy. The reference is the weights at
step 0: the base with the adapter off, or, when training starts from a saved adapter, a frozen second copy of it. With
`train.reference_model: base` it is the base there too, and rewards begin elsewhere than at 0.
"""

import copy
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers.pytorch_utils import Conv1D

from cpo_fast.adapter_kinds import reason_against_training
from cpo_fast.adapters import ADAPTER, brings_embeddings, switch_off_dropout
from cpo_fast.config import Config
from cpo_fast.dtype import dtype_name
from cpo_fast.errors import CheckpointError, ConfigError, EnvironmentProblem
from cpo_fast.models import check_forest_adapter, load_model, model_hash, weights_hash
from cpo_kernels.implementation import Implementations, available_implementations
from cpo_kernels.integrations.lora import fuse_lora, keep_input_dtype
from cpo_kernels.integrations.transformers import prepare
from cpo_kernels.integrations.transformers.fused import fuse_layers
from cpo_kernels.integrations.transformers.model import model_parts, reference_adapter
from cpo_kernels.integrations.transformers.proof import check_training
from cpo_kernels.linear_logprob import resolve_linear_logprob
from cpo_kernels.self_check import KernelCheckError
from cpo_kernels.tree_attention import resolve_tree_attention

logger = logging.getLogger(__name__)

REFERENCE_ADAPTER = "reference"
_ADAPTED = (torch.nn.Linear, Conv1D, torch.nn.Embedding)  # modules that a new LoRA is put on


@dataclass(frozen=True)
class Policy:
    """A `PeftModel`, its tokenizer, the name under which `packed_logps` finds the reference, and its kernels.

    `impl` is None until `prepare_policy` has switched the model to forests.
    """

    model: Any
    tokenizer: Any
    reference: str
    impl: Implementations | None = None


def build_policy(config: Config, model: Any = None, tokenizer: Any = None) -> Policy:
    """Load the model, add or load the adapter, check its targets, and prove the forest forward exact.

    This is `load_policy` and `prepare_policy` for a model whose weights are whole.
    """
    policy = load_policy(config, model, tokenizer)
    return prepare_policy(policy.model, policy, config)


def load_policy(config: Config, model: Any = None, tokenizer: Any = None) -> Policy:
    """Load the model, add or load the adapter and check its targets.

    Args:
        config: sections `model`, `lora`, `train` and the seed of the adapter's initialisation are used.
        model, tokenizer: use these instead of loading `config.model`. A `PeftModel` is trained as it is.

    Raises:
        ConfigError: a LoRA target matches no module.
    """
    if model is None or tokenizer is None:
        if config.model.adapter is not None:
            check_forest_adapter(config.model, reason_against_training)
        elif not config.lora.target_modules:
            raise ConfigError("lora.target_modules: the list is empty; name at least one kind of layer, such as q_proj")
        model, tokenizer = load_model(config.model)
    reference = "adapter_off"
    if not hasattr(model, "peft_config"):
        torch.manual_seed(config.seed)
        model = _with_new_adapter(model, config)
    else:
        for name, settings in model.peft_config.items():
            if (reason := reason_against_training(settings.to_dict())) is not None:
                raise ConfigError(f"adapter '{name}' of the model {reason}")
        switch_off_dropout(model)
        if starts_off_reference(config):
            if brings_embeddings(model):
                raise ConfigError(
                    f"train.reference_model=base: {config.model.adapter} brings embeddings of its own, which are in the "
                    "base once it is loaded; leave the key out"
                )
        elif config.model.adapter is not None:
            _add_frozen_copy(model)
            reference = REFERENCE_ADAPTER
    _train_adapter_only(model)
    if config.train.lora_input == "recast":
        keep_input_dtype(model)
    return Policy(model, tokenizer, reference)


def starts_off_reference(config: Config) -> bool:
    """Whether training starts from an adapter and its reference is the base without it."""
    return config.reference_adapter != config.model.adapter


def prepare_policy(model: Any, policy: Policy, config: Config) -> Policy:
    """Switch the model to forests, prove that exact, and decide, for the whole run, which kernels compute them.

    Args:
        model: that of the policy. Under ZeRO 3 the engine passes it in, its weights whole for the length of this call.
        policy: as loaded.
        config: as it was loaded with.

    Raises:
        ConfigError: the model cannot run on a forest, or `train.impl` not on its device.
        EnvironmentProblem: the kernels that would run by default are wrong on this device.
    """
    device_type, impl = next(model.parameters()).device.type, config.train.impl
    choices = [name for name in available_implementations(device_type) if name != "reference"]
    if impl is not None and impl not in choices:
        raise ConfigError(f"train.impl: {impl} cannot run on {device_type}; choose one of {', '.join(choices)}")
    try:
        prepare(model, impl)
        check_training(model, model_parts(model))
        if policy.reference == REFERENCE_ADAPTER:
            with reference_adapter(model, REFERENCE_ADAPTER):
                check_training(model, model_parts(model))
        fuse_layers(model, impl)
        if config.train.lora_input == "recast":
            fuse_lora(model, impl)
        resolved = Implementations(resolve_tree_attention(impl, device_type), resolve_linear_logprob(impl, device_type))
    except KernelCheckError as error:
        raise EnvironmentProblem(str(error)) from error
    except ValueError as error:
        raise ConfigError(f"model.path: {config.model.path} cannot be trained on forests: {error}") from None
    logger.info("base weights: %s on %s", dtype_name(model.get_base_model().dtype), device_type)
    logger.info("kernels: %s", ", ".join(f"{op} {name}" for op, name in asdict(resolved).items()))
    return replace(policy, impl=resolved)


def _with_new_adapter(model: Any, config: Config) -> Any:
    modules = dict(model.named_modules())
    decoder = model.get_decoder()
    text = next((f"{name}." for name, module in modules.items() if module is decoder and name), "")
    outside = False
    linear = sorted({name.rpartition(".")[2] for name, module in modules.items() if type(module) in _ADAPTED[:2]})
    for target in config.lora.target_modules:
        if not target.strip():
            raise ConfigError("lora.target_modules: a name is empty; name a kind of layer, such as q_proj")
        found = {name: each for name, each in modules.items() if name == target or name.endswith(f".{target}")}
        where = f"of {type(model).__name__}; its linear layers are {', '.join(linear)}"
        if not found:
            raise ConfigError(f"lora.target_modules: '{target}' matches no module {where}")
        for name, module in found.items():
            if not isinstance(module, _ADAPTED):
                raise ConfigError(
                    f"lora.target_modules: '{target}' matches {name}, a {type(module).__name__}, which has no weight "
                    f"matrix for LoRA {where}"
                )
        if any(each is model.get_output_embeddings() for each in found.values()):
            raise ConfigError(
                f"lora.target_modules: '{target}' is the output head, whose weight a forest reads directly; leave it out"
            )
        beside = sorted(name for name in found if text and not name.startswith(text))
        if len(beside) == len(found):
            raise ConfigError(
                f"lora.target_modules: '{target}' matches nothing in the text part of {type(model).__name__} "
                f"({text[:-1]}), but {beside[0]}; only the text part is trained"
            )
        outside = outside or bool(beside)
    if outside:
        logger.warning("LoRA is put on the text part alone (%s): no image is trained on", text[:-1])
    lora = PeftLoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        target_modules=list(config.lora.target_modules),
        exclude_modules=f"(?!{re.escape(text)}).*" if outside else None,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    # float32 adapters on a base of any dtype: they are trained directly, without a second master copy
    return get_peft_model(model, lora, adapter_name=ADAPTER, autocast_adapter_dtype=True)


def _add_frozen_copy(model: Any) -> None:
    """Give a model a second copy of its adapter, which keeps the weights of step 0."""
    settings = copy.deepcopy(model.peft_config[ADAPTER])
    settings.inference_mode = True
    if hasattr(settings, "init_lora_weights"):
        settings.init_lora_weights = True  # some other starts take their update away from the base, once more
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    model.add_adapter(REFERENCE_ADAPTER, settings)
    set_peft_model_state_dict(model, state, adapter_name=REFERENCE_ADAPTER)
    model.set_adapter(ADAPTER)


def _train_adapter_only(model: Any) -> None:
    """Let gradients flow into the adapter and nowhere else."""
    for name, parameter in model.named_parameters():
        # some kinds keep modules under the adapter's name, some the parameters themselves
        parameter.requires_grad_(f".{ADAPTER}." in name or name.endswith(f".{ADAPTER}"))
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            raise ConfigError(
                f"{name} would be trained in {dtype_name(parameter.dtype)}, which rounds small steps away; set "
                "model.dtype=float32, or train an adapter without trained copies of the base's modules"
            )


def put_adapter(model: Any, weights: Mapping[str, np.ndarray]) -> None:
    """Overwrite the trainable weights by those of a checkpoint, before an engine is made of them.

    Raises:
        CheckpointError: names or shapes are not those of the model.
    """
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    shapes = {name: tuple(each.shape) for name, each in parameters.items()}
    if shapes != {name: value.shape for name, value in weights.items()}:
        raise CheckpointError("the checkpoint's adapter has other tensors than the model; it is of another training")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(weights[name]))


def base_hash(config: Config, policy: Policy) -> str:
    """16 hex digits that name the base: its files, or the weights of a model that came without. They must be whole."""
    if config.model.path:
        return model_hash(config.model.path)
    weights, adapters = policy.model.get_base_model().state_dict(), set(policy.model.peft_config)
    return weights_hash({name: value for name, value in weights.items() if not adapters & set(name.split("."))})


def checkpoint_layers(model: Any) -> None:
    """Recompute each layer in backward instead of storing its activations."""
    base = model.get_base_model()
    base.config.use_cache = False
    # transformers renames the call, and the old name warns where the new one exists
    enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
