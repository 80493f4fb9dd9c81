"""Held-out questions, pair weights and batches: functions of names, the seed and the epoch, never of order."""

import itertools
import random
from collections import Counter

import pytest

from cpo_fast.data.batches import epoch_batches, split_by_question, weigh
from cpo_fast.data.examples import Example
from cpo_fast.data.pair_rules import uniform
from cpo_fast.errors import DataError


def pair(group: str, state: int) -> Example:
    return Example((1, state), ((2,), (3,)), group, 1, f"file:{state}")


def pairs_of(num_questions: int, seed: int = 0) -> list[Example]:
    generator = random.Random(seed)
    return [pair(f"q{generator.randrange(num_questions)}", place) for place in range(6 * num_questions)]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
def test_a_question_never_stands_on_both_sides(fraction: float) -> None:
    for seed in range(20):
        everything = pairs_of(30, seed)
        train, held_out = split_by_question(everything, fraction, seed)
        groups = {item.group for item in everything}
        held = {item.group for item in held_out}
        assert held.isdisjoint(item.group for item in train)
        assert len(held) == min(max(1, round(fraction * len(groups))), len(groups) - 1)
        assert sorted([*train, *held_out], key=lambda item: item.prompt_ids) == everything
        assert held_out == [item for item in everything if item.group in held]  # in the order given


def test_the_split_is_a_function_of_names_and_seed() -> None:
    everything = pairs_of(30)
    held = {item.group for item in split_by_question(everything, 0.2, 1)[1]}
    shuffled = random.Random(5).sample(everything, len(everything))
    assert {item.group for item in split_by_question(shuffled, 0.2, 1)[1]} == held
    assert {item.group for item in split_by_question(everything, 0.3, 1)[1]} > held
    assert {item.group for item in split_by_question(everything, 0.2, 2)[1]} != held


def test_a_split_needs_two_questions_and_none_needs_nothing() -> None:
    one = [pair("q", place) for place in range(3)]
    assert split_by_question(one, 0.0, 0) == (one, [])
    with pytest.raises(DataError, match=r"data\.held_out=0\.1 needs at least two questions, the data has 1"):
        split_by_question(one, 0.1, 0)
    with pytest.raises(ValueError, match=r"expected a fraction in \[0, 1\), got 1"):
        split_by_question(one, 1, 0)
    train, held_out = split_by_question([pair("a", 0), pair("b", 1)], 0.9, 0)
    assert (len(train), len(held_out)) == (1, 1)


def test_draws_are_uniform_and_differ_by_seed_and_name() -> None:
    numbers = [uniform(seed, "purpose", name) for seed in range(40) for name in range(50)]
    assert len(set(numbers)) == len(numbers)
    counts = Counter(int(number * 10) for number in numbers)
    # 200 expected in each of ten bins; a chi-square of 35 has probability 1e-4 by nine degrees of freedom
    assert sum((counts[place] - 200) ** 2 / 200 for place in range(10)) < 35


def test_weights_count_states_or_questions_equally_with_mean_one() -> None:
    for seed in range(20):
        generator = random.Random(seed)
        pairs = [pair(f"q{generator.randrange(4)}", generator.randrange(3)) for _ in range(generator.randint(1, 40))]
        for weight in ("pair", "node", "question"):
            weighed = weigh(pairs, weight)  # type: ignore[arg-type]
            assert sum(one.weight for one in weighed) == pytest.approx(len(pairs))
            totals: Counter[object] = Counter()
            for one in weighed:
                key = {"pair": id(one), "node": (one.group, one.prompt_ids), "question": one.group}[weight]
                totals[key] += one.weight  # type: ignore[assignment]
            assert list(totals.values()) == pytest.approx([len(pairs) / len(totals)] * len(totals))
    assert weigh([], "node") == []


def test_one_prompt_under_two_questions_is_two_states() -> None:
    weighed = weigh([pair("a", 0), pair("b", 0), pair("b", 0)], "node")
    assert [one.weight for one in weighed] == [1.5, 0.75, 0.75]


def test_batches_cover_every_pair_once_and_repeat_for_equal_keys() -> None:
    groups = [f"q{index % 7}" for index in range(50)]
    for order in ("pairs", "questions"):
        batches = epoch_batches(groups, 8, order, seed=3, epoch=1)
        assert sorted(index for batch in batches for index in batch) == list(range(50))
        assert batches == epoch_batches(groups, 8, order, seed=3, epoch=1)
        assert (
            batches
            != epoch_batches(groups, 8, order, seed=3, epoch=2)
            != epoch_batches(groups, 8, order, seed=4, epoch=2)
        )
        assert [len(batch) for batch in batches] == [8] * 6 + [2]


def test_order_questions_keeps_each_question_together() -> None:
    groups = [f"q{index % 7}" for index in range(50)]
    line = [groups[index] for batch in epoch_batches(groups, 8, "questions", seed=0, epoch=0) for index in batch]
    changes = sum(left != right for left, right in itertools.pairwise(line))
    assert changes == 6
