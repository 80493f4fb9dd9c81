"""Multimodal models by their text part: LoRA on it alone, numbers of the stock forward, one sentence for the others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from cpo_fast.config import Config
from cpo_fast.errors import ConfigError
from cpo_fast.models import load_model
from cpo_fast.train.policy import build_policy, load_policy
from cpo_kernels.integrations.transformers import packed_logps
from tests.cpo_kernels.padded_oracle import padded_logps
from tests.tiny import SHAPE, randomize_lora, tiny_tokenizer

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 8, "patch_size": 4}
PROMPT = list(range(20, 32))
SEQUENCES, STARTS = [[*PROMPT, 40, 41, 42, 43], [*PROMPT, 40, 44, 45], [9, 8, 7]], [12, 12, 1]


def text_shape(folder: Path, **changes: Any) -> dict[str, Any]:
    return SHAPE | {"vocab_size": len(tiny_tokenizer(folder))} | changes


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma3")
    layers = ["sliding_attention", "full_attention"]
    text = text_shape(folder, head_dim=8, sliding_window=6, layer_types=layers)
    config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, initializer_range=0.2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def config_of(folder: Path, *targets: str, **model: Any) -> Config:
    model = {"path": str(folder), "dtype": "float32", "device": "cpu"} | model
    return Config.model_validate({"model": model, "lora": {"target_modules": list(targets)}})


def test_lora_is_on_the_text_part_alone_with_the_stock_models_numbers(
    gemma: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_policy(config_of(gemma, "q_proj", "v_proj")).model
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 8  # A and B of two modules in two layers
    assert all(".language_model." in name for name in trained)
    assert "LoRA is put on the text part alone (model.language_model)" in caplog.text
    randomize_lora(model)
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(gemma), tmp_path, is_trainable=True).eval()
    results = []
    expected = padded_logps(stock, SEQUENCES, STARTS)
    for found, each in ((packed_logps(model, SEQUENCES, STARTS).segment_logps, model), (expected, stock)):
        found.square().sum().backward()
        results.append((found.detach(), {n: p.grad for n, p in each.named_parameters() if p.requires_grad}))
    (ours, gradients), (theirs, expected_gradients) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert set(gradients) == set(expected_gradients)
    for name, gradient in gradients.items():
        assert gradient is not None
        other = expected_gradients[name]
        assert float((gradient - other).norm()) <= 1e-5 * float(other.norm()), name
    again, _ = load_model(config_of(gemma, adapter=str(tmp_path)).model)
    torch.testing.assert_close(padded_logps(again, SEQUENCES, STARTS), theirs, rtol=1e-6, atol=1e-6)


def test_a_target_in_the_image_tower_alone_is_refused(gemma: Path) -> None:
    with pytest.raises(ConfigError, match=r"'fc1' matches nothing in the text part .*vision_tower"):
        load_policy(config_of(gemma, "q_proj", "fc1"))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_model_that_transformers_loads_by_no_causal_class_is_refused_by_one_sentence(
    name: str, tmp_path: Path
) -> None:
    text = text_shape(tmp_path)
    if name == "llava":
        vision = VISION | {"model_type": "clip_vision_model"}
        model: Any = LlavaForConditionalGeneration(
            LlavaConfig(text_config=text | {"model_type": "llama"}, vision_config=vision)
        )
    else:
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"no causal language model for .*Config\).* save that part as a text model"):
        load_model(config_of(tmp_path).model)
