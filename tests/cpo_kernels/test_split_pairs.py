"""Micro-batches of pairs against their definition: a forest's tokens are the distinct prefixes of its sequences."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cpo_kernels._csrc as _csrc
from cpo_kernels import build_forest
from cpo_kernels.integrations.transformers import PairTooLarge, split_pairs

Pair = tuple[list[int], ...]  # a prompt and its responses


def prefixes(pairs: list[Pair]) -> set[tuple[int, ...]]:
    """Every distinct non-empty prefix of the pairs' sequences: one token of their forest each."""
    rows = [prompt + response for prompt, *responses in pairs for response in responses]
    return {tuple(row[:length]) for row in rows for length in range(1, len(row) + 1)}


def defined(pairs: list[Pair], max_tokens: int) -> list[list[int]]:
    """In the order of the prompts, a pair joins the micro-batch if their forest fits, else it begins the next."""
    batches: list[list[int]] = []
    for index in sorted(range(len(pairs)), key=lambda index: (pairs[index][0], index)):
        if batches and len(prefixes([pairs[i] for i in (*batches[-1], index)])) <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


ids = st.lists(st.integers(0, 2), max_size=5)  # few ids: equal rows, prefixes and branches at every depth are common
prompts = st.lists(st.integers(0, 2), min_size=1, max_size=4)
pair_lists = st.lists(st.tuples(prompts, ids, ids), max_size=8)
groups = st.tuples(prompts, st.lists(ids, min_size=2, max_size=4)).map(lambda group: (group[0], *group[1]))
group_lists = st.lists(groups, max_size=8)


@settings(max_examples=400, deadline=None)
@given(pairs=pair_lists | group_lists, spare=st.integers(0, 12))
def test_micro_batches_are_those_of_the_definition(pairs: list[Pair], spare: int) -> None:
    max_tokens = max([1, *(len(prefixes([pair])) for pair in pairs)]) + spare
    assert split_pairs(pairs, max_tokens) == defined(pairs, max_tokens)


@settings(max_examples=200, deadline=None)
@given(pairs=(pair_lists | group_lists).filter(bool), max_tokens=st.integers(0, 9))
def test_every_pair_too_large_for_the_budget_is_found_with_its_tokens(pairs: list[Pair], max_tokens: int) -> None:
    sizes = {index: len(prefixes([pair])) for index, pair in enumerate(pairs)}
    large = {index: size for index, size in sizes.items() if size > max_tokens}
    if not large:
        assert split_pairs(pairs, max_tokens) == defined(pairs, max_tokens)
        return
    with pytest.raises(PairTooLarge) as raised:
        split_pairs(pairs, max_tokens)
    assert raised.value.num_tokens == large
    first = min(large, key=lambda index: (pairs[index][0], index))  # the first that is visited is the one named
    assert str(raised.value) == (
        f"pair {first} alone has {sizes[first]} tokens, more than the budget of {max_tokens}; raise the budget or "
        "drop the pair"
    )


def test_the_budget_may_be_met_exactly_and_equal_pairs_are_free() -> None:
    pairs: list[Pair] = [([1, 2], [3], [4]), ([1, 2], [3], [4]), ([1, 2], [3, 5], [3])]
    assert split_pairs(pairs, 5) == [[0, 1, 2]]
    assert split_pairs(pairs, 4) == [[0, 1], [2]]
    assert split_pairs([], 0) == []


def test_prompts_are_visited_in_lexicographic_order_and_equal_ones_as_they_came() -> None:
    prompts = [[2], [1, 9], [1], [1, 9], [1, 9, 0], [1, 10]]
    pairs: list[Pair] = [(prompt, [7], [8]) for prompt in prompts]
    assert split_pairs(pairs, 1000) == [[2, 1, 3, 4, 5, 0]]


def test_tuples_and_arrays_are_taken_and_large_ids_do_not_collide() -> None:
    large = 2**31 - 1
    pairs = [((1, large), (2,), (3,)), (np.array([1, large]), np.array([large]), np.array([3]))]
    assert split_pairs(pairs, 5) == [[0, 1]]  # type: ignore[arg-type]
    for wrong in (-1, 2**31):
        with pytest.raises(ValueError, match=rf"sequence 1: expected token ids in \[0, 2147483647\], got {wrong} at"):
            split_pairs([([1], [2], [wrong])], 5)


def test_a_batch_of_realistic_size_fits_and_the_next_pair_would_not() -> None:
    rng = np.random.default_rng(0)

    def tokens(count: int) -> list[int]:
        return rng.integers(0, 32_000, count).tolist()

    shared = tokens(900)
    questions = [shared + tokens(60) for _ in range(12)]
    pairs: list[Pair] = [(questions[rng.integers(12)], tokens(30), tokens(40)) for _ in range(64)]
    batches = split_pairs(pairs, 2000)
    assert len(batches) > 2
    sizes = []
    for batch, following in zip(batches, [*batches[1:], []], strict=True):
        rows = [[*pairs[i][0], *response] for i in (*batch, *following[:1]) for response in pairs[i][1:]]
        sizes.append((build_forest(rows[: 2 * len(batch)]).num_tokens, build_forest(rows).num_tokens))
    assert all(size <= 2000 for size, _ in sizes)
    assert all(with_next > 2000 for _, with_next in sizes[:-1])


@pytest.mark.parametrize(
    ("offsets", "prompt_lengths", "message"),
    [
        ([0, 3], [1], "two sequences a pair"),
        ([0, 2, 3], [2], "prompts no longer than their sequences"),
        ([0, 2, 3], [-1], "prompts no longer than their sequences"),
        ([0, 2, 2], [1], "offsets from 0 to the number of tokens"),
        ([0, 4, 3], [1], "ascending offsets"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_memory_is_read(
    offsets: list[int], prompt_lengths: list[int], message: str
) -> None:
    tokens = np.array([1, 2, 1], np.int64)
    with pytest.raises(ValueError, match=message):
        _csrc.split_pairs(tokens, np.array(offsets, np.int64), np.array(prompt_lengths, np.int64), 10)
