"""An engine in front of another: it tells whose search starts, what is asked, and which answers are kept."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from cpo_fast.search.engine import (
    Answer,
    AnswerCache,
    Engine,
    Requests,
    SampleRequest,
    ScoreRequest,
    Search,
    run_searches,
)


class ListeningCache:
    """Hands everything to `cache`, and each answer that it has taken to `on_note` too."""

    def __init__(self, cache: AnswerCache, on_note: Callable[[str, SampleRequest | ScoreRequest], object]) -> None:
        self._cache, self._on_note = cache, on_note

    def get(self, name: str, item: SampleRequest | ScoreRequest) -> Answer | None:
        return self._cache.get(name, item)

    def put(self, name: str, item: SampleRequest | ScoreRequest, answer: Answer) -> None:
        self._cache.put(name, item, answer)
        self._on_note(name, item)


class ListeningEngine:
    """Lets `engine` do the work.

    Args:
        on_start: called with a search's name when it is taken.
        on_ask: called with what is asked, before it is answered; what it raises is the answer. Searches then run one
            after the other.
        on_note: called with the search's name and the request of every answer that was kept.
    """

    def __init__(
        self,
        engine: Engine,
        on_start: Callable[[str], object] | None = None,
        on_ask: Callable[[Requests], object] | None = None,
        on_note: Callable[[str, SampleRequest | ScoreRequest], object] | None = None,
    ) -> None:
        self._engine, self._on_start, self._on_ask, self._on_note = engine, on_start, on_ask, on_note

    def cache_prefix(self, token_ids: Sequence[int]) -> None:
        self._engine.cache_prefix(token_ids)

    def answer(self, ask: Requests) -> list[Answer]:
        if self._on_ask is not None:
            self._on_ask(ask)
        return self._engine.answer(ask)

    def run(
        self, searches: Iterable[tuple[str, Search[Any]]], cache: AnswerCache | None = None
    ) -> Iterator[tuple[str, Any, float]]:
        if cache is not None and self._on_note is not None:
            cache = ListeningCache(cache, self._on_note)
        if self._on_ask is not None:
            return run_searches(self, self._told(searches), cache)
        return self._engine.run(self._told(searches), cache)

    def _told(self, searches: Iterable[tuple[str, Search[Any]]]) -> Iterator[tuple[str, Search[Any]]]:
        for name, search in searches:
            if self._on_start is not None:
                self._on_start(name)
            yield name, search
