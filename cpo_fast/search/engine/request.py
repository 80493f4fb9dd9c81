"""What a search asks of an engine, and what it gets back. Plain token ids; no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cpo_fast.tree import Stop


@dataclass(frozen=True)
class Request:
    """One continuation to sample.

    Attributes:
        token_ids: the prompt, special tokens included.
        uid: names this sample in the whole run (seed, question, state, sample index); decides its random numbers.
        temperature: 0 is greedy. top_p: nucleus mass. max_new_tokens: the cap.
    """

    token_ids: tuple[int, ...]
    uid: str
    temperature: float
    top_p: float
    max_new_tokens: int


@dataclass(frozen=True)
class Sample:
    """One sampled line: the ids as generated (the newline's token kept whole, end-of-sequence left out), their text,
    and why generation ended."""

    token_ids: tuple[int, ...]
    text: str
    stop: Stop

    @property
    def num_tokens(self) -> int:
        """Tokens the model generated for it, a sampled end-of-sequence included."""
        return num_generated(self.token_ids, self.stop)


def num_generated(token_ids: Sequence[int], stop: Stop) -> int:
    """How many tokens were sampled for these ids: an end-of-sequence cost a forward too, but is not among them."""
    return len(token_ids) + (stop == "eos")


class Engine(Protocol):
    """What the search needs. Results of a request depend on the request alone, never on its company."""

    def cache_prefix(self, token_ids: Sequence[int]) -> None:
        """Compute these leading ids once; later prompts that start with them reuse the work."""

    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        """One line per request, in order."""

    def score(self, token_ids: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[float]:
        """Natural log-prob of each whole continuation after the prompt `token_ids`."""
