"""The arena engine on a GPU: recorded steps give what plain ones give, and both what Hugging Face's own loop gives.

Float32 without TF32, so that equal tokens may be asked for; bfloat16 by nearness to float32, as the research notes ask.
"""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers.modeling_utils import PreTrainedModel

from cpo_fast.search.engine import Sample, SampleRequest
from cpo_fast.search.engine.arena_engine import ArenaEngine
from cpo_fast.search.engine.cuda_graph_batch import CudaGraphBatch
from cpo_fast.search.engine.decode_batch import DecodeBatch
from cpo_fast.search.engine.huggingface import HuggingFaceEngine
from tests.search.engine_cases import (
    CONFIG_CLASSES,
    TOKENIZER,
    Ids,
    Outcomes,
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

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRAPHS = [pytest.param(False, id="plain"), pytest.param(True, id="graphs")]


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(kept)


def engine(model: Any, graphs: bool, **changes: Any) -> ArenaEngine:
    batch = CudaGraphBatch if graphs and DEVICE == "cuda" else DecodeBatch
    return ArenaEngine(model.to(DEVICE), TOKENIZER, engine_config(**changes), batch)


@pytest.mark.parametrize("graphs", GRAPHS)
@pytest.mark.parametrize("adapter", [False, True], ids=["base", "lora"])
@pytest.mark.parametrize("name", CONFIG_CLASSES)
def test_greedy_equals_generate(name: str, adapter: bool, graphs: bool) -> None:
    model = with_adapter(small_model(name)) if adapter else small_model(name)
    few_shot, prompts = forked_prompts(0)
    reference = copy.deepcopy(model).to(DEVICE)
    answers = ask(engine(model, graphs), greedy(prompts), few_shot)
    assert [sample.token_ids for sample in answers] == [generated(reference, prompt) for prompt in prompts]


@pytest.mark.parametrize("graphs", GRAPHS)
@pytest.mark.parametrize(
    "changes", [{}, {"top_k": 5}, {"top_p": 0.7}, {"repetition_penalty": 1.3}, {"top_k": 9, "top_p": 0.8}]
)
def test_samples_equal_the_hugging_face_loop(changes: dict[str, Any], graphs: bool) -> None:
    _, prompts = forked_prompts(5)
    requests = sampled(prompts, **changes)
    expected = ask(HuggingFaceEngine(small_model().to(DEVICE), TOKENIZER, 16), requests)
    actual = ask(engine(small_model(), graphs), requests)
    assert [(sample.token_ids, sample.stop) for sample in actual] == [(s.token_ids, s.stop) for s in expected]


@pytest.mark.parametrize("changes", [{}, {"batch_size": 20}, {"questions_in_flight": 2}, {"arena_tokens": 500}])
def test_recorded_steps_give_the_searches_of_plain_ones(changes: dict[str, int]) -> None:
    few_shot, prompts = forked_prompts(11)
    expected = run_searches_of(engine(small_model(), False), few_shot, prompts)
    actual = run_searches_of(engine(small_model(), True, **changes), few_shot, prompts)

    def tokens(outcomes: Outcomes) -> list[Ids]:
        return [s.token_ids for name in sorted(outcomes) for part in (0, 2) for s in outcomes[name][part]]

    assert tokens(actual) == tokens(expected)


def test_a_run_twice_on_one_engine_is_equal_to_the_bit() -> None:
    few_shot, prompts = forked_prompts(11)
    arena = engine(with_adapter(small_model()), True)
    first = run_searches_of(arena, few_shot, prompts)
    assert run_searches_of(arena, few_shot, prompts) == first


def test_a_changed_adapter_is_seen_by_recorded_steps() -> None:
    few_shot, prompts = forked_prompts(17)
    model = with_adapter(small_model())
    arena = engine(model, True)
    before = run_searches_of(arena, few_shot, prompts)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-1.5)
    after = run_searches_of(arena, few_shot, prompts)
    assert after == run_searches_of(engine(model, True), few_shot, prompts) != before


def test_everything_is_given_back_after_a_run_that_was_left() -> None:
    few_shot, prompts = forked_prompts(13)
    arena = engine(small_model(), True)
    arena.cache_prefix(few_shot)
    free = num_free_slots(arena.arena)
    run = arena.run(two_level_searches(prompts))
    next(run)
    run.close()
    assert num_free_slots(arena.arena) == free


@pytest.mark.parametrize("graphs", GRAPHS)
def test_bfloat16_log_probs_are_as_near_to_float32_as_the_stock_model_s(graphs: bool) -> None:
    few_shot, prompts = forked_prompts(3)
    model = small_model(initializer_range=0.1)
    exact, stock = (copy.deepcopy(model).to(DEVICE, dtype) for dtype in (torch.float32, torch.bfloat16))
    requests = sampled(prompts)

    def logps(judge: PreTrainedModel, request: SampleRequest, sample: Sample) -> np.ndarray:
        new = [*sample.token_ids, *([2] if sample.stop == "eos" else [])]
        ids = torch.tensor([[*request.token_ids, *new]], device=DEVICE)
        with torch.no_grad():
            table = torch.log_softmax(judge(ids).logits[0].double(), -1)[len(request.token_ids) - 1 : -1]
        return table.gather(1, ids[0, -len(new) :].unsqueeze(1)).squeeze(1).cpu().numpy()

    ours, theirs = [], []
    for request, sample in zip(
        requests, ask(engine(model.to(torch.bfloat16), graphs), requests, few_shot), strict=True
    ):
        truth = logps(exact, request, sample)
        ours.append(np.abs(np.asarray(sample.logps) - truth))
        theirs.append(np.abs(logps(stock, request, sample) - truth))
    assert np.concatenate(ours).mean() <= 1.5 * np.concatenate(theirs).mean()
