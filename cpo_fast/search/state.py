"""A state of the search: the thoughts so far. Its token ids are what the model reads; they name its random numbers."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from cpo_fast.search.engine import Sample
from cpo_fast.tree import ROOT


@dataclass(frozen=True)
class State:
    """A path of thoughts.

    Attributes:
        node_id: the last node of the path, -1 for the root state.
        token_ids: prompt, question and thoughts.
        lines: text of each thought.
    """

    node_id: int
    token_ids: tuple[int, ...]
    lines: tuple[str, ...]

    @classmethod
    def root(cls, token_ids: Sequence[int]) -> "State":
        """The question itself, no thought yet."""
        return cls(ROOT, tuple(token_ids), ())

    def extend(self, node_id: int, token_ids: Sequence[int], line: str) -> "State":
        """The state after one more thought."""
        return State(node_id, (*self.token_ids, *token_ids), (*self.lines, line))

    @property
    def depth(self) -> int:
        """How many thoughts the state holds; 0 for the root state."""
        return len(self.lines)

    @property
    def digest(self) -> str:
        """SHA-256 of the token ids: equal states have equal names, whatever else was searched."""
        return hashlib.sha256(" ".join(map(str, self.token_ids)).encode()).hexdigest()


@dataclass(frozen=True)
class Candidate:
    """A thought sampled under a state and not yet judged.

    Attributes:
        state: the state that includes the thought. sample: the first one with its text.
        count: samples merged into it.
    """

    state: State
    sample: Sample
    count: int
