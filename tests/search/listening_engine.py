"""An engine in front of another: it tells whose search starts, what is asked, and which answers are kept."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from cpo_fast.search.engine import Answer, Ask, Engine, Memory, Request, Scoring, Search, drive_each


class ListeningMemory:
    """Hands everything to `memory`, and each answer that it has taken to `on_note` too."""

    def __init__(self, memory: Memory, on_note: Callable[[str, Request | Scoring], object]) -> None:
        self._memory, self._on_note = memory, on_note

    def recall(self, name: str, item: Request | Scoring) -> Answer | None:
        return self._memory.recall(name, item)

    def note(self, name: str, item: Request | Scoring, answer: Answer) -> None:
        self._memory.note(name, item, answer)
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
        on_ask: Callable[[Ask], object] | None = None,
        on_note: Callable[[str, Request | Scoring], object] | None = None,
    ) -> None:
        self._engine, self._on_start, self._on_ask, self._on_note = engine, on_start, on_ask, on_note

    def cache_prefix(self, token_ids: Sequence[int]) -> None:
        self._engine.cache_prefix(token_ids)

    def answer(self, ask: Ask) -> list[Answer]:
        if self._on_ask is not None:
            self._on_ask(ask)
        return self._engine.answer(ask)

    def run(
        self, searches: Iterable[tuple[str, Search[Any]]], memory: Memory | None = None
    ) -> Iterator[tuple[str, Any, float]]:
        if memory is not None and self._on_note is not None:
            memory = ListeningMemory(memory, self._on_note)
        if self._on_ask is not None:
            return drive_each(self, self._told(searches), memory)
        return self._engine.run(self._told(searches), memory)

    def _told(self, searches: Iterable[tuple[str, Search[Any]]]) -> Iterator[tuple[str, Search[Any]]]:
        for name, search in searches:
            if self._on_start is not None:
                self._on_start(name)
            yield name, search
