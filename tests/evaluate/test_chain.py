"""A chain ends where it should and for the reason it says; one by one, in batches and through the engine alike."""

import types
from typing import Any

import pytest
import torch

from cpo_fast.evaluate.chain import Chain, engine_chain, greedy_chains
from cpo_fast.search.engine.huggingface import HuggingFaceEngine
from cpo_fast.tasks import get_task
from tests.evaluate.scripted import EOS, Scripted, ScriptedEngine, leaning
from tests.tiny import tiny_llama, tiny_tokenizer

TASK = get_task("svamp")


def batched_chains_of(texts: list[str], eos_after: bool = False, **caps: int) -> list[Chain]:
    """The chains of a model that says `texts`, all in one batch of `generate`."""
    tokenizer = tiny_tokenizer()
    scripts = [tokenizer(text).input_ids + ([EOS] if eos_after else []) for text in texts]
    return list(greedy_chains(Scripted(scripts), tokenizer, [[7]] * len(texts), TASK, batch_size=len(texts), **caps))


def chains_of(texts: list[str], eos_after: bool = False, **caps: int) -> list[Chain]:
    """The chains of a model that says `texts`; the engine must read a single one the same way."""
    tokenizer = tiny_tokenizer()
    caps = {"max_new_tokens": 200, "max_steps": 4} | caps
    chains = batched_chains_of(texts, eos_after, **caps)
    for text, chain in zip(texts, chains, strict=True):
        engine = ScriptedEngine({"": text}, eos_after=(text.split("\n")[-1],) if eos_after else ())
        prompt = tokenizer("Question: ?\n").input_ids
        other = engine_chain(engine, tokenizer, prompt, TASK, **caps)
        assert (other.text, other.token_ids, other.stop) == (chain.text, chain.token_ids, chain.stop)
    return chains


def test_chain_stops_when_its_answer_line_is_complete() -> None:
    text = "Step 1: 3 + 2 = 5.\nAnswer: 5\n"
    (chain,) = chains_of([text + "\nQuestion: another 12"])
    assert (chain.text, chain.stop, chain.answer(TASK)) == (text, "answer", "5")
    assert chain.num_tokens == len(text)  # one token a byte, the newline included, nothing after it


def test_every_stop_reason_is_told_and_only_whole_answers_count() -> None:
    (chain,) = chains_of(["Step 1: a\nAnswer: 7"], eos_after=True)
    assert (chain.stop, chain.answer(TASK), chain.text) == ("eos", "7", "Step 1: a\nAnswer: 7")
    assert chain.num_tokens == len(chain.token_ids) + 1 == len(chain.text) + 1  # the end-of-sequence was generated too
    (chain,) = chains_of(["Step 1: a\nAnswer: 71\n"], max_new_tokens=len("Step 1: a\nAnswer: 7"))
    assert (chain.stop, chain.answer(TASK)) == ("max_new_tokens", None)  # 7 is half of 71
    (chain,) = chains_of(["Step 1: a\nStep 2: b\nAnswer: 5\n"], max_steps=2)
    assert (chain.stop, chain.answer(TASK), chain.text) == ("max_steps", None, "Step 1: a\nStep 2: b\n")
    (chain,) = chains_of(["Step 1: a\nQuestion: b?\nAnswer: 5\n"])
    assert (chain.stop, chain.answer(TASK)) == ("question", None)


def test_blank_lines_are_no_steps_and_an_answer_inside_a_step_is_no_answer() -> None:
    (chain,) = chains_of(["\n\nStep 1: the Answer: 3 is wrong\n\nAnswer: 4\n"], max_steps=2)
    assert (chain.stop, chain.answer(TASK)) == ("answer", "4")


def test_rows_of_one_batch_stop_apart() -> None:
    short, long = "Answer: 1\n", "Step 1: " + "x" * 40 + "\nAnswer: 2\n"
    chains = chains_of([short, long])
    assert [chain.num_tokens for chain in chains] == [len(short), len(long)]
    assert [chain.answer(TASK) for chain in chains] == ["1", "2"]


def test_seconds_are_the_batchs_divided_and_the_first_call_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 100.0, 200.0, 207.0])  # the call that is thrown away takes 100 s, the batch 7 s
    monkeypatch.setattr("cpo_fast.evaluate.chain.time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    chains = batched_chains_of(["Answer: 1\n", "Answer: 2\n"], max_new_tokens=200, max_steps=4)
    assert [chain.seconds for chain in chains] == [3.5, 3.5]


def test_newline_inside_a_merged_token_ends_the_line() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["5\n\nQuestion"])
    scripts = [tokenizer("Answer: 5\n\nQuestion").input_ids]
    (chain,) = greedy_chains(Scripted(scripts), tokenizer, [[7]], TASK, max_new_tokens=50, max_steps=4)
    assert chain.token_ids[-1] == len(tokenizer) - 1, "the tokenizer did not merge; the test would prove nothing"
    assert (chain.stop, chain.answer(TASK), chain.text) == ("answer", "5", "Answer: 5\n\n")


def test_answer_that_shares_a_token_with_the_newline_before_it_is_read_whole() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["\nAnswer: 1"])
    scripts = [tokenizer("Step 1: a\nAnswer: 12\n").input_ids]
    assert len(tokenizer) - 1 in scripts[0], "the tokenizer did not merge; the test would prove nothing"
    (chain,) = greedy_chains(Scripted(scripts), tokenizer, [[7]], TASK, max_new_tokens=50, max_steps=4)
    assert (chain.answer(TASK), chain.text) == ("12", "Step 1: a\nAnswer: 12\n")


PROMPTS = ["Q: a\n", "Q: a much longer question than the first one\n", "Q: 12\n", "Q: middle sized one\n", "Q\n"]


@pytest.fixture(scope="module")
def model_and_tokenizer() -> tuple[Any, Any]:
    tokenizer = tiny_tokenizer()
    newline = tokenizer("\n").input_ids[0]
    # lines short enough that a chain has several, and now and then an end
    model = tiny_llama(3, vocab_size=len(tokenizer), max_position_embeddings=4096)
    return leaning(model, {newline: 1.5, EOS: 0.5}), tokenizer


def test_engine_batches_and_plain_generate_give_the_same_chains(model_and_tokenizer: tuple[Any, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    assert len({len(prompt) for prompt in prompts}) == len(prompts), "equal lengths would need no padding"
    caps = {"max_new_tokens": 40, "max_steps": 4}
    single = list(greedy_chains(model, tokenizer, prompts, TASK, batch_size=1, **caps))
    for size in (2, 3, 5, 8):
        batched = greedy_chains(model, tokenizer, prompts, TASK, batch_size=size, **caps)
        assert [chain.token_ids for chain in batched] == [chain.token_ids for chain in single]
    engine = HuggingFaceEngine(model, tokenizer, 8)
    engine.cache_prefix(prompts[0][:2])
    for prompt, chain in zip(prompts, single, strict=True):
        ids = chain.token_ids
        plain = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40, pad_token_id=0)
        assert tuple(plain[0, len(prompt) : len(prompt) + len(ids)].tolist()) == ids
        lines = engine_chain(engine, tokenizer, prompt, TASK, **caps)
        assert (lines.token_ids, lines.stop, lines.text) == (ids, chain.stop, chain.text)
    assert len({chain.token_ids for chain in single}) == len(prompts), "the same to every prompt would prove nothing"
    assert any(chain.text.count("\n") > 1 for chain in single), "chains of one line would prove nothing"
    assert {chain.stop for chain in single} == {"eos", "max_steps", "max_new_tokens"}


def test_caps_below_one_are_refused(model_and_tokenizer: tuple[Any, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    engine = HuggingFaceEngine(model, tokenizer, 4)
    with pytest.raises(ValueError, match="expected caps"):
        engine_chain(engine, tokenizer, [5], TASK, max_new_tokens=0, max_steps=1)
    with pytest.raises(ValueError, match="expected caps"):
        list(greedy_chains(model, tokenizer, [[5]], TASK, max_new_tokens=1, max_steps=0))
