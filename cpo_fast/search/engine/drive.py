"""One search after the other through `Engine.answer`: the reference for whatever keeps many going at once."""

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from cpo_fast.search.engine.request import Answer, Ask, Engine, Memory, R, Search


def drive(engine: Engine, search: Search[R], name: str = "", memory: Memory | None = None) -> R:
    """The result of one search, alone; `name` is what `memory` knows it by.

    An error in `answer` is raised inside the search, at the ask that caused it, as in `Engine.run`.

    Raises:
        Exception: whatever ends the search.
    """
    turn: Callable[[], Ask] = partial(next, search)
    end: StopIteration | None = None
    while end is None:
        try:
            turn = _next_turn(engine, search, turn(), name, memory)
        except StopIteration as stop:
            end = stop
    result: R = end.value
    return result


def drive_each(
    engine: Engine, searches: Iterable[tuple[str, Search[R]]], memory: Memory | None = None
) -> Iterator[tuple[str, R | Exception, float]]:
    """`Engine.run` for an engine that keeps one search going at a time."""
    for name, search in searches:
        started = time.perf_counter()
        result: R | Exception
        try:
            result = drive(engine, search, name, memory)
        except Exception as error:
            result = error
        yield name, result, time.perf_counter() - started


def _next_turn(engine: Engine, search: Search[R], ask: Ask, name: str, memory: Memory | None) -> Callable[[], Ask]:
    try:
        return partial(search.send, _answers(engine, ask, name, memory))
    except Exception as error:  # the search decides what it can do without
        return partial(search.throw, error)


def _answers(engine: Engine, ask: Ask, name: str, memory: Memory | None) -> list[Answer]:
    if memory is None:
        return engine.answer(ask)
    known = [memory.recall(name, item) for item in ask.items]
    missing = [item for item, answer in zip(ask.items, known, strict=True) if answer is None]
    computed = engine.answer(Ask(tuple(missing), ask.keep)) if missing else []
    for item, answer in zip(missing, computed, strict=True):
        memory.note(name, item, answer)
    new = iter(computed)
    return [next(new) if answer is None else answer for answer in known]
