"""Sample k thoughts per state and merge the duplicates of one parent.

Duplicates are equal after whitespace is collapsed; the first sample's ids and text stay, with a count. Letters keep
their case and nothing is cut: the ids of a candidate are the ids that were generated. Samples of only whitespace are
dropped and counted.
"""

from collections.abc import Sequence
from dataclasses import replace

from cpo_fast.config import SearchConfig
from cpo_fast.search.engine import Engine, Request
from cpo_fast.search.state import Candidate, State


def expand(
    engine: Engine, states: Sequence[State], settings: SearchConfig, run_name: str, next_id: int
) -> tuple[list[list[Candidate]], int]:
    """Candidates of each state of a level, in sample order.

    Args:
        engine: samples the thoughts.
        states: the states of one level, in rank order.
        settings: `num_candidates`, `temperature`, `top_p`, `max_thought_tokens`.
        run_name: seed and question, the part of a sample's uid that the state does not give.
        next_id: id of the first node that these candidates become; ids go up by parent rank and sample index.

    Returns:
        (one list a state, number of empty samples dropped).
    """
    requests = [
        Request(
            state.token_ids,
            f"{run_name}/thought/{state.digest}/{index}",
            settings.temperature,
            settings.top_p,
            settings.max_thought_tokens,
        )
        for state in states
        for index in range(settings.num_candidates)
    ]
    samples = engine.sample(requests)
    levels: list[list[Candidate]] = []
    num_empty = 0
    for rank, state in enumerate(states):
        merged: dict[str, Candidate] = {}
        first = rank * settings.num_candidates
        for index, sample in enumerate(samples[first : first + settings.num_candidates]):
            key = " ".join(sample.text.split())
            if not key:
                num_empty += 1
            elif key in merged:
                merged[key] = replace(merged[key], count=merged[key].count + 1)
            else:
                after = state.extend(next_id, sample.token_ids, sample.text)
                merged[key] = Candidate(rank, index, after, sample.token_ids, sample.text, sample.stop, count=1)
                next_id += 1
        levels.append(list(merged.values()))
    return levels, num_empty
