"""What a search asks of an engine, and what it gets back. Plain token ids; no torch.

A search is a generator: it yields an `Ask`, is sent the answers in the order of its items, and returns its result. It
holds no engine, so that one engine can keep many searches going and put what they ask into common forwards.

One search after the other through `Engine.answer`: the reference for whatever keeps many going at once.

What makes the arena engine fast, each of which a measurement can switch off. None of them changes a result.
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeAlias, TypeVar

from cpo_fast.tree import Stop

R = TypeVar("R")


@dataclass(frozen=True)
class Request:
    """One continuation to sample; answered by a `Sample`.

    Attributes:
        token_ids: the prompt, special tokens included.
        uid: names this sample in the whole run (seed, question, state, sample index); decides its random numbers.
        temperature: 0 is greedy. top_p: nucleus mass. max_new_tokens: the cap.
        top_k: only so many of the likeliest tokens; 0 is all. repetition_penalty: of every token in the prompt or
            generated so far, as Hugging Face defines it; 1 is none.
    """

    token_ids: tuple[int, ...]
    uid: str
    temperature: float
    top_p: float
    max_new_tokens: int
    top_k: int = 0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class Scoring:
    """Whole continuations to score after one prompt; answered by a list of their natural log-probs, in nats.

    Attributes:
        token_ids: the prompt, special tokens included.
        continuations: token ids of each.
    """

    token_ids: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Sample:
    """One sampled line.

    Attributes:
        token_ids: the ids as generated, the newline's token kept whole, end-of-sequence left out.
        text: of the ids. stop: why generation ended.
        logps: natural log-prob of each of the `num_tokens` generated tokens, end-of-sequence included, under the raw
            policy: temperature 1, unprocessed logits, float64 log-softmax.
    """

    token_ids: tuple[int, ...]
    text: str
    stop: Stop
    logps: tuple[float, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens the model generated for it, a sampled end-of-sequence included."""
        return num_generated(self.token_ids, self.stop)


def num_generated(token_ids: Sequence[int], stop: Stop) -> int:
    """How many tokens were sampled for these ids: an end-of-sequence cost a forward too, but is not among them."""
    return len(token_ids) + (stop == "eos")


@dataclass(frozen=True)
class Ask:
    """What a search wants to know before it goes on.

    Attributes:
        items: in the order in which their answers are expected.
        keep: whether the prompts are states that later prompts continue, so that their keys and values are worth
            keeping: thoughts are, verdicts are not.
    """

    items: tuple[Request | Scoring, ...]
    keep: bool


# of a Request a Sample, of a Scoring a list of log-probs
Answer: TypeAlias = Sample | list[float]
Search: TypeAlias = Generator[Ask, list[Answer], R]


class Memory(Protocol):
    """Answers of an earlier run, and where new ones are noted; `name` is that of the search."""

    def recall(self, name: str, item: Request | Scoring) -> Answer | None:
        """The answer to an item, if it is known."""

    def note(self, name: str, item: Request | Scoring, answer: Answer) -> None:
        """Take an answer that was computed, as soon as it is."""


class Engine(Protocol):
    """What the search needs. The answer to an item depends on the item alone, never on its company."""

    def cache_prefix(self, token_ids: Sequence[int]) -> None:
        """Compute these leading ids once; later prompts that start with them reuse the work."""

    def answer(self, ask: Ask) -> list[Answer]:
        """Answers to one ask, in the order of its items.

        Raises:
            ValueError: an empty prompt, a prompt too long for the model, or logits that are not finite.
        """

    def run(
        self, searches: Iterable[tuple[str, Search[R]]], memory: Memory | None = None
    ) -> Iterator[tuple[str, R | Exception, float]]:
        """Drive named searches until each is done.

        Args:
            searches: taken from the iterable as there is room for them.
            memory: what it knows is not computed again, and changes no other answer.

        Yields:
            (name, result or the exception that ended the search, seconds in flight) as they end, in any order. What
            cannot be answered is raised inside the search that asked; it never ends another.
        """


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


@dataclass(frozen=True)
class Features:
    """Switches of one engine.

    Attributes:
        share: a node that rows share is read once for all of them; off: once for each row.
        refill: places of finished rows are filled while others still run; off: when all have ended.
        graphs: steps of generation are recorded and replayed, and read back one step late. Needs CUDA.
    """

    share: bool = True
    refill: bool = True
    graphs: bool = False
