"""A tiny configuration of any causal language model that Transformers has, made from the defaults of its class.

Sizes are replaced by what their names say. Lists with an entry a layer are cut to the first layer of each kind, so that
every kind of layer occurs. Windows become shorter than the test's paths, scales and soft-caps become values that show.
What this rule cannot know stands in `CHANGES`. A new model type needs nothing here unless its class refuses these sizes.
"""

import re
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCAB_SIZE = 97
WINDOW = 24  # tokens: more than the probe of `prepare` runs through, fewer than the deepest path of the test's forest
NUM_LAYERS = 2
MAX_LAYERS = 4  # of a model with more kinds of layers

# pattern of a key's whole name, and its value; the first that matches counts. A key whose default is None is left alone
_SIZES: tuple[tuple[str, Any], ...] = (
    (r"(unpadded_|shape_|pronunciation_)?vocab_size(_per_layer_input)?|encoder_hash_byte_group_vocab", VOCAB_SIZE),
    (r"pad_token_id", 0),
    (r"(bos|eos|sep|cls|decoder_start|eod|start|mask)_token_id", 1),
    (r"n_heads?|num_heads|(num_|swa_num_)?attention_heads|(num_)?(de|en)coder_attention_heads", 4),
    (r"num_key_value_heads|num_kv_heads|swa_num_key_value_heads|num_query_groups", 2),
    (r"hidden_size|d_model|n_embd|emb_dim|((in|out)put_)?embedding_size|word_embed_proj_dim", 32),
    (r"embed_dim|embedding_dim|lru_width|attention_hidden_size", 32),
    (r"(swa_|qk_rope_|qk_nope_|index_|attention_|linear_|linear_key_|linear_value_)?head_dim", 8),
    (r"d_head|dim_head|attention_head_size|kv_channels", 8),
    (r"rotary_dim", 4),
    (r"qk_head_dim", 16),
    (r"v_head_dim", 12),
    (r"(kv|q|o)_lora_rank", 16),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size|intermediate_size_mlp|feed_forward_size|dim_ff|dff|d_inner)", 48),
    (r"hidden_size_per_layer_input|laurel_rank|router_hidden_size|hc_lowrank|ple_embed_dim", 8),
    (r"(num_(de|en)coder_layers|(de|en)coder_layers|n_layers?|num_layers|num_hidden_layers|num_blocks)", NUM_LAYERS),
    (r"(num_experts|num_local_experts|n_routed_experts|moe_num_experts)", 4),
    (r"(num_experts_per_tok(en)?|moe_topk|moe_k)", 2),
    (r"(n_group|n_groups|topk_group|num_expert_group|n_shared_experts|num_shared_experts|moe_num_shared_experts)", 1),
    (r"zero_expert_num", 2),
    (r"(first_k_dense_replace|num_dense_layers)", 1),
    (r"(max_position_embeddings|n_positions|max_seq_len|n_ctx|model_max_length|context_length|max_target_positions)", 256),
    (r"index_block_size", 2),
    (r"linear_num_(key_|value_)?heads|index_n_heads", 2),
    (r"(.*dropout.*|.*_pdrop|.*layerdrop|.*jitter_noise)", 0.0),
    (r"(attn|final)_logit_softcapping", 1.5),
    (r"query_pre_attn_scalar", 8),
    (r"logits_scaling", 3.0),
    (r"logit_scale", 0.5),
    (r"dim_model_base", 16),  # divides logits; that of the real width makes a tiny model certain of every token
    (r"(embedding|residual|attention|lm_head)_multiplier", 0.7),
)  # fmt: skip
_RULES = [(re.compile(pattern), value) for pattern, value in _SIZES]
_WINDOWS = re.compile(
    r"sliding_window(_size)?|attention_window_size|attention_chunk_size|window_size|local_attention"
    r"|local_attention_window_len|keep_window_size|index_topk|indexer_budget"
)
_LAYERS = re.compile(r"num_hidden_layers|n_layers?|num_layers|(num_)?decoder_layers|num_blocks")

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_DOTS3 = {
    "head_dim": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 12,
}  # fmt: skip
_QWEN4 = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": WINDOW,
    "indexer_compress_ratio": 2, "ngram_vocab_size_base": 97,
}  # fmt: skip
_ZAMBA = {
    "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 64,
    "attention_head_dim": 16,
}  # fmt: skip
# model type -> keys that the rule above gets wrong, or lacks
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": _DOTS3,
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.95, 0.0] * 2,
    },
    "granitemoehybrid": {"mamba_n_heads": 8},
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "mamba2": {"num_heads": 8},
    "mllama": {"text_config": {"cross_attention_layers": [1]}},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {"axial_pos_embds_dim": (8, 24), "axial_pos_shape": (16, 16)},
    "xmod": {"default_language": "en_XX"},
    "zamba": _ZAMBA,
    "zamba2": _ZAMBA,
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
# model type -> why no tiny model of it can be built or run, even by Transformers alone
UNBUILT: dict[str, str] = {
    "gemma3n": "its image tower is built by timm, which is not installed here; `gemma3n_text` is its text part",
    "gemma4_assistant": "drafts tokens from another model's keys and values, and is no model of text alone",
    "gemma4_unified_assistant": "drafts tokens from another model's keys and values, and is no model of text alone",
}


def architectures() -> list[str]:
    """Model types that Transformers maps to a causal language model."""
    return sorted({config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING})


def tiny_config(model_type: str, window: int = WINDOW) -> PreTrainedConfig:
    """A configuration of a few thousand parameters, whose layers with a window or a choice of keys see `window` tokens."""
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**_smaller(config_class(), CHANGES.get(model_type, {}), window))


def _smaller(config: PreTrainedConfig, changes: dict[str, Any], window: int) -> dict[str, Any]:
    """Keyword arguments for a small configuration of the class of `config`."""
    keys = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    small: dict[str, Any] = {}
    for name, value in keys.items():
        if isinstance(value, PreTrainedConfig):
            small[name] = _smaller(value, changes.get(name, {}), window)
            continue
        if name == "head_dim" and value is None:
            small[name] = 8
        if isinstance(value, bool) or value is None:
            continue
        if _WINDOWS.fullmatch(name):
            small[name] = window
        elif name == "index_topk_blocks":  # of two tokens
            small[name] = window // 2
        found = next((new for pattern, new in _RULES if pattern.fullmatch(name)), None)
        if found is not None:
            small[name] = [found] * len(value) if isinstance(value, list) else found
            if type(value) is int and found == int(found):
                small[name] = int(found)
    if "kv_lora_rank" in keys:  # latent attention has a key head a query head
        small |= {name: small["num_attention_heads"] for name in keys if name == "num_key_value_heads"}
    depth = next((value for name, value in keys.items() if _LAYERS.fullmatch(name) and isinstance(value, int)), 0)
    layerwise = {
        name: value for name, value in keys.items() if isinstance(value, list) and len(value) == depth > MAX_LAYERS
    }
    if layerwise:
        kinds: dict[str, int] = {}
        for layer in range(depth):
            kinds.setdefault(str([value[layer] for value in layerwise.values()]), layer)
        chosen = sorted([*kinds.values()][:MAX_LAYERS])
        chosen += [layer for layer in range(depth) if layer not in chosen][: max(0, NUM_LAYERS - len(chosen))]
        small |= {
            name: [small.get(name, value)[layer] for layer in sorted(chosen)] for name, value in layerwise.items()
        }
        small |= {name: len(chosen) for name in keys if _LAYERS.fullmatch(name)}
    if set(keys.get("layer_types") or ()) == {"full_attention"} and "sliding_window" in keys:
        small["layer_types"] = ["sliding_attention", "full_attention"]  # as some checkpoints of the type have them
        small["sliding_window"] = window
    if "use_sliding_window" in keys:
        small["use_sliding_window"] = True
    if "is_decoder" in keys:
        small["is_decoder"] = True
    small |= {"initializer_range": 0.2} if "initializer_range" in keys else {}
    return small | {name: value for name, value in changes.items() if not isinstance(small.get(name), dict)}


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Matrices of deviation 0.2, other parameters near what they were, from one generator: nothing is zero or equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)


def tiny_model(model_type: str, seed: int = 0, window: int = WINDOW) -> PreTrainedModel:
    """A random model in float32 and evaluation mode, with the attention that Transformers chooses for it."""
    config = tiny_config(model_type, window)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not isinstance(config, model_class.config_class):  # a model of several towers, whose text part this class is
        parts = [each for each in vars(config).values() if isinstance(each, model_class.config_class)]
        config = parts[0] if parts else config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class._from_config(config)
    randomize(model, seed)
    return model.eval()
