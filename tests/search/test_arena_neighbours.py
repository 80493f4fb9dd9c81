"""What ends one request, or ran on the engine before, changes no other request: every answer is that of a cold engine."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from cpo_fast.search.engine import Requests, Sample, SampleRequest, ScoreRequest, Search
from cpo_fast.search.engine.arena_engine import ArenaEngine
from tests.search.engine_cases import (
    BOS,
    EOS,
    NEWLINES,
    TOKENIZER,
    VOCAB_SIZE,
    Ids,
    ask,
    engine_config,
    forked_prompts,
    greedy,
    run_searches_of,
    sampled,
)
from tests.search.tiny_llama import build_model


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Ends a third of its lines early: by either newline token or by end-of-sequence. No prompt here holds BOS or EOS."""
    return build_model(VOCAB_SIZE, {**dict.fromkeys(NEWLINES, 2.5), EOS: 2.0, BOS: -1e4})


def cold(model: LlamaForCausalLM, few_shot: Ids, **changes: Any) -> ArenaEngine:
    engine = ArenaEngine(model, TOKENIZER, engine_config(**changes))
    engine.cache_prefix(few_shot)
    return engine


def one_search_each(requests: Sequence[SampleRequest]) -> list[tuple[str, Search[Sample]]]:
    """Each request a search of its own, as the questions of a run are."""

    def search(request: SampleRequest) -> Search[Sample]:
        (sample,) = yield Requests((request,), keep=True)
        return sample

    return [(str(number), search(request)) for number, request in enumerate(requests)]


@pytest.mark.parametrize("changes", [{"batch_size": 3}, {"questions_in_flight": 64}], ids=["refilled", "one batch"])
def test_a_request_that_ends_changes_no_bit_of_a_request_beside_it(
    model: LlamaForCausalLM, changes: dict[str, int]
) -> None:
    few_shot, prompts = forked_prompts(41)
    requests = sampled(prompts, copies=2)
    found = {name: sample for name, sample, _ in cold(model, few_shot, **changes).run(one_search_each(requests))}
    together = [found[str(number)] for number in range(len(requests))]
    lengths = [len(sample.token_ids) for sample in together]
    assert {sample.stop for sample in together} == {"newline", "eos", "length"}
    assert {sample.token_ids[-1] for sample in together if sample.stop == "newline"} == set(NEWLINES)
    assert min(lengths) < 3 < 10 < max(lengths)  # requests left while others went on
    for request, sample in zip(requests, together, strict=True):
        assert ask(cold(model, few_shot), [request]) == [sample]


def test_what_a_neighbour_would_say_after_its_stop_changes_nothing(model: LlamaForCausalLM) -> None:
    """The same request, once beside lines that are stopped by a newline and once beside lines that cannot be."""
    few_shot, prompts = forked_prompts(43)
    target = sampled(prompts[:1], copies=1)
    neighbours = sampled([prompts[0]] * 6, copies=3)
    beside = ask(cold(model, few_shot), [*neighbours, *target])
    endless = build_model(VOCAB_SIZE, dict.fromkeys([*NEWLINES, EOS], -1e4))
    assert {sample.stop for sample in ask(cold(endless, few_shot), neighbours)} == {"length"}
    assert any(sample.stop == "newline" for sample in beside[:-1])
    assert ask(cold(model, few_shot), target) == beside[-1:]


@pytest.mark.parametrize("requests", [greedy, sampled], ids=["greedy", "sampled"])
def test_after_a_batch_that_ended_on_a_stop_the_target_says_what_it_says_cold(
    model: LlamaForCausalLM, requests: Callable[[Sequence[Ids]], list[SampleRequest]]
) -> None:
    """As vllm-project/vllm#5543: a prefix cache warmed by requests that a stop string ended gave other greedy output."""
    few_shot, prompts = forked_prompts(47)
    warm_up = sampled([prompt for prompt in prompts if prompt != prompts[3]], copies=3)
    target = requests([prompts[3]])
    expected = ask(cold(model, few_shot), target)
    engine = cold(model, few_shot)
    warm = ask(engine, warm_up)
    assert sum(sample.stop == "newline" for sample in warm) > 5
    assert ask(engine, target) == expected
    assert ask(engine, warm_up) == warm


def test_within_one_search_a_stopped_line_leaves_nothing_in_the_states_below_it(model: LlamaForCausalLM) -> None:
    """A state goes on from a stopped sample's ids; what other samples wrote after the same prompt is not read."""
    few_shot, prompts = forked_prompts(53)

    def search() -> Search[tuple[list[Ids], list[Any]]]:
        first = yield Requests(tuple(sampled(prompts[:2], copies=6)), keep=True)
        stopped = [sample.token_ids for sample in first if sample.stop == "newline"]
        states = [prompts[0] + ids for ids in dict.fromkeys(stopped)]
        last = yield Requests((*greedy(states), ScoreRequest(states[0], ((5,), (6, 7)))), keep=True)
        return states, last

    ((_, (states, last), _),) = cold(model, few_shot).run([("", search())])
    assert len(states) > 2
    for state, sample in zip(states, last[:-1], strict=True):
        (alone,) = ask(cold(model, few_shot), greedy([state]))
        assert (sample.token_ids, sample.stop) == (alone.token_ids, alone.stop)
        # the state lies in other nodes there, and sums are grouped by node
        assert sample.logps == pytest.approx(alone.logps, abs=1e-4)
    (scores,) = ask(cold(model, few_shot), [ScoreRequest(states[0], ((5,), (6, 7)))], keep=False)
    assert last[-1] == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("changes", [{}, {"batch_size": 5, "questions_in_flight": 2, "arena_tokens": 600}])
def test_a_second_run_on_an_engine_has_the_bits_of_a_cold_one(model: LlamaForCausalLM, changes: dict[str, int]) -> None:
    few_shot, prompts = forked_prompts(59)
    expected = run_searches_of(cold(model, few_shot, **changes), few_shot, prompts)
    engine = cold(model, few_shot, **changes)
    other = forked_prompts(61)[1]
    run_searches_of(engine, few_shot, other)
    assert run_searches_of(engine, few_shot, prompts) == expected
    backwards = run_searches_of(engine, few_shot, prompts[::-1])
    assert {str(len(prompts) - 1 - int(name)): result for name, result in backwards.items()} == expected


def test_logits_of_one_request_that_are_not_finite_end_its_own_search_only(model: LlamaForCausalLM) -> None:
    """A neighbour that fails is a neighbour that ends."""
    few_shot, prompts = forked_prompts(67)
    expected = run_searches_of(cold(model, few_shot), few_shot, prompts[:3])
    engine = cold(model, few_shot)
    embedding = model.model.embed_tokens.weight
    before = embedding[BOS].detach().clone()
    try:
        with torch.no_grad():
            embedding[BOS] = float("nan")
        found = run_searches_of(engine, few_shot, [*prompts[:3], (*prompts[3], BOS)])
    finally:
        with torch.no_grad():
            embedding[BOS] = before
    assert "not finite" in str(found.pop("3"))
    assert found == expected
