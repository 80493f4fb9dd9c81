"""An engine that follows a script: what a search does then depends on the search alone."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from cpo_fast.config import Config, SearchConfig
from cpo_fast.search.engine import (
    Answer,
    Requests,
    Sample,
    SampleRequest,
    ScoreRequest,
    Search,
    run_search,
    run_searches,
)
from cpo_fast.search.tree_search import search_question
from cpo_fast.tasks import Prompts, Question, get_task
from cpo_fast.tree import SearchTree, Stop

QUESTION = Question("q", "how many")
Lines = tuple[str, ...]
Said = tuple[str, Stop]
Thoughts = dict[Lines, list[Said]] | Callable[[Lines], list[Said]]
Likely = dict[str, float] | None


def line(text: str) -> Said:
    """A sample that ended with its newline."""
    return (f"{text}\n", "newline")


class ScriptedEngine:
    """Thoughts from a table {lines so far: samples}, every text known by one id; values from the last line.

    `thoughts` may be a function of the lines instead. `likely` gives the log-prob of the label by last line; the other
    label's is -1. `verdicts` are the texts of sampled verdicts.

    Attributes:
        expanded: the lines of each state that was sampled under. asks: all that was asked.
    """

    def __init__(
        self,
        prompts: Prompts,
        thoughts: Thoughts,
        likely: Likely = None,
        verdicts: Sequence[str] = (),
    ) -> None:
        self.tokenizer, self.likely, self.verdicts = prompts.tokenizer, likely or {}, verdicts
        self.thoughts = thoughts if callable(thoughts) else thoughts.__getitem__
        self.num_root_ids = len(prompts.encode(QUESTION))
        self.ids: dict[str, int] = {}
        self.expanded: list[Lines] = []
        self.asks: list[Requests] = []

    def cache_prefix(self, token_ids: Sequence[int]) -> None:
        raise AssertionError("not part of a search")

    def answer(self, ask: Requests) -> list[Answer]:
        self.asks.append(ask)
        return [self._sample(item) if isinstance(item, SampleRequest) else self._score(item) for item in ask.items]

    def run(self, searches: Iterable[tuple[str, Search[Any]]], cache: Any = None) -> Iterator[tuple[str, Any, float]]:
        return run_searches(self, searches)

    def _sample(self, request: SampleRequest) -> Sample:
        index = int(request.uid.rpartition("/")[2])
        if "/verdict/" in request.uid:
            return Sample((7, 8), self.verdicts[index % len(self.verdicts)], "newline", (-0.5, -0.5))
        texts = {number: text for text, number in self.ids.items()}
        lines = tuple(texts[number] for number in request.token_ids[self.num_root_ids :])
        if index == 0:
            self.expanded.append(lines)
        text, stop = self.thoughts(lines)[index]
        logps = (-0.25,) * (1 + (stop == "eos"))
        return Sample((self.ids.setdefault(text, 100 + len(self.ids)),), text, stop, logps)

    def _score(self, scoring: ScoreRequest) -> list[float]:
        last = self.tokenizer.decode(scoring.token_ids).split("\n")[-2]
        return [self.likely.get(last, -1.0), -1.0]


def search(
    tokenizer: PreTrainedTokenizerFast,
    thoughts: Thoughts,
    likely: Likely = None,
    verdicts: Sequence[str] = (),
    task: str = "svamp",
    **settings: Any,
) -> tuple[SearchTree, ScriptedEngine]:
    """The tree of one scripted search, and its engine: 3 candidates, 1 kept, 3 steps unless said otherwise."""
    prompts = Prompts(get_task(task), tokenizer)
    config = Config(search=SearchConfig(**{"num_candidates": 3, "num_kept": 1, "max_steps": 3, **settings}))
    engine = ScriptedEngine(prompts, thoughts, likely, verdicts)
    tree = run_search(engine, search_question(config, prompts, QUESTION))
    assert tree.status != "failed", tree.detail
    return tree, engine


def full_tree(lines: Lines) -> list[Said]:
    """Three different steps under every state."""
    return [line(f"Step {len(lines) + 1}{letter}{'z' * len(lines)}") for letter in "abc"]
