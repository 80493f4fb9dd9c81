"""The batch that the device steps alone gives what the plain one gives, and its steps can be recorded once and replayed.

A CUDA graph replays kernels on fixed places in memory and runs no Python. Tracing a step to a list of operators on the
same tensors, and running that list, is the same thing without a GPU: whatever the host would have had to decide anew
comes out wrong.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from cpo_fast.search.engine.arena_engine import ArenaEngine
from cpo_fast.search.engine.cuda_graph_batch import CudaGraphBatch, Record, slot_bucket
from cpo_fast.search.engine.decode_batch import RunningRequest
from cpo_fast.search.engine.forward_plans import ModelRunner, compute_nodes
from cpo_fast.search.engine.kv_arena import KVArena, KVTrie
from cpo_fast.search.engine.stopping import StopChecker
from cpo_kernels.integrations.transformers import prepare
from cpo_kernels.integrations.transformers.decode import arena_shapes
from cpo_kernels.integrations.transformers.model import model_parts
from cpo_kernels.tree_decode import DecodePlan
from tests.cpo_kernels.device_waits import DeviceWaits
from tests.search.dense_decode import DenseRunner, repeated, traced
from tests.search.engine_cases import (
    TOKENIZER,
    Outcomes,
    ask,
    engine_config,
    forked_prompts,
    num_free_slots,
    run_searches_of,
    sampled,
    small_model,
    two_level_searches,
    with_adapter,
)

NUM_SLOTS = 700  # a dense product is over all of the arena


def plain_engine(model: Any) -> ArenaEngine:
    return ArenaEngine(model, TOKENIZER, engine_config(arena_tokens=NUM_SLOTS))


def graph_engine(
    model: Any,
    record: Record = repeated,
    make_runner: Callable[[ModelRunner], ModelRunner] = DenseRunner,
    **changes: Any,
) -> ArenaEngine:
    """An engine whose decode steps are recorded by `record`."""

    def make_batch(runner: ModelRunner, stop_checker: StopChecker) -> CudaGraphBatch:
        return CudaGraphBatch(make_runner(runner), stop_checker, record=record)

    return ArenaEngine(model, TOKENIZER, engine_config(**{"arena_tokens": NUM_SLOTS, **changes}), make_batch)


class WatchedRunner(DenseRunner):
    """Notes how often Python runs each recorded step, which alone has a plan of its own, and at which positions."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__(runner)
        self.num_runs: Counter[int] = Counter()
        self.positions: list[list[int]] = []

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, plan: DecodePlan) -> torch.Tensor:
        self.num_runs[id(plan)] += 1
        self.positions.append(positions.tolist())
        return super().forward(token_ids, positions, plan)


def assert_same_searches(actual: Outcomes, expected: Outcomes) -> None:
    """Samples alike, and every number nearly: the two attentions sum in other orders, which weights of 0.4 magnify."""
    assert actual.keys() == expected.keys()
    for name, (first, scores, last, last_scores) in expected.items():
        samples, expected_samples = [*actual[name][0], *actual[name][2]], [*first, *last]
        assert [(s.token_ids, s.stop, s.text) for s in samples] == [
            (s.token_ids, s.stop, s.text) for s in expected_samples
        ]
        pairs = [*actual[name][1], *actual[name][3]]
        numbers = [logp for sample in samples for logp in sample.logps] + [v for pair in pairs for v in pair]
        wanted = [logp for sample in expected_samples for logp in sample.logps]
        wanted += [v for pair in [*scores, *last_scores] for v in pair]
        torch.testing.assert_close(torch.tensor(numbers), torch.tensor(wanted), atol=1e-4, rtol=0)


@pytest.mark.parametrize("record", [repeated, traced])
@pytest.mark.parametrize(
    "changes",
    [{}, {"batch_size": 5}, {"batch_size": 33}, {"questions_in_flight": 2}, {"arena_tokens": 400}],
    ids=["wide", "narrow", "bucket and one", "two questions", "full arena"],
)
def test_searches_equal_those_of_the_plain_batch(changes: dict[str, int], record: Record) -> None:
    few_shot, prompts = forked_prompts(12)
    expected = run_searches_of(plain_engine(small_model()), few_shot, prompts)
    assert_same_searches(run_searches_of(graph_engine(small_model(), record, **changes), few_shot, prompts), expected)


@pytest.mark.parametrize("make_engine", [plain_engine, graph_engine])
def test_a_request_goes_on_past_newlines_as_long_as_it_is_told_to(make_engine: Callable[[Any], ArenaEngine]) -> None:
    """To its third token with a newline; the tokens are those of lines that are asked for one after the other."""
    newlines = {token for token in range(len(TOKENIZER)) if "\n" in TOKENIZER.decode([token])}

    def two_more(generated: Sequence[int]) -> bool:
        assert generated[-1] in newlines
        return sum(token in newlines for token in generated) < 3

    _, prompts = forked_prompts(5)
    model, lengths = small_model(), []
    for request in sampled(prompts[:6], copies=1, temperature=0.0, max_new_tokens=400):
        ids: tuple[int, ...] = ()
        for _ in range(3):
            cap = 400 - len(ids)
            (line,) = ask(make_engine(model), [replace(request, token_ids=request.token_ids + ids, max_new_tokens=cap)])
            ids += line.token_ids
            if line.stop != "newline":
                break
        (lines,) = ask(make_engine(model), [replace(request, goes_on=two_more)])
        assert (lines.token_ids, lines.stop) == (ids, line.stop)
        lengths.append(sum(token in newlines for token in ids))
    assert max(lengths) > 1, lengths  # else going on would not be seen


@pytest.mark.parametrize(
    "sampling",
    [{"top_k": 5}, {"top_p": 0.7}, {"repetition_penalty": 1.3}, {"top_k": 9, "top_p": 0.8, "repetition_penalty": 1.1}],
)
def test_every_processor_of_logits_can_be_recorded(sampling: dict[str, Any]) -> None:
    _, prompts = forked_prompts(5)
    requests = sampled(prompts, **sampling)
    expected = ask(plain_engine(small_model()), requests)
    actual = ask(graph_engine(small_model(), traced), requests)
    assert [sample.token_ids for sample in actual] == [sample.token_ids for sample in expected]


def test_a_live_adapter_can_be_recorded() -> None:
    few_shot, prompts = forked_prompts(7)
    expected = run_searches_of(plain_engine(with_adapter(small_model("qwen2"))), few_shot, prompts)
    actual = run_searches_of(graph_engine(with_adapter(small_model("qwen2")), traced), few_shot, prompts)
    assert_same_searches(actual, expected)


def test_sliding_windows_can_be_recorded() -> None:
    """Rows get deeper from step to step, and what their windows reach moves with them."""
    few_shot, prompts = forked_prompts(7)
    window = {"sliding_window": 20}
    expected = run_searches_of(plain_engine(small_model("mistral", **window)), few_shot, prompts)
    actual = run_searches_of(graph_engine(small_model("mistral", **window), traced), few_shot, prompts)
    assert_same_searches(actual, expected)


def test_a_switch_of_adapters_forgets_what_was_recorded() -> None:
    """A recorded step holds the path through the modules that it was recorded on."""
    few_shot, prompts = forked_prompts(7, num_groups=2)
    model = with_adapter(small_model())
    engine = graph_engine(model, traced)
    on = run_searches_of(engine, few_shot, prompts)
    with model.disable_adapter():
        off = run_searches_of(engine, few_shot, prompts)
    assert_same_searches(off, run_searches_of(plain_engine(small_model()), few_shot, prompts))
    assert run_searches_of(engine, few_shot, prompts) == on != off


def test_plain_torch_attention_refuses_a_plan_that_it_would_read_once_only() -> None:
    _, prompts = forked_prompts(5)
    engine = graph_engine(small_model(), make_runner=lambda runner: runner)
    with pytest.raises(ValueError, match="cannot follow one whose contents change"):
        ask(engine, sampled(prompts))


def test_a_step_is_run_by_python_twice_and_then_replayed() -> None:
    few_shot, prompts = forked_prompts(12)
    runners: list[WatchedRunner] = []

    def make_runner(runner: ModelRunner) -> WatchedRunner:
        runners.append(WatchedRunner(runner))
        return runners[-1]

    engine = graph_engine(small_model(), traced, make_runner)
    run_searches_of(engine, few_shot, prompts)
    (runner,) = runners
    assert max(runner.num_runs.values()) == 2  # once to warm up, once to be recorded
    before = runner.num_runs.total()
    run_searches_of(engine, few_shot, prompts)
    assert runner.num_runs.total() - before <= 2  # the same batches need the same shapes
    assert engine.scheduler.batch.counts.num_steps > 3 * runner.num_runs.total()


def test_a_step_reads_nothing_back() -> None:
    _, prompts = forked_prompts(5)
    found: list[Any] = []

    def watched(run: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            with DeviceWaits() as mode:
                run()
            found.append(mode.found)

        return replay

    ask(graph_engine(small_model(), watched), sampled(prompts, top_k=5, top_p=0.9, repetition_penalty=1.2))
    assert found
    assert not any(found), found


def test_finished_requests_are_masked_and_their_memory_serves_others() -> None:
    """A request keeps its batch slot for a step after its end; in an arena this full its KV slots are taken by then."""
    few_shot, prompts = forked_prompts(13)
    expected = run_searches_of(plain_engine(small_model()), few_shot, prompts)
    for num_slots in (330, 360, 420, 500):
        engine = graph_engine(small_model(), arena_tokens=num_slots)
        assert_same_searches(run_searches_of(engine, few_shot, prompts), expected)
        assert num_free_slots(engine.arena) == num_slots - len(few_shot)


def test_a_request_that_was_dropped_writes_nowhere_and_grows_no_further() -> None:
    (prompt, _), length = forked_prompts(13), 12
    parts = model_parts(prepare(small_model()))
    arena = KVArena(arena_shapes(parts), NUM_SLOTS, torch.float32, torch.device("cpu"))
    runner = ModelRunner(parts, arena, "eager")
    (path,) = KVTrie().insert([prompt[:-1]])
    for node, _ in path:
        node.start = arena.allocate(len(node))
    compute_nodes(runner, [node for node, _ in path], 64)
    watched = WatchedRunner(runner)
    batch = CudaGraphBatch(watched, StopChecker(parts.causal_lm, TOKENIZER), record=repeated)
    dropped, kept = (
        RunningRequest(request, None, 0, path, arena.allocate(length))
        for request in sampled([prompt], max_new_tokens=length)
    )
    batch.add([dropped, kept])
    for _ in range(3):
        assert batch.step() == []
    batch.drop([dropped])
    own = [storage[dropped.first_slot : dropped.first_slot + length] for layer in arena.layers for storage in layer]
    for storage in own:
        storage.fill_(7.0)
    for _ in range(4):
        batch.step()
    assert all(bool((storage == 7.0).all()) for storage in own)
    assert len(dropped.generated) <= 2 < len(kept.generated)
    first = len(prompt) - 1
    assert [positions[0] - first for positions in watched.positions] == [0, 1, 2, 3, 3, 3, 3]
    assert [positions[1] - first for positions in watched.positions] == [0, 1, 2, 3, 4, 5, 6]


def test_a_run_that_was_left_does_not_disturb_the_next() -> None:
    few_shot, prompts = forked_prompts(13)
    expected = run_searches_of(plain_engine(small_model()), few_shot, prompts)
    engine = graph_engine(small_model())
    engine.cache_prefix(few_shot)
    for _ in range(3):
        run = engine.run(two_level_searches(prompts))
        next(run)
        run.close()
        assert num_free_slots(engine.arena) == NUM_SLOTS - len(few_shot)
    assert_same_searches(run_searches_of(engine, few_shot, prompts), expected)


def test_slots_are_refilled_in_turns_and_few_requests_take_few_slots() -> None:
    _, prompts = forked_prompts(5)
    engine = graph_engine(small_model(), batch_size=16)
    ask(engine, sampled(prompts, copies=8))
    batch = engine.scheduler.batch
    assert isinstance(batch, CudaGraphBatch)
    assert batch.counts.num_steps > 2 * batch.num_rebuilds  # not one a step
    assert batch.counts.num_tokens > 0.5 * batch.counts.num_slots


@pytest.mark.parametrize(("count", "bucket"), [(1, 16), (16, 16), (17, 32), (97, 128), (512, 512), (513, 1024)])
def test_batch_slots_come_in_buckets(count: int, bucket: int) -> None:
    assert slot_bucket(count) == bucket
