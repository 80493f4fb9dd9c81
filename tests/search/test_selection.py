"""Order and cut of the beam, and the vote."""

from cpo_fast.search.selection import rank, vote
from cpo_fast.tree import Node


def _leaf(identity, answer, value, complete=None):
    complete = answer is not None if complete is None else complete
    return Node(identity, -1, 1, "Answer: x\n", (1,), value, (), True, True, complete, 1, answer, "newline")


def test_ties_go_to_the_earlier_candidate_and_are_cut_at_n():
    assert rank([1.0, 3.0, 3.0, 2.0, 3.0], 2) == [1, 2]
    assert rank([5.0], 3) == [0]
    assert rank([], 3) == []


def test_a_candidate_without_a_verdict_ranks_last():
    assert rank([None, -100.0, None], 3) == [1, 0, 2]


def test_the_largest_sum_wins_and_every_path_of_the_group_is_a_winner():
    nodes = [_leaf(0, "7", 9.0), _leaf(1, "8", 5.0), _leaf(2, None, 10.0), _leaf(3, "8", 5.0)]
    assert vote(nodes) == ("8", [1, 3])


def test_a_tied_sum_goes_to_the_larger_best_value_then_to_the_first():
    assert vote([_leaf(0, "a", 5.0), _leaf(1, "a", 5.0), _leaf(2, "b", 8.0), _leaf(3, "b", 2.0)]) == ("b", [2, 3])
    assert vote([_leaf(0, "a", 5.0), _leaf(1, "b", 5.0)]) == ("a", [0])


def test_a_path_without_a_verdict_adds_nothing_to_its_group():
    assert vote([_leaf(0, "a", None), _leaf(1, "b", 0.5)]) == ("b", [1])
    assert vote([_leaf(0, "a", None)]) == ("a", [0])


def test_nothing_complete_is_no_answer():
    assert vote([_leaf(0, None, 10.0)]) == (None, [])
    assert vote([]) == (None, [])


def test_a_vote_by_count_goes_to_the_most_paths_whatever_their_values():
    nodes = [_leaf(0, "yes", 9.0), _leaf(1, "no", 1.0), _leaf(2, "no", None), _leaf(3, "yes", None, complete=False)]
    assert vote(nodes, "count") == ("no", [1, 2])
    assert vote(nodes, "value") == ("yes", [0])


def test_a_tied_count_goes_to_the_group_of_the_best_path_then_to_the_first():
    assert vote([_leaf(0, "a", 2.0), _leaf(1, "b", 3.0), _leaf(2, "a", 2.5), _leaf(3, "b", 0.0)], "count")[0] == "b"
    assert vote([_leaf(0, "a", 2.0), _leaf(1, "b", 2.0)], "count") == ("a", [0])
    assert vote([_leaf(0, "a", None), _leaf(1, "b", 1.0)], "count") == ("b", [1])


def test_winners_below_the_smallest_value_are_left_out_after_the_vote():
    nodes = [_leaf(0, "7", 4.0), _leaf(1, "8", 9.0), _leaf(2, "7", 6.0), _leaf(3, "7", None)]
    assert vote(nodes) == ("7", [0, 2, 3])
    assert vote(nodes, min_value=1.0) == ("7", [0, 2])  # no readable verdict is below every value
    assert vote(nodes, min_value=6.0) == ("7", [2])
    # 8 has a chain that is good enough, and lost
    assert vote(nodes, min_value=6.5) == (None, [])
    assert vote(nodes, "count", min_value=6.0) == ("7", [2])


def test_ties_with_the_last_kept_one_are_kept_on_request_and_none_ties_with_none():
    assert rank([3.0, 1.0, 3.0, 2.0, 3.0], 2, keep_ties=True) == [0, 2, 4]
    assert rank([3.0, 2.0, 2.0, None, None], 2, keep_ties=True) == [0, 1, 2]
    assert rank([1.0, None, None], 2, keep_ties=True) == [0, 1, 2]
    assert rank([1.0, None], 1, keep_ties=True) == [0]
    assert rank([], 2, keep_ties=True) == []
