"""Adapters off for the reference: what PEFT's own switch gives, for every kind, without asking layers for their status."""

from typing import Any

import peft
import pytest
import torch

from cpo_kernels.integrations.transformers.model import reference_adapter
from tests.tiny import tiny_llama

TARGETS = ["q_proj", "v_proj", "down_proj"]
KINDS = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, use_dora=True),
    "trained copies": lambda: peft.LoraConfig(
        r=4, target_modules=TARGETS, init_lora_weights=False, modules_to_save=["norm"]
    ),
    "token deltas": lambda: peft.LoraConfig(
        r=4, target_modules=TARGETS, init_lora_weights=False, trainable_token_indices={"embed_tokens": [1, 2]}
    ),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=TARGETS, init_weights=False),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"], init_ia3_weights=False),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
}


def adapted(kind: str) -> Any:
    torch.manual_seed(1)
    model = peft.get_peft_model(tiny_llama(), KINDS[kind]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "ia3" in name:
                parameter.add_(torch.rand_like(parameter))
    return model.eval()


def state(model: Any) -> list[Any]:
    flags = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    switches = [module._disable_adapters for module in model.modules() if hasattr(module, "_disable_adapters")]
    return [flags, switches, model._adapters_disabled, list(model.active_adapters)]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_off_is_what_peft_gives_and_everything_is_as_it_was_afterwards(kind: str) -> None:
    model, ids = adapted(kind), torch.tensor([[1, 2, 3, 4, 1]])
    before, on = state(model), model(ids).logits
    with model.disable_adapter():
        expected = model(ids).logits
    for name, flag in before[0]:  # PEFT's switch has its own idea of them
        model.get_parameter(name).requires_grad_(flag)
    with reference_adapter(model, None):
        assert torch.equal(model(ids).logits, expected)
    assert not torch.equal(on, expected)
    assert state(model) == before
    assert torch.equal(model(ids).logits, on)
    with pytest.raises(KeyError), reference_adapter(model, None):
        raise KeyError
    assert state(model) == before


def test_lora_is_switched_without_asking_for_the_status_of_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's switch does: a tenth of a second for 32 layers, twice a micro-batch."""
    model = adapted("lora")
    monkeypatch.setattr(type(model), "get_model_status", lambda self: pytest.fail("asked"))
    with reference_adapter(model, None):
        assert not model.active_adapters or model._adapters_disabled


@torch.no_grad()
def test_layers_that_were_off_before_stay_off() -> None:
    model, ids = adapted("lora"), torch.tensor([[1, 2, 3, 4, 1]])
    model.base_model.disable_adapter_layers()
    before, off = state(model), model(ids).logits
    with reference_adapter(model, None):
        assert torch.equal(model(ids).logits, off)
    assert state(model) == before
    assert torch.equal(model(ids).logits, off)
