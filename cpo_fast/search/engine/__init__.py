"""Engines turn token ids into sampled token ids and log-probs. `huggingface` is the reference."""

from cpo_fast.search.engine.requests import (
    Answer,
    Ask,
    Engine,
    Memory,
    Request,
    Sample,
    Scoring,
    Search,
    drive,
    drive_each,
    num_generated,
)

__all__ = [
    "Answer",
    "Ask",
    "Engine",
    "Memory",
    "Request",
    "Sample",
    "Scoring",
    "Search",
    "drive",
    "drive_each",
    "num_generated",
]
