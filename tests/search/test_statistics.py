"""A tree in numbers, against counts made by hand."""

from cpo_fast.search.statistics import tree_statistics
from tests.search.scripted_engine import line, search


def test_thoughts_values_depth_and_tokens_of_a_small_tree(tokenizer):
    thoughts = {
        (): [line("Step a"), line("Step a"), ("\n", "newline"), line("Step b")],
        ("Step a\n",): [("Answer: 7", "eos"), line("Answer: 8"), line("Answer: 7 "), ("Step x", "length")],
    }
    tree, _ = search(tokenizer, thoughts, {"Step a": 1.0, "Answer: 7": 9.0}, num_candidates=4)
    counted = tree_statistics(tree)
    assert (counted.num_samples, counted.num_unique, counted.num_duplicates, counted.num_empty) == (8, 5, 2, 1)
    assert (counted.num_cut, counted.max_depth) == (1, 2)
    assert (counted.num_complete, counted.num_answers, counted.num_winning) == (2, 2, 1)
    # one id a sample, and one end-of-sequence; useful are "Step a" and "Answer: 7" with it
    assert (counted.num_generated_tokens, counted.num_verdict_tokens, counted.num_useful_tokens) == (9, 0, 3)
    first, second = counted.depths
    assert (first.depth, first.num_thoughts, first.num_kept, first.num_judged) == (1, 2, 1, 2)
    values = [node.value for node in tree.nodes]
    assert (first.max_value, first.min_value, first.mean_value) == (values[0], values[1], sum(values[:2]) / 2)
    assert (second.num_thoughts, second.num_kept) == (3, 2)


def test_shared_steps_of_two_winning_paths_are_useful_once_and_verdict_tokens_are_generated(tokenizer):
    thoughts = {
        (): [line("Step a"), line("Step b")],
        ("Step a\n",): [line("Answer: 7"), line("Answer: 7.0")],
    }
    settings = {"evaluator": "sample", "num_verdicts": 3, "num_candidates": 2}
    tree, _ = search(tokenizer, thoughts, verdicts=["likely\n", "what\n"], **settings)
    counted = tree_statistics(tree)
    assert counted.num_winning == 2
    assert counted.num_useful_tokens == 3
    assert counted.num_verdict_tokens == 4 * 3 * 2  # four states, three verdicts, two tokens each
    assert counted.num_generated_tokens == 4 + 24


def test_a_tree_without_thoughts_or_values_has_numbers_too(tokenizer):
    tree, _ = search(tokenizer, {(): [("", "eos")] * 3})
    counted = tree_statistics(tree)
    assert (counted.num_samples, counted.num_unique, counted.max_depth, counted.depths) == (3, 0, 0, ())
    settings = {"evaluator": "sample", "num_verdicts": 1, "max_steps": 1}
    tree, _ = search(tokenizer, {(): [line("a"), line("b"), line("c")]}, verdicts=["?"], **settings)
    (only,) = tree_statistics(tree).depths
    assert (only.num_judged, only.mean_value, only.min_value, only.max_value) == (0, None, None, None)
