"""Chains of the paper's program as nodes: parents, lines, merged duplicates, winners, and what is left out."""

import pytest

from cpo_fast.official.nodes import build_nodes
from cpo_fast.official.reader import Entry, Level
from cpo_fast.tasks import get_task
from tests.official.official_sample import (
    FOUNDER,
    FOUNDER_BORN,
    LAST,
    MATH,
    MATH_QUESTION,
    QUESTION,
    SEARCH,
    STEPMOTHER,
    WIN,
)


def _build(search, question=QUESTION, task="bamboogle", tokenize=lambda before, line: [1]):
    levels = []
    while str(len(levels)) in search:
        level = search[str(len(levels))]
        levels.append(Level(tuple(level["candiate"]), tuple(map(float, level["values"]))))
    entry = Entry("raw.json:1", question, tuple(levels), tuple(search["correct"]))
    return build_nodes(entry, get_task(task), tokenize)


def test_chains_are_cut_into_lines_under_their_parents_and_words_stay():
    nodes, winners, dropped, num_lost = _build(SEARCH)
    assert [(node.parent, node.text) for node in nodes] == [
        (-1, 'Step 1: who founded versus? "gianni versace" did, in 1978.\n'),
        (-1, "Step 1: when was tolkien's stepmother born? nobody knows.\n"),
        (0, "Step 2: versace was born in 1946.\n"),
        (0, "Step 2: when were they born? tolkien in 1892 - long before versace.\n"),
        (1, "Step 2: so x = y.\n"),
        (2, "Answer: versace.\n"),
        (3, "Answer: j. r. r. tolkien.\n"),
        (2, "Answer: the J. R. R. Tolkien\n"),
        (2, "Step 3: nobody can tell.\n"),
    ]
    assert dropped == []
    assert num_lost == 0
    assert winners == [6, 7]
    assert nodes[6].answer == nodes[7].answer != nodes[5].answer
    assert [node.complete for node in nodes] == [False] * 5 + [True] * 3 + [False]
    assert [node.terminal for node in nodes] == [False] * 5 + [True] * 3 + [False]
    assert [node.kept for node in nodes] == [True, True, True, True, False, True, True, True, False]
    assert nodes[3].value == 5.0
    assert nodes[3].evaluations == ({"imported": 5.0},)
    assert {node.stop for node in nodes} == {"newline"}


def test_numbers_are_grouped_by_value_and_duplicates_of_one_line_merge():
    nodes, winners, _, _ = _build(MATH, MATH_QUESTION, "svamp")
    assert [node.text for node in nodes[3:]] == ["Answer: 7.\n", "Answer: 7.0\n", "Answer: 1,912\n"]
    assert [node.answer for node in nodes[3:]] == ["7", "7", "1912"]
    assert winners == [3, 4]  # the program recorded one of them; equal answers win together
    doubled = {**MATH, "0": {"candiate": ["step 1, a  b. ", "step 1, a b."], "values": [5, 1]}}
    nodes, *_ = _build(doubled, MATH_QUESTION, "svamp")
    assert (nodes[0].text, nodes[0].count, nodes[0].value) == ("Step 1: a b.\n", 2, 3.0)
    assert nodes[0].evaluations == ({"imported": 5.0}, {"imported": 1.0})


def test_the_longest_parent_with_the_mark_of_the_step_after_it_wins():
    search = {
        "0": {"candiate": ["step 1, x", "step 1, x.", "step 1, x. step 2 is hard."], "values": [1, 2, 3]},
        "1": {"candiate": ["step 1, x.step 2, y.", "step 1, x. step 2 is hard. step 2, z."], "values": [1, 1]},
        "correct": [],
    }
    nodes, *_ = _build(search)
    assert [(node.parent, node.text) for node in nodes[3:]] == [(1, "Step 2: y.\n"), (2, "Step 2: z.\n")]


@pytest.mark.parametrize(
    ("level", "chain", "reason"),
    [
        (1, "answer: step 1, unheard of.step 2, y.", "continues no candidate of the level above"),
        (1, FOUNDER + "they were stepped on.", "no mark of its step"),
        (1, FOUNDER + "step 3, too early.", "no mark of its step"),
        (1, FOUNDER + "step 2, ", "empty thought"),
        (0, "who knows", "no mark of its step"),
        (2, FOUNDER_BORN + "step 3, tolkien, so the final answer is: tolkien.", "answer in the middle of prose"),
        (2, LAST, "continues no candidate of the level above"),
    ],
)
def test_a_candidate_that_becomes_no_line_is_reported_with_its_place(level, chain, reason):
    changed = {**SEARCH[str(level)]}
    changed["candiate"], changed["values"] = [*changed["candiate"], chain], [*changed["values"], 1]
    whole = _build(SEARCH)[0]
    nodes, _, dropped, _ = _build({**SEARCH, str(level): changed})
    assert [(each.level, each.index, each.reason) for each in dropped] == [(level, len(changed["values"]) - 1, reason)]
    assert [node.text for node in nodes] == [node.text for node in whole]


def test_winners_that_are_no_complete_chain_are_counted():
    assert _build({**SEARCH, "correct": ["step 1, another"]})[1::2] == ([], 1)
    _, winners, _, num_lost = _build({**SEARCH, "correct": ["step 1, another", WIN]})
    assert (winners, num_lost) == ([6, 7], 1)
    nothing = {"0": {"candiate": [], "values": []}, "correct": []}
    assert _build(nothing) == ([], [], [], 0)


def test_lines_are_tokenised_in_their_context():
    asked = []

    def tokenize(before, line):
        asked.append((before, line))
        return [len(asked)]

    nodes, *_ = _build(
        {"0": {"candiate": [STEPMOTHER], "values": [1]}, "1": SEARCH["1"], "correct": []}, tokenize=tokenize
    )
    assert asked == [("", nodes[0].text), (nodes[0].text, nodes[1].text)]
    assert [node.token_ids for node in nodes] == [(1,), (2,)]
