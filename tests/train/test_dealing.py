"""A step's examples over ranks: each exactly once, questions together, about as many tokens everywhere."""

import random

import pytest

from cpo_fast.data.batches import epoch_batches
from cpo_fast.data.examples import Example
from cpo_fast.train.dealing import deal, num_tokens

PROMPT = 400  # tokens of a few-shot prompt, which every rank computes once
NUM_QUESTIONS = 600


def searched_questions(seed: int = 0, num_questions: int = NUM_QUESTIONS) -> list[Example]:
    """Pairs along winning chains of two to five thoughts of 15 to 45 tokens, with one to five losers at each."""
    generator = random.Random(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(generator.randrange(5, 30_000) for _ in range(generator.randint(low, high)))

    shared = ids(PROMPT, PROMPT)
    examples = []
    for question in range(num_questions):
        prompt = shared + ids(40, 90)
        for depth in range(1, generator.randint(2, 5) + 1):
            chosen = ids(15, 45)
            for _ in range(generator.randint(1, 5)):
                examples.append(Example(prompt, (chosen, ids(15, 45)), f"q{question}", depth, f"f:{len(examples)}"))
            prompt = prompt + chosen
    return examples


EXAMPLES = searched_questions()


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
