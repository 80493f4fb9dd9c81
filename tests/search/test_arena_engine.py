"""The arena engine gives what Hugging Face's own loop gives, whatever runs beside it, and what it stores is bounded."""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GraniteConfig, NanoChatConfig, Phi3Config

from cpo_fast.config import SearchConfig
from cpo_fast.errors import OutOfMemory
from cpo_fast.search.engine import Requests, ScoreRequest, Search
from cpo_fast.search.engine.arena_engine import ArenaEngine
from cpo_fast.search.engine.decode_batch import DecodeBatch
from cpo_fast.search.engine.forward_plans import decode_plan
from cpo_fast.search.engine.huggingface import HuggingFaceEngine
from cpo_fast.search.engine.kv_arena import KVNode, KVTrie, path_to
from cpo_kernels.tree_decode.row_keys import row_keys
from tests.search.engine_cases import (
    CONFIG_CLASSES,
    TOKENIZER,
    ask,
    engine_config,
    forked_prompts,
    generated,
    greedy,
    num_free_slots,
    run_searches_of,
    sampled,
    small_model,
    two_level_searches,
    with_adapter,
)
from tests.tiny import tiny_model, with_lora


def arena_engine(
    model: Any = None, make_batch: Callable[..., DecodeBatch] | None = None, **changes: Any
) -> ArenaEngine:
    return ArenaEngine(small_model() if model is None else model, TOKENIZER, engine_config(**changes), make_batch)


def reference_engine(**changes: Any) -> HuggingFaceEngine:
    return HuggingFaceEngine(small_model(**changes), TOKENIZER, 16)


@pytest.mark.parametrize("adapter", [False, True], ids=["base", "lora"])
@pytest.mark.parametrize(
    ("name", "heads"), [*((name, (4, 2)) for name in CONFIG_CLASSES), ("llama", (4, 4)), ("llama", (4, 1))]
)
def test_greedy_equals_generate(name: str, heads: tuple[int, int], adapter: bool) -> None:
    model = small_model(name, heads)
    if adapter:
        model = with_adapter(model)
    few_shot, prompts = forked_prompts(0)
    answers = ask(arena_engine(model), greedy(prompts), few_shot)
    for prompt, sample in zip(prompts, answers, strict=True):
        assert sample.token_ids == generated(model, prompt)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_greedy_with_a_repetition_penalty_equals_generate(name: str) -> None:
    model = small_model(name, initializer_range=0.2)
    few_shot, prompts = forked_prompts(71)
    answers = ask(arena_engine(model), greedy(prompts, repetition_penalty=1.3), few_shot)
    expected = [generated(model, prompt, repetition_penalty=1.3) for prompt in prompts]
    assert [sample.token_ids for sample in answers] == expected
    assert expected != [generated(model, prompt) for prompt in prompts]


def test_logps_equal_a_forward_without_a_cache() -> None:
    # weights of 0.4 make float32 itself uncertain by 1e-5 here
    model = small_model(initializer_range=0.1)
    few_shot, prompts = forked_prompts(3)
    requests = sampled(prompts)
    for request, sample in zip(requests, ask(arena_engine(model), requests, few_shot), strict=True):
        ids = [*request.token_ids, *sample.token_ids, *([2] if sample.stop == "eos" else [])]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double()
        expected = torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)
        np.testing.assert_allclose(sample.logps, expected[len(request.token_ids) - 1 :].numpy(), atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{}, {"top_k": 5}, {"top_p": 0.7}, {"repetition_penalty": 1.3}, {"top_k": 9, "top_p": 0.8}]
)
def test_samples_equal_the_hugging_face_loop(changes: dict[str, Any]) -> None:
    few_shot, prompts = forked_prompts(5)
    requests = sampled(prompts, **changes)
    expected = ask(reference_engine(), requests)
    actual = ask(arena_engine(), requests, few_shot)
    assert [(sample.token_ids, sample.stop) for sample in actual] == [(s.token_ids, s.stop) for s in expected]


def test_scores_equal_the_hugging_face_loop() -> None:
    few_shot, prompts = forked_prompts(7)
    requests = [ScoreRequest(prompt, ((5,), (6, 7, 8), (6, 9), ())) for prompt in prompts]
    # weights of 0.4 make float32 itself uncertain by 1e-5 here
    expected = ask(reference_engine(initializer_range=0.1), requests, keep=False)
    actual = ask(arena_engine(small_model(initializer_range=0.1)), requests, few_shot, keep=False)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


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
def test_bits_depend_on_nothing_but_the_search(changes: dict[str, Any]) -> None:
    few_shot, prompts = forked_prompts(11)
    expected = run_searches_of(arena_engine(), few_shot, prompts)
    actual = run_searches_of(arena_engine(**changes), few_shot, prompts)
    assert actual == expected
    assert not any(isinstance(result, Exception) for result in actual.values())


@pytest.mark.parametrize(
    ("config", "changes"),
    [(GraniteConfig, {"logits_scaling": 0.25}), (NanoChatConfig, {"final_logit_softcapping": 2.0})],
)
def test_scaled_and_capped_logits_are_those_of_the_model(config: type, changes: dict[str, Any]) -> None:
    """Greedy tokens stay what they are under a scale, samples and scores do not."""
    few_shot, prompts = forked_prompts(9)
    model = tiny_model(config, vocab_size=len(TOKENIZER), initializer_range=0.1, **changes)
    requests = [*sampled(prompts), *(ScoreRequest(prompt, ((5,), (6, 7, 8))) for prompt in prompts)]
    expected = ask(HuggingFaceEngine(model, TOKENIZER, 16), requests, keep=False)
    actual = ask(arena_engine(model), requests, few_shot, keep=False)
    for one, other in zip(actual, expected, strict=True):
        if isinstance(one, list):
            np.testing.assert_allclose(one, other, atol=1e-5)
        else:
            assert one.token_ids == other.token_ids
            np.testing.assert_allclose(one.logps, other.logps, atol=1e-5)


def test_longrope_is_exact_for_paths_that_cannot_outgrow_its_original_length() -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 100.0, "factor": 4.0,
        "short_factor": [1.0, 1.5, 2.0, 1.0], "long_factor": [2.0, 4.0, 9.0, 3.0],
    }  # fmt: skip
    model = tiny_model(
        Phi3Config, vocab_size=len(TOKENIZER), initializer_range=0.4, sliding_window=None, rope_parameters=rope,
        original_max_position_embeddings=110,
    )  # fmt: skip
    few_shot, prompts = forked_prompts(15)
    engine = arena_engine(model)
    for prompt, sample in zip(prompts, ask(engine, greedy(prompts), few_shot), strict=True):
        assert sample.token_ids == generated(model, prompt)
    room = 110 - len(prompts[0])
    ask(engine, greedy(prompts[:1], max_new_tokens=room))
    with pytest.raises(ValueError, match=r"path of 111 tokens is longer than 110, .* type longrope"):
        ask(engine, greedy(prompts[:1], max_new_tokens=room + 1))


def test_everything_but_the_permanent_nodes_is_given_back() -> None:
    few_shot, prompts = forked_prompts(13)
    engine = arena_engine()
    run_searches_of(engine, few_shot, prompts)
    assert num_free_slots(engine.arena) == 4096 - len(few_shot)
    run = engine.run(two_level_searches(prompts))
    next(run)
    run.close()
    assert num_free_slots(engine.arena) == 4096 - len(few_shot)


def test_a_changed_adapter_never_reads_an_old_node() -> None:
    few_shot, prompts = forked_prompts(17)
    model = with_adapter(small_model())
    engine = arena_engine(model)
    before = run_searches_of(engine, few_shot, prompts)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(-1.5)
    after = run_searches_of(engine, few_shot, prompts)
    assert after == run_searches_of(arena_engine(model), few_shot, prompts) != before
    with model.disable_adapter():
        off = run_searches_of(engine, few_shot, prompts)
    assert off == run_searches_of(arena_engine(), few_shot, prompts) != after


def test_an_arena_that_holds_nothing_names_the_option() -> None:
    _, prompts = forked_prompts(19)
    with pytest.raises(OutOfMemory, match=r"search\.arena_tokens"):
        list(arena_engine(arena_tokens=60).run(two_level_searches(prompts)))


def test_a_prompt_longer_than_the_context_fails_its_own_search_only() -> None:
    few_shot, prompts = forked_prompts(23)
    engine = arena_engine()
    alone = run_searches_of(engine, few_shot, prompts[:2])
    mixed = run_searches_of(engine, few_shot, [*prompts[:2], prompts[0] * 8])
    assert {name: mixed[name] for name in alone} == alone
    assert isinstance(mixed["2"], ValueError)
    assert "512 positions" in str(mixed["2"])


def test_logits_that_are_not_finite_fail_the_search() -> None:
    few_shot, prompts = forked_prompts(29)
    model = small_model()
    engine = arena_engine(model)
    model.lm_head.weight.data.fill_(float("nan"))
    outcome = run_searches_of(engine, few_shot, prompts[:1])["0"]
    assert isinstance(outcome, ValueError)
    assert "not finite" in str(outcome)


def test_a_shared_node_is_read_once_for_all_requests() -> None:
    few_shot, prompts = forked_prompts(31)
    requests = sampled([prompts[0]], copies=20)
    shared, apart = arena_engine(), arena_engine(make_batch=partial(DecodeBatch, share=False))
    assert ask(shared, requests, few_shot) == ask(apart, requests, few_shot)
    assert apart.scheduler.batch.counts.num_keys > 5 * shared.scheduler.batch.counts.num_keys


def test_samples_that_have_said_the_same_are_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some draw tokens of their own sooner or later, some end before those that go on in their slots."""
    few_shot, prompts = forked_prompts(31)
    caps = (3, 12, 1, 12, 7, 12)
    requests = [request for cap in caps for request in sampled(prompts[:1], 3, max_new_tokens=cap, temperature=0.3)]
    requests += [request for cap in caps for request in greedy(prompts[1:3], max_new_tokens=cap)]
    requests.sort(key=lambda request: request.token_ids)  # the same prompt adjoins, as the samples of a state do
    rows: list[int] = []
    step = DecodeBatch.step

    def counted(batch: DecodeBatch) -> Any:
        rows.append(len({one.leader for one in batch.running}))
        return step(batch)

    monkeypatch.setattr(DecodeBatch, "step", counted)
    together, together_rows = ask(arena_engine(), requests, few_shot), sum(rows)
    rows.clear()
    apart = ask(arena_engine(make_batch=partial(DecodeBatch, share=False)), requests, few_shot)
    assert together == apart
    assert sum(rows) == sum(sample.num_tokens for sample in apart)  # a row a token
    assert 3 * together_rows < 2 * sum(rows)
    assert len({sample.token_ids for sample in apart}) > 4


def test_a_tiny_model_on_a_cpu_is_asked_more_at_once() -> None:
    _, prompts = forked_prompts(31)
    names = [(str(number), prompts[number % len(prompts)]) for number in range(70)]
    for settings, at_once in (({}, 64), ({"questions_in_flight": 5}, 5)):
        engine = ArenaEngine(small_model(), TOKENIZER, SearchConfig(arena_tokens=20_000, **settings))
        started: list[str] = []

        def search(name: str, prompt: tuple[int, ...], started: list[str] = started) -> Any:
            started.append(name)
            yield Requests(tuple(greedy([prompt])), keep=True)

        results = engine.run((name, search(name, prompt)) for name, prompt in names)
        next(results)
        assert at_once <= len(started) < at_once + 5
        results.close()
    assert SearchConfig().side_by_side() == (256, 16)
    assert SearchConfig(batch_size=3).side_by_side(is_tiny=True) == (3, 64)


def test_a_path_is_as_later_prompts_have_left_it() -> None:
    """Prompts that fork inside nodes, computed or not: as if every prompt were laid in after all are."""
    generator = np.random.default_rng(0)
    for repeat in range(60):
        trie = KVTrie(base=KVTrie() if repeat % 2 else None)
        if trie.base is not None:
            trie.base.insert([tuple(generator.integers(0, 2, 40).tolist()) for _ in range(2)])
            for node in trie.base.nodes:
                node.fixed = True
        prompts: list[tuple[int, ...]] = []
        for _ in range(3):
            earlier = [prompt[:-2] for prompt in prompts if len(prompt) > 20]
            prompts = [tuple(generator.integers(0, 2, generator.integers(1, 60)).tolist()) for _ in range(6)]
            prompts += [*(prompt[: len(prompt) // 2] + prompts[0] for prompt in prompts), *earlier]
            limits = [len(prompt) - int(generator.integers(2)) for prompt in prompts]  # of samples and of scores
            paths = trie.insert(prompts, limits)
            for prompt, path in zip(prompts, paths, strict=True):
                assert np.concatenate([node.ids[:used] for node, used in path]).tolist() == list(prompt)
                assert path == [*path_to(path[-1][0]), path[-1]]
            assert trie.insert(prompts, limits) == paths
            for node in trie.nodes:
                node.fixed = bool(generator.integers(2)) or node.fixed


def test_reads_that_are_not_shared_stay_apart() -> None:
    """Else a measurement of what sharing is worth would compare two names of one thing."""
    node = KVNode(np.arange(40), None, 0, 0, 0, start=0)
    for share, num_reads in ((True, 1), (False, 6)):
        plan, num_keys = decode_plan([[(node, 40)]] * 6, range(100, 160, 10), [1] * 6, 2, 999, share)
        assert len(set(row_keys(plan, "native").node.tolist())) == num_reads
        assert num_keys == 40 * num_reads


def test_what_existed_is_left_to_itself_by_the_garbage_collector_while_searches_run_and_no_longer() -> None:
    _, prompts = forked_prompts(31)
    engine = arena_engine()
    gc.unfreeze()

    def search() -> Search[int]:
        yield Requests(tuple(sampled(prompts[:1])), keep=False)
        return gc.get_freeze_count()

    for abandoned in (False, True):
        running = engine.run([("one", search()), ("two", search())])
        assert next(running)[1] > 10_000
        if abandoned:
            running.close()
        else:
            list(running)
        assert gc.get_freeze_count() == 0
    gc.freeze()
    try:
        before = gc.get_freeze_count()
        list(engine.run([("one", search())]))
        assert gc.get_freeze_count() > before // 2  # the caller's own; some of them have gone since
    finally:
        gc.unfreeze()


def test_refill_fills_slots_sooner_and_changes_no_answer() -> None:
    _, prompts = forked_prompts(31)
    requests = [request for prompt in prompts for cap in (1, 24) for request in sampled([prompt], max_new_tokens=cap)]
    expected = ask(arena_engine(), requests)
    refilled = arena_engine(batch_size=6)
    emptied = arena_engine(make_batch=partial(DecodeBatch, refill=False), batch_size=6)
    assert ask(refilled, requests) == ask(emptied, requests) == expected
    assert refilled.scheduler.batch.counts.num_steps < emptied.scheduler.batch.counts.num_steps


def test_model_changed_after_the_engine_was_made_is_proved_again_or_refused() -> None:
    """An activated LoRA would give the tokens of the base: its offsets are told around the model's forward."""
    model = small_model()
    engine, (few_shot, prompts) = arena_engine(model), forked_prompts(0)
    ask(engine, greedy(prompts), few_shot)
    with_adapter(model)  # injected in place
    for prompt, sample in zip(prompts, ask(engine, greedy(prompts), few_shot), strict=True):
        assert sample.token_ids == generated(model, prompt)
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: -logits)
    with pytest.raises(ValueError, match="head has a forward hook"):
        ask(engine, greedy(prompts), few_shot)
    activated = with_lora(small_model(), targets=("q_proj",), alora_invocation_tokens=[5, 6])
    for each in (activated, activated.get_base_model()):
        with pytest.raises(ValueError, match="activated LoRA"):
            arena_engine(each)
    dropping = with_lora(small_model(), dropout=0.2)
    engine = arena_engine(dropping)
    ask(engine, greedy(prompts[:1]), few_shot)
    dropping.train()
    with pytest.raises(ValueError, match=r"lora_dropout.*p=0\.2"):
        ask(engine, greedy(prompts[:1]), few_shot)
