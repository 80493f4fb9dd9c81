"""A search with the adapter merged gives the live adapter's results and leaves no bit of a weight changed."""

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, Qwen2Config

from cpo_fast.adapters import merged_adapter
from cpo_fast.errors import ConfigError
from cpo_fast.search.collect import collect
from cpo_fast.search.engine import Requests, ScoreRequest
from cpo_fast.search.engine.arena_engine import ArenaEngine, weights_fingerprint
from cpo_fast.tree import read_trees
from tests.search.engine_cases import TOKENIZER, VOCAB_SIZE, engine_config, forked_prompts, greedy, sampled
from tests.search.tiny_llama import build_model
from tests.tiny import randomize_lora, tiny_llama, tiny_model, with_lora

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def tiny(config_class=LlamaConfig, dtype=torch.float32, **changes):
    """A live adapter in float32 on every linear layer of a base in `dtype`, as `load_model` gives it."""
    model = with_lora(tiny_model(config_class, dtype=dtype, vocab_size=VOCAB_SIZE, initializer_range=0.1, **changes))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    randomize_lora(model)  # numbers that a 16-bit adapter could not hold
    return model


def bits(model):
    """Every parameter as bytes, and every adapter's state."""
    weights = {name: value.detach().view(torch.uint8).clone() for name, value in model.named_parameters()}
    states = [module.merged_adapters for module in model.modules() if hasattr(module, "merged_adapters")]
    return weights, states


def equal(left, right):
    weights, states = left
    others, other_states = right
    return states == other_states and all(torch.equal(weights[name], others[name]) for name in weights | others)


def layers(model):
    return [module for module in model.modules() if hasattr(module, "lora_A")]


@DTYPES
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_every_weight_is_bitwise_what_it_was_however_the_block_ends(dtype, error):
    model = tiny(dtype=dtype)
    before = bits(model)
    try:
        with merged_adapter(model):
            assert not equal(bits(model), before)
            if error is not None:
                raise error
    except (RuntimeError, KeyboardInterrupt, GeneratorExit) as caught:
        assert type(caught) is error  # noqa: PT017 - the three have no common base worth naming
    assert equal(bits(model), before)


class Interrupt(TorchDispatchMode):
    """Ctrl-C during a matrix product, after so many others."""

    def __init__(self, num_products):
        super().__init__()
        self.num_left = num_products

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            if self.num_left == 0:
                raise KeyboardInterrupt
            self.num_left -= 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_merged", [0, 3])
def test_a_merge_that_fails_half_way_puts_back_what_it_had_merged(num_merged):
    model = tiny()
    before = bits(model)
    weights = [layer.base_layer.weight for layer in layers(model)]
    versions = [weight._version for weight in weights]
    with pytest.raises(KeyboardInterrupt), Interrupt(num_merged), merged_adapter(model):
        pytest.fail("entered")
    # a merged weight was written twice, the one that failed was put back
    written = [weight._version - version for weight, version in zip(weights, versions, strict=True)]
    assert written == [2] * num_merged + [1] + [0] * (len(weights) - num_merged - 1)
    assert equal(bits(model), before)


def test_a_hundred_merges_do_not_drift_where_subtracting_would():
    model, subtracted = tiny(dtype=torch.bfloat16), tiny(dtype=torch.bfloat16)
    before = bits(model)
    for _ in range(100):
        with merged_adapter(model):
            pass
    assert equal(bits(model), before)
    for _ in range(3):
        subtracted.merge_adapter()
        subtracted.unmerge_adapter()
    assert not equal(bits(subtracted), before), "the weights are too kind to show a drift"


@DTYPES
def test_merged_weights_are_the_float32_sum_rounded_once(dtype):
    model = tiny(dtype=dtype)
    expected = []
    for layer in layers(model):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        total = layer.base_layer.weight.float() + (b @ a) * layer.scaling["default"]
        expected.append(total.to(dtype))
    with merged_adapter(model):
        for layer, weight in zip(layers(model), expected, strict=True):
            assert layer.base_layer.weight.dtype == dtype
            assert torch.equal(layer.base_layer.weight, weight)
    assert len(expected) == 14


def test_no_live_product_is_computed_inside(monkeypatch):
    model = tiny()
    calls = []
    for layer in layers(model):
        layer.lora_A["default"].register_forward_hook(lambda *_: calls.append(1))
    ids = torch.tensor([[5, 6, 7]])
    with merged_adapter(model):
        inside = model(ids).logits
    assert calls == []
    torch.testing.assert_close(model(ids).logits, inside, rtol=1e-5, atol=1e-5)
    assert len(calls) == len(layers(model))


def test_a_plain_sum_of_several_active_adapters_is_merged_as_one():
    model = tiny()
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"]))
    randomize_lora(model, seed=7)
    model.base_model.set_adapter(["default", "second"])
    ids = torch.tensor([[5, 6, 7, 40]])
    both = model(ids).logits
    with merged_adapter(model):
        torch.testing.assert_close(model(ids).logits, both, rtol=1e-5, atol=1e-5)
    model.base_model.set_adapter(["default"])
    assert float((model(ids).logits - both).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config], ids=["llama", "qwen2"])
def test_the_engine_samples_what_it_samples_with_the_live_adapter(config_class):
    few_shot, prompts = forked_prompts(3)
    requests = (*greedy(prompts), *sampled(prompts))
    answers = []
    for merge in (False, True):
        model = tiny(config_class)
        if not merge:
            engine = ArenaEngine(model, TOKENIZER, engine_config())
            engine.cache_prefix(few_shot)
            answers.append(engine.answer(Requests(requests, keep=True)))
            continue
        with merged_adapter(model):
            engine = ArenaEngine(model, TOKENIZER, engine_config())
            engine.cache_prefix(few_shot)
            answers.append(engine.answer(Requests(requests, keep=True)))
    live, merged = answers
    assert [sample.token_ids for sample in merged] == [sample.token_ids for sample in live]
    assert [sample.stop for sample in merged] == [sample.stop for sample in live]
    for one, other in zip(merged, live, strict=True):
        assert one.logps == pytest.approx(other.logps, abs=1e-5)
    assert len({sample.token_ids for sample in live}) > len(prompts)


@DTYPES
def test_one_engine_before_inside_and_after_reads_no_node_of_other_weights(dtype):
    few_shot, prompts = forked_prompts(5)
    requests = Requests((*sampled(prompts), ScoreRequest(prompts[0], ((5,), (6, 7)))), keep=True)

    def answers(engine):
        engine.cache_prefix(few_shot)
        return engine.answer(requests)

    model = tiny(dtype=dtype)
    randomize_lora(model, std=0.3)
    engine = ArenaEngine(model, TOKENIZER, engine_config())
    before, names = answers(engine), [weights_fingerprint(model)]
    with merged_adapter(model):
        inside = answers(engine)
        names.append(weights_fingerprint(model))
        fresh = ArenaEngine(model, TOKENIZER, engine_config())
        assert inside == answers(fresh)
    names.append(weights_fingerprint(model))
    assert answers(engine) == before == answers(ArenaEngine(model, TOKENIZER, engine_config()))
    with merged_adapter(model):
        assert answers(engine) == inside
    assert inside != before  # the rounding differs, so a stale node would have been seen
    assert len(set(names)) == 3


def test_an_engine_notices_the_weights_alone_even_when_they_change_in_inference_mode():
    model = tiny()
    before = weights_fingerprint(model)
    with torch.inference_mode(), merged_adapter(model):
        for layer in layers(model):
            layer.merged_adapters = []
        assert weights_fingerprint(model) != before
    assert weights_fingerprint(model) != before


def _peft(**changes):
    values = {"r": 2, "target_modules": ["q_proj"], **changes}
    return get_peft_model(
        tiny_llama(**({"tie_word_embeddings": True} if "lm_head" in values["target_modules"] else {})),
        LoraConfig(**values),
    )


def _merged_already():
    model = _peft()
    model.merge_adapter()
    return model


def _quantised():
    model = _peft()
    for layer in layers(model):
        layer.base_layer.weight = torch.nn.Parameter(layer.base_layer.weight.to(torch.float8_e4m3fn), False)
    return model


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (tiny_llama, r"the model has no adapter to merge; set model\.adapter"),
        (lambda: _peft(use_dora=True), r"q_proj has a LoRA variant \(DoraLinearVariant in adapter 'default'\)"),
        (lambda: _peft(lora_bias=True), "q_proj has a bias in adapter 'default'"),
        (lambda: _peft(target_modules=["embed_tokens"]), r"embed_tokens holds an adapter of kind \S+\.Embedding"),
        (lambda: _peft(target_modules=["lm_head"]), "lm_head shares its weight with another module"),
        (_merged_already, "q_proj has its adapter merged already"),
        (_quantised, r"q_proj has a quantised weight \(torch\.float8_e4m3fn\)"),
    ],
    ids=["no adapter", "dora", "bias", "embedding", "tied", "merged", "quantised"],
)
def test_what_is_no_plain_sum_is_refused_by_name_and_nothing_changes(build, sentence):
    model = build()
    before = bits(model)
    pattern = rf"^search\.merge_adapter: .*{sentence}"
    with pytest.raises(ConfigError, match=pattern) as refusal, merged_adapter(model):
        pytest.fail("entered")
    assert "search.merge_adapter=false" in str(refusal.value)
    assert equal(bits(model), before)


def test_an_adapter_that_is_off_is_refused():
    model = _peft()
    off = pytest.raises(ConfigError, match="has its adapters switched off")
    with model.disable_adapter(), off, merged_adapter(model):
        pytest.fail("entered")


@pytest.fixture
def adapted(model, tokenizer):
    """make(): the model of the other tests under an adapter that changes what it says."""
    bias = {token: float(value) for token, value in enumerate(model.lm_head.bias.detach()) if value}

    def make():
        return with_lora(build_model(len(tokenizer), bias), targets=("q_proj", "v_proj", "down_proj"), seed=4)

    return make


def test_collect_with_the_adapter_merged_finds_the_same_thoughts_in_trees_of_another_search(
    make_config, adapted, tokenizer, engine
):
    found = []
    for merge in (False, True):
        model = adapted()
        before = bits(model)
        config = make_config(f"merge-{merge}", engine=engine, merge_adapter=merge)
        found.append(read_trees(collect(config, model, tokenizer).trees_path))
        assert equal(bits(model), before)
    live, merged = found
    for one, other in zip(live, merged, strict=True):
        assert (one.status, one.answer, one.winning_nodes) == (other.status, other.answer, other.winning_nodes)
        assert [node.token_ids for node in one.nodes] == [node.token_ids for node in other.nodes]
        assert one.config_hash != other.config_hash
        assert (one.model_hash, one.adapter_hash) == (other.model_hash, other.adapter_hash)
        logps = [
            pair for a, b in zip(one.nodes, other.nodes, strict=True) for pair in zip(a.logps, b.logps, strict=True)
        ]
        assert all(left == pytest.approx(right, abs=1e-4) for left, right in logps)
    assert any(tree.nodes for tree in live)


def test_collect_that_is_interrupted_leaves_the_weights_as_they_were(make_config, adapted, tokenizer):
    model = adapted()
    before = bits(model)

    def interrupt(*_):
        assert not equal(bits(model), before)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(make_config(engine="arena", merge_adapter=True), model, tokenizer, progress=interrupt)
    assert equal(bits(model), before)


def test_a_missing_adapter_is_reported_before_a_model_is_loaded(make_config, tmp_path: Path):
    config = make_config(merge_adapter=True)
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(tmp_path / "none")})})
    with pytest.raises(ConfigError, match=re.escape("set model.adapter to its folder")):
        collect(config)
