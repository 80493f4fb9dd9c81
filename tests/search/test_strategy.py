"""Another search is one function: everything else of a tree comes from its builder."""

from cpo_fast.search.tree_search import STRATEGIES
from cpo_fast.tree import ROOT
from tests.search.scripted_engine import full_tree, line, search


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
