"""Verdicts: strict reading, counted failures, labels tokenised with their prompt, equal states judged once."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from cpo_fast.config import SearchConfig
from cpo_fast.search.engine import Answer, Requests, Sample, SampleRequest, run_search
from cpo_fast.search.state_evaluator import Evaluator, Verdict, num_unparseable, parse_verdict
from cpo_fast.tasks import Prompts, Question, get_task

QUESTION = Question("q", "how many")


class ScriptedEngine:
    """Gives the same verdict texts and log-probs for every prompt, and keeps what it was asked."""

    def __init__(self, texts: Sequence[str] = (), logps: tuple[float, float] = (0.0, 0.0)) -> None:
        self.texts, self.logps = texts, logps
        self.asks: list[Requests] = []

    def cache_prefix(self, token_ids: Sequence[int]) -> None:
        raise AssertionError("not part of a verdict")

    def answer(self, ask: Requests) -> list[Answer]:
        assert not ask.keep
        self.asks.append(ask)
        requests = [item for item in ask.items if isinstance(item, SampleRequest)]
        assert len({request.uid for request in requests}) == len(requests)
        samples = [Sample((1,), text, "newline", (-1.0,)) for text in self.texts]
        if requests:
            return samples * (len(requests) // len(samples))
        return [list(self.logps) for _ in ask.items]


def _evaluator(tokenizer: PreTrainedTokenizerFast, **settings: Any) -> Evaluator:
    return Evaluator(SearchConfig(**settings), Prompts(get_task("svamp"), tokenizer), QUESTION, "0/q")


def _verdict(engine: ScriptedEngine, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> Verdict:
    """The verdict on one state."""
    (verdict,) = run_search(engine, _evaluator(tokenizer, **settings).evaluate([("a\n",)]))
    return verdict


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (" likely\n", "likely"),
        (" Impossible.\n", "impossible"),
        (" unlikely\n", None),
        (" not impossible\n", None),
        (" likely or impossible\n", None),
        (" likely, since 3 + 4 = 7\n", None),
        (" 47\n", None),
        ("", None),
    ],
)
def test_only_a_line_that_is_the_label_is_a_verdict(text, label):
    assert parse_verdict(text) == label


def test_unreadable_verdicts_are_counted_and_left_out_of_the_mean(tokenizer):
    engine = ScriptedEngine(texts=[" likely\n", " 47\n", " impossible\n", " likely\n"])
    verdict = _verdict(engine, tokenizer, evaluator="sample", num_verdicts=4)
    assert verdict.value == pytest.approx((10 + 1 + 10) / 3)
    assert num_unparseable(verdict.evaluations) == 1
    assert [record["label"] for record in verdict.evaluations] == ["likely", None, "impossible", "likely"]


def test_a_state_without_a_readable_verdict_has_no_value(tokenizer):
    engine = ScriptedEngine(texts=["maybe"] * 2)
    verdict = _verdict(engine, tokenizer, evaluator="sample", num_verdicts=2)
    assert verdict.value is None
    assert num_unparseable(verdict.evaluations) == 2


@pytest.mark.parametrize("logps", [(-1.0, -2.5), (-3.0, -0.1), (-2000.0, -1.0), (-1.0, -2000.0)])
def test_logit_value_is_weighted_by_the_label_probabilities(tokenizer, logps):
    verdict = _verdict(ScriptedEngine(logps=logps), tokenizer)
    largest = max(logps)
    likely, impossible = (math.exp(logp - largest) for logp in logps)
    assert verdict.value == pytest.approx((10 * likely + 1 * impossible) / (likely + impossible))
    assert verdict.evaluations == ({"likely": logps[0], "impossible": logps[1]},)


def test_equal_states_are_judged_once(tokenizer):
    engine = ScriptedEngine(logps=(-1.0, -2.0))
    evaluator = _evaluator(tokenizer)
    same, other, last = ((f"{text}\n",) for text in "abc")
    verdicts = run_search(engine, evaluator.evaluate([same, other, same]))
    run_search(engine, evaluator.evaluate([other]))
    run_search(engine, evaluator.evaluate([other, last]))
    assert [len(ask.items) for ask in engine.asks] == [2, 1]
    assert verdicts[0] == verdicts[2]


@pytest.mark.parametrize("evaluator", ["logits", "sample"])
def test_the_verdicts_of_a_level_are_one_ask(tokenizer, evaluator):
    engine = ScriptedEngine(texts=[" likely\n", " impossible\n"])
    states = [(f"{text}\n",) for text in "abca"]
    verdicts = run_search(engine, _evaluator(tokenizer, evaluator=evaluator, num_verdicts=2).evaluate(states))
    (ask,) = engine.asks
    assert len(ask.items) == 3 * (1 if evaluator == "logits" else 2)
    assert {verdict.value for verdict in verdicts} == {5.5}


def test_labels_are_tokenised_with_the_prompt_and_keep_their_leading_space(tokenizer):
    prompt_ids, labels = Prompts(get_task("svamp"), tokenizer).labels(["Question: a b c\nIt is"])[0]
    assert tokenizer.decode(prompt_ids) == "Question: a b c\nIt is"
    assert [tokenizer.decode(ids) for ids in labels] == [" likely", " impossible"]


@pytest.mark.parametrize("chat", [False, True])
def test_labels_of_a_level_are_those_of_each_prompt_alone(tokenizer, chat):
    prompts = Prompts(get_task("svamp"), tokenizer, chat)
    texts = ["Question: a b c\nIt is", "It is", "Question: a\nb\nIt is"]
    assert prompts.labels(texts) == [one for text in texts for one in prompts.labels([text])]
    assert [ids for ids, _ in prompts.labels(texts)] == [prompts.encode_text(text) for text in texts]


def test_an_unreadable_verdict_can_count_as_impossible_and_is_still_recorded_as_unreadable(tokenizer):
    engine = ScriptedEngine(texts=[" likely\n", " 47\n", " maybe\n", " likely\n"])
    settings = {"evaluator": "sample", "num_verdicts": 4, "unparseable": "impossible"}
    verdict = _verdict(engine, tokenizer, **settings)
    assert verdict.value == pytest.approx((10 + 1 + 1 + 10) / 4)
    assert num_unparseable(verdict.evaluations) == 2


def test_tokens_of_verdicts_are_counted_once_a_prompt(tokenizer):
    engine = ScriptedEngine(texts=[" likely\n"] * 3)
    evaluator = _evaluator(tokenizer, evaluator="sample", num_verdicts=3)
    run_search(engine, evaluator.evaluate([("a\n",), ("a\n",)]))
    assert evaluator.num_tokens == 3
