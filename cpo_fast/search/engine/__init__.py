"""Engines turn token ids into sampled token ids and log-probs. `huggingface` is the reference."""

from cpo_fast.search.engine.requests import (
    Answer,
    AnswerCache,
    Engine,
    Requests,
    Sample,
    SampleRequest,
    ScoreRequest,
    Search,
    num_generated,
    run_search,
    run_searches,
)

__all__ = [
    "Answer",
    "AnswerCache",
    "Engine",
    "Requests",
    "Sample",
    "SampleRequest",
    "ScoreRequest",
    "Search",
    "num_generated",
    "run_search",
    "run_searches",
]
