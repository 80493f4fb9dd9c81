"""Searches over scripted thoughts: what is merged, kept, ended and voted on, level by level or the best child first."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from cpo_fast.config import Config, PairsConfig
from cpo_fast.data.pair_rules import select_pairs
from cpo_fast.files import canonical_json
from cpo_fast.search.engine import run_search
from cpo_fast.search.tree_search import STRATEGIES, search_question
from cpo_fast.search.tree_store import Provenance
from cpo_fast.tasks import Prompts, Question, get_task
from cpo_fast.tree import ROOT, SearchTree
from tests.search.scripted_engine import QUESTION, Likely, ScriptedEngine, Thoughts, full_tree, line, search


def test_duplicates_merge_with_a_count_and_empty_samples_are_dropped_and_counted(tokenizer):
    thoughts = {(): [line("Step a"), ("Step  a\n\n", "newline"), ("\n", "newline")]}
    tree, _ = search(tokenizer, thoughts, max_steps=1)
    (node,) = tree.nodes
    assert (node.text, node.count, tree.num_empty) == ("Step a\n", 2, 1)
    assert tree.status == "no_answer"


def test_letters_keep_their_case_and_differ_by_it(tokenizer):
    tree, _ = search(tokenizer, {(): [line("Step A"), line("step a"), line("Step A")]}, max_steps=1)
    assert [(node.text, node.count) for node in tree.nodes] == [("Step A\n", 2), ("step a\n", 1)]


def test_only_the_best_open_state_is_expanded_and_an_answer_votes_without_a_place(tokenizer):
    thoughts = {
        (): [line("Step a"), line("Answer: 7"), line("Step b")],
        ("Step b\n",): [line("Answer: 8"), line("Answer: 9"), line("Step c")],
        ("Step b\n", "Step c\n"): [line("Answer: 8"), line("Step d"), line("Step e")],
    }
    likely = {"Step b": 2.0, "Answer: 7": 3.0}
    tree, engine = search(tokenizer, thoughts, likely)
    assert engine.expanded == [(), ("Step b\n",), ("Step b\n", "Step c\n")]
    by_text = {(node.depth, node.text): node for node in tree.nodes}
    assert not by_text[1, "Step a\n"].kept
    assert by_text[1, "Answer: 7\n"].kept
    assert by_text[1, "Answer: 7\n"].complete
    assert not by_text[3, "Step d\n"].kept
    assert not by_text[3, "Step d\n"].terminal
    # two paths to 8 at even odds (5.5 each) outvote one to 7 at 9.8
    assert tree.answer == "8"
    assert [tree.nodes[i].depth for i in tree.winning_nodes] == [2, 3]
    assert [node.id for node in tree.nodes] == list(range(9))
    assert [node.parent for node in tree.nodes] == [-1, -1, -1, 2, 2, 2, 5, 5, 5]


def test_a_broken_chain_is_not_expanded_and_has_no_vote(tokenizer):
    thoughts = {
        (): [("Step a", "length"), ("Step b", "eos"), line("Question: another")],
    }
    tree, engine = search(tokenizer, thoughts)
    assert engine.expanded == [()]
    assert tree.status == "no_answer"
    assert all(node.terminal and not node.complete and not node.kept for node in tree.nodes)


def test_an_answer_counts_after_eos_but_not_when_cut_or_unreadable(tokenizer):
    thoughts = {(): [("Answer: 7", "eos"), ("Answer: 1234", "length"), line("Answer: none")]}
    tree, _ = search(tokenizer, thoughts)
    assert [node.answer for node in tree.nodes] == ["7", None, None]
    assert (tree.answer, tree.winning_nodes, tree.status) == ("7", (0,), "ok")


def test_nothing_but_empty_samples_is_no_candidates(tokenizer):
    tree, _ = search(tokenizer, {(): [("", "eos"), ("\n", "newline"), (" ", "length")]})
    assert (tree.status, tree.nodes, tree.num_empty) == ("no_candidates", (), 3)


def test_states_tied_with_the_last_kept_one_are_cut_unless_ties_are_kept(tokenizer):
    likely = {"Step 1a": 1.0}
    cut, _ = search(tokenizer, full_tree, likely, num_kept=2, max_steps=2)
    assert [node.kept for node in cut.nodes[:3]] == [True, True, False]
    tied, _ = search(tokenizer, full_tree, likely, num_kept=2, max_steps=2, keep_ties=True)
    assert [node.kept for node in tied.nodes[:3]] == [True, True, True]
    assert (len(cut.nodes), len(tied.nodes)) == (9, 12)


def test_the_node_budget_bounds_a_search_whose_ties_are_all_kept(tokenizer):
    """Without the budget there would be 3 + 9 + ... + 3^7 thoughts."""
    tree, engine = search(tokenizer, full_tree, num_kept=3, max_steps=7, keep_ties=True, max_nodes=20)
    assert 20 <= len(tree.nodes) <= 20 + 2
    assert len(engine.expanded) == 7
    assert sum(node.kept for node in tree.nodes) == 6  # what the budget left unexpanded is not kept
    assert {node.parent for node in tree.nodes} == {-1, *(node.id for node in tree.nodes if node.kept)}


def test_tokens_of_duplicates_and_empty_samples_and_end_of_sequence_are_counted(tokenizer):
    thoughts = {(): [line("Step a"), line("Step a"), ("", "eos")]}
    tree, _ = search(tokenizer, thoughts, max_steps=1)
    assert (len(tree.nodes), tree.num_empty) == (1, 1)
    assert tree.num_thought_tokens == 1 + 1 + (1 + 1)  # the script gives the empty text an id, and eos costs one
    assert tree.num_verdict_tokens == 0


def _depth_first(
    tokenizer: PreTrainedTokenizerFast,
    thoughts: Thoughts,
    likely: Likely = None,
    verdicts: Sequence[str] = (),
    **settings: Any,
) -> tuple[SearchTree, ScriptedEngine]:
    return search(tokenizer, thoughts, likely, verdicts, strategy="dfs", **{"num_kept": 2, **settings})


def _chains(tree: SearchTree) -> dict[tuple[str, ...], float | None]:
    """{texts from the first thought down: value} of every node."""
    chains = []
    for node in tree.nodes:
        above = () if node.parent == -1 else chains[node.parent]
        chains.append((*above, node.text))
    return {chain: node.value for chain, node in zip(chains, tree.nodes, strict=True)}


def test_the_best_child_is_followed_to_the_end_before_the_next_best(tokenizer):
    likely = {"Step 1b": 2.0, "Step 1c": 1.0, "Step 2cz": 1.0}
    tree, engine = _depth_first(tokenizer, full_tree, likely)
    best, second = ("Step 1b\n",), ("Step 1c\n",)
    assert engine.expanded == [
        (),
        best,
        (*best, "Step 2cz\n"),
        (*best, "Step 2az\n"),  # equal values: the earlier sample
        second,
        (*second, "Step 2cz\n"),
        (*second, "Step 2az\n"),
    ]
    assert [node.id for node in tree.nodes] == list(range(21))
    assert [node.parent for node in tree.nodes[:9]] == [-1, -1, -1, 1, 1, 1, 5, 5, 5]
    assert [node.depth for node in tree.nodes[6:12]] == [3] * 6
    assert [node.kept for node in tree.nodes[:3]] == [False, True, True]


def test_without_cuts_both_searches_find_the_same_thoughts_with_the_same_values(tokenizer):
    likely = {"Step 1b": 2.0, "Step 2az": -3.0}
    depth_first, _ = _depth_first(tokenizer, full_tree, likely, num_kept=3, dfs_threshold=-1.0)
    breadth_first, _ = search(tokenizer, full_tree, likely, num_kept=9, strategy="bfs")
    assert len(_chains(depth_first)) == 3 + 9 + 27
    assert _chains(depth_first) == _chains(breadth_first)


def test_states_below_the_threshold_stay_in_the_tree_and_are_not_entered(tokenizer):
    likely = {"Step 1a": -20.0, "Step 1b": -20.0}  # values near 1; even odds are 5.5
    tree, engine = _depth_first(tokenizer, full_tree, likely, num_kept=3, max_steps=2, dfs_threshold=5.5)
    assert engine.expanded == [(), ("Step 1c\n",)]
    assert len(tree.nodes) == 6
    assert [node.kept for node in tree.nodes[:3]] == [False, False, True]


def test_a_state_without_a_readable_verdict_is_entered_all_the_same(tokenizer):
    settings = {"evaluator": "sample", "num_verdicts": 2, "max_steps": 2, "num_kept": 1}
    tree, engine = _depth_first(tokenizer, full_tree, verdicts=["it depends"], **settings)
    assert engine.expanded == [(), ("Step 1a\n",)]
    assert {node.value for node in tree.nodes} == {None}


def test_the_budget_ends_the_search_and_what_was_found_votes(tokenizer):
    def thoughts(lines):
        return [line("Answer: 7"), *full_tree(lines)[1:]] if len(lines) == 2 else full_tree(lines)

    tree, engine = _depth_first(tokenizer, thoughts, max_nodes=9)
    assert len(engine.expanded) == 3
    assert len(tree.nodes) == 9
    assert (tree.answer, tree.status) == ("7", "ok")
    longer, _ = _depth_first(tokenizer, thoughts, max_nodes=10)
    assert len(longer.nodes) == 12  # never past the budget by more than one state's children
    assert [(node.parent, node.text) for node in longer.nodes[:9]] == [(n.parent, n.text) for n in tree.nodes]


def test_an_answer_takes_no_place_among_the_followed(tokenizer):
    thoughts = {
        (): [line("Answer: 1"), line("Step b"), ("Step c", "length")],
        ("Step b\n",): [line("Answer: 2"), line("Answer: 2"), line("Question: new")],
    }
    tree, engine = _depth_first(tokenizer, thoughts, num_kept=1, likely={"Answer: 1": 5.0})
    assert engine.expanded == [(), ("Step b\n",)]
    assert [node.answer for node in tree.nodes] == ["1", None, None, "2", None]
    assert tree.answer == "1"


def test_another_strategy_is_one_function_and_one_entry(tokenizer, monkeypatch):
    def worst_first(builder):
        """A chain of the worst thoughts."""
        states = [ROOT]
        while states:
            children = yield from builder.expand(states)
            open_children = [child for child in children if not child.terminal]
            states = [min(open_children, key=lambda child: child.value).id] if open_children else []

    def thoughts(lines):
        return [line("Answer: 5"), line("Answer: 6"), line("Answer: 6")] if len(lines) == 2 else full_tree(lines)

    monkeypatch.setitem(STRATEGIES, "dfs", worst_first)
    likely = {"Step 1b": -5.0, "Step 2cz": -5.0}
    tree, engine = search(tokenizer, thoughts, likely, strategy="dfs")
    assert engine.expanded == [(), ("Step 1b\n",), ("Step 1b\n", "Step 2cz\n")]
    assert [node.count for node in tree.nodes] == [1] * 7 + [2]
    assert (tree.answer, tree.winning_nodes) == ("5", (6,))


def test_fact_verification_votes_by_count_and_arithmetic_by_value(tokenizer):
    """One path near 10 against two near 1."""

    def vote(task, first, *others):
        texts = [f"Answer: {answer}" for answer in (first, *others)]
        likely = {texts[0]: 9.0, texts[1]: -9.0, texts[2]: -9.0}
        return search(tokenizer, {(): [line(text) for text in texts]}, likely, task=task)[0]

    counted = vote("fever", "SUPPORTS", "REFUTES", "REFUTES.")
    assert counted.winning_nodes == (1, 2)
    assert counted.answer == counted.nodes[1].answer
    valued = vote("svamp", "1", "2", "2.0")
    assert (valued.answer, valued.winning_nodes) == ("1", (0,))


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_a_question_whose_winning_chains_are_too_bad_is_left_without_an_answer(tokenizer, strategy):
    thoughts = {(): [line("Answer: 1"), line("Answer: 1.0"), line("Answer: 2")]}
    likely = {"Answer: 1": 0.0, "Answer: 1.0": -2.0, "Answer: 2": -3.0}  # values 7.58, 3.42 and 2.07

    def tree(min_value):
        return search(tokenizer, thoughts, likely, strategy=strategy, min_value=min_value)[0]

    assert [tree(value).winning_nodes for value in (None, 1.0, 3.4, 7.5, 7.6)] == [(0, 1), (0, 1), (0, 1), (0,), ()]
    assert (tree(7.5).status, tree(7.5).answer) == ("ok", "1")
    abstained = tree(7.6)
    assert (abstained.status, abstained.answer, abstained.num_thought_tokens) == ("abstained", None, 3)
    assert SearchTree.from_dict(json.loads(canonical_json(abstained.to_dict()))) == abstained
    assert select_pairs(abstained, PairsConfig()).examples == ()
    # what is too bad loses to its siblings like any other thought
    assert [pair.node_ids for pair in select_pairs(tree(7.5), PairsConfig()).examples] == [(0, 1), (0, 2)]


def test_nothing_complete_is_no_answer_and_not_abstained(tokenizer):
    assert search(tokenizer, {(): [line("Step a")] * 3}, max_steps=1, min_value=10.0)[0].status == "no_answer"


def test_a_search_that_fails_leaves_its_reason_and_what_is_known_of_its_prompt(tokenizer):
    prompts = Prompts(get_task("svamp"), tokenizer)
    provenance = Provenance("svamp", prompts.shared.hash, "model", "", 3, "config")

    def refuse(lines):
        raise ValueError("not a line\nnor two")

    tree = run_search(ScriptedEngine(prompts, refuse), search_question(Config(seed=3), prompts, QUESTION, provenance))
    assert (tree.status, tree.detail, tree.nodes) == ("failed", "ValueError: not a line", ())
    assert tree.root_ids(prompts.shared) == prompts.encode(QUESTION)
    assert prompts.shared.text + tree.question_prompt == prompts.text(QUESTION)
    assert (tree.model_hash, tree.seed, tree.config_hash) == ("model", 3, "config")


class OnlyAscii:
    """A tokenizer of bytes that cannot read every text."""

    eos_token_id, eos_token = None, None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode("ascii"))}


def test_a_question_that_no_tokenizer_reads_leaves_its_text():
    prompts = Prompts(get_task("svamp"), OnlyAscii())
    tree = run_search(ScriptedEngine(prompts, {}), search_question(Config(), prompts, Question("q", "how m\u00e4ny")))
    assert (tree.status, tree.num_shared_tokens, tree.question_token_ids) == ("failed", 0, ())
    assert tree.detail.startswith("UnicodeEncodeError: ")
    assert tree.question_prompt == "Question: how m\u00e4ny\n"
