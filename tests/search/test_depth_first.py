"""Depth-first search over scripted thoughts: best child first, a threshold, a budget, nothing else different."""

from tests.search.scripted_engine import full_tree, line, search


def _depth_first(tokenizer, thoughts, likely=None, verdicts=(), **settings):
    return search(tokenizer, thoughts, likely, verdicts, strategy="dfs", **{"num_kept": 2, **settings})


def _chains(tree):
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
