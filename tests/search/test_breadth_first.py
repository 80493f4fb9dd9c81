"""Breadth-first search over scripted thoughts: what is merged, kept, ended and voted on."""

from tests.search.scripted_engine import full_tree, line, search


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
