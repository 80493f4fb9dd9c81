"""A tiny model on disk, a pairs file of token ids, and a way to train on them with a few options changed."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cpo_fast.config import Config, validate_config
from tests.tiny import save_tiny_model


def id_rows(seed: int = 0, num_questions: int = 4) -> list[dict[str, Any]]:
    """Rows of `pairs.jsonl` ids: three steps a question under one shared prompt, siblings diverging at every place."""
    generator = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [generator.randrange(5, 250) for _ in range(generator.randint(low, high))]

    rows = []
    shared = ids(20, 20)
    for question in range(num_questions):
        prompt = shared + ids(4, 8)
        for step in (1, 2, 3):
            chosen = ids(1, 6)
            losers = [ids(1, 6), [chosen[0], *ids(1, 3)], chosen + ids(1, 2)]
            rows += [
                {
                    "prompt_token_ids": prompt,
                    "chosen_token_ids": chosen,
                    "rejected_token_ids": loser,
                    "chosen_final": step == 3,
                    "rejected_final": step == 3,
                    "tree": f"q{question}",
                    "step": step,
                }
                for loser in losers
            ]
            prompt = prompt + chosen
    return rows


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model/` (a tiny Llama and its tokenizer) and `pairs.jsonl`."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder / "model")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in id_rows()))
    return folder


@pytest.fixture
def make_config(tiny_folder: Path, tmp_path: Path) -> Callable[..., Config]:
    """`make_config(lr=..., max_tokens=...)`: a training configuration with those `train` options changed."""

    def make(data: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **train: Any) -> Config:
        return validate_config(
            {
                "run": str(tmp_path / f"run-{len(list(tmp_path.iterdir()))}"),
                "model": {"path": str(tiny_folder / "model"), "dtype": "float32", **(model or {})},
                "data": {"path": str(tiny_folder / "pairs.jsonl"), **(data or {})},
                "lora": {"r": 4, "alpha": 8},
                "train": {"lr": 0.01, "batch_pairs": 12, "num_epochs": 2, "max_tokens": 400, **train},
            }
        )

    return make


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference over tensors with the same names."""
    assert left.keys() == right.keys()
    return max(float((left[key] - right[key]).abs().max()) for key in left)
