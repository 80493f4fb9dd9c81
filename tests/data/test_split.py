"""Held-out questions, pair weights and mixtures: functions of names and the seed, never of order."""

import random
from collections import Counter
from dataclasses import dataclass

import pytest

from cpo_fast.data.batches import split_by_question, weigh_pairs
from cpo_fast.data.examples import PreferencePair
from cpo_fast.data.load import apportion
from cpo_fast.data.pair_rules import uniform
from cpo_fast.errors import DataError


@dataclass(frozen=True)
class Item:
    group: str
    place: int


def items(num_questions: int, seed: int = 0) -> list[Item]:
    generator = random.Random(seed)
    return [Item(f"q{generator.randrange(num_questions)}", place) for place in range(6 * num_questions)]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
def test_a_question_never_stands_on_both_sides(fraction: float) -> None:
    for seed in range(20):
        everything = items(30, seed)
        train, held_out = split_by_question(everything, fraction, seed)
        groups = {item.group for item in everything}
        held = {item.group for item in held_out}
        assert held.isdisjoint(item.group for item in train)
        assert len(held) == min(max(1, round(fraction * len(groups))), len(groups) - 1)
        assert sorted([*train, *held_out], key=lambda item: item.place) == everything
        assert held_out == [item for item in everything if item.group in held]  # in the order given


def test_the_split_is_a_function_of_names_and_seed() -> None:
    everything = items(30)
    held = {item.group for item in split_by_question(everything, 0.2, 1)[1]}
    shuffled = random.Random(5).sample(everything, len(everything))
    assert {item.group for item in split_by_question(shuffled, 0.2, 1)[1]} == held
    assert {item.group for item in split_by_question(everything, 0.3, 1)[1]} > held
    assert {item.group for item in split_by_question(everything, 0.2, 2)[1]} != held


def test_a_split_needs_two_questions_and_none_needs_nothing() -> None:
    one = [Item("q", place) for place in range(3)]
    assert split_by_question(one, 0.0, 0) == (one, [])
    with pytest.raises(DataError, match=r"data\.held_out=0\.1 needs at least two questions, the data has 1"):
        split_by_question(one, 0.1, 0)
    with pytest.raises(ValueError, match=r"expected a fraction in \[0, 1\), got 1"):
        split_by_question(one, 1, 0)
    train, held_out = split_by_question([Item("a", 0), Item("b", 1)], 0.9, 0)
    assert (len(train), len(held_out)) == (1, 1)


def test_draws_are_uniform_and_differ_by_seed_and_name() -> None:
    numbers = [uniform(seed, "purpose", name) for seed in range(40) for name in range(50)]
    assert len(set(numbers)) == len(numbers)
    counts = Counter(int(number * 10) for number in numbers)
    # 200 expected in each of ten bins; a chi-square of 35 has probability 1e-4 by nine degrees of freedom
    assert sum((counts[place] - 200) ** 2 / 200 for place in range(10)) < 35


def pair(group: str, state: int) -> PreferencePair:
    return PreferencePair((1, state), (2,), (3,), group, 1, "file:1")


def test_weights_count_states_or_questions_equally_with_mean_one() -> None:
    for seed in range(20):
        generator = random.Random(seed)
        pairs = [pair(f"q{generator.randrange(4)}", generator.randrange(3)) for _ in range(generator.randint(1, 40))]
        for weight in ("pair", "node", "question"):
            weighed = weigh_pairs(pairs, weight)  # type: ignore[arg-type]
            assert sum(one.weight for one in weighed) == pytest.approx(len(pairs))
            totals: Counter[object] = Counter()
            for one in weighed:
                key = {"pair": id(one), "node": (one.group, one.prompt_ids), "question": one.group}[weight]
                totals[key] += one.weight  # type: ignore[assignment]
            assert list(totals.values()) == pytest.approx([len(pairs) / len(totals)] * len(totals))
    assert weigh_pairs([], "node") == []


def test_one_prompt_under_two_questions_is_two_states() -> None:
    weighed = weigh_pairs([pair("a", 0), pair("b", 0), pair("b", 0)], "node")
    assert [one.weight for one in weighed] == [1.5, 0.75, 0.75]


@pytest.mark.parametrize(
    ("weights", "sizes", "total", "counts"),
    [
        ([1], [7], None, [7]),
        ([1], [7], 3, [3]),
        ([1], [7], 9, [7]),
        ([1, 1], [10, 4], None, [4, 4]),  # as large as equal shares allow
        ([3, 1], [30, 20], None, [30, 10]),
        ([0.7, 1], [3, 9], None, [3, 4]),  # 0.7 * (3 / 0.7) is 2.9999... in floating point
        ([1, 1, 1], [9, 9, 9], 10, [4, 3, 3]),
        ([2, 1], [9, 9], 9, [6, 3]),
        ([2, 1], [4, 9], 9, [4, 2]),  # the first is too small for six of nine: the shares hold
        ([1, 100], [5, 50], 10, [0, 10]),
    ],
)
def test_a_mixture_keeps_its_shares(
    weights: list[float], sizes: list[int], total: int | None, counts: list[int]
) -> None:
    assert apportion(weights, sizes, total) == counts


def test_mixtures_never_take_more_than_there_is_or_was_asked_for() -> None:
    generator = random.Random(0)
    for _ in range(500):
        sizes = [generator.randint(0, 30) for _ in range(generator.randint(1, 5))]
        weights = [generator.uniform(0.1, 5) for _ in sizes]
        total = generator.choice([None, generator.randint(1, 60)])
        counts = apportion(weights, sizes, total)
        assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
        assert total is None or sum(counts) <= total
        largest = min(size / weight for size, weight in zip(sizes, weights, strict=True))
        if total is not None and total <= largest * sum(weights):
            assert sum(counts) == total
