"""Families whose forward is not Llama's: one forest equals one unpadded forward a sequence, in values and every gradient.

Each case changes one thing: what is done to the head's products (a scale, a soft-cap), how attention's output is read,
what is done to its scores (a soft-cap, sinks), heads of values that are smaller than those of keys, other heads in other
layers, positions whose rotary table depends on the longest of them, a window on what a row sees. The oracle is the stock
model with its own attention, a sequence at a time.
"""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AfmoeConfig,
    Cohere2Config,
    CohereConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteSWAConfig,
    HyperCLOVAXConfig,
    JetMoeConfig,
    MiMoV2FlashConfig,
    MiniCPM3Config,
    MistralConfig,
    NanoChatConfig,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
    VaultGemmaConfig,
)
from transformers.masking_utils import create_causal_mask

from cpo_kernels.integrations.transformers import packed_logps, prepare
from cpo_kernels.integrations.transformers.hook import cpo_tree_attention
from cpo_kernels.tree_attention import Window, attention_layer
from tests.cpo_kernels.padded_oracle import pair_sequences, relative_error, trained_gradients, worst_gradient_error
from tests.models.matrix import stock_logps
from tests.tiny import random_pairs, tiny_llama, tiny_model, with_lora

FULL = ["full_attention"] * 2
MIXED = ["sliding_attention", "full_attention"]
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
    "n_shared_experts": 1, "topk_group": 1,
}  # fmt: skip
# configuration class, attention that the stock model has, changes
FAMILIES: dict[str, tuple[type, str, dict[str, Any]]] = {
    "granite": (GraniteConfig, "sdpa", {"logits_scaling": 8.0}),
    "cohere": (CohereConfig, "sdpa", {"logit_scale": 0.0625}),
    "cohere2": (Cohere2Config, "sdpa", {"logit_scale": 4.0, "head_dim": 8, "layer_types": FULL}),
    "hyperclovax": (HyperCLOVAXConfig, "sdpa", {"logits_scaling": 3.0}),
    # scores of this model reach 1.5
    "gemma2": (
        Gemma2Config,
        "eager",
        {"head_dim": 8, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 3.0, "sliding_window": 6},
    ),
    "gemma2, no cap on scores": (
        Gemma2Config,
        "eager",
        {"head_dim": 8, "attn_logit_softcapping": None, "final_logit_softcapping": 3.0},
    ),
    "vaultgemma": (VaultGemmaConfig, "eager", {"head_dim": 8, "attn_logit_softcapping": 0.5}),
    "gemma3": (Gemma3TextConfig, "sdpa", {"head_dim": 8, "final_logit_softcapping": 2.0, "layer_types": FULL}),
    "nanochat": (NanoChatConfig, "sdpa", {"final_logit_softcapping": 2.0}),
    "gpt-oss": (
        GptOssConfig,
        "eager",
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6, "layer_types": MIXED},
    ),
    "granite_swa": (
        GraniteSWAConfig,
        "eager",
        {"sliding_window": 6, "layer_types": MIXED, "initializer_range": 0.1},
    ),
    # sinks and twice as many key heads in the layers with a window
    "mimo_v2_flash": (
        MiMoV2FlashConfig,
        "eager",
        {"head_dim": 8, "v_head_dim": 6, "layer_types": MIXED, "sliding_window": 6, "n_routed_experts": 4,
         "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    # heads of 8 in the one layer and of 16 in the other
    "gemma4": (
        Gemma4TextConfig,
        "sdpa",
        {"head_dim": 8, "global_head_dim": 16, "layer_types": MIXED, "sliding_window": 6,
         "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 97, "num_kv_shared_layers": 0,
         "initializer_range": 0.1},
    ),
    "deepseek_v2": (DeepseekV2Config, "sdpa", LATENT | EXPERTS | {"topk_method": "greedy", "n_group": 1}),
    "deepseek_v3": (DeepseekV3Config, "sdpa", LATENT | EXPERTS | {"n_group": 2, "head_dim": 4}),
    "minicpm3": (MiniCPM3Config, "sdpa", LATENT),
    # their attention takes a view of what the hook gives
    "afmoe": (
        AfmoeConfig,
        "sdpa",
        {"head_dim": 8, "layer_types": FULL, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
         "num_dense_layers": 1, "num_shared_experts": 1},
    ),
    "jetmoe": (JetMoeConfig, "sdpa", {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
}  # fmt: skip


def build(name: str, lora: bool, seed: int = 0) -> nn.Module:
    config_class, attention, changes = FAMILIES[name]
    model = tiny_model(config_class, seed, attention=attention, **changes)
    targets = {
        "jetmoe": ("kv_proj",),
        **dict.fromkeys(("deepseek_v2", "deepseek_v3", "minicpm3"), ("q_b_proj", "o_proj")),
    }
    return with_lora(model, targets=targets.get(name, ("q_proj", "k_proj", "v_proj"))) if lora else model


def gradients(model: nn.Module, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of every trained tensor, under weights that differ from sequence to sequence."""
    model.zero_grad(set_to_none=True)
    (logps * torch.linspace(-1.0, 2.0, len(logps))).sum().backward()
    return trained_gradients(model)


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_family_equals_one_unpadded_forward_a_sequence(name: str, lora: bool, impl: str) -> None:
    sequences, starts = pair_sequences(random_pairs(seed=4))
    stock, packed = build(name, lora), prepare(build(name, lora))
    want = stock_logps(stock, sequences, starts)
    got = packed_logps(packed, sequences, starts, reference="adapter_off" if lora else None, impl=impl)
    assert relative_error(got.segment_logps.detach(), want.detach()) <= 1e-5
    assert worst_gradient_error(gradients(packed, got.segment_logps), gradients(stock, want)) <= 1e-5
    if lora:
        with stock.disable_adapter(), torch.no_grad():
            want = stock_logps(stock, sequences, starts)
        assert relative_error(got.ref_segment_logps, want) <= 1e-5


WINDOWS: dict[str, tuple[type, dict[str, Any]]] = {
    "mistral": (MistralConfig, {"sliding_window": 6}),
    "mistral, two tokens": (MistralConfig, {"sliding_window": 2}),
    "gemma3": (Gemma3TextConfig, {"sliding_window": 6, "head_dim": 8, "layer_types": MIXED}),
    "olmo3": (Olmo3Config, {"sliding_window": 6, "layer_types": MIXED}),
    "cohere2": (Cohere2Config, {"sliding_window": 6, "layer_types": MIXED, "logit_scale": 0.5}),
    "exaone4": (Exaone4Config, {"sliding_window": 6, "layer_types": MIXED}),
    "qwen2": (Qwen2Config, {"sliding_window": 6, "use_sliding_window": True, "layer_types": MIXED}),
    "phi3": (Phi3Config, {"sliding_window": 6}),
    # families that do not read the key by which the window would be off
    "mistral, switched off": (MistralConfig, {"sliding_window": 6, "use_sliding_window": False}),
    "phi3, full layers": (Phi3Config, {"sliding_window": 6, "layer_types": FULL}),
}


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", WINDOWS)
def test_windows_shorter_than_a_path_are_counted_in_depth(name: str, lora: bool, impl: str) -> None:
    config_class, changes = WINDOWS[name]
    sequences, starts = pair_sequences(random_pairs(seed=4))
    stock, packed = (
        with_lora(model, targets=("o_proj", "down_proj")) if lora else model
        for model in (tiny_model(config_class, **changes) for _ in range(2))
    )
    want = stock_logps(stock, sequences, starts)
    got = packed_logps(prepare(packed), sequences, starts, impl=impl)
    assert relative_error(got.segment_logps.detach(), want.detach()) <= 1e-5
    assert worst_gradient_error(gradients(packed, got.segment_logps), gradients(stock, want)) <= 1e-5


def with_rope(kind: str, limit: int, lora: bool = False) -> nn.Module:
    """A Llama or Phi-3 whose rotary table is the same for rows of up to `limit` tokens."""
    rope = {"rope_type": kind, "rope_theta": 100.0, "factor": 4.0}
    if kind == "dynamic":
        model = tiny_llama(rope_parameters=rope, max_position_embeddings=limit + 1)
    else:
        rope |= {"short_factor": [1.0, 1.5, 2.0, 1.0], "long_factor": [2.0, 4.0, 9.0, 3.0]}
        model = tiny_model(
            Phi3Config, rope_parameters=rope, original_max_position_embeddings=limit, sliding_window=None
        )
    return with_lora(model, targets=("o_proj", "down_proj")) if lora else model


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_longest_row_is_exact_up_to_its_original_length(kind: str, lora: bool) -> None:
    sequences, starts = pair_sequences(random_pairs(seed=4))
    longest = max(map(len, sequences))
    stock, packed = (with_rope(kind, longest, lora) for _ in range(2))
    prepare(packed)
    with torch.no_grad():  # a longer row before, as `generate` may write one, leaves no trace
        packed(input_ids=torch.randint(3, 97, (1, longest + 9)), use_cache=False)
    want = stock_logps(stock, sequences, starts)
    got = packed_logps(packed, sequences, starts)
    assert relative_error(got.segment_logps.detach(), want.detach()) <= 1e-5
    assert worst_gradient_error(gradients(packed, got.segment_logps), gradients(stock, want)) <= 1e-5


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_longest_row_is_refused_beyond(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences, starts = pair_sequences(random_pairs(seed=4))
    longest = max(map(len, sequences))
    model = prepare(with_rope(kind, longest - 1))
    with pytest.raises(ValueError, match=rf"path of {longest} tokens is longer than {longest - 1}, .* type {kind}"):
        packed_logps(model, sequences, starts)
    if kind == "longrope":  # what it would be: one row too long changes the tables of all the others
        monkeypatch.setattr("cpo_kernels.integrations.transformers.proof.rope_limit", lambda _: None)
        want = stock_logps(with_rope(kind, longest - 1), sequences, starts).detach()
        assert relative_error(packed_logps(model, sequences, starts).segment_logps.detach(), want) > 1e-3


@pytest.mark.parametrize("name", ["granite", "nanochat"])
def test_frozen_reference_has_logits_of_its_own(name: str) -> None:
    """A scaled or capped reference of an unscaled policy, and the other way round."""
    sequences, starts = pair_sequences(random_pairs(seed=5))
    models = [tiny_llama(), build(name, lora=False, seed=3)]
    for policy, reference in (models, models[::-1]):
        with torch.no_grad():
            want = stock_logps(reference, sequences, starts)
        packed = packed_logps(
            prepare(copy.deepcopy(policy)), sequences, starts, reference=prepare(copy.deepcopy(reference))
        )
        assert relative_error(packed.ref_segment_logps, want) <= 1e-5


def chunk_of_24(size: int) -> Any:
    return lambda batch, head, query, key: (key <= query) & (key // 24 == query // 24)


def causal_mask_of_its_own(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    mask = create_causal_mask(*args, **kwargs)
    return None if mask is None else mask.clone()


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("transformers.masking_utils.sliding_window_causal_mask_function", chunk_of_24),
        ("transformers.models.mistral.modeling_mistral.create_sliding_window_causal_mask", causal_mask_of_its_own),
    ],
    ids=["in chunks", "made by the model itself"],
)
def test_masks_that_are_no_sliding_window_are_refused_beyond_it(
    name: str, function: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = list(range(3, 28))
    with monkeypatch.context() as patch:
        patch.setattr(name, function)
        model = prepare(tiny_model(MistralConfig, sliding_window=24))
        packed_logps(model, [row[:24]], [1])
        with pytest.raises(ValueError, match="longer than 24, up to which decoder layer 0 sees whole rows"):
            packed_logps(model, [row], [1])
    packed_logps(prepare(model), [row], [1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_keep_their_windows(reentrant: bool) -> None:
    sequences, starts = pair_sequences(random_pairs(seed=4))
    found = []
    for checkpointing in (False, True):
        model = prepare(tiny_model(Gemma3TextConfig, sliding_window=6, head_dim=8, layer_types=MIXED)).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found.append(gradients(model, packed_logps(model, sequences, starts).segment_logps))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_window_is_refused_by_an_implementation_without_one() -> None:
    q = torch.zeros(3, 1, 8)
    with pytest.raises(ValueError, match="impl='flash' computes no sliding window"):
        attention_layer(q, q, q, torch.full((3,), 3), None, None, "flash", Window(torch.arange(3), 2))


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_weights_under_autocast_are_no_further_from_float32_than_stock(
    dtype: torch.dtype, lora: bool, impl: str
) -> None:
    sequences, starts = pair_sequences(random_pairs(seed=4))
    exact, stock, packed = (with_lora(tiny_llama()) if lora else tiny_llama() for _ in range(3))
    want = stock_logps(exact, sequences, starts)
    with torch.autocast("cpu", dtype):
        theirs = stock_logps(stock, sequences, starts)
        ours = packed_logps(prepare(packed), sequences, starts, impl=impl).segment_logps
    assert ours.dtype == torch.float32
    assert 0 < relative_error(ours.detach(), want.detach()) <= 2 * relative_error(theirs.detach(), want.detach())
    errors = []
    expected = gradients(exact, want)
    for model, logps in ((packed, ours), (stock, theirs)):
        found = gradients(model, logps)
        errors.append(relative_error(*(torch.cat([g[name].flatten() for name in expected]) for g in (found, expected))))
    assert 0 < errors[0] <= 1.2 * errors[1]


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_under_autocast_reads_rounded_inputs_and_adds_up_in_float32(dtype: torch.dtype, impl: str) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 2, 20, 8, generator=generator) for _ in range(3)]
    options: dict[str, Any] = {"subtree_end": torch.full((20,), 20, dtype=torch.int32), "tree_impl": impl}
    with torch.autocast("cpu", dtype):
        got, _ = cpo_tree_attention(nn.Module(), *inputs, None, **options)
    want, _ = cpo_tree_attention(nn.Module(), *(each.to(dtype) for each in inputs), None, **options)
    assert got.dtype == dtype
    assert torch.equal(got, want)


@pytest.mark.parametrize("change", ["cap", "key", "rows"])
def test_logits_that_the_configuration_does_not_describe_are_refused(change: str) -> None:
    """A soft-cap 50 times above the logits, one that only the configuration has, and logits that the model drops."""
    model = tiny_llama(initializer_range=0.2)
    if change == "cap":
        model.lm_head.register_forward_hook(lambda _module, _inputs, logits: 60.0 * torch.tanh(logits / 60.0))
    elif change == "key":
        model.config.final_logit_softcapping = 60.0
    else:
        model.lm_head.register_forward_hook(lambda _module, _inputs, logits: logits[..., :-1])
    with pytest.raises(ValueError, match=r"(?i)output head.*logits"):
        prepare(model)
