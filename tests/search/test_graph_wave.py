"""The wave that the device steps alone gives what the plain one gives, and its steps can be recorded once and replayed.

A CUDA graph replays kernels on fixed places in memory and runs no Python. Tracing a step to a list of operators on the
same tensors, and running that list, is the same thing without a GPU: whatever the host would have had to decide anew
comes out wrong.
"""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from cpo_fast.search.engine import cuda_graph_batch
from cpo_fast.search.engine.arena_engine import ArenaEngine
from cpo_fast.search.engine.cuda_graph_batch import DecodeStep, power_bucket, row_bucket
from cpo_fast.search.engine.decode_batch import Row
from cpo_fast.search.engine.requests import Ask, Features
from cpo_kernels.integrations.transformers import hook
from tests.cpo_kernels.device_waits import DeviceWaits
from tests.search.dense_decode import dense_tree_decode
from tests.search.test_arena_engine import (
    TOKENIZER,
    random_prompts,
    results,
    sampled,
    searches,
    tiny,
    with_adapter,
)
from tests.search.test_arena_engine import settings as engine_settings

ARENA = 700  # a dense product is over all of it


def settings(**changes):
    return engine_settings(**{"arena_tokens": ARENA, **changes})


def traced(run):
    """What a step does to its tensors, as operators without Python."""
    graph = make_fx(lambda: run())()
    done = [True]  # tracing has run the step, which recording a CUDA graph does not

    def replay():
        if done:
            done.pop()
        else:
            graph()

    return replay


def again(run):
    return run


@pytest.fixture
def use(monkeypatch):
    """Chooses how steps are recorded, and attention inside them; returns how often each was run by Python."""
    runs = []
    plain = DecodeStep.run

    def run(self):
        runs.append(id(self))
        with monkeypatch.context() as inside:
            inside.setattr(hook, "decode_layer", dense_tree_decode)
            plain(self)

    def choose(record):
        monkeypatch.setattr(cuda_graph_batch, "cuda_graphs", lambda: record)
        monkeypatch.setattr(DecodeStep, "run", run)
        return runs

    return choose


def graph_engine(model, **changes):
    return ArenaEngine(model, TOKENIZER, settings(**changes), Features(graphs=True))


def flat(outcome):
    """Token ids and stops of a run's samples, and every number in it."""
    samples = [s for name in sorted(outcome) for part in (outcome[name][0], outcome[name][2]) for s in part]
    numbers = [logp for sample in samples for logp in sample.logps]
    numbers += [value for name in sorted(outcome) for pair in outcome[name][1] for value in pair]
    return [(sample.token_ids, sample.stop, sample.text) for sample in samples], numbers


def assert_same(actual, expected):
    (tokens, numbers), (expected_tokens, expected_numbers) = flat(actual), flat(expected)
    differing = [pair for pair in zip(tokens, expected_tokens, strict=True) if pair[0] != pair[1]]
    assert not differing, f"{len(differing)} of {len(tokens)} samples differ, the first: {differing[0]}"
    # the two attentions sum in other orders, which weights of 0.4 magnify
    torch.testing.assert_close(torch.tensor(numbers), torch.tensor(expected_numbers), atol=1e-4, rtol=0)


@pytest.mark.parametrize("record", [again, traced])
@pytest.mark.parametrize(
    "changes",
    [{}, {"batch_size": 5}, {"batch_size": 33}, {"questions_in_flight": 2}, {"arena_tokens": 400}],
    ids=["wide", "narrow", "bucket and one", "two questions", "full arena"],
)
def test_searches_equal_those_of_the_plain_wave(use, changes, record):
    use(record)
    few_shot, prompts = random_prompts(11)
    expected = results(ArenaEngine(tiny("llama"), TOKENIZER, settings()), few_shot, prompts)
    assert_same(results(graph_engine(tiny("llama"), **changes), few_shot, prompts), expected)


@pytest.mark.parametrize(
    "sampling",
    [{"top_k": 5}, {"top_p": 0.7}, {"repetition_penalty": 1.3}, {"top_k": 9, "top_p": 0.8, "repetition_penalty": 1.1}],
)
def test_every_processor_of_logits_can_be_recorded(use, sampling):
    use(traced)
    _, prompts = random_prompts(5)
    ask = Ask(tuple(sampled(prompts, **sampling)), keep=True)
    expected = ArenaEngine(tiny("llama"), TOKENIZER, settings()).answer(ask)
    actual = graph_engine(tiny("llama")).answer(ask)
    assert [sample.token_ids for sample in actual] == [sample.token_ids for sample in expected]


def test_a_live_adapter_can_be_recorded(use):
    use(traced)
    few_shot, prompts = random_prompts(7)
    expected = results(ArenaEngine(with_adapter(tiny("qwen2")), TOKENIZER, settings()), few_shot, prompts)
    assert_same(results(graph_engine(with_adapter(tiny("qwen2"))), few_shot, prompts), expected)


def test_a_switch_of_adapters_forgets_what_was_recorded(use):
    """A recorded step holds the path through the modules that it was recorded on."""
    use(traced)
    few_shot, prompts = random_prompts(7, num_groups=2)
    model = with_adapter(tiny("llama"))
    engine = graph_engine(model)
    on = results(engine, few_shot, prompts)
    with model.disable_adapter():
        off = results(engine, few_shot, prompts)
    assert_same(off, results(ArenaEngine(tiny("llama"), TOKENIZER, settings()), few_shot, prompts))
    assert results(engine, few_shot, prompts) == on != off


def test_plain_torch_attention_refuses_a_plan_that_it_would_read_once_only(monkeypatch):
    monkeypatch.setattr(cuda_graph_batch, "cuda_graphs", lambda: again)
    _, prompts = random_prompts(5)
    with pytest.raises(ValueError, match="cannot follow one whose contents change"):
        graph_engine(tiny("llama")).answer(Ask(tuple(sampled(prompts)), keep=True))


def test_a_step_is_run_by_python_twice_and_then_replayed(use):
    runs = use(traced)
    few_shot, prompts = random_prompts(11)
    engine = graph_engine(tiny("llama"))
    results(engine, few_shot, prompts)
    assert max(runs.count(step) for step in runs) == 2  # once to warm up, once to be recorded
    before = len(runs)
    results(engine, few_shot, prompts)
    assert len(runs) - before <= 2  # the same waves need the same shapes
    assert engine.scheduler.wave.counts.num_steps > 3 * len(runs)


def test_a_step_reads_nothing_back(use):
    use(again)
    _, prompts = random_prompts(5)
    engine = graph_engine(tiny("llama"))
    found = []
    plain = DecodeStep.run

    def watched(self):
        with DeviceWaits() as mode:
            plain(self)
        found.append(mode.found)

    DecodeStep.run, unwatched = watched, DecodeStep.run
    try:
        engine.answer(Ask(tuple(sampled(prompts, top_k=5, top_p=0.9, repetition_penalty=1.2)), keep=True))
    finally:
        DecodeStep.run = unwatched
    assert found
    assert not any(found), found


def test_rows_that_end_are_silent_and_their_memory_serves_others(use):
    """A row goes on in its place for a step after its end; in an arena this full its rows are taken by then."""
    use(again)
    few_shot, prompts = random_prompts(13)
    expected = results(ArenaEngine(tiny("llama"), TOKENIZER, settings()), few_shot, prompts)
    for tokens in (330, 360, 420, 500):
        engine = graph_engine(tiny("llama"), arena_tokens=tokens)
        assert_same(results(engine, few_shot, prompts), expected)
        assert engine._arena.num_free == tokens - len(few_shot)


def test_a_row_that_was_dropped_writes_nowhere_and_grows_no_further(use):
    use(again)
    few_shot, _ = random_prompts(13)
    engine = graph_engine(tiny("llama"))
    engine.cache_prefix(few_shot)
    ((node, _),) = engine._permanent.insert([few_shot])[0]
    wave, starts = engine.scheduler.wave, [engine._arena.allocate(12) for _ in range(2)]
    rows = [
        Row(request, None, 0, [(node, len(few_shot) - 1)], start)
        for request, start in zip(sampled([few_shot], max_new_tokens=12), starts, strict=True)
    ]
    wave.add(rows)
    for _ in range(3):
        assert wave.step() == []
    wave.drop(rows[:1])
    private = [storage[starts[0] : starts[0] + 12] for layer in engine._arena.layers for storage in layer]
    for rows_of_it in private:
        rows_of_it.fill_(7.0)
    for _ in range(4):
        wave.step()
    assert all(bool((rows_of_it == 7.0).all()) for rows_of_it in private)
    assert len(rows[0].generated) <= 2 < len(rows[1].generated)
    assert wave._step._length[:2].tolist() == [3, 7]


def test_a_run_that_was_left_does_not_disturb_the_next(use):
    use(again)
    few_shot, prompts = random_prompts(13)
    expected = results(ArenaEngine(tiny("llama"), TOKENIZER, settings()), few_shot, prompts)
    engine = graph_engine(tiny("llama"))
    engine.cache_prefix(few_shot)
    for _ in range(3):
        run = engine.run(searches(prompts))
        next(run)
        run.close()
        assert engine._arena.num_free == ARENA - len(few_shot)
    assert_same(results(engine, few_shot, prompts), expected)


def test_places_are_refilled_in_turns_and_few_rows_take_few_places(use):
    use(again)
    _, prompts = random_prompts(5)
    engine = graph_engine(tiny("llama"), batch_size=16)
    engine.answer(Ask(tuple(sampled(prompts, copies=8)), keep=True))
    wave = engine.scheduler.wave
    assert wave.counts.num_steps > 2 * wave.num_compositions  # not one a step
    assert wave.counts.num_rows > 0.5 * wave.counts.num_places


@pytest.mark.parametrize(("count", "bucket"), [(1, 16), (16, 16), (17, 32), (97, 128), (512, 512), (513, 1024)])
def test_rows_come_in_buckets(count, bucket):
    assert row_bucket(count) == bucket


@pytest.mark.parametrize(("count", "bucket"), [(0, 16), (1, 16), (16, 16), (17, 32), (33, 64), (1024, 1024)])
def test_other_sizes_come_in_powers_of_two(count, bucket):
    assert power_bucket(count) == bucket
