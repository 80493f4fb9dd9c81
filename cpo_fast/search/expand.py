"""Sample k thoughts per state and merge the duplicates of one parent.

Duplicates are equal after whitespace is collapsed; the first sample's ids and text stay, with a count. Letters keep
their case and nothing is cut: the ids of a candidate are the ids that were generated. Samples of only whitespace are
dropped and counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cpo_fast.config import SearchConfig
from cpo_fast.search.engine import Ask, Request, Sample, Search
from cpo_fast.search.state import Candidate, State


@dataclass(frozen=True)
class Expansion:
    """What the samples under some states came to.

    Attributes:
        children: one list of candidates a state, in sample order.
        num_empty: samples dropped because they were only whitespace.
        num_tokens: tokens generated for all samples, duplicates and empty ones included.
    """

    children: list[list[Candidate]]
    num_empty: int
    num_tokens: int


def expand(states: Sequence[State], settings: SearchConfig, run_name: str, next_id: int) -> Search[Expansion]:
    """Sample under each state, in one ask.

    Args:
        states: the states to continue, in rank order.
        settings: `num_candidates`, `max_thought_tokens`, and how a token is sampled.
        run_name: seed and question, the part of a sample's uid that the state does not give.
        next_id: id of the first node that these candidates become; ids go up by parent rank and sample index.
    """
    requests = [
        Request(
            state.token_ids,
            f"{run_name}/thought/{state.digest}/{index}",
            settings.temperature,
            settings.top_p,
            settings.max_thought_tokens,
            settings.top_k,
            settings.repetition_penalty,
        )
        for state in states
        for index in range(settings.num_candidates)
    ]
    answers = yield Ask(tuple(requests), keep=True)
    samples = [answer for answer in answers if isinstance(answer, Sample)]
    assert len(samples) == len(requests), "a request is answered by a sample"
    children: list[list[Candidate]] = []
    num_empty = 0
    for rank, state in enumerate(states):
        merged: dict[str, Candidate] = {}
        first = rank * settings.num_candidates
        for sample in samples[first : first + settings.num_candidates]:
            key = " ".join(sample.text.split())
            if not key:
                num_empty += 1
            elif key in merged:
                merged[key] = replace(merged[key], count=merged[key].count + 1)
            else:
                after = state.extend(next_id, sample.token_ids, sample.text)
                merged[key] = Candidate(after, sample, count=1)
                next_id += 1
        children.append(list(merged.values()))
    return Expansion(children, num_empty, sum(sample.num_tokens for sample in samples))
