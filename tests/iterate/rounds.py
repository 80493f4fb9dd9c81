"""A model that talks, questions and a configuration whose rounds take seconds."""

import json
import re
from pathlib import Path
from typing import Any

from tests.golden.tiny_models import save_talker

QUESTIONS = [("Two and five?", "7"), ("Nine less eight?", "1"), ("What is 3 + 4?", "7"), ("And 1 + 1?", "2")]
DEV = [("Five and two?", "7"), ("Ten less nine?", "1"), ("How many is one?", "1"), ("And what is left of 2?", "2")]


def write_questions(path: Path, rows: list[tuple[str, str | None]]) -> Path:
    """A JSONL of questions, answers where there are any."""
    with open(path, "w", encoding="utf-8") as file:
        for number, (question, answer) in enumerate(rows):
            row = {"id": f"{path.stem}-{number}", "question": question} | ({"answer": answer} if answer else {})
            file.write(json.dumps(row) + "\n")
    return path


def write_inputs(folder: Path) -> Path:
    """`model/`, `asked.jsonl` and `dev.jsonl`."""
    save_talker(folder / "model")
    write_questions(folder / "asked.jsonl", list(QUESTIONS))
    write_questions(folder / "dev.jsonl", list(DEV))
    return folder


def values(inputs: Path, run: Path, **sections: Any) -> dict[str, Any]:
    """A whole configuration, with `sections` over it."""
    usual: dict[str, Any] = {
        "run": str(run),
        "seed": 1,
        "model": {"path": str(inputs / "model"), "dtype": "float32", "device": "cpu"},
        "task": {"path": str(inputs / "asked.jsonl"), "num_questions": 2},
        "search": {
            "num_candidates": 5,
            "num_kept": 2,
            "max_steps": 3,
            "max_thought_tokens": 5,
            "arena_tokens": 30_000,
        },
        "lora": {"r": 4, "alpha": 8},
        "train": {"lr": 0.02, "batch_pairs": 6, "num_epochs": 1, "dev_path": str(inputs / "dev.jsonl")},
        "eval": {"max_new_tokens": 20, "latency_questions": 1},
        "iterate": {"num_rounds": 2, "patience": 2},
    }
    for section, changes in sections.items():
        usual[section] = {**usual.get(section, {}), **changes} if isinstance(changes, dict) else changes
    return usual


def write_config(path: Path, settings: dict[str, Any]) -> Path:
    """A configuration as a file. JSON is YAML."""
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path


_VARYING = re.compile(r'"(?:[a-z_]*seconds|num_starts)":\s*(?:\{[^}]*\}|[^,}\n]+)')


def results(run: Path) -> dict[str, bytes | str]:
    """What rounds leave, by file: all but checkpoints, locks, the environment, times and how often a stage was begun."""
    found: dict[str, bytes | str] = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name = path.relative_to(run).as_posix()
        left_out = ("checkpoints", "reference", "environment.json")
        if any(part.startswith(".") or part in left_out for part in path.relative_to(run).parts):
            continue
        if path.suffix in (".json", ".jsonl") and path.name != "timings.jsonl":
            text = _VARYING.sub('"time"', path.read_text(encoding="utf-8"))
            found[name] = text.replace(str(run), "RUN")
        elif path.suffix in (".safetensors", ".parquet"):
            found[name] = path.read_bytes()
    return found
