"""An adapter of any kind that changes in place, or is switched, leaves no stored node of other weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, PeftConfig, TrainableTokensConfig, VeraConfig, get_peft_model

from cpo_fast.search.engine import Requests
from cpo_fast.search.engine.arena_engine import ArenaEngine, weights_fingerprint
from tests.search.engine_cases import TOKENIZER, engine_config, forked_prompts, greedy, small_model

TARGETS = ["q_proj", "down_proj"]


def rescale(model: Any) -> None:
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 3


def other(model: Any) -> None:
    model.set_adapter("other")


def change(part: str) -> Callable[[Any], None]:
    def in_place(model: Any) -> None:
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        (name, *_) = (name for name in tensors if part in name)
        # as loaders do that hold on to `.data`, which counts no change
        tensor = tensors[name].data if "default" in name else tensors[name].detach()
        tensor.mul_(-1.5)

    return in_place


CASES: dict[str, tuple[PeftConfig, Callable[[Any], None]]] = {
    "lora": (LoraConfig(target_modules=TARGETS), change("q_proj.lora_B.default")),
    "scaling": (LoraConfig(target_modules=TARGETS), rescale),
    "other adapter": (LoraConfig(target_modules=TARGETS), other),
    "ia3": (IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]), change("down_proj.ia3_l")),
    "vera": (VeraConfig(r=4, target_modules=["q_proj"]), change("vera_lambda_b.default")),
    "projection of vera": (VeraConfig(r=4, target_modules=["q_proj"]), change("vera_A")),
    "trained copy": (LoraConfig(target_modules=TARGETS, modules_to_save=["norm"]), change("norm.modules_to_save")),
    "other trained copy": (LoraConfig(target_modules=TARGETS, modules_to_save=["norm"]), other),
    "tokens": (TrainableTokensConfig(token_indices=[*range(40)], target_modules=["embed_tokens"]), change("_delta")),
    "norm": (LNTuningConfig(target_modules=["input_layernorm"]), change("ln_tuning_layers.default")),
    "buffer of the base": (LoraConfig(target_modules=TARGETS), change("inv_freq")),
}


def randomize(model: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "default" in name or "other" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_changed_in_place_leaves_no_stale_node(case: str) -> None:
    settings, apply_change = CASES[case]
    settings.task_type = "CAUSAL_LM"
    model = get_peft_model(small_model(), settings)
    if apply_change is other:
        model.add_adapter("other", settings)
    randomize(model)
    few_shot, prompts = forked_prompts(6, num_groups=1)
    engine = ArenaEngine(model, TOKENIZER, engine_config())

    def answers(engine: ArenaEngine) -> Any:
        engine.cache_prefix(few_shot)
        return engine.answer(Requests(greedy(prompts[:2]), keep=True))

    before, name = answers(engine), weights_fingerprint(model)
    assert weights_fingerprint(model) == name, "answers change no weight"
    apply_change(model)
    after = answers(engine)
    assert after == answers(ArenaEngine(model, TOKENIZER, engine_config()))
    assert after != before
