"""Fixtures: the tiny model and tokenizer of `tiny_llama`, and configurations that search three questions."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from cpo_fast.config import Config, validate_config
from tests.search.tiny_llama import build_model, build_tokenizer

ARENA_TOKENS = 20_000  # more than all questions of a test at once, few enough that the tiny model's arena is 5 MB


@pytest.fixture(params=["hf", "arena"])
def engine(request: pytest.FixtureRequest) -> str:
    """Each value of `search.engine`."""
    return request.param


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A model that ends lines and answers often enough for small trees to have winners."""
    ids = tokenizer.convert_tokens_to_ids
    digits = {ids(digit): 4.0 for digit in "12"}
    return build_model(len(tokenizer), {ids("\n"): 6.0, ids("Answer:"): 5.0, ids("</s>"): 2.0, **digits})


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Config]:
    """make_config(run name, **search settings) -> a Config over three questions of two fields each."""
    questions = tmp_path / "questions.jsonl"
    rows = [
        {"id": "first", "question": "what is 1 + 1", "answer": 2},
        {"id": "second", "question": "how many", "answer": "12"},
        {"id": "third", "question": "and why not"},
    ]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(run: str = "run", seed: int = 0, **search: object) -> Config:
        sizes = {"num_candidates": 5, "num_kept": 2, "max_steps": 3, "max_thought_tokens": 20}
        settings = {"engine": "hf", "arena_tokens": ARENA_TOKENS, **sizes, **search}
        values = {"run": str(tmp_path / run), "seed": seed, "task": {"path": str(questions)}, "search": settings}
        return validate_config(values)

    return make
