"""Searches as generators: what they ask, in which order they are answered, and whose error is whose."""

from collections.abc import Iterator

import pytest
from transformers import PreTrainedTokenizerFast

from cpo_fast.search.engine import Requests, ScoreRequest, Search, run_search, run_searches
from tests.search.scripted_engine import full_tree, search


class EchoEngine:
    """Answers a score request by its prompt; a prompt of 13 cannot be answered."""

    def answer(self, requests: Requests) -> list[list[float]]:
        if any(item.token_ids == (13,) for item in requests.items):
            raise ValueError("thirteen")
        return [[float(item.token_ids[0])] for item in requests.items]


def scores_of(*numbers: int) -> Requests:
    return Requests(tuple(ScoreRequest((number,), ((1,),)) for number in numbers), keep=False)


def sum_search(*numbers: int) -> Search[float]:
    """Asks for all at once, then for the sum alone."""
    answers = yield scores_of(*numbers)
    assert answers == [[float(number)] for number in numbers]
    ((total,),) = yield scores_of(sum(numbers))
    return total


def test_a_search_is_sent_the_answers_in_order_and_returns_its_result() -> None:
    assert run_search(EchoEngine(), sum_search(1, 2, 3)) == 6.0


def test_a_search_that_asks_nothing_has_a_result() -> None:
    def nothing() -> Search[str]:
        yield from ()
        return "done"

    assert run_search(EchoEngine(), nothing()) == "done"


def test_what_cannot_be_answered_is_raised_inside_the_search_that_asked() -> None:
    def careful() -> Search[tuple[str, list[float]]]:
        try:
            yield scores_of(1, 13)
        except ValueError as error:
            (first,) = yield scores_of(2)
            return str(error), first

    assert run_search(EchoEngine(), careful()) == ("thirteen", [2.0])
    with pytest.raises(ValueError, match="thirteen"):
        run_search(EchoEngine(), sum_search(6, 7))


def test_one_search_that_fails_ends_no_other_and_searches_are_taken_when_it_is_their_turn() -> None:
    taken: list[str] = []

    def searches() -> Iterator[tuple[str, Search[float]]]:
        for name, numbers in (("fine", (1, 2)), ("engine", (6, 7)), ("own", ()), ("last", (4, 4))):
            taken.append(name)
            yield name, sum_search(*numbers) if numbers else broken()

    def broken() -> Search[float]:
        yield scores_of(1)
        raise KeyError("own")

    seen = []
    for name, result, seconds in run_searches(EchoEngine(), searches()):
        assert taken[-1] == name
        assert seconds >= 0
        seen.append((name, result if isinstance(result, float) else type(result)))
    assert seen == [("fine", 3.0), ("engine", ValueError), ("own", KeyError), ("last", 8.0)]


@pytest.mark.parametrize("evaluator", ["logits", "sample"])
def test_a_level_asks_once_for_thoughts_and_once_for_verdicts(
    tokenizer: PreTrainedTokenizerFast, evaluator: str
) -> None:
    tree, engine = search(
        tokenizer, full_tree, verdicts=["likely\n"], num_kept=2, max_steps=2, evaluator=evaluator, num_verdicts=2
    )
    assert len(tree.nodes) == 3 + 6
    per_state = 1 if evaluator == "logits" else 2
    # two states of the second level say the same lines, but each after another first one
    assert [(len(ask.items), ask.keep) for ask in engine.asks] == [
        (3, True),
        (3 * per_state, False),
        (6, True),
        (6 * per_state, False),
    ]


def test_settings_of_a_thought_reach_its_requests_and_verdicts_are_sampled_plainly(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    _, engine = search(
        tokenizer, full_tree, verdicts=["likely\n"], evaluator="sample", max_steps=1, top_k=7, repetition_penalty=1.3
    )
    thoughts, verdicts = engine.asks
    assert {(item.top_k, item.repetition_penalty) for item in thoughts.items} == {(7, 1.3)}
    assert {(item.top_k, item.repetition_penalty, item.top_p) for item in verdicts.items} == {(0, 1.0, 1.0)}
