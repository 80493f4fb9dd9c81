"""The reference engine: alone equals batched, greedy equals `generate`, cached prefixes change nothing."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from cpo_fast.search.engine import Requests, SampleRequest, ScoreRequest
from cpo_fast.search.engine.huggingface import HuggingFaceEngine
from cpo_fast.search.engine.sampler import choose_token, uniforms
from tests.search.tiny_llama import build_model


def line_requests(
    tokenizer: PreTrainedTokenizerFast, num_samples: int = 7, max_new_tokens: int = 30, **sampling: Any
) -> list[SampleRequest]:
    """So many lines after each of three prompts, at temperature 0.9 and nucleus 0.95 unless `sampling` says otherwise."""
    prompts = ["Question: a b c\n", "Question: 12 + 7 is what and why\nStep 1: go\n", "Question: z\n"]
    values = {"temperature": 0.9, "top_p": 0.95, "max_new_tokens": max_new_tokens, **sampling}
    return [
        SampleRequest(tuple(tokenizer(prompt)["input_ids"]), f"{prompt}/{index}", **values)
        for prompt in prompts
        for index in range(num_samples)
    ]


def cut_line(ids: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Ids up to end-of-sequence, which is left out, or to the first newline."""
    line: list[int] = []
    for token in ids:
        if token == tokenizer.eos_token_id:
            break
        line.append(token)
        if "\n" in tokenizer.decode([token]):
            break
    return tuple(line)


def sample_plainly(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, request: SampleRequest
) -> tuple[int, ...]:
    """One token at a time, the whole sequence through the model each time: no cache, no batch."""
    ids = list(request.token_ids)
    for uniform in uniforms(request.uid, request.max_new_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double().numpy()
        sampling = (request.temperature, request.top_p, request.top_k, request.repetition_penalty)
        token = choose_token(logits, float(uniform), *sampling, ids)
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
        if "\n" in tokenizer.decode([token]):
            break
    return tuple(ids[len(request.token_ids) :])


@pytest.mark.parametrize("processed", [{}, {"top_k": 5, "repetition_penalty": 1.3}], ids=["plain", "processed"])
def test_batched_sampling_equals_one_row_without_a_cache(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, processed: dict[str, Any]
) -> None:
    requests = line_requests(tokenizer, **processed)
    expected = [sample_plainly(model, tokenizer, request) for request in requests]
    assert len(set(expected)) > 5  # a model that always says the same would prove nothing
    assert len({len(ids) for ids in expected}) > 3
    for batch_size in (1, 3, 40):
        engine = HuggingFaceEngine(model, tokenizer, batch_size)
        assert [sample.token_ids for sample in engine.sample(requests)] == expected


def test_top_k_and_penalty_change_the_samples(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    engine = HuggingFaceEngine(model, tokenizer, 8)
    plain, few, penalised = (
        engine.sample(line_requests(tokenizer, **processed))
        for processed in ({}, {"top_k": 2}, {"repetition_penalty": 2.0})
    )
    assert plain != few != penalised != plain


def test_logps_are_the_raw_policys_whatever_was_sampled_from(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Against one forward over prompt and line without a cache; the sampling itself is far from the policy."""
    engine = HuggingFaceEngine(model, tokenizer, 40)
    requests = line_requests(tokenizer, temperature=2.5, top_p=0.9, top_k=20, repetition_penalty=1.3)
    stops = set()
    for request, sample in zip(requests, engine.sample(requests), strict=True):
        stops.add(sample.stop)
        targets = [*sample.token_ids, *([tokenizer.eos_token_id] if sample.stop == "eos" else [])]
        assert len(sample.logps) == sample.num_tokens == len(targets)
        with torch.no_grad():
            logits = model(torch.tensor([[*request.token_ids, *sample.token_ids]])).logits[0]
        logps = logits.double().log_softmax(-1)[len(request.token_ids) - 1 :]
        expected = [logps[position, target].item() for position, target in enumerate(targets)]
        np.testing.assert_allclose(sample.logps, expected, rtol=1e-5, atol=1e-5)
    assert stops >= {"newline", "eos"}


def test_answers_stand_in_the_order_of_the_items(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    engine = HuggingFaceEngine(model, tokenizer, 40)
    requests = line_requests(tokenizer, num_samples=2)
    scoring = ScoreRequest(requests[0].token_ids, ((5, 6), (7,)))
    items = (requests[0], scoring, *requests[1:], scoring)
    answers = engine.answer(Requests(items, keep=True))
    samples, logps = engine.sample(requests), engine.score(scoring.token_ids, scoring.continuations)
    assert answers == [samples[0], logps, *samples[1:], logps]


@pytest.mark.parametrize("num_threads", [1, 2])
def test_tokens_and_logps_are_the_same_bits_for_any_number_of_rows(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, num_threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        # on two busy cores two threads wait for each other at every product: few forwards, of rows that leave a thread 1
        requests = line_requests(tokenizer, num_samples=14, max_new_tokens=4)[:14]
        expected = HuggingFaceEngine(model, tokenizer, 40).sample(requests)
        for batch_size in (5, 9):
            assert HuggingFaceEngine(model, tokenizer, batch_size).sample(requests) == expected
    finally:
        torch.set_num_threads(before)


def test_samples_do_not_depend_on_the_other_requests(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = HuggingFaceEngine(model, tokenizer, 40)
    requests = line_requests(tokenizer)
    together = engine.sample(requests)
    assert [engine.sample([request])[0] for request in requests[::4]] == together[::4]
    assert engine.sample(requests[::-1]) == together[::-1]


def test_a_cached_prefix_changes_no_sample_and_no_score(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    requests = line_requests(tokenizer)
    plain, cached = HuggingFaceEngine(model, tokenizer, 8), HuggingFaceEngine(model, tokenizer, 8)
    cached.cache_prefix(requests[0].token_ids[:3])
    cached.cache_prefix(requests[0].token_ids[:2])
    expected = plain.sample(requests)
    samples = cached.sample(requests)
    assert samples == cached.sample(requests)  # the stored cache was not grown by its use
    for sample, alone in zip(samples, expected, strict=True):
        assert (sample.token_ids, sample.stop) == (alone.token_ids, alone.stop)
        np.testing.assert_allclose(sample.logps, alone.logps, rtol=1e-4, atol=1e-4)  # another split of the prefill
    labels = [[5, 6], [7]]
    np.testing.assert_allclose(
        cached.score(requests[0].token_ids, labels), plain.score(requests[0].token_ids, labels), rtol=1e-5
    )


@pytest.mark.parametrize("prompt", ["Question: a b c\n", "Question: how many\nStep 1: x y\n"])
def test_greedy_equals_generate_token_for_token(tokenizer: PreTrainedTokenizerFast, prompt: str) -> None:
    newline = tokenizer.convert_tokens_to_ids("\n")
    greedy_model = build_model(len(tokenizer), {newline: 1.0})
    ids = tokenizer(prompt)["input_ids"]
    with torch.no_grad():
        output = greedy_model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=24,
            do_sample=False,
        )
    expected = cut_line(output[0, len(ids) :].tolist(), tokenizer)
    assert len(expected) > 2
    for batch_size in (1, 8):
        engine = HuggingFaceEngine(greedy_model, tokenizer, batch_size)
        request = SampleRequest(tuple(ids), "greedy", 0.0, 1.0, 24)
        assert [sample.token_ids for sample in engine.sample([request] * 5)] == [expected] * 5


def test_score_is_the_log_prob_of_the_whole_label(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = tuple(tokenizer("Question: a b c\n")["input_ids"])
    labels = [[10, 11, 12], [13], [14, 15]]
    with torch.no_grad():
        expected = []
        for label in labels:
            logps = model(torch.tensor([[*prompt, *label]])).logits.double().log_softmax(-1)[0]
            expected.append(sum(logps[len(prompt) - 1 + i, token].item() for i, token in enumerate(label)))
    np.testing.assert_allclose(HuggingFaceEngine(model, tokenizer, 2).score(prompt, labels), expected, rtol=1e-5)


def test_a_line_ends_at_newline_eos_or_the_cap_and_says_which(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.convert_tokens_to_ids
    prompt = tuple(tokenizer("Question: a\n")["input_ids"])
    for word, stop, kept in (("\n\n", "newline", 1), ("</s>", "eos", 0), ("7", "length", 9)):
        engine = HuggingFaceEngine(build_model(len(tokenizer), {ids(word): 1000.0}), tokenizer, 4)
        samples = engine.sample([SampleRequest(prompt, str(index), 1.0, 1.0, 9) for index in range(3)])
        assert {sample.stop for sample in samples} == {stop}
        assert {sample.token_ids for sample in samples} == {(ids(word),) * kept}


def test_a_prompt_beyond_the_models_positions_is_refused(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = HuggingFaceEngine(model, tokenizer, 4)
    with pytest.raises(ValueError, match="exceed the model's 4096 positions"):
        engine.sample([SampleRequest((5,) * 4090, "long", 1.0, 1.0, 10)])
    with pytest.raises(ValueError, match="no tokens"):
        engine.sample([SampleRequest((), "empty", 1.0, 1.0, 10)])
