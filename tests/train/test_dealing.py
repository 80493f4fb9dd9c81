"""A step's examples over ranks: each exactly once, questions together, about as many tokens everywhere."""

import random

import pytest

from benchmarks.scaling import searched_questions
from cpo_fast.data.batches import epoch_batches
from cpo_fast.train.dealing import deal, num_tokens

PROMPT = 400  # tokens of a few-shot prompt, which every rank computes once
NUM_QUESTIONS = 600
EXAMPLES = searched_questions(NUM_QUESTIONS, PROMPT, 30_000, most=5)


def efficiency(num_ranks: int, batch_pairs: int, order: str) -> float:
    """Tokens of one process over ranks x those of the busiest, mean over steps."""
    groups = [example.group for example in EXAMPLES]
    shares = []
    for batch in epoch_batches(groups, batch_pairs, order, 0, 0)[:20]:  # type: ignore[arg-type]
        examples = [EXAMPLES[index] for index in batch]
        dealt = deal(examples, num_ranks)
        loads = [num_tokens(examples, places) if places else 0 for places in dealt]
        shares.append(num_tokens(examples, range(len(examples))) / (num_ranks * max(loads)))
    return sum(shares) / len(shares)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_sixteen_pairs_a_rank_keep_ranks_busy(num_ranks: int) -> None:
    assert efficiency(num_ranks, 16 * num_ranks, "pairs") >= 0.85


@pytest.mark.parametrize("num_ranks", [2, 8])
def test_a_hundred_pairs_a_rank_keep_ranks_busy_where_questions_stay_together(num_ranks: int) -> None:
    assert efficiency(num_ranks, 100 * num_ranks, "questions") >= 0.7


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_every_example_has_one_rank_and_every_rank_finds_the_same(num_ranks: int, count: int) -> None:
    examples = random.Random(count).sample(EXAMPLES, count)
    dealt = deal(examples, num_ranks)
    assert len(dealt) == num_ranks
    assert sorted(place for places in dealt for place in places) == list(range(count))
    assert all(places == sorted(places) for places in dealt)
    assert dealt == deal(examples, num_ranks)


def test_a_question_stays_on_one_rank_until_it_is_more_than_a_rank_s_share() -> None:
    by_question = [example for example in EXAMPLES if int(example.group[1:]) < 40]
    dealt = deal(by_question, 4)
    for name in {example.group for example in by_question}:
        holders = [
            rank for rank, places in enumerate(dealt) if any(by_question[place].group == name for place in places)
        ]
        assert len(holders) == 1
    alone = [example for example in EXAMPLES if example.group == "q3"]
    holders = [rank for rank, places in enumerate(deal(alone, 2)) if places]
    assert holders == [0, 1]
