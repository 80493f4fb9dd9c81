"""What a search asks of an engine, and what it gets back. Plain token ids, no torch.

A search is a generator. It yields `Requests`, is sent their answers in order, and returns its result. It holds no
engine, so one engine can keep many searches going and put what they ask into common forwards.
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeAlias, TypeVar

from cpo_fast.tree import Stop

R = TypeVar("R")


@dataclass(frozen=True)
class SampleRequest:
    """One continuation to sample. Answered by a `Sample`.

    Attributes:
        token_ids: the prompt, special tokens included.
        uid: names this sample in the whole run (seed, question, state, sample index). It decides the random numbers.
        temperature: 0 is greedy. top_p: nucleus mass. max_new_tokens: the cap. With 0 the sample is empty.
        top_k: only so many of the likeliest tokens. 0 is all. repetition_penalty: of every token in the prompt or
            generated so far, as Hugging Face defines it. 1 is none.
        goes_on: asked with the ids generated so far after each token that holds a newline, in order, whether more are to
            come. None: generation ends at the first.
    """

    token_ids: tuple[int, ...]
    uid: str
    temperature: float
    top_p: float
    max_new_tokens: int
    top_k: int = 0
    repetition_penalty: float = 1.0
    goes_on: Callable[[Sequence[int]], bool] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class ScoreRequest:
    """Whole continuations to score after one prompt. Answered by a list of their natural log-probs, in nats.

    Attributes:
        token_ids: the prompt, special tokens included.
        continuations: token ids of each.
    """

    token_ids: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]

    @property
    def max_new_tokens(self) -> int:
        return max(map(len, self.continuations), default=0)


@dataclass(frozen=True)
class Sample:
    """One sampled line, or as many as were asked for.

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
        """Tokens generated for it, a sampled end-of-sequence included."""
        return num_generated(self.token_ids, self.stop)


def num_generated(token_ids: Sequence[int], stop: Stop) -> int:
    """How many tokens were sampled for these ids."""
    return len(token_ids) + (stop == "eos")  # an end-of-sequence cost a forward too, but is not among them


@dataclass(frozen=True)
class Requests:
    """What a search wants to know before it goes on.

    Attributes:
        items: in the order in which their answers are expected.
        keep: keep the KV of these prompts after the call, and until the next such call that of what was generated behind
            them: True for thoughts (later prompts extend them). False for verdict prompts, of which what several share,
            or what the next such call begins with, is all that an engine may keep.
    """

    items: tuple[SampleRequest | ScoreRequest, ...]
    keep: bool


Answer: TypeAlias = Sample | list[float]  # of a SampleRequest, of a ScoreRequest
Search: TypeAlias = Generator[Requests, list[Answer], R]


class AnswerCache(Protocol):
    """Answers of an earlier run. `name` is that of the search."""

    def get(self, name: str, item: SampleRequest | ScoreRequest) -> Answer | None:
        """The answer to a request, if it is known."""

    def put(self, name: str, item: SampleRequest | ScoreRequest, answer: Answer) -> None:
        """Take an answer as soon as it is computed."""


EMPTY_SAMPLE = Sample((), "", "length", ())


def answer_to_nothing(item: SampleRequest | ScoreRequest) -> Answer | None:
    """The answer to a request for no token at all, which needs no model. None: the request wants some."""
    if item.max_new_tokens > 0:
        return None
    return EMPTY_SAMPLE if isinstance(item, SampleRequest) else [0.0] * len(item.continuations)


class Engine(Protocol):
    """What a search needs. The answer to a request depends on that request alone, never on those beside it."""

    def cache_prefix(self, token_ids: Sequence[int]) -> None:
        """Compute these leading ids once. Later prompts that start with them reuse the work."""

    def answer(self, requests: Requests) -> list[Answer]:
        """Answers in the order of the items.

        Raises:
            ValueError: an empty prompt, a prompt too long for the model, or logits that are not finite.
        """

    def run(
        self, searches: Iterable[tuple[str, Search[R]]], cache: AnswerCache | None = None
    ) -> Iterator[tuple[str, R | Exception, float]]:
        """Run named searches until each is done.

        Args:
            searches: taken from the iterable as there is room for them.
            cache: what it knows is not computed again, and changes no other answer.

        Yields:
            (name, result or the exception that ended the search, seconds in flight) as they end, in any order. What
            cannot be answered is raised inside the search that asked. It never ends another.
        """


def check_length(num_prompt_tokens: int, num_new_tokens: int, max_positions: int | None) -> None:
    """Refuse, by a ValueError, an empty prompt, and one that may outgrow the positions a model has (None: no limit)."""
    if num_prompt_tokens == 0:
        raise ValueError("the prompt has no tokens")
    if max_positions is not None and num_prompt_tokens + num_new_tokens > max_positions:
        raise ValueError(
            f"prompt of {num_prompt_tokens} tokens and up to {num_new_tokens} new ones exceed the model's "
            f"{max_positions} positions"
        )


def run_search(engine: Engine, search: Search[R], name: str = "", cache: AnswerCache | None = None) -> R:
    """The result of one search, alone. `cache` knows it by `name`. Raises whatever ends the search."""
    advance: Callable[[], Requests] = partial(next, search)
    end: StopIteration | None = None
    while end is None:
        try:
            requests = advance()
        except StopIteration as stop:
            end = stop  # its value is what the generator returns
            continue
        try:
            advance = partial(search.send, _answers(engine, requests, name, cache))
        except Exception as error:  # raised at the search's `yield`: it decides what it can do without
            advance = partial(search.throw, error)
    result: R = end.value
    return result


def run_searches(
    engine: Engine, searches: Iterable[tuple[str, Search[R]]], cache: AnswerCache | None = None
) -> Iterator[tuple[str, R | Exception, float]]:
    """`Engine.run`, one search after the other: the reference for an engine that keeps many going."""
    for name, search in searches:
        started = time.perf_counter()
        result: R | Exception
        try:
            result = run_search(engine, search, name, cache)
        except Exception as error:
            result = error
        yield name, result, time.perf_counter() - started


def _answers(engine: Engine, requests: Requests, name: str, cache: AnswerCache | None) -> list[Answer]:
    if cache is None:
        return engine.answer(requests)
    known = [cache.get(name, item) for item in requests.items]
    missing = [item for item, answer in zip(requests.items, known, strict=True) if answer is None]
    computed = engine.answer(Requests(tuple(missing), requests.keep)) if missing else []
    for item, answer in zip(missing, computed, strict=True):
        cache.put(name, item, answer)
    new = iter(computed)  # in the order of the items that were missing
    return [next(new) if answer is None else answer for answer in known]
