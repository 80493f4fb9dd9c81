"""Rows to train on, short runs, and what they leave: for every test of training."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cpo_fast.config import Config, TrainConfig
from cpo_fast.train.loop import train

MakeConfig = Callable[..., Config]

# with `sgd`, weights move along the gradient and by nothing else
CONSTANT_RATE = {"lr": 0.5, "schedule": "constant", "warmup_ratio": 0.0}


def sgd(config: TrainConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer whose steps are the gradient, which AdamW divides by its own size."""
    return torch.optim.SGD(parameters, lr=config.lr, weight_decay=config.weight_decay)


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


def adapter_of(config: Config, **options: Any) -> dict[str, torch.Tensor]:
    """Train, and load the adapter that was written."""
    return load_file(train(config, **options).adapter_path / "adapter_model.safetensors")


def metrics_of(config: Config, **options: Any) -> list[dict[str, Any]]:
    """Train, and read the metrics that were written."""
    return [json.loads(line) for line in train(config, **options).metrics_path.read_text().splitlines()]


def memory_bytes(name: str) -> int:
    """What Linux says of this process's memory, by its name in /proc/self/status."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) << 10


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference over tensors with the same names."""
    assert left.keys() == right.keys()
    return max(float((left[key] - right[key]).abs().max()) for key in left)
