"""Run folders written by hand, in the form that the commands write, without a model."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cpo_fast.evaluate.result import QuestionResult, RunIdentity, summarise
from cpo_fast.files import canonical_json

# what a model or a file may say, that a page must show and not do
HOSTILE = (
    "<script>window.hacked = 1</script>",
    "</script><img src=x onerror='window.hacked = 1'>",
    "{{7*7}} {% raw %}",
    "\x1b[31mred\x1b[0m\x00\u202egnirts\u2028",
    "مرحبا بالعالم",
    "\ud800 half",
    "x" * 100_000,
)


def metrics_lines(num_steps: int, every: int = 0, alarm_from: int | None = None) -> list[dict[str, Any]]:
    """A training of so many steps, validated after each `every` and before the first."""
    lines: list[dict[str, Any]] = []
    if every:
        lines.append(
            {"step": 0, "epoch": 0.0, "seconds": 1.0, "eval_accuracy": 0.5, "eval_answered": 1.0, "eval_best_step": 0}
        )
    for step in range(1, num_steps + 1):
        done = step / num_steps
        line = {
            "step": step,
            "epoch": done,
            "seconds": 0.5,
            "loss": 0.69 * math.exp(-done),
            "grad_norm": 0.05 + done,
            "learning_rate": 1e-4 * (1 - done),
            "rewards/margins": done,
            "rewards/chosen": 0.2 * done,
            "rewards/rejected": -0.8 * done,
            "rewards/accuracies": 0.5 + 0.4 * done,
            "rewards/accuracies/step_1": 0.4 + 0.5 * done,
            "rewards/accuracies/step_2": 0.5 + 0.5 * done,
            "logps/chosen_per_token": -0.2 - 0.1 * done,
            "logps/rejected_per_token": -0.3 - done,
            "logps/chosen_drift": -0.1 * done,
            "logps/chosen_drift_p10": -0.3 * done,
            "tokens/computed": 800,
            "tokens/rows": 2000,
            "tokens/saved": 0.6,
            "alarm": alarm_from is not None and step >= alarm_from,
            "impl/linear_logprob": "eager",
        }
        if every and step % every == 0:
            line |= {"eval_accuracy": 0.5 + 0.3 * done, "eval_answered": 1.0, "eval_best_step": step}
        lines.append(line)
    return lines


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_evaluation(run: Path, label: str, corrects: Sequence[bool], chain: str = "so 1+1=2\nAnswer: 2") -> None:
    """`eval-<label>.jsonl` and its summary: question q0, q1, ... right as `corrects` says."""
    results = [
        QuestionResult(
            f"q{place}",
            f"question {place}",
            "2",
            "2" if right else "3",
            right,
            {"exact": float(right)},
            9,
            0,
            1.5,
            "answer",
            chain,
        )
        for place, right in enumerate(corrects)
    ]
    adapter = "" if label.startswith("base") else "a" * 16
    identity = RunIdentity("m", "b" * 16, adapter, "float32", "cpu", "t", "p", "s", "arena", 1, adapter and "adapter")
    summarise(label, "cot", "svamp", identity, results, 0.25, 1.5 * len(results)).write(run)


def node(place: int, text: str, parent: int = -1, depth: int = 1, **changes: Any) -> dict[str, Any]:
    """One thought of a tree."""
    usual = {
        "id": place, "parent": parent, "depth": depth, "text": text, "token_ids": [1, 2], "value": 5.0 + place, "count": 1,
        "evaluations": [], "kept": True, "terminal": False, "complete": False, "answer": None, "stop": "newline",
        "logps": [-0.1, -0.2],
    }  # fmt: skip
    return usual | changes


def tree(
    name: str, thoughts: Sequence[str] = ("1+1=2\n", "1+1=3\n"), question: str = "How much is 1+1?"
) -> dict[str, Any]:
    """A tree of these thoughts under the question, the first of which leads to the winning answer."""
    nodes = [node(place, text) for place, text in enumerate(thoughts)]
    last = {"terminal": True, "complete": True, "answer": "2"}
    nodes.append(node(len(nodes), "Answer: 2\n", parent=0, depth=2, **last))
    return {
        "id": name, "task": "svamp", "question": question, "gold": "2", "prompt_hash": "c" * 16, "num_shared_tokens": 3,
        "question_token_ids": [4, 5], "nodes": nodes, "winning_nodes": [len(nodes) - 1], "answer": "2", "num_empty": 0,
        "status": "ok", "detail": "", "model_hash": "b" * 16, "adapter_hash": "", "seed": 0, "config_hash": "d" * 16,
        "num_thought_tokens": 20, "num_verdict_tokens": 0, "schema_version": 2,
    }  # fmt: skip


def write_trees(run: Path, trees: Sequence[dict[str, Any]]) -> None:
    """`trees.jsonl` and `statistics.jsonl`."""
    write_lines(run / "trees.jsonl", (json.loads(canonical_json(one)) for one in trees))
    depth = {"depth": 1, "num_thoughts": 2, "num_kept": 1, "num_judged": 2, "mean_value": 5.5, "min_value": 5.0}
    statistics = {
        "num_samples": 10,
        "num_unique": 3,
        "num_duplicates": 7,
        "num_empty": 0,
        "num_cut": 0,
        "num_winning": 1,
    }
    statistics |= {"num_generated_tokens": 20, "num_useful_tokens": 4, "status": "ok"}
    write_lines(
        run / "statistics.jsonl",
        ({**statistics, "id": one["id"], "depths": [{**depth, "max_value": 6.0}]} for one in trees),
    )
    write_lines(run / "timings.jsonl", ({"id": one["id"], "seconds": 2.5} for one in trees))


def write_run(run: Path, rate: float = 1e-3, num_steps: int = 20, **training: Any) -> Path:
    """A run that searched, trained and was evaluated before and after."""
    write_trees(run, [tree(f"t{place}") for place in range(4)])
    write_lines(run / "pairs.jsonl", [{"chosen": "1+1=2", "rejected": "1+1=3"}] * 5)
    settings = {
        "run": str(run),
        "seed": 0,
        "model": {"path": "models/tiny"},
        "train": {"lr": rate, "max_steps": num_steps},
    }
    settings["train"]["alarm_nats"] = 0.1  # type: ignore[index]
    (run / "config.yaml").write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    write_lines(run / "metrics.jsonl", metrics_lines(num_steps, **training))
    write_evaluation(run, "base", [True, False] * 10)
    write_evaluation(run, "adapter", [True] * 18 + [False] * 2)
    (run / "adapter").mkdir(exist_ok=True)
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    return run
