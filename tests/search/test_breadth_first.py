"""Breadth-first search over scripted thoughts: what is merged, kept, ended and voted on."""

from cpo_fast.config import SearchConfig
from cpo_fast.search.breadth_first import search_question
from cpo_fast.search.engine import Sample
from cpo_fast.tasks import Question, get_task

QUESTION = Question("q", "how many")
ROOT_IDS = [5, 6]


class ScriptedEngine:
    """Thoughts from a table {lines so far: texts}, every text known by one id; values from the last line."""

    def __init__(self, tokenizer, thoughts, likely):
        self.tokenizer, self.thoughts, self.likely = tokenizer, thoughts, likely
        self.ids = {}
        self.expanded = []

    def cache_prefix(self, token_ids):
        raise AssertionError("not part of a search")

    def sample(self, requests):
        texts = {number: text for text, number in self.ids.items()}
        samples = []
        for request in requests:
            lines = tuple(texts[number] for number in request.token_ids[len(ROOT_IDS) :])
            index = int(request.uid.rpartition("/")[2])
            if index == 0:
                self.expanded.append(lines)
            text, stop = self.thoughts[lines][index]
            samples.append(Sample((self.ids.setdefault(text, 100 + len(self.ids)),), text, stop))
        return samples

    def score(self, token_ids, continuations):
        line = self.tokenizer.decode(token_ids).split("\n")[-2]
        return [self.likely.get(line, -1.0), -1.0]


def _line(text):
    return (f"{text}\n", "newline")


def _search(tokenizer, thoughts, likely=None, **settings):
    settings = {"num_candidates": 3, "num_kept": 1, "max_steps": 3, **settings}
    engine = ScriptedEngine(tokenizer, thoughts, likely or {})
    outcome = search_question(engine, tokenizer, get_task("svamp"), QUESTION, ROOT_IDS, SearchConfig(**settings), 0)
    return outcome, engine


def test_duplicates_merge_with_a_count_and_empty_samples_are_dropped_and_counted(tokenizer):
    thoughts = {(): [_line("Step a"), ("Step  a\n\n", "newline"), ("\n", "newline")]}
    outcome, _ = _search(tokenizer, thoughts, max_steps=1)
    (node,) = outcome.nodes
    assert (node.text, node.count, outcome.num_empty) == ("Step a\n", 2, 1)
    assert outcome.status == "no_answer"


def test_letters_keep_their_case_and_differ_by_it(tokenizer):
    outcome, _ = _search(tokenizer, {(): [_line("Step A"), _line("step a"), _line("Step A")]}, max_steps=1)
    assert [(node.text, node.count) for node in outcome.nodes] == [("Step A\n", 2), ("step a\n", 1)]


def test_only_the_best_open_state_is_expanded_and_an_answer_votes_without_a_place(tokenizer):
    thoughts = {
        (): [_line("Step a"), _line("Answer: 7"), _line("Step b")],
        ("Step b\n",): [_line("Answer: 8"), _line("Answer: 9"), _line("Step c")],
        ("Step b\n", "Step c\n"): [_line("Answer: 8"), _line("Step d"), _line("Step e")],
    }
    likely = {"Step b": 2.0, "Answer: 7": 3.0}
    outcome, engine = _search(tokenizer, thoughts, likely)
    assert engine.expanded == [(), ("Step b\n",), ("Step b\n", "Step c\n")]
    by_text = {(node.depth, node.text): node for node in outcome.nodes}
    assert not by_text[1, "Step a\n"].kept
    assert by_text[1, "Answer: 7\n"].kept
    assert by_text[1, "Answer: 7\n"].complete
    assert not by_text[3, "Step d\n"].kept
    assert not by_text[3, "Step d\n"].terminal
    # two paths to 8 at even odds (5.5 each) outvote one to 7 at 9.8
    assert outcome.answer == "8"
    assert [outcome.nodes[i].depth for i in outcome.winning_nodes] == [2, 3]
    assert [node.id for node in outcome.nodes] == list(range(9))
    assert [node.parent for node in outcome.nodes] == [-1, -1, -1, 2, 2, 2, 5, 5, 5]


def test_a_broken_chain_is_not_expanded_and_has_no_vote(tokenizer):
    thoughts = {
        (): [("Step a", "length"), ("Step b", "eos"), _line("Question: another")],
    }
    outcome, engine = _search(tokenizer, thoughts)
    assert engine.expanded == [()]
    assert outcome.status == "no_answer"
    assert all(node.terminal and not node.complete and not node.kept for node in outcome.nodes)


def test_an_answer_counts_after_eos_but_not_when_cut_or_unreadable(tokenizer):
    thoughts = {(): [("Answer: 7", "eos"), ("Answer: 1234", "length"), _line("Answer: none")]}
    outcome, _ = _search(tokenizer, thoughts)
    assert [node.answer for node in outcome.nodes] == ["7", None, None]
    assert (outcome.answer, outcome.winning_nodes, outcome.status) == ("7", (0,), "ok")


def test_nothing_but_empty_samples_is_no_candidates(tokenizer):
    outcome, _ = _search(tokenizer, {(): [("", "eos"), ("\n", "newline"), (" ", "length")]})
    assert (outcome.status, outcome.nodes, outcome.num_empty) == ("no_candidates", (), 3)
