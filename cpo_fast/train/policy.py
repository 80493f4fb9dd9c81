"""The policy: base model, LoRA adapter and reference, ready for packed forwards.

The base keeps its dtype and is frozen; adapters are float32 and their own master copy. The reference is the weights at
step 0: the base with the adapter off, or, when training starts from a saved adapter, a frozen second copy of it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model

from cpo_fast.config import Config
from cpo_fast.errors import ConfigError
from cpo_fast.models import load_model
from cpo_kernels.integrations.transformers import prepare

ADAPTER = "default"
REFERENCE_ADAPTER = "reference"


@dataclass(frozen=True)
class Policy:
    """A prepared `PeftModel`, its tokenizer, and the name under which `packed_logps` finds the reference."""

    model: Any
    tokenizer: Any
    reference: str


def build_policy(config: Config, model: Any = None, tokenizer: Any = None) -> Policy:
    """Load the model, add or load the adapter, check its targets, and prove the forest forward exact (`prepare`).

    Args:
        config: sections `model`, `lora`, `train` and the seed of the adapter's initialisation are used.
        model, tokenizer: use these instead of loading `config.model`; a `PeftModel` is trained as it is.

    Raises:
        ConfigError: a LoRA target matches no module, or the model cannot run on a forest.
    """
    if model is None or tokenizer is None:
        model, tokenizer = load_model(config.model)
    reference = "adapter_off"
    if not hasattr(model, "peft_config"):
        torch.manual_seed(config.seed)
        model = _with_new_adapter(model, config)
    elif config.model.adapter is not None:
        model.load_adapter(config.model.adapter, adapter_name=REFERENCE_ADAPTER, is_trainable=False)
        model.set_adapter(ADAPTER)
        reference = REFERENCE_ADAPTER
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{ADAPTER}." in name)
    try:
        prepare(model)
    except ValueError as error:
        raise ConfigError(f"model.path: {config.model.path} cannot be trained on forests: {error}") from None
    _checkpoint_layers(model, config.train.gradient_checkpointing)
    return Policy(model, tokenizer, reference)


def _with_new_adapter(model: Any, config: Config) -> Any:
    names = {name for name, _ in model.named_modules()}
    for target in config.lora.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            linear = sorted(
                {name.rpartition(".")[2] for name, m in model.named_modules() if type(m) is torch.nn.Linear}
            )
            raise ConfigError(
                f"lora.target_modules: '{target}' matches no module of {type(model).__name__}; its linear layers are "
                f"{', '.join(linear)}"
            )
    lora = PeftLoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        target_modules=list(config.lora.target_modules),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    # float32 adapters on a base of any dtype: they are trained directly, without a second master copy
    return get_peft_model(model, lora, adapter_name=ADAPTER, autocast_adapter_dtype=True)


def _checkpoint_layers(model: Any, variant: str) -> None:
    if variant == "off":
        return
    base = model.get_base_model()
    base.config.use_cache = False
    reentrant = variant == "reentrant"
    # transformers renames the call; the old name warns where the new one exists
    enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    if reentrant:
        base.enable_input_require_grads()  # a reentrant checkpoint needs one input that requires a gradient
