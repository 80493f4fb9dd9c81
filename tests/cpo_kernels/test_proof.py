"""The proof of `prepare` holds for the model that is called: what runs is looked at, and a change is seen at each call."""

import copy
import sys
import time
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, PromptTuningConfig, RandLoraConfig, VeraConfig, get_peft_model
from torch import nn
from transformers import (
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GptOssConfig,
    JambaConfig,
    Lfm2Config,
    LlamaConfig,
    MiniMaxConfig,
    MixtralConfig,
    NemotronConfig,
    Olmo3Config,
    OPTConfig,
    Phi3Config,
    PhimoeConfig,
    Qwen2Config,
    SeedOssConfig,
    StableLmConfig,
    Starcoder2Config,
)
from transformers.integrations.neftune import neftune_post_forward_hook

from cpo_kernels.integrations.transformers import fused, packed_logps, prepare
from cpo_kernels.integrations.transformers.model import model_parts
from cpo_kernels.integrations.transformers.proof import (
    check_call,
    check_path,
    check_training,
    path_limit,
    proved_windows,
    shortest,
)
from cpo_kernels.integrations.trl import _route_forward
from cpo_kernels.tree_attention import WINDOWED
from tests.tiny import tiny_llama, tiny_mistral, tiny_model, with_lora

ROWS = [list(range(3, 23)), [*range(3, 13), *range(40, 50)]]  # two paths of 20 tokens, shared to the tenth
STARTS = [10, 10]


def score(model: nn.Module, **options: Any) -> torch.Tensor:
    return packed_logps(model, ROWS, STARTS, **options).segment_logps


def stock(model: nn.Module) -> torch.Tensor:
    """The summed log-probs of one unpadded forward a sequence."""
    sums = []
    with torch.no_grad():
        for row, start in zip(ROWS, STARTS, strict=True):
            logps = model(input_ids=torch.tensor([row])).logits[0, :-1].log_softmax(-1)
            sums.append(logps.gather(1, torch.tensor(row[1:]).unsqueeze(1))[start - 1 :].sum())
    return torch.stack(sums)


def lora_whose_configuration_says_no_dropout() -> nn.Module:
    model = with_lora(tiny_llama(), dropout=0.3)
    model.peft_config["default"].lora_dropout = 0.0  # the modules keep theirs
    return model


def adapter_added_by_transformers() -> nn.Module:
    model = tiny_llama()
    model.add_adapter(LoraConfig(target_modules=["q_proj"], lora_dropout=0.3))
    return model


def with_neftune(model: Any) -> Any:
    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = 5.0
    embeddings.register_forward_hook(neftune_post_forward_hook)
    return model


EXPERTS: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": None}
# model, words of the refusal in training mode. In evaluation mode each is exact
RANDOM: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "lora_dropout=0 on the configuration only": (lora_whose_configuration_says_no_dropout, r"lora_dropout.*p=0\.3"),
    "add_adapter": (adapter_added_by_transformers, r"lora_dropout.*p=0\.3"),
    "get_base_model of a PEFT model": (
        lambda: with_lora(tiny_llama(), dropout=0.1).get_base_model(),
        r"layers\.0\.self_attn\.q_proj\.lora_dropout",
    ),
    "residual dropout of Seed-OSS": (
        lambda: tiny_model(SeedOssConfig, head_dim=8, attention_dropout=0.0, residual_dropout=0.1),
        r"self_attn.*residual_dropout=0\.1",
    ),
    "defaults of GPT-2": (lambda: tiny_model(GPT2Config, embd_pdrop=0.1), r"transformer\.drop \(Dropout, p=0\.1\)"),
    "defaults of BigCode": (
        lambda: tiny_model(GPTBigCodeConfig, embd_pdrop=0.1),
        r"transformer\.drop \(Dropout, p=0\.1",
    ),
    "defaults of OPT": (
        lambda: tiny_model(OPTConfig, ffn_dim=48, word_embed_proj_dim=32, dropout=0.1),
        r"OPTDecoderLayer, dropout=0\.1",
    ),
    "embedding dropout of Starcoder2": (
        lambda: tiny_model(Starcoder2Config, embedding_dropout=0.1, sliding_window=None),
        r"embedding_dropout=0\.1",
    ),
    "residual dropout of Starcoder2": (
        lambda: tiny_model(Starcoder2Config, residual_dropout=0.1, sliding_window=None),
        r"residual_dropout=0\.1",
    ),
    "router jitter of Mixtral": (
        lambda: tiny_model(MixtralConfig, router_jitter_noise=0.1, **EXPERTS),
        r"jitter_noise=0\.1",
    ),
    "defaults of PhiMoE": (lambda: tiny_model(PhimoeConfig, **EXPERTS), r"(?i)phimoe"),
    "VeRA": (
        lambda: get_peft_model(tiny_llama(), VeraConfig(target_modules=["q_proj"], r=4, vera_dropout=0.1)),
        r"vera_dropout",
    ),
    "RandLoRA": (
        lambda: get_peft_model(tiny_llama(), RandLoraConfig(target_modules=["q_proj"], r=4, randlora_dropout=0.1)),
        r"randlora_dropout",
    ),
    "NEFTune": (lambda: with_neftune(tiny_llama()), r"embed_tokens.*neftune_noise_alpha=5"),
    "functional attention dropout": (lambda: tiny_llama(attention_dropout=0.1), r"self_attn.*attention_dropout=0\.1"),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_forward_is_refused_naming_its_module(name: str) -> None:
    build, words = RANDOM[name]
    model = prepare(build().eval())
    torch.testing.assert_close(score(model).detach(), stock(model), rtol=1e-5, atol=1e-5)
    random_state = torch.get_rng_state()
    with pytest.raises(ValueError, match=words):
        score(model.train())
    with pytest.raises(ValueError, match=words):  # what was found is remembered
        score(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    score(model.eval())


def test_dropout_in_a_configuration_whose_modules_have_none_is_accepted() -> None:
    model = tiny_model(OPTConfig, ffn_dim=48, word_embed_proj_dim=32, dropout=0.1, attention_dropout=0.1)
    for module in model.modules():  # as TRL's disable_dropout does, for functional dropout too
        for key in ("dropout", "p"):
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, 0.0)
    assert model.config.attention_dropout == 0.1
    adapted = with_lora(tiny_llama())
    adapted.add_adapter("other", LoraConfig(target_modules=["q_proj"], lora_dropout=0.5))  # inactive
    for each in (model, adapted):
        check_training(prepare(each), model_parts(each))
        score(each.train(), **({"reference": "adapter_off"} if each is adapted else {}))
    with pytest.raises(ValueError, match=r"lora_dropout\.other"):
        score(adapted, reference="other")


FIRST_SLIDES = ["sliding_attention", "full_attention"]
# model with a window of 8 that a key denies, or that one layer alone has; the layer that is named
WINDOWS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "use_sliding_window of Mistral": (lambda: tiny_mistral(sliding_window=8, use_sliding_window=False), 0),
    "layer_types of Mistral": (lambda: tiny_mistral(sliding_window=8, layer_types=["full_attention"] * 2), 0),
    "use_sliding_window of Phi-3": (
        lambda: tiny_model(Phi3Config, sliding_window=8, use_sliding_window=False),
        0,
    ),
    "one layer of Gemma 3": (
        lambda: tiny_model(
            Gemma3TextConfig, head_dim=8, sliding_window=8, use_sliding_window=False, layer_types=FIRST_SLIDES[::-1]
        ),
        1,
    ),
    "one layer of OLMo 3": (lambda: tiny_model(Olmo3Config, sliding_window=8, layer_types=FIRST_SLIDES), 0),
    "last layer of Qwen2": (
        lambda: tiny_model(Qwen2Config, sliding_window=8, use_sliding_window=True, max_window_layers=1),
        1,
    ),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_window_of_a_layer_is_the_one_that_it_runs_with(name: str) -> None:
    build, layer = WINDOWS[name]
    model = prepare(build())
    assert model.config._attn_implementation == "cpo_tree"
    torch.testing.assert_close(score(model).detach(), stock(model), rtol=1e-5, atol=1e-5)
    parts = model_parts(model)
    assert shortest(proved_windows(parts), parts.config) == (8, "a sliding window of 8")
    assert path_limit(parts) is None  # a search computes it
    check_path(parts, 9)
    for impl in WINDOWED:
        check_path(parts, 9, impl)
    check_path(parts, 8, "flash")
    with pytest.raises(
        ValueError, match=f"path of 9 tokens .* sliding window of 8 of decoder layer {layer}, .*'flash'"
    ):
        check_path(parts, 9, "flash")


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_window_in_one_layer_only_that_the_probe_cannot_see_is_exact_or_refused(
    impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [list(range(3, 43)), [*range(3, 23), *range(50, 60)]]  # paths of 40 and 30, the probe's are 22

    def values(model: Any) -> torch.Tensor:
        return packed_logps(model, rows, STARTS, impl=impl).segment_logps.detach()

    unprepared = tiny_model(Qwen2Config, sliding_window=26, use_sliding_window=True, max_window_layers=1)
    with torch.no_grad():
        each = [unprepared(torch.tensor([row])).logits[0, :-1].log_softmax(-1) for row in rows]
    logps = [all_rows.gather(1, torch.tensor(row[1:])[:, None]) for all_rows, row in zip(each, rows, strict=True)]
    expected = torch.stack([tokens[start - 1 :].sum() for tokens, start in zip(logps, STARTS, strict=True)])
    model = prepare(unprepared, impl)
    assert proved_windows(model_parts(model)) == {1: (26, True)}
    torch.testing.assert_close(values(model), expected, rtol=1e-5, atol=0)
    check_path(model_parts(model), 26, "flash")
    with pytest.raises(ValueError, match=r"path of 27 tokens .* window of 26 of decoder layer 1"):
        check_path(model_parts(model), 27, "flash")
    monkeypatch.setattr("cpo_kernels.integrations.transformers.packed.forest_windows", lambda *_: {})
    assert ((values(model) - expected) / expected).abs().max() > 1e-4  # the window matters on these rows


@pytest.mark.parametrize("value", [-0.5, float("-inf"), float("nan"), True])
def test_a_mask_of_a_layers_own_making_is_refused(value: float | bool) -> None:
    """A bias, a hidden token, a number that is none, and a mask of booleans that hides what is no later token."""

    def own_mask(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        length = (args[0] if args else kwargs["hidden_states"]).shape[1]
        mask = torch.zeros(1, 1, length, length)
        mask[..., 1:, 0] = value
        return args, kwargs | {"attention_mask": mask == 0 if value is True else mask}

    model = tiny_llama()
    model.model.layers[1].self_attn.register_forward_pre_hook(own_mask, with_kwargs=True)
    with pytest.raises(ValueError, match=r"decoder layer 1 of LlamaForCausalLM .* adds a mask of its own making"):
        prepare(model)


def test_packed_forward_asks_for_the_window_by_the_implementation_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, windowed = prepare(tiny_mistral()), prepare(tiny_mistral(sliding_window=8))
    score(policy, reference=windowed)
    monkeypatch.setattr("cpo_kernels.integrations.transformers.packed.resolve_tree_attention", lambda *_: "flash")
    for model, options in ((windowed, {}), (policy, {"reference": windowed})):
        with pytest.raises(ValueError, match="sliding window of 8 of decoder layer 0"):
            score(model, **options)


def test_window_that_a_model_does_not_use_is_no_obstacle_and_one_given_later_is_seen() -> None:
    model = prepare(tiny_model(Qwen2Config, sliding_window=8, use_sliding_window=False))
    torch.testing.assert_close(score(model).detach(), stock(model), rtol=1e-5, atol=1e-5)
    late = prepare(tiny_mistral())
    score(late)
    late.config.sliding_window = 8
    torch.testing.assert_close(score(late).detach(), stock(late), rtol=1e-5, atol=1e-5)
    assert proved_windows(model_parts(late))[0].size == 8


CONV_FIRST = ["conv", "full_attention"]
# a layer with a state along the row, or with an attention that nothing can be put in for; its name in the sentence
LAYERS: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "convolution before attention": (
        lambda **dtype: tiny_model(Lfm2Config, layer_types=CONV_FIRST, **dtype),
        r"model\.layers\.0\.conv \(Lfm2ShortConv\) carries a state",
    ),
    "selective state space": (
        lambda **dtype: tiny_model(JambaConfig, num_experts=2, use_mamba_kernels=False, **dtype),
        r"layers\.0\.mamba \(JambaMambaMixer\) carries a state",
    ),
    "linear attention": (
        lambda **dtype: tiny_model(MiniMaxConfig, head_dim=8, **dtype),
        r"self_attn \(MiniMaxLightningAttention\) carries a state",
    ),
    "own attention": (
        lambda **dtype: tiny_model(FalconConfig, **dtype),
        r"decoder layer 0 of FalconForCausalLM \(FalconAttention\) does not ask",
    ),
    "keyword arguments kept by StableLM": (
        lambda **dtype: tiny_model(StableLmConfig, **dtype),
        r"decoder layer 0 of StableLmForCausalLM .* keeps the caller's keyword arguments",
    ),
    "keyword arguments kept": (
        lambda **dtype: tiny_model(NemotronConfig, head_dim=8, **dtype),
        r"decoder layer 0 of NemotronForCausalLM .* keeps the caller's keyword arguments",
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_that_no_forest_can_run_is_refused_by_its_name(name: str, dtype: torch.dtype) -> None:
    build, words = LAYERS[name]
    model: Any = build(dtype=dtype)
    with pytest.raises(ValueError, match=words):
        prepare(model)
    assert model.config._attn_implementation == "sdpa"


class _Leak(nn.Module):
    """The MLP of a layer, to which a token gives a little of what it is to its neighbour in the row."""

    def __init__(self, mlp: nn.Module, share: float) -> None:
        super().__init__()
        self.mlp, self.share = mlp, share

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.mlp(hidden + self.share * hidden.roll(1, dims=1))
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_structure_that_rounding_would_hide_is_seen_in_float32(dtype: torch.dtype) -> None:
    prepare(tiny_llama(dtype=dtype))
    model = tiny_llama(dtype=dtype)
    model.model.layers[1].mlp = _Leak(model.model.layers[1].mlp, 1e-3)
    with pytest.raises(ValueError, match=r"decoder layer 1 (in float32 )?differs"):
        prepare(model)


def test_layer_whose_weights_a_library_fetches_is_not_copied() -> None:
    """Under ZeRO 3 a copy would run the hook of the original and ask its own parameters for what they have not."""
    model = tiny_llama(dtype=torch.bfloat16)
    layer = model.model.layers[0].self_attn.q_proj

    def fetch(module: nn.Module, _inputs: Any) -> None:
        assert module is layer

    fetch.__module__ = "deepspeed.runtime.zero.parameter_offload"
    layer.register_forward_pre_hook(fetch)
    score(prepare(model))


CHANGED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "adapter on the head": (lambda base: with_lora(base, targets=("q_proj", "lm_head")), "output head is a"),
    "trained copy of the head": (lambda base: with_lora(base, modules_to_save=["lm_head"]), "output head is a"),
    "prompt learning": (
        lambda base: get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
        "prompt learning",
    ),
    "activated LoRA": (lambda base: with_lora(base, alora_invocation_tokens=[5, 6]), "activated LoRA"),
    "hook on the head": (
        lambda base: base.lm_head.register_forward_hook(lambda _m, _i, logits: 1.5 * logits) and base,
        "head has a forward hook",
    ),
    "layer that mixes rows": (
        lambda base: base.model.layers[1].register_forward_hook(lambda _m, _i, out: out + out.mean(1, True)) and base,
        "decoder layer 1 differs",
    ),
    "module of one layer in exchange": (
        lambda base: base.model.layers[1].register_module("mlp", _Mixer()) or base,
        "decoder layer 1 differs",
    ),
}


def with_forward(base: Any, forward: Callable[..., Any]) -> Any:
    """Layer 1's MLP with its forward replaced in the instance alone, as many a library does it."""
    mlp = base.model.layers[1].mlp
    mlp.forward = partial(forward, type(mlp).forward, mlp)
    return base


REPLACED: dict[str, tuple[Callable[..., Any], str | None]] = {
    "mixes rows": (lambda stock, mlp, x: stock(mlp, x) + x.mean(1, keepdim=True), "decoder layer 1 differs"),
    "exact": (lambda stock, mlp, x: 2.0 * stock(mlp, x), None),
}


@pytest.mark.parametrize("name", REPLACED)
def test_forward_replaced_after_prepare_is_seen(name: str) -> None:
    forward, words = REPLACED[name]
    model = prepare(tiny_llama())
    before = score(model)
    with_forward(model, forward)
    if words is not None:
        with pytest.raises(ValueError, match=words):
            score(model)
    else:
        values = score(model).detach()
        torch.testing.assert_close(values, stock(model), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(values, before, rtol=1e-3)
    del model.model.layers[1].mlp.forward
    assert torch.equal(score(model if words is None else prepare(model)), before)


def test_forwards_that_change_no_number_are_not_proved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of `fuse_layers` and of accelerate, and the one of TRL's model around ours."""
    model = prepare(tiny_llama())
    score(model)
    monkeypatch.setattr(sys.modules[prepare.__module__], "_probe", lambda *_: pytest.fail("proved again"))
    norm, mlp = model.model.norm, model.model.layers[0].mlp
    monkeypatch.setattr(fused, "rms_norm", lambda x, weight, eps, impl: type(norm).forward(norm, x))
    norm.forward = MethodType(fused._fused_forward(norm), norm)
    score(model)
    attention = model.model.layers[0].self_attn
    attention.forward = MethodType(fused._attention_forward(type(attention).forward), attention)
    monkeypatch.setattr(fused, "rotary", lambda q, k, cos, sin, impl: fused._rotation_of_llama(q, k, cos, sin))
    add_hook_to_module(mlp, ModelHook())
    score(model)
    _route_forward(model, lambda *_: None)
    score(model)
    norm.forward = lambda x: x  # nobody's
    with pytest.raises(pytest.fail.Exception):
        score(model)


def test_table_of_the_configuration_changed_in_place_is_seen() -> None:
    model = prepare(tiny_model(Qwen2Config, sliding_window=8, use_sliding_window=True, layer_types=FIRST_SLIDES))
    before = score(model)
    model.config.layer_types[1] = "sliding_attention"
    torch.testing.assert_close(score(model).detach(), stock(model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(score(model), before, rtol=1e-4)
    assert set(proved_windows(model_parts(model))) == {0, 1}


def test_configuration_of_one_layer_in_exchange_is_seen() -> None:
    model = prepare(tiny_llama())
    score(model)
    attention = model.model.layers[1].self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match=r"decoder layer 1 of LlamaForCausalLM \(LlamaAttention\) does not ask"):
        score(model)


def gpt_oss(**changes: Any) -> Any:
    return tiny_model(
        GptOssConfig, attention="eager", head_dim=8, num_local_experts=2, num_experts_per_tok=1, **changes
    )


def without_option(model: Any, option: str) -> Any:
    """Layer 1's attention no longer hands `option` on to a forest, as a module that forgets it would."""
    attention = model.model.layers[1].self_attn
    stock, place = type(attention).forward, sys.modules[type(attention).__module__]

    def forward(*args: Any, **kwargs: Any) -> Any:
        functions = place.ALL_ATTENTION_FUNCTIONS

        class Forgetful:
            def get_interface(self, *names: Any) -> Any:
                function = functions.get_interface(*names)
                return lambda *inputs, **options: function(*inputs, **{k: v for k, v in options.items() if k != option})

        place.ALL_ATTENTION_FUNCTIONS = Forgetful()
        try:
            return stock(attention, *args, **kwargs)
        finally:
            place.ALL_ATTENTION_FUNCTIONS = functions

    attention.forward = forward
    return model


@pytest.mark.parametrize("sink", [0.0, -60.0])
def test_dropped_sink_is_refused_however_small(sink: float) -> None:
    """Stock attention reads the module's sinks. At -60 they change no score that a random row has."""
    model = gpt_oss()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(sink)
    torch.testing.assert_close(score(prepare(model)).detach(), stock(model), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"decoder layer 1 of GptOssForCausalLM .* sink"):
        score(without_option(model, "s_aux"))


def test_soft_cap_that_only_the_stock_attention_has_is_refused_far_above_todays_scores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model(Gemma2Config, attention="eager", head_dim=8, attn_logit_softcapping=None)
    place = sys.modules[type(model).__module__]
    eager = place.eager_attention_forward
    monkeypatch.setattr(
        place, "eager_attention_forward", lambda *args, **options: eager(*args, **options | {"softcap": 500.0})
    )
    with pytest.raises(ValueError, match=r"decoder layer 0 of Gemma2ForCausalLM .* soft-cap"):
        prepare(model)


class _Mixer(nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.mean(dim=1, keepdim=True).expand_as(hidden)


@pytest.mark.parametrize("name", CHANGED)
def test_change_after_prepare_is_refused_at_the_next_call(name: str) -> None:
    change, words = CHANGED[name]
    base = prepare(tiny_llama())
    score(base)
    model = change(base)
    for _ in range(2):
        with pytest.raises(ValueError, match=words if _ == 0 else "."):
            score(model)


def test_exact_change_after_prepare_is_proved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    base = prepare(tiny_llama())
    before = score(base)
    adapted = with_lora(base, modules_to_save=["embed_tokens"])
    with torch.no_grad():
        adapted.get_input_embeddings().modules_to_save["default"].weight.add_(0.1)
    values = score(adapted)
    torch.testing.assert_close(values.detach(), stock(adapted), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(values, before, rtol=1e-2)
    # what was proved is not proved twice, and a copy is proved for itself
    proved = vars(base)["_cpo_proof"]
    with monkeypatch.context() as patch:
        # by its module, whose name in the package is the function's
        patch.setattr(sys.modules[prepare.__module__], "_probe", lambda *_: pytest.fail("proved twice"))
        score(adapted)
        base.enable_input_require_grads()  # a hook that changes no number
        score(adapted)
        with pytest.raises(pytest.fail.Exception):
            score(copy.deepcopy(adapted))
    assert vars(base)["_cpo_proof"] is proved
    assert torch.equal(score(copy.deepcopy(adapted)), values)


@pytest.mark.parametrize("value", ["p of a module", "module"])
def test_dropout_given_after_prepare_is_refused(value: str) -> None:
    model = prepare(with_lora(tiny_llama(), dropout=1e-9 if value == "p of a module" else 0.0))
    layer = model.base_model.model.model.layers[1].self_attn.v_proj
    if value == "p of a module":
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        score(model.train())
        layer.lora_dropout["default"].p = 0.2
    else:
        score(model.train())
        layer.lora_dropout["default"] = nn.Dropout(0.2)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.v_proj\.lora_dropout\.default.*p=0\.2"):
        score(model)
    layer.lora_dropout.eval()  # the one module that drops
    score(model)


def test_check_of_a_call_is_cheap_and_runs_nothing() -> None:
    """About 2,600 modules: 32 layers with LoRA on every linear layer. Measured 0.5 ms on one core beside other work."""
    model = prepare(with_lora(tiny_llama(num_hidden_layers=32)))
    parts = model_parts(model)
    check_training(model, parts)
    model.train()
    with torch.profiler.profile() as profile:
        check_call(model, parts)
    assert not [event for event in profile.events() if event.name.startswith("aten::")]
    times = []
    for _ in range(20):
        start = time.perf_counter()
        check_call(model, parts)
        times.append(time.perf_counter() - start)
    print(f"{1e3 * min(times):.2f} ms for {len(list(model.modules()))} modules")
    assert min(times) < 5e-3


@pytest.mark.parametrize(
    ("config_class", "changes", "table"), [(GPT2Config, {}, "wpe"), (OPTConfig, {"ffn_dim": 48}, "embed_positions")]
)
def test_a_row_beyond_learned_positions_is_refused_by_the_tables_name(
    config_class: type, changes: dict[str, Any], table: str
) -> None:
    model = prepare(tiny_model(config_class, max_position_embeddings=24, **changes))
    row = [3 + number % 60 for number in range(24)]
    assert packed_logps(model, [row], [1]).segment_logps.isfinite().all()
    with pytest.raises(ValueError, match=rf"a path of 25 tokens is longer than the 24 positions that \S*{table} has"):
        packed_logps(model, [[*row, 5]], [1])


def test_a_row_beyond_the_positions_of_rope_is_computed_and_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    model = prepare(tiny_model(LlamaConfig, max_position_embeddings=24))
    row = [3 + number % 60 for number in range(30)]
    packed_logps(model, [row[:24]], [1])
    assert not caplog.records
    for _ in range(2):
        packed_logps(model, [row], [1])
    (record,) = caplog.records
    assert "a path of 30 tokens is longer than the 24 positions" in record.getMessage()
