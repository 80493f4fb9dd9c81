"""The arena engine gives what Hugging Face's own loop gives, whatever runs beside it, and what it stores is bounded."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cpo_fast.config import SearchConfig
from cpo_fast.errors import OutOfMemory
from cpo_fast.search.engine.arena_engine import ArenaEngine
from cpo_fast.search.engine.forward_plans import decode_plan
from cpo_fast.search.engine.huggingface import HuggingFaceEngine
from cpo_fast.search.engine.kv_arena import Node
from cpo_fast.search.engine.requests import Ask, Features, Request, Scoring
from cpo_kernels.tree_decode.eager import _tables
from tests.search.tiny_llama import build_tokenizer

TOKENIZER = build_tokenizer()
VOCAB = len(TOKENIZER)
NEWLINES = TOKENIZER.convert_tokens_to_ids(["\n", "\n\n"])
ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gemma": (GemmaConfig, GemmaForCausalLM),
}


def settings(**changes):
    return SearchConfig(**{"batch_size": 64, "arena_tokens": 4096, "prefill_tokens": 64, **changes})


def random_prompts(seed, num_groups=3, shared=70):
    """Ragged prompts that fork at several depths from one shared beginning."""
    generator = np.random.default_rng(seed)

    def draw(count):
        return tuple(int(token) for token in generator.integers(3, VOCAB, count))

    few_shot = draw(shared)
    prompts = []
    for _ in range(num_groups):
        question = few_shot + draw(int(generator.integers(1, 20)))
        prompts.append(question)
        for _ in range(2):
            state = question + draw(int(generator.integers(1, 12)))
            prompts.extend([state, state + draw(5), state + draw(3)])
    return few_shot, prompts


def greedy(prompts, count=12):
    return [Request(prompt, "greedy", 0.0, 1.0, count) for prompt in prompts]


def sampled(prompts, copies=2, **changes):
    values = {"temperature": 0.9, "top_p": 1.0, "max_new_tokens": 12, **changes}
    return [Request(prompt, f"{n}/{i}", **values) for n, prompt in enumerate(prompts) for i in range(copies)]


def tiny(name, heads=(4, 2), initializer_range=0.4):
    torch.manual_seed(1)
    config_class, model_class = ARCHITECTURES[name]
    extra = {"sliding_window": None} if name == "mistral" else {}
    config = config_class(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=initializer_range,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **extra,
    )
    return model_class(config).eval()


def with_adapter(model):
    torch.manual_seed(2)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    return adapted.eval()


def generated(model, prompt, count):
    ids = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=count, do_sample=False, pad_token_id=0)
    new = ids[0, len(prompt) :].tolist()
    for place, token in enumerate(new):
        if token in NEWLINES:
            return new[: place + 1]
        if token == 2:
            return new[:place]
    return new


@pytest.mark.parametrize("adapter", [False, True], ids=["base", "lora"])
@pytest.mark.parametrize(
    ("name", "heads"), [*((name, (4, 2)) for name in ARCHITECTURES), ("llama", (4, 4)), ("llama", (4, 1))]
)
def test_greedy_equals_generate(name, heads, adapter):
    model = tiny(name, heads)
    if adapter:
        model = with_adapter(model)
    few_shot, prompts = random_prompts(0)
    engine = ArenaEngine(model, TOKENIZER, settings())
    engine.cache_prefix(few_shot)
    answers = engine.answer(Ask(tuple(greedy(prompts)), keep=True))
    for prompt, sample in zip(prompts, answers, strict=True):
        assert list(sample.token_ids) == generated(model, prompt, 12)


def test_logps_equal_a_forward_without_a_cache():
    # weights of 0.4 make float32 itself uncertain by 1e-5 here
    model = tiny("llama", initializer_range=0.1)
    few_shot, prompts = random_prompts(3)
    engine = ArenaEngine(model, TOKENIZER, settings())
    engine.cache_prefix(few_shot)
    for request, sample in zip(sampled(prompts), engine.answer(Ask(tuple(sampled(prompts)), keep=True)), strict=True):
        ids = [*request.token_ids, *sample.token_ids, *([2] if sample.stop == "eos" else [])]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double()
        expected = torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)
        np.testing.assert_allclose(sample.logps, expected[len(request.token_ids) - 1 :].numpy(), atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{}, {"top_k": 5}, {"top_p": 0.7}, {"repetition_penalty": 1.3}, {"top_k": 9, "top_p": 0.8}]
)
def test_samples_equal_the_hugging_face_loop(changes):
    model = tiny("llama")
    few_shot, prompts = random_prompts(5)
    requests = sampled(prompts, **changes)
    reference = HuggingFaceEngine(tiny("llama"), TOKENIZER, 16).answer(Ask(tuple(requests), keep=True))
    engine = ArenaEngine(model, TOKENIZER, settings())
    engine.cache_prefix(few_shot)
    answers = engine.answer(Ask(tuple(requests), keep=True))
    assert [sample.token_ids for sample in answers] == [sample.token_ids for sample in reference]
    assert [sample.stop for sample in answers] == [sample.stop for sample in reference]


def test_scores_equal_the_hugging_face_loop():
    def model():  # weights of 0.4 make float32 itself uncertain by 1e-5 here
        return tiny("llama", initializer_range=0.1)

    few_shot, prompts = random_prompts(7)
    items = tuple(Scoring(prompt, ((5,), (6, 7, 8), (6, 9), ())) for prompt in prompts)
    reference = HuggingFaceEngine(model(), TOKENIZER, 16).answer(Ask(items, keep=False))
    engine = ArenaEngine(model(), TOKENIZER, settings())
    engine.cache_prefix(few_shot)
    np.testing.assert_allclose(engine.answer(Ask(items, keep=False)), reference, atol=1e-5)


def searches(prompts):
    """Two levels a search: samples, then scores of what they wrote, then samples below them."""

    def search(prompt):
        first = yield Ask(tuple(sampled([prompt])), keep=True)
        states = [prompt + sample.token_ids for sample in first if sample.token_ids]
        scores = yield Ask(tuple(Scoring(state, ((5,), (6, 7))) for state in states), keep=False)
        last = yield Ask(tuple(sampled(states)), keep=True)
        return [first, scores, last]

    return [(str(number), search(prompt)) for number, prompt in enumerate(prompts)]


def results(engine, few_shot, prompts):
    engine.cache_prefix(few_shot)
    return {name: result for name, result, _ in engine.run(searches(prompts))}


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 1},
        {"batch_size": 5},
        {"questions_in_flight": 1},
        {"questions_in_flight": 3, "batch_size": 7},
        {"prefill_tokens": 4096},
        {"arena_tokens": 330},
    ],
)
def test_bits_depend_on_nothing_but_the_search(changes):
    few_shot, prompts = random_prompts(11)
    expected = results(ArenaEngine(tiny("llama"), TOKENIZER, settings()), few_shot, prompts)
    actual = results(ArenaEngine(tiny("llama"), TOKENIZER, settings(**changes)), few_shot, prompts)
    assert actual == expected
    assert not any(isinstance(result, Exception) for result in actual.values())


def test_everything_but_the_permanent_nodes_is_given_back():
    few_shot, prompts = random_prompts(13)
    engine = ArenaEngine(tiny("llama"), TOKENIZER, settings())
    engine.cache_prefix(few_shot)
    free = engine._arena.num_free
    results(engine, few_shot, prompts)
    assert engine._arena.num_free == free == 4096 - len(few_shot)
    run = engine.run(searches(prompts))
    next(run)
    run.close()
    assert engine._arena.num_free == free


def test_a_changed_adapter_never_reads_an_old_node():
    few_shot, prompts = random_prompts(17)
    model = with_adapter(tiny("llama"))
    engine = ArenaEngine(model, TOKENIZER, settings())
    before = results(engine, few_shot, prompts)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(-1.5)
    after = results(engine, few_shot, prompts)
    fresh = results(ArenaEngine(model, TOKENIZER, settings()), few_shot, prompts)
    assert after == fresh != before
    with model.disable_adapter():
        off = results(engine, few_shot, prompts)
    assert off == results(ArenaEngine(tiny("llama"), TOKENIZER, settings()), few_shot, prompts) != after


def test_an_arena_that_holds_nothing_names_the_option():
    _, prompts = random_prompts(19)
    engine = ArenaEngine(tiny("llama"), TOKENIZER, settings(arena_tokens=60))
    with pytest.raises(OutOfMemory, match=r"search\.arena_tokens"):
        list(engine.run(searches(prompts)))


def test_a_prompt_longer_than_the_context_fails_its_own_search_only():
    few_shot, prompts = random_prompts(23)
    engine = ArenaEngine(tiny("llama"), TOKENIZER, settings())
    alone = results(engine, few_shot, prompts[:2])
    mixed = results(engine, few_shot, [*prompts[:2], prompts[0] * 8])
    assert {name: mixed[name] for name in alone} == alone
    assert isinstance(mixed["2"], ValueError)
    assert "512 positions" in str(mixed["2"])


def test_logits_that_are_not_finite_fail_the_search():
    few_shot, prompts = random_prompts(29)
    engine = ArenaEngine(tiny("llama"), TOKENIZER, settings())
    engine._parts.head.weight.data.fill_(float("nan"))
    outcome = results(engine, few_shot, prompts[:1])["0"]
    assert isinstance(outcome, ValueError)
    assert "not finite" in str(outcome)


def test_a_shared_node_is_read_once_for_all_rows():
    few_shot, prompts = random_prompts(31)
    counts, answers = [], []
    for share in (True, False):
        engine = ArenaEngine(tiny("llama"), TOKENIZER, settings(), Features(share=share))
        engine.cache_prefix(few_shot)
        answers.append(engine.answer(Ask(tuple(sampled([prompts[0]], copies=20)), keep=True)))
        counts.append(engine.scheduler.wave.counts.num_keys)
    assert counts[1] > 5 * counts[0]
    assert answers[0] == answers[1]


def test_reads_that_are_not_shared_stay_apart():
    """Else a measurement of what sharing is worth would compare two names of one thing."""
    node = Node(np.arange(40), None, 0, 0, 0, start=0)
    for share, num_products in ((True, 1), (False, 6)):
        plan, num_keys = decode_plan([[(node, 40)]] * 6, range(100, 160, 10), [1] * 6, 2, 999, share)
        assert len(_tables(plan).products) == num_products
        assert num_keys == 40 * num_products


def test_refill_fills_places_sooner_and_changes_no_answer():
    _, prompts = random_prompts(31)
    requests = (sampled([prompt], max_new_tokens=cap) for prompt in prompts for cap in (1, 24))
    ask = Ask(tuple(request for group in requests for request in group), keep=True)
    expected = ArenaEngine(tiny("llama"), TOKENIZER, settings()).answer(ask)
    num_steps = []
    for refill in (True, False):
        engine = ArenaEngine(tiny("llama"), TOKENIZER, settings(batch_size=6), Features(refill=refill))
        assert engine.answer(ask) == expected
        num_steps.append(engine.scheduler.wave.counts.num_steps)
    assert num_steps[0] < num_steps[1]
