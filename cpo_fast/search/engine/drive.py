"""One search after the other through `Engine.answer`: the reference for whatever keeps many going at once."""

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from cpo_fast.search.engine.request import Ask, Engine, R, Search


def drive(engine: Engine, search: Search[R]) -> R:
    """The result of one search, alone.

    An error in `answer` is raised inside the search, at the ask that caused it, as in `Engine.run`.

    Raises:
        Exception: whatever ends the search.
    """
    turn: Callable[[], Ask] = partial(next, search)
    end: StopIteration | None = None
    while end is None:
        try:
            turn = _next_turn(engine, search, turn())
        except StopIteration as stop:
            end = stop
    result: R = end.value
    return result


def drive_each(engine: Engine, searches: Iterable[tuple[str, Search[R]]]) -> Iterator[tuple[str, R | Exception, float]]:
    """`Engine.run` for an engine that keeps one search going at a time."""
    for name, search in searches:
        started = time.perf_counter()
        result: R | Exception
        try:
            result = drive(engine, search)
        except Exception as error:
            result = error
        yield name, result, time.perf_counter() - started


def _next_turn(engine: Engine, search: Search[R], ask: Ask) -> Callable[[], Ask]:
    try:
        return partial(search.send, engine.answer(ask))
    except Exception as error:  # the search decides what it can do without
        return partial(search.throw, error)
