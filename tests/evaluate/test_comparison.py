"""Comparisons are paired by question, refuse other questions, and say what else differs."""

import pytest

from cpo_fast.errors import DataError
from cpo_fast.evaluate import compare, mcnemar_exact, paired_bootstrap
from cpo_fast.evaluate.result import QuestionResult, summarise
from tests.evaluate.scripted import IDENTITY, made_evaluation

FIRST = [True, True, False, False, None, True]
SECOND = [True, False, True, True, None, True]


def test_counts_tests_and_ratios_of_two_evaluations() -> None:
    first = made_evaluation("base", FIRST, seconds=0.5, num_tokens=30)
    second = made_evaluation("adapter", SECOND, seconds=2.0, num_tokens=15)
    comparison = compare(first, second, ("base", "adapter"), seed=4, num_resamples=500)
    assert (comparison.num_questions, comparison.num_graded) == (6, 5)
    counts = (comparison.num_both, comparison.num_only_first, comparison.num_only_second, comparison.num_neither)
    assert counts == (2, 1, 2, 0)
    assert comparison.mcnemar_p == mcnemar_exact(1, 2)
    assert (comparison.seconds_ratio, comparison.tokens_ratio) == (4.0, 0.5)
    assert list(comparison.metrics) == ["accuracy", "exact", "f1"]
    accuracy, f1 = comparison.metrics["accuracy"], comparison.metrics["f1"]
    assert (accuracy.first, accuracy.second) == (0.6, 0.8)
    assert accuracy.difference == pytest.approx(0.2)
    assert accuracy.interval == paired_bootstrap([1, 1, 0, 0, 1], [1, 0, 1, 1, 1], 500, seed=4)
    assert (f1.first, f1.second) == pytest.approx((0.8, 0.9))  # a miss has an F1 of one half here
    assert comparison.stated == ()


def test_questions_are_paired_by_id_not_by_place() -> None:
    first = made_evaluation("base", FIRST)
    second = made_evaluation("adapter", SECOND)
    turned = type(second)(**{**second.__dict__, "results": second.results[::-1]})
    forth, back = (compare(first, each, ("a", "b"), num_resamples=50) for each in (second, turned))
    assert forth == back


def test_other_questions_are_refused_and_the_first_is_named() -> None:
    first = made_evaluation("base", FIRST)
    fewer = made_evaluation("adapter", SECOND[:3])
    with pytest.raises(DataError, match="'q3' is in one only"):
        compare(first, fewer, ("one", "two"))
    with pytest.raises(DataError, match="'q3' is in one only"):
        compare(fewer, first, ("two", "one"))
    ungraded = made_evaluation("adapter", [*SECOND[:2], None, *SECOND[3:]])
    with pytest.raises(DataError, match="the reference answer of 'q2' differs"):
        compare(first, ungraded, ("one", "two"))
    results = tuple(type(each)(**{**each.__dict__, "question": each.question + "!"}) for each in first.results)
    with pytest.raises(DataError, match="the text of 'q0' differs"):
        compare(first, type(first)(**{**first.__dict__, "results": results}), ("one", "two"))


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("prompt_hash", "other", "the prompt differs: ph in one, other in two"),
        ("task_hash", "other", "the task section differs: th in one, other in two"),
        ("model_hash", "other", "the model differs: mh in one, other in two"),
        ("adapter_hash", "0a", "the adapter differs: none in one, 0a in two"),
        ("batch_size", 8, "the batch size differs: 1 in one, 8 in two"),
        ("device", "cuda:0", "the device differs: cpu in one, cuda:0 in two"),
    ],
)
def test_what_else_differs_is_stated(field: str, value: object, sentence: str) -> None:
    first, second = made_evaluation("base", FIRST), made_evaluation("base", SECOND, **{field: value})
    assert compare(first, second, ("one", "two"), num_resamples=10).stated == (sentence,)


def test_nothing_graded_still_compares_costs() -> None:
    first, second = made_evaluation("base", [None] * 3, 1.0), made_evaluation("adapter", [None] * 3, 3.0, 0)
    comparison = compare(first, second, ("a", "b"))
    assert (comparison.num_graded, comparison.mcnemar_p, comparison.metrics) == (0, None, {})
    assert (comparison.seconds_ratio, comparison.tokens_ratio) == (3.0, 0.0)
    assert compare(second, first, ("a", "b")).tokens_ratio is None


def test_a_metric_of_some_questions_is_averaged_over_those() -> None:
    """`numeric` is for questions whose reference answer is a number."""
    results = [
        QuestionResult(name, "", gold, gold, True, scores, 1, 0, 1.0, "answer", "")
        for name, gold, scores in (
            ("a", "Paris", {"exact": 1.0}),
            ("b", "7", {"exact": 0.0, "numeric": 1.0}),
            ("c", "8", {"exact": 1.0, "numeric": 0.0}),
        )
    ]
    assert summarise("base", "cot", "hotpotqa", IDENTITY, results, 0.0, 3.0).metrics == {"exact": 2 / 3, "numeric": 0.5}
