"""Where keys and values are kept: no slot has two owners, and what several prompts share is computed once."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpo_fast.errors import OutOfMemory
from cpo_fast.search.engine import Requests, SampleRequest, ScoreRequest, Search
from cpo_fast.search.engine.arena_engine import ArenaEngine
from cpo_fast.search.engine.kv_arena import KVArena, KVTrie
from tests.search.engine_cases import TOKENIZER, ask, engine_config, greedy, num_free_slots, sampled, small_model

NUM_TOKENS = 40


def arena_engine(**changes: int) -> ArenaEngine:
    return ArenaEngine(small_model(), TOKENIZER, engine_config(**changes))


def scored(prompt: Sequence[int]) -> ScoreRequest:
    return ScoreRequest(tuple(prompt), ((5,),))


def asked_in_turn(engine: ArenaEngine, *turns: Requests, after: Callable[[], None] = lambda: None) -> list[Any]:
    """The answers to what one search asks, turn by turn; `after` each is called."""

    def search() -> Search[list[Any]]:
        answers = []
        for turn in turns:
            answers.append((yield turn))
            after()
        return answers

    ((_, answers, _),) = engine.run([("", search())])
    if isinstance(answers, Exception):
        raise answers
    assert isinstance(answers, list)
    return answers


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 17)), max_size=60))
def test_no_slot_has_two_owners_and_an_interval_is_given_wherever_one_fits(moves: list[tuple[bool, int]]) -> None:
    arena = KVArena([(1, 2)], NUM_TOKENS, torch.float32, torch.device("cpu"))
    owned: list[tuple[int, int]] = []
    is_free = np.ones(NUM_TOKENS, dtype=bool)
    for gives_back, number in moves:
        if gives_back and owned:
            start, count = owned.pop(number % len(owned))
            arena.release(start, count)
            is_free[start : start + count] = True
            continue
        start = arena.allocate(number)
        runs = "".join(".#"[not free] for free in is_free).split("#")
        fitting = [len(run) for run in runs if len(run) >= number]
        assert (start is None) == (not fitting)
        if start is not None:
            assert is_free[start : start + number].all()
            parts = is_free[:start][::-1], is_free[start:]
            length = sum(len(part) if part.all() else int(part.argmin()) for part in parts)
            assert length == min(fitting), "a longer interval was cut up"
            is_free[start : start + number] = False
            owned.append((start, number))
    assert num_free_slots(arena) == is_free.sum()
    for start, count in owned:
        arena.release(start, count)
    assert arena.allocate(NUM_TOKENS) == 0


def test_nodes_that_are_taken_out_are_found_no_more() -> None:
    trie = KVTrie()
    shared, left, right = tuple(range(30)), (40, 41), (50, 51)
    paths = trie.insert([shared + left, shared + right, (99, 98)])
    for node in trie.nodes:
        node.fixed = True
    top = paths[0][0][0]
    assert [tuple(node.ids.tolist()) for node in trie.take_out(set(trie.nodes) - {top})] == [left, right, (99, 98)]
    assert trie.nodes == [top]
    (again, lone) = trie.insert([shared + left, (99, 98)])
    assert again[0] == (top, 30)
    assert not {again[1][0], lone[0][0]} & {node for path in paths for node, _ in path}


@pytest.mark.parametrize("labels", [((5,), (6,)), ((5, 8), (6, 7, 9))])
def test_what_verdicts_of_a_question_share_is_computed_once(labels: tuple[tuple[int, ...], ...]) -> None:
    """A question of 50 tokens, under it two lines of 20, each judged beside a third that differs, then lines below one."""
    generator = np.random.default_rng(5)
    few_shot, question, first, second, third = (
        tuple(generator.integers(30, 60, count).tolist()) for count in (30, 50, 20, 20, 20)
    )
    few_shot, question = (60, *few_shot), (61, *question)
    lines = [(62 + place, *line) for place, line in enumerate((first, second))]
    below = [(*lines[0], 70, *third), (*lines[0], 71, *third)]
    last = [(*below[0], 80, *third), (*below[0], 81, *third)]
    levels = [[ScoreRequest(few_shot + question + state, labels) for state in level] for level in (lines, below, last)]
    engine = arena_engine()
    engine.cache_prefix(few_shot)
    num_kept: list[int] = []
    turns = [Requests(tuple(level), keep=False) for level in levels]
    answers = asked_in_turn(
        engine, *turns, after=lambda: num_kept.append(4096 - len(few_shot) - num_free_slots(engine.arena))
    )
    own = sum(map(len, labels)) - len(labels)  # tokens of a label that something of it follows
    judged = 2 * (21 + own)
    assert engine.scheduler.num_prefilled == 51 + 3 * judged  # the question once, and each line once
    # a level's lines stay until the next prompts tell which of them go on
    assert num_kept == [51 + judged, 51 + 21 + judged, 51 + 21 + 21 + judged]
    assert num_free_slots(engine.arena) == 4096 - len(few_shot)
    alone = [ask(arena_engine(), [item], few_shot, keep=False) for level in levels for item in level]
    assert [answer for level in answers for answer in level] == [answer for (answer,) in alone]


def test_what_a_thought_has_computed_is_what_the_next_prompts_begin_with() -> None:
    """Three levels, of which no prompt but the first is computed: a sample's tokens are where they were generated.

    Most samples leave their leader with the token that ends them. Some have the same tokens as others.
    """
    num_tokens = 1 << 14
    engine = arena_engine(batch_size=4096, arena_tokens=num_tokens)
    prompt = tuple(range(3, 40))
    levels: list[tuple[list[SampleRequest], list[Any]]] = []
    num_stored: list[int] = []
    expected = [len(prompt) - 1]

    def search() -> Search[None]:
        requests = sampled([prompt], copies=300, max_new_tokens=4)
        for _ in range(3):
            levels.append((requests, (yield Requests(tuple(requests), keep=True))))
            num_stored.append(num_tokens - num_free_slots(engine.arena))
            answered = list(zip(requests, levels[-1][1], strict=True))
            pairs = [(item.token_ids, one.token_ids) for item, one in answered if one.stop == "newline"]
            ended = dict.fromkeys(pairs)
            assert len(pairs) > len(ended) > 5
            others = {(item.token_ids, one.token_ids[:2]) for item, one in answered if one.stop == "length"}
            assert any((above, ids[:-1]) in others for above, ids in ended)
            first, *going_on = ended
            expected[-1] += len(first[1])
            expected.append(expected.pop() + sum(len(ids) for _, ids in going_on))
            expected.append(expected[-1] - len(first[1]))  # the first is not asked for below
            requests = sampled([above + ids for above, ids in going_on], copies=40, max_new_tokens=4)

    assert [result for _, result, _ in engine.run([("", search())])] == [None]
    assert engine.scheduler.num_prefilled == len(prompt) - 1
    assert num_stored == expected[:-1]
    assert num_free_slots(engine.arena) == num_tokens
    for items, samples in levels:
        for place in range(0, len(items), -(-len(items) // 6)):
            assert [samples[place]] == ask(arena_engine(), [items[place]])


@pytest.mark.parametrize("goes_on", [(False, True), (True, False), (False, True, False, True)], ids=str)
def test_who_goes_on_after_a_line_is_not_led_by_who_ended_with_it(goes_on: tuple[bool, ...]) -> None:
    prompt = tuple(range(3, 40))
    some = sampled([prompt], copies=60, max_new_tokens=10)
    line = next(item for item, one in zip(some, ask(arena_engine(), some), strict=True) if one.stop == "newline")
    more = replace(line, goes_on=lambda ids: True)
    items = [more if on else line for on in goes_on]
    alone = [ask(arena_engine(), [item])[0] for item in items]
    assert len({len(one.token_ids) for one in alone}) == 2
    engine = arena_engine()
    assert ask(engine, items) == alone
    assert num_free_slots(engine.arena) == 4096


def test_what_is_free_between_nodes_that_nothing_reads_is_found_together() -> None:
    """Behind a thought of six tokens there is room for ten more only where the other sample was."""
    prompt = tuple(range(3, 13))
    some = sampled([prompt], copies=80, max_new_tokens=7)
    answered = list(zip(some, ask(arena_engine(), some), strict=True))
    line, thought = next((item, one) for item, one in answered if one.stop == "newline" and len(one.token_ids) == 6)
    other = next(item for item, one in answered if one.stop == "length")
    last = sampled([prompt + thought.token_ids], copies=1, max_new_tokens=10)
    turns = [Requests((other, line), keep=True), Requests(tuple(last), keep=True)]
    for num_tokens in (25, 26, 27, 28):
        engine = arena_engine(arena_tokens=num_tokens)
        (_, own), below = asked_in_turn(engine, *turns)
        assert (own, below) == (thought, ask(arena_engine(), last))
    with pytest.raises(OutOfMemory, match="cannot hold one prompt"):
        asked_in_turn(arena_engine(arena_tokens=24), *turns)


def test_what_verdicts_share_makes_room_where_the_arena_is_full() -> None:
    verdicts = [scored([*range(3, 53), *ending]) for ending in ((60, 61), (62, 63))]
    engine = arena_engine(arena_tokens=75)
    answers = asked_in_turn(
        engine, Requests(tuple(verdicts), keep=False), Requests(tuple(greedy([tuple(range(20, 60))])), keep=True)
    )
    assert answers[1] == ask(arena_engine(), greedy([tuple(range(20, 60))]))


def test_a_verdict_that_ends_inside_one_computed_before_it_is_computed_with_what_it_reads() -> None:
    """What begins the first two is there when the last, which is nothing else, is admitted: it had to wait for room."""
    start = [*range(3, 33)]
    verdicts = tuple(map(scored, ([*start, *range(33, 53)], [*start, *range(20, 80)], [*range(20, 80)], start)))
    (answers,) = asked_in_turn(arena_engine(arena_tokens=140), Requests(verdicts, keep=False))
    assert answers == [answer for item in verdicts for answer in ask(arena_engine(), [item], keep=False)]


@pytest.mark.parametrize("keep", [False, True])
def test_a_score_whose_prompt_something_else_holds_is_read_when_that_is_computed(keep: bool) -> None:
    """Samples below the prompt go first and hold it, so that it is not computed again for the score, which waits."""
    prompt = tuple(range(3, 40))
    below = greedy([(*prompt, 41, 42), (*prompt, 41, 43)], max_new_tokens=6)
    items = (*below, scored(prompt), scored((*prompt, 50)), scored(prompt))
    alone = [answer for item in items for answer in ask(arena_engine(), [item], keep=False)]
    for changes in ({"batch_size": 1}, {"arena_tokens": 60}):
        (answers,) = asked_in_turn(arena_engine(**changes), Requests(items, keep=keep))
        assert answers == alone


def test_a_prompt_that_forks_from_a_computed_one_within_a_label_is_laid_in() -> None:
    start = tuple(range(3, 43))
    engine = arena_engine()
    engine.cache_prefix(start)
    one = ScoreRequest(start[:20], ((60, 61, 62, 63, 64, 65), (60, 61, 66, 67)))
    other = ScoreRequest(start[:10], ((*start[10:30], 70),))
    together = ask(engine, [one, other], keep=False)
    apart = [answer for item in (one, other) for answer in ask(arena_engine(), [item], keep=False)]
    np.testing.assert_allclose(np.concatenate(together), np.concatenate(apart), atol=1e-4)


def test_no_request_among_others_is_too_long_or_empty() -> None:
    longest = small_model().config.max_position_embeddings
    short, long = greedy([(5, 6), (5,) * (longest - 12)])
    with_cap = greedy([(5,) * (longest - 20)], max_new_tokens=30)[0]
    for items in ([short, long, with_cap], [with_cap, long, short]):
        with pytest.raises(ValueError, match=f"prompt of {longest - 20} tokens and up to 30 new ones exceed"):
            ask(arena_engine(), items)
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        ask(arena_engine(), [short, *greedy([()]), short])
