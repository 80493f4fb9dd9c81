"""An engine that follows a script: what a search does then depends on the search alone."""

from cpo_fast.config import SearchConfig
from cpo_fast.search.engine import Request, Sample, drive, drive_each
from cpo_fast.search.tree_search import search_question
from cpo_fast.tasks import Question, get_task

QUESTION = Question("q", "how many")
ROOT_IDS = [5, 6]


def line(text):
    """A sample that ended with its newline."""
    return (f"{text}\n", "newline")


class ScriptedEngine:
    """Thoughts from a table {lines so far: samples}, every text known by one id; values from the last line.

    `thoughts` may be a function of the lines instead. `likely` gives the log-prob of the label by last line; the other
    label's is -1. `verdicts` are the texts of sampled verdicts.
    """

    def __init__(self, tokenizer, thoughts, likely=None, verdicts=()):
        self.tokenizer, self.likely, self.verdicts = tokenizer, likely or {}, verdicts
        self.thoughts = thoughts if callable(thoughts) else thoughts.__getitem__
        self.ids = {}
        self.expanded = []
        self.asks = []

    def cache_prefix(self, token_ids):
        raise AssertionError("not part of a search")

    def answer(self, ask):
        self.asks.append(ask)
        return [self._sample(item) if isinstance(item, Request) else self._score(item) for item in ask.items]

    def run(self, searches, memory=None):
        return drive_each(self, searches)

    def _sample(self, request):
        index = int(request.uid.rpartition("/")[2])
        if "/verdict/" in request.uid:
            return Sample((7, 8), self.verdicts[index % len(self.verdicts)], "newline", (-0.5, -0.5))
        texts = {number: text for text, number in self.ids.items()}
        lines = tuple(texts[number] for number in request.token_ids[len(ROOT_IDS) :])
        if index == 0:
            self.expanded.append(lines)
        text, stop = self.thoughts(lines)[index]
        logps = (-0.25,) * (1 + (stop == "eos"))
        return Sample((self.ids.setdefault(text, 100 + len(self.ids)),), text, stop, logps)

    def _score(self, scoring):
        last = self.tokenizer.decode(scoring.token_ids).split("\n")[-2]
        return [self.likely.get(last, -1.0), -1.0]


def search(tokenizer, thoughts, likely=None, verdicts=(), task="svamp", **settings):
    """(outcome, engine) of one scripted search: 3 candidates, 1 kept, 3 steps unless said otherwise."""
    settings = {"num_candidates": 3, "num_kept": 1, "max_steps": 3, **settings}
    engine = ScriptedEngine(tokenizer, thoughts, likely, verdicts)
    grown = search_question(tokenizer, get_task(task), QUESTION, ROOT_IDS, SearchConfig(**settings), 0)
    return drive(engine, grown), engine


def full_tree(lines):
    """Three different steps under every state."""
    return [line(f"Step {len(lines) + 1}{letter}{'z' * len(lines)}") for letter in "abc"]
