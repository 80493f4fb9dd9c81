"""The arena engine on a GPU: recorded steps give what plain ones give, and both what Hugging Face's own loop gives.

Float32 without TF32, so that equal tokens may be asked for; bfloat16 by nearness to float32, as the research notes ask.
"""

import copy

import numpy as np
import pytest
import torch

from cpo_fast.search.engine.arena_engine import ArenaEngine
from cpo_fast.search.engine.huggingface import HuggingFaceEngine
from cpo_fast.search.engine.requests import Ask, Features
from tests.search.test_arena_engine import (
    ARCHITECTURES,
    TOKENIZER,
    generated,
    greedy,
    random_prompts,
    results,
    sampled,
    searches,
    settings,
    tiny,
    with_adapter,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRAPHS = [pytest.param(False, id="plain"), pytest.param(True, id="graphs")]


@pytest.fixture(autouse=True)
def _exact_products():
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(kept)


def engine(model, graphs, **changes):
    return ArenaEngine(model.to(DEVICE), TOKENIZER, settings(**changes), Features(graphs=graphs and DEVICE == "cuda"))


def on_device(model):
    """`generate` of a test's helper reads CPU tensors."""
    twin = copy.deepcopy(model).to(DEVICE)
    plain = twin.generate
    twin.generate = lambda input_ids, **kwargs: plain(input_ids=input_ids.to(DEVICE), **kwargs).cpu()
    return twin


@pytest.mark.parametrize("graphs", GRAPHS)
@pytest.mark.parametrize("adapter", [False, True], ids=["base", "lora"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_equals_generate(name, adapter, graphs):
    model = with_adapter(tiny(name)) if adapter else tiny(name)
    few_shot, prompts = random_prompts(0)
    reference = on_device(model)
    arena = engine(model, graphs)
    arena.cache_prefix(few_shot)
    answers = arena.answer(Ask(tuple(greedy(prompts)), keep=True))
    different = [
        prompt
        for prompt, sample in zip(prompts, answers, strict=True)
        if list(sample.token_ids) != generated(reference, prompt, 12)
    ]
    assert not different


@pytest.mark.parametrize("graphs", GRAPHS)
@pytest.mark.parametrize(
    "changes", [{}, {"top_k": 5}, {"top_p": 0.7}, {"repetition_penalty": 1.3}, {"top_k": 9, "top_p": 0.8}]
)
def test_samples_equal_the_hugging_face_loop(changes, graphs):
    _, prompts = random_prompts(5)
    requests = tuple(sampled(prompts, **changes))
    expected = HuggingFaceEngine(tiny("llama").to(DEVICE), TOKENIZER, 16).answer(Ask(requests, keep=True))
    actual = engine(tiny("llama"), graphs).answer(Ask(requests, keep=True))
    assert [sample.token_ids for sample in actual] == [sample.token_ids for sample in expected]
    assert [sample.stop for sample in actual] == [sample.stop for sample in expected]


@pytest.mark.parametrize("changes", [{}, {"batch_size": 20}, {"questions_in_flight": 2}, {"arena_tokens": 500}])
def test_recorded_steps_give_the_searches_of_plain_ones(changes):
    few_shot, prompts = random_prompts(11)
    expected = results(engine(tiny("llama"), False), few_shot, prompts)
    actual = results(engine(tiny("llama"), True, **changes), few_shot, prompts)

    def tokens(outcome):
        return [s.token_ids for name in sorted(outcome) for part in (0, 2) for s in outcome[name][part]]

    assert tokens(actual) == tokens(expected)


def test_a_run_twice_on_one_engine_is_equal_to_the_bit():
    few_shot, prompts = random_prompts(11)
    arena = engine(with_adapter(tiny("llama")), True)
    first = results(arena, few_shot, prompts)
    assert results(arena, few_shot, prompts) == first


def test_a_changed_adapter_is_seen_by_recorded_steps():
    few_shot, prompts = random_prompts(17)
    model = with_adapter(tiny("llama"))
    arena = engine(model, True)
    before = results(arena, few_shot, prompts)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-1.5)
    after = results(arena, few_shot, prompts)
    assert after == results(engine(model, True), few_shot, prompts) != before


def test_everything_is_given_back_after_a_run_that_was_left():
    few_shot, prompts = random_prompts(13)
    arena = engine(tiny("llama"), True)
    arena.cache_prefix(few_shot)
    free = arena._arena.num_free
    run = arena.run(searches(prompts))
    next(run)
    run.close()
    assert arena._arena.num_free == free


@pytest.mark.parametrize("graphs", GRAPHS)
def test_bfloat16_log_probs_are_as_near_to_float32_as_the_stock_model_s(graphs):
    few_shot, prompts = random_prompts(3)
    model = tiny("llama", initializer_range=0.1)
    exact, stock = (copy.deepcopy(model).to(DEVICE, dtype) for dtype in (torch.float32, torch.bfloat16))
    arena = engine(model.to(torch.bfloat16), graphs)
    arena.cache_prefix(few_shot)
    requests = sampled(prompts)

    def logps(judge, request, sample):
        new = [*sample.token_ids, *([2] if sample.stop == "eos" else [])]
        ids = torch.tensor([[*request.token_ids, *new]], device=DEVICE)
        with torch.no_grad():
            table = torch.log_softmax(judge(ids).logits[0].double(), -1)[len(request.token_ids) - 1 : -1]
        return table.gather(1, ids[0, -len(new) :].unsqueeze(1)).squeeze(1).cpu().numpy()

    ours, theirs = [], []
    for request, sample in zip(requests, arena.answer(Ask(tuple(requests), keep=True)), strict=True):
        truth = logps(exact, request, sample)
        ours.append(np.abs(np.asarray(sample.logps) - truth))
        theirs.append(np.abs(logps(stock, request, sample) - truth))
    assert np.concatenate(ours).mean() <= 1.5 * np.concatenate(theirs).mean()
