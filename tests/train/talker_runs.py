"""Searches and trainings of the talker, whose chains come to answers."""

import json
from pathlib import Path
from typing import Any

from cpo_fast.config import Config, validate_config
from cpo_fast.search.collect import collect
from tests.golden.tiny_models import save_talker

SEARCHED = [f"How many are {first} + {second}?" for first in (1, 2, 3) for second in (4, 7)]
DEV = [f"How many are {first} less {second}?" for first in (7, 12) for second in (1, 2, 3)]


def write_questions(path: Path, texts: list[str], answers: list[Any]) -> Path:
    rows = [{"id": f"q{number}", "question": text} for number, text in enumerate(texts)]
    rows = [row | ({"answer": answer} if answer is not None else {}) for row, answer in zip(rows, answers, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_inputs(folder: Path) -> None:
    """`talker/`, and the trees of six questions in `searched/` and of six others in `dev/`."""
    save_talker(folder / "talker", answer_bonus=0.25)
    for name, texts in (("searched", SEARCHED), ("dev", DEV)):
        write_questions(folder / f"{name}.jsonl", texts, ["7"] * len(texts))
        collect(config_for(folder, folder / name, task={"path": str(folder / f"{name}.jsonl")}))


def config_for(folder: Path, run: Path, **sections: dict[str, Any]) -> Config:
    """A search or a training of the talker, with these sections changed."""
    values: dict[str, Any] = {
        "run": str(run),
        "model": {"path": str(folder / "talker"), "dtype": "float32", "device": "cpu"},
        "task": {},
        "search": {
            "num_candidates": 4,
            "num_kept": 2,
            "max_steps": 3,
            "max_thought_tokens": 5,
            "arena_tokens": 30_000,
        },
        "data": {"path": str(folder / "searched" / "trees.jsonl")},
        "lora": {"r": 4, "alpha": 8},
        "train": {"lr": 0.05, "batch_pairs": 8, "max_steps": 8, "eval_every": 2, "reference": "online"},
        "eval": {"max_new_tokens": 20},
    }
    return validate_config(
        {name: {**values.get(name, {}), **more} for name, more in sections.items()}
        | {name: value for name, value in values.items() if name not in sections}
    )


def by_votes(folder: Path, run: Path, data: dict[str, Any] | None = None, **options: Any) -> Config:
    """A training that stops on the agreement with the votes of `dev/`, unless `options` say other trees."""
    asked = {"stop_on": "agreement", "dev_trees": str(folder / "dev" / "trees.jsonl"), **options}
    base = config_for(folder, run)
    return config_for(folder, run, data=data or {}, train=base.train.model_dump(exclude_unset=True) | asked)


# at this rate chains do not come to an answer any more after two steps
COLLAPSING = {"lr": 1.0, "eval_every": 1, "schedule": "constant", "warmup_ratio": 0.0}
