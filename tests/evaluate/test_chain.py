"""A chain ends where it should and for the reason it says; alone, beside others and token by token alike."""

from typing import Any

import pytest
import torch

from cpo_fast.config import SearchConfig
from cpo_fast.evaluate.chain import Chain, ChainReader, chain_search
from cpo_fast.search.engine import run_search
from cpo_fast.search.engine.arena_engine import ArenaEngine
from cpo_fast.search.engine.huggingface import HuggingFaceEngine
from cpo_fast.tasks import common_prefix_length, get_task
from tests.evaluate.scripted import EOS, ScriptedEngine, leaning
from tests.tiny import tiny_llama, tiny_tokenizer

TASK = get_task("svamp")


def chain_of(text: str, eos_after: bool = False, **caps: int) -> Chain:
    """The chain of an engine that says `text`."""
    engine = ScriptedEngine({"": text}, eos_after=(text.split("\n")[-1],) if eos_after else ())
    prompt = engine.tokenizer("Question: ?\n").input_ids
    caps = {"max_new_tokens": 200, "max_steps": 4} | caps
    return run_search(engine, chain_search(engine.tokenizer, prompt, TASK, **caps))


def read(tokenizer: Any, token_ids: list[int]) -> Chain:
    """The chain of these ids, token by token until it ends."""
    reader = ChainReader(tokenizer, TASK, max_steps=4, max_new_tokens=50)
    for token in token_ids:
        if reader.stop is None:
            reader.add(token)
    return reader.chain()


def test_chain_stops_when_its_answer_line_is_complete() -> None:
    text = "Step 1: 3 + 2 = 5.\nAnswer: 5\n"
    chain = chain_of(text + "\nQuestion: another 12")
    assert (chain.text, chain.stop, chain.answer(TASK)) == (text, "answer", "5")
    assert chain.num_tokens == len(text)  # one token a byte, the newline included, nothing after it


def test_every_stop_reason_is_told_and_only_whole_answers_count() -> None:
    chain = chain_of("Step 1: a\nAnswer: 7", eos_after=True)
    assert (chain.stop, chain.answer(TASK), chain.text) == ("eos", "7", "Step 1: a\nAnswer: 7")
    assert chain.num_tokens == len(chain.token_ids) + 1 == len(chain.text) + 1  # the end-of-sequence was generated too
    chain = chain_of("Step 1: a\nAnswer: 71\n", max_new_tokens=len("Step 1: a\nAnswer: 7"))
    assert (chain.stop, chain.answer(TASK)) == ("max_new_tokens", None)  # 7 is half of 71
    chain = chain_of("Step 1: a\nStep 2: b\nAnswer: 5\n", max_steps=2)
    assert (chain.stop, chain.answer(TASK), chain.text) == ("max_steps", None, "Step 1: a\nStep 2: b\n")
    chain = chain_of("Step 1: a\nQuestion: b?\nAnswer: 5\n")
    assert (chain.stop, chain.answer(TASK)) == ("question", None)


def test_blank_lines_are_no_steps_and_an_answer_inside_a_step_is_no_answer() -> None:
    chain = chain_of("\n\nStep 1: the Answer: 3 is wrong\n\nAnswer: 4\n", max_steps=2)
    assert (chain.stop, chain.answer(TASK)) == ("answer", "4")


def test_newline_inside_a_merged_token_ends_the_line() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["5\n\nQuestion"])
    ids = tokenizer("Answer: 5\n\nQuestion").input_ids
    chain = read(tokenizer, ids)
    assert chain.token_ids[-1] == len(tokenizer) - 1, "the tokenizer did not merge; the test would prove nothing"
    assert (chain.stop, chain.answer(TASK), chain.text) == ("answer", "5", "Answer: 5\n\n")


def test_answer_that_shares_a_token_with_the_newline_before_it_is_read_whole() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["\nAnswer: 1"])
    ids = tokenizer("Step 1: a\nAnswer: 12\n").input_ids
    assert len(tokenizer) - 1 in ids, "the tokenizer did not merge; the test would prove nothing"
    chain = read(tokenizer, ids)
    assert (chain.answer(TASK), chain.text) == ("12", "Step 1: a\nAnswer: 12\n")


PROMPTS = ["Q: a\n", "Q: a much longer question than the first one\n", "Q: 12\n", "Q: middle sized one\n", "Q\n"]


@pytest.fixture(scope="module")
def model_and_tokenizer() -> tuple[Any, Any]:
    tokenizer = tiny_tokenizer()
    newline = tokenizer("\n").input_ids[0]
    # lines short enough that a chain has several, and now and then an end
    model = tiny_llama(3, vocab_size=len(tokenizer), max_position_embeddings=4096)
    return leaning(model, {newline: 1.5, EOS: 0.5}), tokenizer


def test_chains_alone_side_by_side_and_of_plain_generate_are_the_same(model_and_tokenizer: tuple[Any, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    prompts = {text: tokenizer(text).input_ids for text in PROMPTS}
    caps = {"max_new_tokens": 40, "max_steps": 4}

    def searches() -> Any:
        return ((name, chain_search(tokenizer, prompt, TASK, **caps)) for name, prompt in prompts.items())

    reference = HuggingFaceEngine(model, tokenizer, 8)
    reference.cache_prefix(prompts[PROMPTS[0]][:2])
    single = {name: chain for name, chain, _ in reference.run(searches())}
    for name, prompt in prompts.items():
        ids = single[name].token_ids
        plain = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40, pad_token_id=0)
        assert tuple(plain[0, len(prompt) : len(prompt) + len(ids)].tolist()) == ids
    begin = tuple(prompts[PROMPTS[0]][:2])
    num_shared = sum(common_prefix_length(begin, prompt) for prompt in prompts.values())
    for at_once in (1, 2, 5):
        config = SearchConfig(arena_tokens=2000, questions_in_flight=at_once)
        engine = ArenaEngine(model, tokenizer, config)
        engine.cache_prefix(prompts[PROMPTS[0]][:2])
        assert {name: chain for name, chain, _ in engine.run(searches())} == single
        # keys of one shared node are read once for all that run, so fewer steps than tokens show that they ran together
        counts = engine.scheduler.batch.counts
        assert (counts.num_steps == counts.num_tokens) == (at_once == 1)
        # every prompt once, but for its last token, which the first step reads, and what is kept for all; no line again
        assert engine.scheduler.num_prefilled == sum(len(prompt) - 1 for prompt in prompts.values()) - num_shared
    assert len({chain.token_ids for chain in single.values()}) == len(prompts), "the same to all would prove nothing"
    assert any(chain.text.count("\n") > 1 for chain in single.values()), "chains of one line would prove nothing"
    assert {chain.stop for chain in single.values()} == {"eos", "max_steps", "max_new_tokens"}


def test_a_task_that_fails_on_one_chain_ends_that_chain_alone(
    model_and_tokenizer: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks may be code of the user's own, which reads lines while other chains are under way."""
    model, tokenizer = model_and_tokenizer
    failing, caps = get_task("svamp"), {"max_new_tokens": 40, "max_steps": 4}

    def fails(line: str) -> bool:
        raise ZeroDivisionError("a fault of the task")

    monkeypatch.setattr(failing, "is_answer_line", fails)
    tasks = {PROMPTS[0]: failing} | dict.fromkeys(PROMPTS[1:], TASK)
    engine = ArenaEngine(model, tokenizer, SearchConfig(arena_tokens=2000, questions_in_flight=len(tasks)))
    searches = (
        (text, chain_search(tokenizer, tokenizer(text).input_ids, task, **caps)) for text, task in tasks.items()
    )
    found = {name: chain for name, chain, _ in engine.run(searches)}
    assert isinstance(found.pop(PROMPTS[0]), ZeroDivisionError)
    assert all(isinstance(chain, Chain) for chain in found.values())


@pytest.mark.parametrize("caps", [{"max_new_tokens": 0, "max_steps": 1}, {"max_new_tokens": 1, "max_steps": 0}])
def test_caps_below_one_are_refused(caps: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected caps"):
        chain_of("Answer: 1\n", **caps)
