"""Searches of models whose attention is not dense Llama's: greedy answers and log-probs are those of the stock model.

Sliding windows in some layers, sinks, soft-caps on scores, latent attention (keys and values of different head sizes), more
key heads than the configuration says, head sizes that differ by layer. Prompts and thoughts are longer than the windows.
"""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Cohere2Config,
    DeepseekV2Config,
    DeepseekV3Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GptOssConfig,
    JetMoeConfig,
    MiniCPM3Config,
    MistralConfig,
    Olmo3Config,
)
from transformers.modeling_utils import PreTrainedModel

from cpo_fast.search.engine import kv_arena
from cpo_fast.search.engine.arena_engine import ArenaEngine
from cpo_fast.search.engine.kv_arena import KVArena, default_num_tokens, kv_bytes_per_token
from tests.search.engine_cases import (
    TOKENIZER,
    VOCAB_SIZE,
    ask,
    engine_config,
    forked_prompts,
    generated,
    greedy,
    run_searches_of,
)
from tests.tiny import tiny_model

WINDOW = 8
SLIDING: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 2}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
ROUTED: dict[str, Any] = {
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
# configuration, what it changes, and key heads and head size of each layer as its arena has them
MODELS: dict[str, tuple[type, dict[str, Any], list[tuple[int, int]]]] = {
    "mistral": (MistralConfig, {"sliding_window": WINDOW}, [(2, 8)] * 2),
    "gemma3": (Gemma3TextConfig, {"head_dim": 8, **SLIDING}, [(2, 8)] * 2),
    "olmo3": (Olmo3Config, SLIDING, [(2, 8)] * 2),
    "cohere2": (Cohere2Config, SLIDING, [(2, 8)] * 2),
    "exaone4": (Exaone4Config, SLIDING, [(2, 8)] * 2),
    "gemma2": (Gemma2Config, {"head_dim": 8, "attn_logit_softcapping": 2.0, **SLIDING}, [(2, 8)] * 2),
    "gpt-oss": (GptOssConfig, {"head_dim": 8, "rope_parameters": None, **EXPERTS, **SLIDING}, [(2, 8)] * 2),
    "deepseek v2": (DeepseekV2Config, LATENT | ROUTED, [(4, 12)] * 2),
    "deepseek v3": (DeepseekV3Config, LATENT | ROUTED, [(4, 12)] * 2),
    "minicpm3": (MiniCPM3Config, LATENT, [(4, 12)] * 2),
    "jetmoe": (JetMoeConfig, {"kv_channels": 8, **EXPERTS}, [(4, 8)] * 2),
    "gemma4": (
        Gemma4TextConfig,
        {"head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, **SLIDING},
        [(2, 8), (2, 16)],
    ),
}


def build(name: str, **changes: Any) -> PreTrainedModel:
    """Two layers, with sinks that are not zero."""
    config, own, _ = MODELS[name]
    attention = "eager" if name in ("gemma2", "gpt-oss") else "sdpa"  # what Transformers has for them
    shape = {"vocab_size": VOCAB_SIZE, "intermediate_size": 64, "initializer_range": 0.2}
    model = tiny_model(config, seed=1, attention=attention, **(shape | own | changes))
    for module in model.modules():
        if hasattr(module, "sinks"):
            module.sinks.data = torch.linspace(-1, 3, len(module.sinks))
    return model


def engine(model: PreTrainedModel, **changes: Any) -> ArenaEngine:
    return ArenaEngine(model, TOKENIZER, engine_config(**{"arena_tokens": 700, **changes}))


@pytest.mark.parametrize("name", MODELS)
def test_greedy_answers_and_log_probs_are_those_of_the_stock_model(name: str) -> None:
    model = build(name)
    few_shot, prompts = forked_prompts(0, num_groups=1, num_shared=40)
    expected = [generated(model, prompt) for prompt in prompts]
    assert max(map(len, expected)) == 12 > WINDOW
    logps = []
    for prompt, new in zip(prompts, expected, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + new]), use_cache=False).logits[0].double()
        logps.append(torch.log_softmax(logits[len(prompt) - 1 : -1], -1).gather(1, torch.tensor(new)[:, None])[:, 0])
    arena = engine(model)
    assert [keys.shape[1:] for keys, _ in arena.arena.layers] == MODELS[name][2]
    answers = ask(arena, greedy(prompts), few_shot)
    assert [answer.token_ids for answer in answers] == expected
    for answer, want in zip(answers, logps, strict=True):
        np.testing.assert_allclose(answer.logps[: len(want)], want.numpy(), atol=2e-5)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_bits_under_windows_depend_on_nothing_but_the_search(name: str) -> None:
    few_shot, prompts = forked_prompts(11)
    expected = run_searches_of(engine(build(name)), few_shot, prompts)
    assert not any(isinstance(result, Exception) for result in expected.values())
    for changes in ({"batch_size": 5}, {"questions_in_flight": 1, "prefill_tokens": 4096}):
        assert run_searches_of(engine(build(name), **changes), few_shot, prompts) == expected


def test_a_layer_that_is_not_where_it_says_is_refused_before_a_search_starts() -> None:
    model = build("mistral")
    model.model.layers[1].self_attn.layer_idx = 5
    with pytest.raises(ValueError, match="MistralAttention says that it is decoder layer 5 of 2"):
        engine(model)


def test_the_arena_is_sized_by_what_its_layers_store(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, device = [(2, 8), (4, 16)], torch.device("cpu")
    assert kv_bytes_per_token(shapes, torch.float32) == 2 * 4 * (2 * 8 + 4 * 16)
    monkeypatch.setattr(kv_arena, "free_device_bytes", lambda _: 4 * 640 * 1000)
    assert default_num_tokens(shapes, torch.float32, device) == 1000  # a quarter of a CPU's free memory
    arena = KVArena(shapes, 10, torch.float32, device)
    assert [tuple(part.shape) for layer in arena.layers for part in layer] == [(11, 2, 8)] * 2 + [(11, 4, 16)] * 2
