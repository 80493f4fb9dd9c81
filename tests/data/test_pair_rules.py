"""Every pair rule on hand-made trees, one case a test, and on random trees for what must hold of all."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from cpo_fast.config import PairsConfig
from cpo_fast.data.pair_rules import (
    EQUAL_VALUES,
    NO_VALUE,
    TreeExample,
    response_ids,
    select_children,
    select_pairs,
    select_valued_paths,
    select_winning_paths,
)
from cpo_fast.tree import Node, SearchTree
from tests.data.hand_made import node, random_tree, tree

RULES = ("all", "lower", "lowest", "fpo")
SEEDS = range(300)


def ids(pairs: list[TreeExample]) -> list[tuple[int, ...]]:
    return [(pair.parent, *pair.node_ids) for pair in pairs]


def by_rule(searched: SearchTree, rule: str, seed: int = 0, **settings: Any) -> list[TreeExample]:
    return list(select_pairs(searched, PairsConfig(rule=rule, **settings), seed).examples)  # type: ignore[arg-type]


def test_pruned_siblings_are_rejected_ones() -> None:
    nodes = [node(0, -1, 1), node(1, -1, 1, kept=False), node(2, -1, 1, kept=False), node(3, 0, 2, "4")]
    assert ids(by_rule(tree(nodes, (3,)), "all")) == [(-1, 0, 1), (-1, 0, 2)]


def test_children_of_losing_states_are_never_used() -> None:
    nodes = [
        node(0, -1, 1),
        node(1, -1, 1),
        node(2, 0, 2, "4"),
        node(3, 0, 2, "5"),
        node(4, 1, 2, "6"),
        node(5, 1, 2, "7"),
    ]
    assert ids(by_rule(tree(nodes, (2,)), "all")) == [(-1, 0, 1), (0, 2, 3)]


def test_winning_paths_through_one_state_never_reject_each_other() -> None:
    nodes = [
        node(0, -1, 1),
        node(1, -1, 1),
        node(2, 0, 2, "4"),
        node(3, 0, 2, "4"),
        node(4, 0, 2, "9"),
        node(5, 1, 2, "4"),
    ]
    assert ids(by_rule(tree(nodes, (2, 3, 5)), "all")) == [(0, 2, 4), (0, 3, 4)]


def test_a_merged_duplicate_is_one_loser_whatever_its_count() -> None:
    nodes = [node(0, -1, 1, "4"), node(1, -1, 1, count=7)]
    assert ids(by_rule(tree(nodes, (0,)), "all")) == [(-1, 0, 1)]


@pytest.mark.parametrize(
    "nodes",
    [
        [],
        [node(0, -1, 1), node(1, -1, 1)],  # no answer
    ],
)
@pytest.mark.parametrize("rule", RULES)
def test_no_winning_path_gives_no_pair(nodes: list[Node], rule: str) -> None:
    assert by_rule(tree(nodes, ()), rule) == []
    assert select_winning_paths(tree(nodes, ())).examples == ()


@pytest.mark.parametrize("rule", RULES)
def test_one_candidate_gives_no_pair(rule: str) -> None:
    assert by_rule(tree([node(0, -1, 1), node(1, 0, 2, "4")], (1,)), rule) == []


def valued(*values: float | None, winners: int = 1) -> SearchTree:
    """Siblings under the root with these values, the first `winners` of them winning."""
    nodes = [node(i, -1, 1, "4" if i < winners else "9", value=value) for i, value in enumerate(values)]
    return tree(nodes, tuple(range(winners)))


def test_lower_takes_the_losers_valued_below_each_winner() -> None:
    searched = valued(5.0, 3.0, 4.0, 5.0, 1.0, 3.0, winners=2)
    assert ids(by_rule(searched, "lower")) == [(-1, 0, 2), (-1, 0, 4), (-1, 0, 5), (-1, 1, 4)]


def test_lowest_takes_one_loser_a_winner_and_the_first_of_equals() -> None:
    searched = valued(5.0, 2.0, 4.0, 1.0, 6.0, 1.0, winners=2)
    assert ids(by_rule(searched, "lowest")) == [(-1, 0, 3), (-1, 1, 3)]
    assert ids(by_rule(valued(1.0, 2.0, 3.0), "lowest")) == []


def test_all_equal_values_give_pairs_by_all_alone() -> None:
    searched = valued(5.0, 5.0, 5.0)
    assert len(by_rule(searched, "all")) == 2
    assert by_rule(searched, "lower") == by_rule(searched, "lowest") == []


def test_a_thought_without_value_ranks_below_every_value() -> None:
    assert ids(by_rule(valued(1.0, None, 0.5), "lower")) == [(-1, 0, 1), (-1, 0, 2)]
    assert ids(by_rule(valued(1.0, 0.5, None, None), "lowest")) == [(-1, 0, 2)]
    assert by_rule(valued(None, None, 1.0), "lower") == by_rule(valued(None, None, 1.0), "lowest") == []


def test_fpo_takes_whole_winning_paths_against_whole_complete_paths() -> None:
    nodes = [
        node(0, -1, 1),
        node(1, 0, 2, "4"),
        node(2, 0, 2, "9"),
        node(3, -1, 1),
        node(4, 3, 2, "7"),
        node(5, 3, 2, "4", complete=False, stop="length"),  # broke off: no whole path
        node(6, -1, 1),
    ]
    searched = tree(nodes, (1,))
    pairs = by_rule(searched, "fpo")
    assert ids(pairs) == [(-1, 1, 2), (-1, 1, 4)]
    assert [pair.step for pair in pairs] == [0, 0]
    assert response_ids(searched, -1, pairs[1].last[0]) == [100, 10, 101, 10]
    assert response_ids(searched, -1, pairs[1].last[1]) == [103, 10, 104, 10]


def test_fpo_is_capped_per_question_by_a_seeded_draw() -> None:
    searched = valued(*[5.0] * 20, winners=5)
    assert len(by_rule(searched, "fpo", max_fpo_pairs=64)) == 64
    draws = [by_rule(searched, "fpo", seed=seed, max_fpo_pairs=10) for seed in (0, 0, 1)]
    assert [len(pairs) for pairs in draws] == [10, 10, 10]
    assert draws[0] == draws[1] != draws[2]
    assert set(ids(draws[0])) < set(ids(by_rule(searched, "fpo", max_fpo_pairs=11)))


def test_sft_takes_every_winning_path_once() -> None:
    nodes = [
        node(0, -1, 1),
        node(1, 0, 2, "4"),
        node(2, 0, 2, "4", token_ids=(101, 10)),  # the same tokens as node 1
        node(3, -1, 1, "4"),
        node(4, 0, 2, "9"),
    ]
    assert [(one.parent, one.step, *one.node_ids) for one in select_winning_paths(tree(nodes, (1, 2, 3))).examples] == [
        (-1, 0, 1),
        (-1, 0, 3),
    ]


def on_winning_path(searched: SearchTree) -> set[int]:
    return {one.id for winner in searched.winning_nodes for one in searched.path(winner)}


@pytest.mark.parametrize("rule", ["all", "lower", "lowest"])
def test_chosen_is_on_a_winning_path_and_rejected_is_a_sibling_off_every_one(rule: str) -> None:
    num_pairs = 0
    for seed in SEEDS:
        searched = random_tree(seed)
        winning = on_winning_path(searched)
        pairs = by_rule(searched, rule)
        assert len({(p.last[0].id, p.last[1].id) for p in pairs}) == len(pairs)
        for pair in pairs:
            assert pair.last[0].id in winning
            assert pair.last[1].id not in winning
            assert pair.last[0].parent == pair.last[1].parent == pair.parent
            assert pair.parent == -1 or pair.parent in winning
            assert pair.step == pair.last[0].depth == pair.last[1].depth
        num_pairs += len(pairs)
    assert num_pairs > 100


def below(pair: TreeExample) -> bool:
    chosen, rejected = pair.last[0].value, pair.last[1].value
    return chosen is not None and (rejected is None or rejected < chosen)


def test_rules_are_the_definitions_applied_to_all() -> None:
    for seed in SEEDS:
        searched = random_tree(seed)
        everything = by_rule(searched, "all")
        lower = by_rule(searched, "lower")
        lowest = by_rule(searched, "lowest")
        assert lower == [pair for pair in everything if below(pair)]
        assert set(ids(lowest)) <= set(ids(lower))
        for pair in lowest:
            siblings = [p.last[1] for p in everything if p.last[0] is pair.last[0]]
            smallest = min(-math.inf if s.value is None else s.value for s in siblings)
            ties = [s.id for s in siblings if (-math.inf if s.value is None else s.value) == smallest]
            assert pair.last[1].id == min(ties)
        assert {p.last[0].id for p in lowest} == {p.last[0].id for p in lower}
        assert max(Counter(p.last[0].id for p in lowest).values(), default=1) == 1


def test_fpo_pairs_a_winning_leaf_with_every_other_complete_leaf() -> None:
    for seed in SEEDS:
        searched = random_tree(seed)
        losers = [one.id for one in searched.nodes if one.complete and one.id not in searched.winning_nodes]
        expected = [(-1, winner, loser) for winner in searched.winning_nodes for loser in losers]
        assert ids(by_rule(searched, "fpo", max_fpo_pairs=10_000)) == expected


@pytest.mark.parametrize("rule", RULES)
def test_every_couple_is_a_pair_or_has_a_reason(rule: str) -> None:
    for seed in SEEDS:
        searched = random_tree(seed)
        settings = PairsConfig(rule=rule, rejected_fraction=0.6, max_fpo_pairs=3)  # type: ignore[arg-type]
        selection = select_pairs(searched, settings, seed)
        couples = ids([*selection.examples, *(pair for pair, _ in selection.unused)])
        full = by_rule(searched, "fpo" if rule == "fpo" else "all", max_fpo_pairs=10_000)
        assert sorted(couples) == sorted(ids(full))


@pytest.mark.parametrize("rule", RULES)
def test_gold_and_other_trees_change_no_pair(rule: str) -> None:
    for seed in range(50):
        searched = random_tree(seed)
        changed = replace(searched, gold="41", seed=9, model_hash="other")
        settings = {"rejected_fraction": 0.5, "max_fpo_pairs": 2}
        assert ids(by_rule(searched, rule, **settings)) == ids(by_rule(changed, rule, **settings))


def test_a_fraction_of_the_rejected_thoughts_is_nested_and_near_its_share() -> None:
    """A thought is drawn once, not once a winner, and a larger share holds every thought of a smaller one."""
    totals: Counter[float] = Counter()
    for seed in SEEDS:
        searched = random_tree(seed, tree_id=f"tree-{seed}")
        drawn = {share: ids(by_rule(searched, "all", rejected_fraction=share)) for share in (0.25, 0.5, 1.0)}
        assert set(drawn[0.25]) <= set(drawn[0.5]) <= set(drawn[1.0])
        losers = {share: {loser for _, _, loser in pairs} for share, pairs in drawn.items()}
        for share, pairs in drawn.items():
            assert pairs == [pair for pair in drawn[1.0] if pair[2] in losers[share]]
            totals[share] += len(losers[share])
    for share in (0.25, 0.5):
        # four standard deviations of a binomial
        slack = 4 * math.sqrt(share * (1 - share) * totals[1.0])
        assert abs(totals[share] - share * totals[1.0]) < slack
    searched = valued(*[5.0] * 30)
    one, two = (by_rule(searched, "all", seed=seed, rejected_fraction=0.5) for seed in (1, 2))
    assert one != two
    other = replace(searched, id="another question")
    assert ids(by_rule(other, "all", seed=1, rejected_fraction=0.5)) != ids(one)


def children_of(parent: int, *values: float | None, first: int = 0, **changes: object) -> list[Node]:
    """Thoughts under a state, with these values."""
    depth = 1 if parent == -1 else 2
    return [node(first + place, parent, depth, value=value, **changes) for place, value in enumerate(values)]


def test_children_of_every_expanded_state_stand_best_first_worst_second_and_the_rest_in_order() -> None:
    nodes = [
        *children_of(-1, 4.0, 2.0, 7.0, 7.0, None, 2.0),
        *children_of(1, 3.0, 3.0, first=6),
        *children_of(2, 1.0, 9.0, first=8),
    ]
    selection = select_children(tree([*nodes, node(10, 9, 3, "4", value=None)], (10,)))
    assert [(group.parent, group.step, group.node_ids) for group in selection.examples] == [
        (-1, 1, (2, 1, 0, 3, 5)),
        (2, 2, (9, 8)),
    ]
    assert [(unused.node_ids, reason) for unused, reason in selection.unused] == [
        ((4,), NO_VALUE),
        ((6, 7), EQUAL_VALUES),
        ((10,), NO_VALUE),
    ]


def test_of_children_with_equal_tokens_the_first_is_taken() -> None:
    twins = [*children_of(-1, 4.0, 2.0), node(2, -1, 1, value=9.0, token_ids=(100, 10))]
    assert [group.node_ids for group in select_children(tree(twins, ())).examples] == [(0, 1)]


def test_valued_paths_are_the_pairs_of_fpo_whose_every_thought_has_a_value() -> None:
    nodes = [*children_of(-1, 4.0, None, 2.0), *(node(3 + p, p, 2, answer) for p, answer in enumerate("456"))]
    selection = select_valued_paths(tree(nodes, (3,)), PairsConfig(rule="lowest"))
    assert [pair.node_ids for pair in selection.examples] == [(3, 5)]
    assert [(pair.node_ids, reason) for pair, reason in selection.unused] == [((3, 4), NO_VALUE)]
