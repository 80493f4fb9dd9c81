"""Engines turn token ids into sampled token ids and log-probs. `huggingface` is the reference."""

from cpo_fast.search.engine.request import Engine, Request, Sample, num_generated

__all__ = ["Engine", "Request", "Sample", "num_generated"]
