"""Language models that say nothing, never stop, or say anything: a recorded status, bounded work, never a crash."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from cpo_fast.config import Config
from cpo_fast.files import canonical_json
from cpo_fast.search.collect import collect
from cpo_fast.search.statistics import tree_statistics
from cpo_fast.search.tree_search import STRATEGIES
from cpo_fast.tree import SearchTree, read_trees
from tests.search.scripted_engine import Thoughts, line, search
from tests.search.tiny_llama import build_byte_tokenizer, build_model, build_tokenizer

NUM_CANDIDATES, MAX_NODES = 4, 60
HUGE = 100_000

# what a model says at every state -> status of the tree, whatever judges it
THOUGHTS = {
    "nothing": (("", "eos"), "no_candidates"),
    "newlines": (("\n\n", "newline"), "no_candidates"),
    "unicode spaces": (("\u3000\u2028\u00a0\n", "newline"), "no_candidates"),
    "endless text": (("and so on " * 20_000, "length"), "no_answer"),
    "one token": (("a" * 96, "length"), "no_answer"),
    "one line for ever": (line("Step 1: go on"), "no_answer"),
    "another question": (line("Question: how many"), "no_answer"),
    "100 kB line": (line("x" * HUGE), "no_answer"),
    "100 kB answer": (line("Answer: " + "the " * (HUGE // 4)), "no_answer"),
    "100 kB number": (line("Answer: " + "7" * HUGE), "no_answer"),
    "emoji and right to left": (line("Step 1: \U0001f600 \u0634\u0643\u0631\u0627 e\u0301\u200b\x00"), "no_answer"),
    "bytes that are no text": (line("Step 1: \ufffd\ufffd"), "no_answer"),
    "terminal codes": (line("Answer: \x1b[31m7\x1b[0m"), None),
    "the same answer": (line("Answer: 7"), "ok"),
}
VERDICTS = {
    "prose": ["I think that it is likely, because the sum is right\n", "Let us see.\n"],
    "labels inside words": [" unlikely\n", " likelyhood\n", " not impossible\n", " impossibleness\n"],
    "nothing": [""],
    "100 kB": [" likely" * (HUGE // 7)],
    "unicode": ["\ufffd\u200b likely\u0301\n", "\U0001f600"],
}


def _search(
    tokenizer: PreTrainedTokenizerFast,
    thoughts: Thoughts,
    verdicts: Sequence[str] = ("likely\n",),
    seconds: float = 20.0,
    num_candidates: int = NUM_CANDIDATES,
    **settings: Any,
) -> SearchTree:
    """The tree of a scripted search that took no longer than `seconds` of this process and survives its file."""
    sizes = {"num_kept": 2, "max_steps": 3, "max_nodes": MAX_NODES}
    started = time.process_time()
    tree, engine = search(
        tokenizer, thoughts, verdicts=verdicts, num_candidates=num_candidates, **{**sizes, **settings}
    )
    assert time.process_time() - started < seconds
    assert SearchTree.from_dict(json.loads(canonical_json(tree.to_dict()))) == tree
    counted = tree_statistics(tree)
    assert counted.num_samples == num_candidates * len(engine.expanded)
    assert counted.num_unique < MAX_NODES + num_candidates
    return tree


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
@pytest.mark.parametrize("evaluator", ["logits", "sample"])
@pytest.mark.parametrize("name", THOUGHTS)
def test_whatever_a_model_says_has_a_status(tokenizer, name, evaluator, strategy):
    sample, status = THOUGHTS[name]
    tree = _search(tokenizer, lambda _: [sample] * NUM_CANDIDATES, strategy=strategy, evaluator=evaluator)
    if status is not None:
        assert tree.status == status
    assert all(node.count == NUM_CANDIDATES for node in tree.nodes)
    assert max((node.depth for node in tree.nodes), default=0) <= 3


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
@pytest.mark.parametrize("name", VERDICTS)
def test_verdicts_that_cannot_be_read_leave_no_value_and_the_first_samples_go_on(tokenizer, name, strategy):
    def thoughts(lines):
        if len(lines) == 2:
            return [line(f"Answer: {number}") for number in range(NUM_CANDIDATES)]
        return [line(f"Step {len(lines) + 1}{'abcd'[number]}") for number in range(NUM_CANDIDATES)]

    settings = {"strategy": strategy, "evaluator": "sample", "num_verdicts": len(VERDICTS[name])}
    tree = _search(tokenizer, thoughts, VERDICTS[name], **settings)
    assert {node.value for node in tree.nodes} == {None}
    # simulations, whose scores are equal too, reach every state sooner or later
    followed = [True] * 4 if strategy == "mcts" else [True, True, False, False]
    assert [node.kept for node in tree.nodes[:NUM_CANDIDATES]] == followed
    assert (tree.status, tree.answer) == ("ok", "0")  # nobody knows better: the first answer of equals
    counted = _search(tokenizer, thoughts, VERDICTS[name], unparseable="impossible", **settings)
    assert {node.value for node in counted.nodes} == {1.0}


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_equal_values_and_kept_ties_stay_within_the_budget(tokenizer, strategy):
    def thoughts(lines):
        return [line(f"Step {len(lines) + 1}{'abcd'[number]}") for number in range(NUM_CANDIDATES)]

    tree = _search(tokenizer, thoughts, strategy=strategy, keep_ties=True, max_steps=50)
    assert tree.status == "no_answer"
    assert len(tree.nodes) == MAX_NODES


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_one_candidate_a_state_is_a_chain(tokenizer, strategy):
    script = [line("Step 1: a"), line("Step 2: b"), line("Answer: 12")]
    tree = _search(tokenizer, lambda lines: [script[len(lines)]], strategy=strategy, num_candidates=1)
    assert [node.parent for node in tree.nodes] == [-1, 0, 1]
    assert (tree.answer, tree.winning_nodes) == ("12", (2,))


@pytest.mark.parametrize("evaluator", ["logits", "sample"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(
    ("word", "status"), [("</s>", "no_candidates"), ("\n", "no_candidates"), ("a", "no_answer"), ("1", "no_answer")]
)
def test_empty_equal_and_endless_candidates_have_a_status_for_any_k(make_config, engine, evaluator, k, word, status):
    """A model that says one word for ever: its candidates are all empty or all equal, its verdicts no labels."""
    tokenizer = build_tokenizer()
    stuck = build_model(len(tokenizer), {tokenizer.convert_tokens_to_ids(word): 1000.0})
    settings = {"num_candidates": k, "num_kept": 2, "max_thought_tokens": 4, "num_verdicts": 2, "max_verdict_tokens": 2}
    result = collect(make_config(engine=engine, evaluator=evaluator, **settings), stuck, tokenizer)
    assert result.statuses == {status: 3}
    assert (result.num_samples, result.num_empty) == (3 * k, 3 * k * (status == "no_candidates"))
    assert result.num_thoughts == 3 * (status == "no_answer")  # equal ones are merged
    assert result.num_unparseable == result.num_verdicts == (6 if evaluator == "sample" and result.num_thoughts else 0)


@pytest.mark.parametrize("k", [1, 3])
def test_the_same_line_for_ever_is_searched_to_the_last_step(make_config, engine, k):
    """Greedy in all but name: every candidate of every state is equal, and every state goes on."""
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer))
    ids = tokenizer.convert_tokens_to_ids
    with torch.no_grad():  # `b` then a newline, whatever stands before: the embedding decides alone
        model.lm_head.weight.zero_()
        model.lm_head.bias.fill_(-1000.0)
        model.lm_head.bias[[ids("b"), ids("\n")]] = 0.0
    config = make_config(engine=engine, num_candidates=k, num_kept=2, max_steps=3, max_thought_tokens=6, top_k=2)
    trees = read_trees(collect(config, model, tokenizer).trees_path)
    assert {tree.status for tree in trees} <= {"no_answer", "no_candidates"}
    assert all(set(node.text) <= {"b", "\n"} for tree in trees for node in tree.nodes)
    assert all(node.logps == tuple([round(math.log(0.5), 6)] * len(node.token_ids)) for t in trees for node in t.nodes)


def _questions(config: Config, *texts: str) -> None:
    rows = [{"id": str(number), "question": text} for number, text in enumerate(texts)]
    Path(config.task.path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_a_model_of_random_bytes_is_searched_to_the_end(make_config, strategy, engine):
    tokenizer = build_byte_tokenizer()
    noisy = build_model(len(tokenizer), {tokenizer.convert_tokens_to_ids("\u010a"): 3.0})  # newlines now and then
    settings = {"temperature": 5.0, "evaluator": "sample", "num_verdicts": 2, "max_verdict_tokens": 8}
    config = make_config(strategy, strategy=strategy, engine=engine, num_candidates=3, max_nodes=12, **settings)
    _questions(config, "how many \U0001f600?", "\u0643\u0645 e\u0301")
    result = collect(config, noisy, tokenizer)
    trees = read_trees(result.trees_path)
    assert sum(result.statuses.values()) == 2
    assert "failed" not in result.statuses
    assert any("\ufffd" in node.text for tree in trees for node in tree.nodes)
    assert result.num_unparseable == result.num_verdicts > 0


@pytest.mark.parametrize("text", ["why " * 2000, "\ud800 how many"], ids=["longer than the context", "half a pair"])
def test_a_question_that_cannot_be_asked_is_recorded_and_the_next_one_is_searched(make_config, text, engine):
    tokenizer = build_byte_tokenizer()
    model = build_model(len(tokenizer), {tokenizer.convert_tokens_to_ids("a"): 1000.0}, max_positions=6000)
    config = make_config(engine=engine, num_candidates=2, max_thought_tokens=4)
    _questions(config, text, "how many")
    result = collect(config, model, tokenizer)
    first, second = read_trees(result.trees_path)
    assert (first.status, second.status) == ("failed", "no_answer")
    assert first.nodes == ()
    assert first.detail
    if "\ud800" not in text:
        assert "exceed the model's 6000 positions" in first.detail
    lines = (Path(config.run) / "statistics.jsonl").read_text().splitlines()
    assert [json.loads(each)["status"] for each in lines] == ["failed", "no_answer"]
