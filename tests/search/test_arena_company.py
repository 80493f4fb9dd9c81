"""What ends one request, or ran on the engine before, changes no other request: every answer is that of a cold engine."""

import pytest
import torch

from cpo_fast.search.engine import Ask, Scoring
from cpo_fast.search.engine.arena_engine import ArenaEngine
from tests.search.test_arena_engine import TOKENIZER, VOCAB, greedy, random_prompts, results, sampled, settings
from tests.search.tiny_llama import build_model

NEWLINE, BLANK_LINE = TOKENIZER.convert_tokens_to_ids(["\n", "\n\n"])
BOS, EOS = 1, 2  # no prompt here holds either


@pytest.fixture(scope="module")
def model():
    """Ends a third of its lines early: by either newline token or by end-of-sequence."""
    return build_model(VOCAB, {NEWLINE: 2.5, BLANK_LINE: 2.5, EOS: 2.0, BOS: -1e4})


def cold(model, few_shot, **changes):
    engine = ArenaEngine(model, TOKENIZER, settings(**changes))
    engine.cache_prefix(few_shot)
    return engine


def asks(requests):
    """Each request a search of its own, as the questions of a run are."""

    def search(request):
        (sample,) = yield Ask((request,), keep=True)
        return sample

    return [(str(number), search(request)) for number, request in enumerate(requests)]


@pytest.mark.parametrize("changes", [{"batch_size": 3}, {"questions_in_flight": 64}], ids=["refilled", "one wave"])
def test_a_row_that_ends_changes_no_bit_of_a_row_beside_it(model, changes):
    few_shot, prompts = random_prompts(41)
    requests = sampled(prompts, copies=2)
    found = {name: sample for name, sample, _ in cold(model, few_shot, **changes).run(asks(requests))}
    together = [found[str(number)] for number in range(len(requests))]
    lengths = [len(sample.token_ids) for sample in together]
    assert {sample.stop for sample in together} == {"newline", "eos", "length"}
    assert {sample.token_ids[-1] for sample in together if sample.stop == "newline"} == {NEWLINE, BLANK_LINE}
    assert min(lengths) < 3 < 10 < max(lengths)  # rows left while others went on
    for request, sample in zip(requests, together, strict=True):
        assert cold(model, few_shot).answer(Ask((request,), keep=True)) == [sample]


def test_a_neighbour_without_its_stop_would_say_something_else_and_nobody_hears_it(model):
    """The same row, once beside rows that are stopped by a newline and once beside rows that cannot be."""
    few_shot, prompts = random_prompts(43)
    target = sampled(prompts[:1], copies=1)[0]
    neighbours = sampled([prompts[0]] * 6, copies=3)
    beside = cold(model, few_shot).answer(Ask((*neighbours, target), keep=True))
    silent = build_model(VOCAB, {NEWLINE: -1e4, BLANK_LINE: -1e4, EOS: -1e4})
    unstopped = cold(silent, few_shot).answer(Ask(tuple(neighbours), keep=True))
    assert {sample.stop for sample in unstopped} == {"length"}
    assert any(sample.stop == "newline" for sample in beside[:-1])
    assert cold(model, few_shot).answer(Ask((target,), keep=True)) == beside[-1:]


@pytest.mark.parametrize("requests", [greedy, sampled], ids=["greedy", "sampled"])
def test_after_a_batch_that_ended_on_a_stop_the_target_says_what_it_says_cold(model, requests):
    """As vllm-project/vllm#5543: a prefix cache warmed by requests that a stop string ended gave other greedy output."""
    few_shot, prompts = random_prompts(47)
    warm_up = tuple(sampled([prompt for prompt in prompts if prompt != prompts[3]], copies=3))
    target = tuple(requests([prompts[3]]))
    expected = cold(model, few_shot).answer(Ask(target, keep=True))
    engine = cold(model, few_shot)
    warm = engine.answer(Ask(warm_up, keep=True))
    assert sum(sample.stop == "newline" for sample in warm) > 5
    assert engine.answer(Ask(target, keep=True)) == expected
    assert engine.answer(Ask(warm_up, keep=True)) == warm


def test_within_one_search_a_stopped_line_leaves_nothing_in_the_states_below_it(model):
    """A state goes on from a stopped sample's ids; what other samples wrote after the same prompt is not read."""
    few_shot, prompts = random_prompts(53)

    def search():
        first = yield Ask(tuple(sampled(prompts[:2], copies=6)), keep=True)
        stopped = [sample.token_ids for sample in first if sample.stop == "newline"]
        states = [prompts[0] + ids for ids in dict.fromkeys(stopped)]
        last = yield Ask((*greedy(states), Scoring(states[0], ((5,), (6, 7)))), keep=True)
        return states, last

    ((_, (states, last), _),) = cold(model, few_shot).run([("", search())])
    assert len(states) > 2
    for state, sample in zip(states, last[:-1], strict=True):
        (alone,) = cold(model, few_shot).answer(Ask(tuple(greedy([state])), keep=True))
        assert (sample.token_ids, sample.stop) == (alone.token_ids, alone.stop)
        # the state lies in other nodes there, and sums are grouped by node
        assert sample.logps == pytest.approx(alone.logps, abs=1e-4)
    (scores,) = cold(model, few_shot).answer(Ask((Scoring(states[0], ((5,), (6, 7))),), keep=False))
    assert last[-1] == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("changes", [{}, {"batch_size": 5, "questions_in_flight": 2, "arena_tokens": 600}])
def test_a_second_run_on_an_engine_has_the_bits_of_a_cold_one(model, changes):
    few_shot, prompts = random_prompts(59)
    expected = results(ArenaEngine(model, TOKENIZER, settings(**changes)), few_shot, prompts)
    engine = ArenaEngine(model, TOKENIZER, settings(**changes))
    other = random_prompts(61)[1]
    results(engine, few_shot, other)
    assert results(engine, few_shot, prompts) == expected
    backwards = results(engine, few_shot, prompts[::-1])
    assert {str(len(prompts) - 1 - int(name)): result for name, result in backwards.items()} == expected


def test_logits_of_one_row_that_are_not_finite_end_its_own_search_only(model):
    """A neighbour that fails is a neighbour that ends."""
    few_shot, prompts = random_prompts(67)
    expected = results(cold(model, few_shot), few_shot, prompts[:3])
    engine = cold(model, few_shot)
    embedding = model.model.embed_tokens.weight
    before = embedding[BOS].detach().clone()
    try:
        with torch.no_grad():
            embedding[BOS] = float("nan")
        found = results(engine, few_shot, [*prompts[:3], (*prompts[3], BOS)])
    finally:
        with torch.no_grad():
            embedding[BOS] = before
    assert "not finite" in str(found.pop("3"))
    assert found == expected
