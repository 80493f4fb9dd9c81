"""Requests that want nothing are answered at once, in both engines, and touch nothing of others."""

from typing import Any

import pytest

from cpo_fast.search.engine import Requests, Sample, SampleRequest, ScoreRequest
from cpo_fast.search.engine.arena_engine import ArenaEngine
from cpo_fast.search.engine.huggingface import HuggingFaceEngine
from tests.search.engine_cases import TOKENIZER, engine_config, forked_prompts, greedy, small_model

EMPTY = Sample((), "", "length", ())


def build_engine(kind: str) -> Any:
    model = small_model()
    return HuggingFaceEngine(model, TOKENIZER, 4) if kind == "hf" else ArenaEngine(model, TOKENIZER, engine_config())


@pytest.mark.parametrize("kind", ["arena", "hf"])
def test_a_sample_of_no_tokens_is_empty_and_changes_no_other_answer(kind: str) -> None:
    few_shot, prompts = forked_prompts(4)
    usual = greedy(prompts)
    engine = build_engine(kind)
    engine.cache_prefix(few_shot)
    expected = engine.answer(Requests(usual, keep=True))
    nothing = tuple(SampleRequest(prompt, f"none {i}", 1.0, 0.9, 0) for i, prompt in enumerate(prompts))
    engine = build_engine(kind)
    engine.cache_prefix(few_shot)
    assert engine.answer(Requests(nothing, keep=True)) == [EMPTY] * len(nothing)
    mixed = tuple(item for pair in zip(nothing, usual, strict=True) for item in pair)
    answers = engine.answer(Requests(mixed, keep=True))
    assert answers[::2] == [EMPTY] * len(nothing)
    assert answers[1::2] == expected


@pytest.mark.parametrize("kind", ["arena", "hf"])
def test_scores_of_nothing_are_none_and_zero(kind: str) -> None:
    _, prompts = forked_prompts(4)
    engine = build_engine(kind)
    items = (ScoreRequest(prompts[0], ()), ScoreRequest(prompts[0], ((), ())), ScoreRequest(prompts[0], ((5, 6), ())))
    none, zeros, mixed = engine.answer(Requests(items, keep=True))
    assert (none, zeros, mixed[1]) == ([], [0.0, 0.0], 0.0)
    (alone,) = build_engine(kind).answer(Requests((ScoreRequest(prompts[0], ((5, 6),)),), keep=True))
    assert mixed[0] == pytest.approx(alone[0], abs=1e-5)


@pytest.mark.parametrize("kind", ["arena", "hf"])
def test_an_empty_prompt_is_refused_whatever_is_asked_of_it(kind: str) -> None:
    for item in (SampleRequest((), "u", 0.0, 1.0, 0), ScoreRequest((), ())):
        with pytest.raises(ValueError, match="the prompt has no tokens"):
            build_engine(kind).answer(Requests((item,), keep=True))
