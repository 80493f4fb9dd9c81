"""How many steps a whole run records as CUDA graphs: each costs about a tenth of a second and keeps memory.

A run of the paper's shape over random tokens, of a model that computes nothing: what is recorded depends on the shapes of
plans and samplers alone. Lines end at random, so that the decode batch has every size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from cpo_fast.search.engine.arena_engine import ArenaEngine
from cpo_fast.search.engine.cuda_graph_batch import CudaGraphBatch, doubled_bucket
from cpo_fast.search.engine.forward_plans import ModelRunner
from cpo_fast.search.engine.requests import Requests, Sample, SampleRequest, Search
from cpo_fast.search.engine.stopping import StopChecker
from cpo_fast.tree import Stop
from cpo_kernels.tree_decode import DecodePlan
from tests.search.dense_decode import DenseRunner, repeated
from tests.search.engine_cases import TOKENIZER, VOCAB_SIZE, ask, engine_config, sampled, small_model

Ids = tuple[int, ...]
NUM_QUESTIONS, NUM_LEVELS, NUM_CANDIDATES, NUM_KEPT, NUM_VERDICTS = 20, 3, 10, 5, 2
MAX_NEW_TOKENS = 24


class IdleRunner(ModelRunner):
    """Hidden states and logits of 0 in the right shapes."""

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, plan: DecodePlan) -> torch.Tensor:
        return torch.zeros(len(token_ids), 32)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(hidden), VOCAB_SIZE)


class RandomEnds(StopChecker):
    """A line ends with one token in ten."""

    def append(self, token: int, generated: list[int], request: SampleRequest) -> Stop | None:
        generated.append(token)
        return "newline" if token % 10 == 0 else "length" if len(generated) == request.max_new_tokens else None


def searches(few_shot: Ids, evaluator: Ids, **sampling: Any) -> list[tuple[str, Search[int]]]:
    """Breadth-first searches whose verdicts are written, as the paper's are."""
    generator = np.random.default_rng(0)

    def draw(count: int) -> Ids:
        return tuple(int(token) for token in generator.integers(3, VOCAB_SIZE, count))

    def ask(prompts: Sequence[Ids], copies: int, name: str, **values: Any) -> Requests:
        items = [
            SampleRequest(prompt, f"{name}/{place}/{copy}", max_new_tokens=MAX_NEW_TOKENS, **values)
            for place, prompt in enumerate(prompts)
            for copy in range(copies)
        ]
        return Requests(tuple(items), keep=values["temperature"] > 0.5)

    def search(name: str, question: Ids) -> Search[int]:
        states: list[Ids] = [()]
        for level in range(NUM_LEVELS):
            prompts = [few_shot + question + state for state in states]
            thoughts = yield ask(
                prompts, NUM_CANDIDATES, f"{name}/{level}", temperature=0.9, **{"top_p": 1.0, **sampling}
            )
            below = [
                state + answer.token_ids
                for answer, state in zip(thoughts, [one for one in states for _ in range(NUM_CANDIDATES)], strict=True)
                if isinstance(answer, Sample)
            ]
            judged = [evaluator + question + state for state in below]
            yield ask(judged, NUM_VERDICTS, f"{name}/{level}/verdicts", temperature=0.4, top_p=1.0)
            states = below[:NUM_KEPT]
        return 0

    return [(str(number), search(str(number), draw(20 + number))) for number in range(NUM_QUESTIONS)]


def run(**sampling: Any) -> tuple[int, CudaGraphBatch]:
    """How many steps a run records, and the batch after it."""
    num_recorded = 0

    def record(step: Callable[[], None]) -> Callable[[], None]:
        nonlocal num_recorded
        num_recorded += 1
        return step

    def make_batch(runner: ModelRunner, stop_checker: StopChecker) -> CudaGraphBatch:
        runner.__class__ = IdleRunner  # the engine's, so that prefills compute nothing either
        runner.impl = "eager"  # on a GPU too states are prefilled
        return CudaGraphBatch(runner, stop_checker, record=record)

    model = small_model(max_position_embeddings=4096)
    config = engine_config(batch_size=256, arena_tokens=40_000, prefill_tokens=8192)
    engine = ArenaEngine(model, TOKENIZER, config, make_batch, RandomEnds(model, TOKENIZER))
    few_shot, evaluator = (5,) * 450, (6,) * 700
    for prefix in (few_shot, evaluator):
        engine.cache_prefix(prefix)
    for name, result, _ in engine.run(searches(few_shot, evaluator, **sampling)):
        assert result == 0, name
    batch = engine.scheduler.batch
    assert isinstance(batch, CudaGraphBatch)
    return num_recorded, batch


@pytest.mark.parametrize(
    ("sampling", "most"),
    [
        ({}, 13),  # 22 while items, partials and uniforms had a bucket each
        ({"top_p": 0.9}, 14),  # 28, because verdicts are drawn without it
        ({"top_k": 50, "repetition_penalty": 1.1}, 18),  # 28
    ],
    ids=str,
)
def test_a_run_records_few_steps(sampling: dict[str, Any], most: int) -> None:
    num_recorded, batch = run(**sampling)
    assert num_recorded <= most
    assert batch.num_rebuilds > 5 * num_recorded
    assert batch.counts.num_steps > 2 * batch.num_rebuilds


@pytest.mark.parametrize(("count", "bucket"), [(0, 24), (24, 24), (25, 48), (97, 192)])
def test_buckets_double(count: int, bucket: int) -> None:
    assert doubled_bucket(count, 24) == bucket


def test_what_is_asked_for_once_stays_and_changes_no_token() -> None:
    """A request without top-k and top-p gets in a batch that had them what it gets in one that had not."""
    prompts = [(5,) * 30 + (token,) for token in range(3, 12)]
    answers = []
    for before in ([], sampled(prompts, top_k=4, top_p=0.7)):
        engine = ArenaEngine(
            small_model(),
            TOKENIZER,
            engine_config(arena_tokens=2000),
            lambda runner, stop: CudaGraphBatch(DenseRunner(runner), stop, record=repeated),
        )
        if before:
            ask(engine, before)
        answers.append(ask(engine, sampled(prompts, copies=4)))
    assert answers[0] == answers[1]
