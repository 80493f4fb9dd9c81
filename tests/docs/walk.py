"""Runs the commands of a page as a reader would type them, in a folder that has the files which the page speaks of.

The lines run as they stand. What is put in place of a reader's model, questions and pairs is in `prepare`, what makes the
runs small is in SMALL and is appended to a line.
"""

import csv
import json
import shlex
import shutil
from pathlib import Path

from cpo_fast.cli import cli, guarded
from cpo_fast.demo import REASONER
from tests.docs.snippets import ROOT, Snippet, blocks, name_of
from tests.tiny import save_tiny_model

# appended to lines of these commands; what a line says of the same key is overruled
SMALL = {
    "search": ["search.num_candidates=4", "search.num_kept=2", "search.max_steps=4", "search.max_thought_tokens=16"],
    "asked": ["eval.max_new_tokens=48", "eval.latency_questions=1"],
    "few": ["eval.path=my_test.jsonl"],
    "trained": ["train.max_steps=2", "train.lr=1e-4", "train.reference=online"],
    "model": ["model.dtype=float32", "model.device=cpu"],
}
APPENDED = {
    "collect": ["model", "search"],
    "eval": ["model", "search", "asked", "few"],
    "train": ["model", "search", "asked", "trained"],
    "plan": ["model", "trained"],
    "iterate": ["model", "search", "asked", "trained"],
    "merge": ["model"],
}
# pages whose configuration names a data set that a page cannot bring: its rows become the reasoner's
SUBSTITUTED = {
    "README.md": ["task.file=my_task.yaml", "task.path=my_questions.jsonl"],
    "docs/tasks.md": ["task.num_questions=2", "run=runs/units", "model.path=tiny"],  # the reasoner reads digits alone
}
NUM_QUESTIONS = 8


def prepare(folder: Path, page: Path) -> None:
    """Put the page's configuration, or that of the first page, into `folder` as config.yaml, and files beside it."""
    configurations = [block.text for each in (page, ROOT / "docs" / "index.md") for block in blocks(each, "yaml")]
    (folder / "config.yaml").write_text(next(text for text in configurations if "run: " in text), encoding="utf-8")
    for name, target in (("path/to/model", REASONER / "base-0"), ("examples", ROOT / "examples")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            (folder / name).symlink_to(target)
    if "tiny" in " ".join(SUBSTITUTED.get(name_of(page), [])):
        save_tiny_model(folder / "tiny", max_position_embeddings=8192)
    shutil.copy(REASONER / "plain.yaml", folder / "my_task.yaml")
    questions = (REASONER / "search.jsonl").read_text("utf-8").splitlines(keepends=True)
    (folder / "my_questions.jsonl").write_text("".join(questions[:NUM_QUESTIONS]), encoding="utf-8")
    for place, name in enumerate(("my_dev.jsonl", "my_test.jsonl")):
        asked = (REASONER / "asked.jsonl").read_text("utf-8").splitlines(keepends=True)
        (folder / name).write_text("".join(asked[4 * place : 4 * place + 4]), encoding="utf-8")
    pairs = []
    for total in (53, 62, 71, 45, 34, 83):
        for wrong in (10, 11):
            question, lines = f"Question: {total}-7+4-8", [f"{total}-7={value}\n" for value in (total - 7, wrong)]
            pairs.append({"prompt": f"Solve.\n\n{question}\n", "chosen": lines[0], "rejected": lines[1]})
    for name in ("my_pairs.jsonl", "more_pairs.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    factory = [
        {"instruction": row["prompt"], "input": "", **{k: row[k] for k in ("chosen", "rejected")}} for row in pairs
    ]
    (folder / "dpo_en_demo.json").write_text(json.dumps(factory), encoding="utf-8")
    with open(folder / "my_table.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerows([("ask", "good", "bad"), *(tuple(row.values()) for row in pairs)])


def run(line: Snippet) -> int:
    """Run a command line in the working directory; its exit code."""
    _, *arguments = shlex.split(line.text)
    command = next((word for word in arguments if not word.startswith("-")), "")
    if "--compare" not in arguments:
        for name in APPENDED.get(command, ()):
            arguments += SMALL[name]
        if command in APPENDED:
            arguments += SUBSTITUTED.get(line.page, [])
        if command in ("collect", "eval", "plan") and "examples/reasoner" in Path("config.yaml").read_text("utf-8"):
            arguments.append(f"task.num_questions={NUM_QUESTIONS}")
    return guarded(lambda: cli.main(arguments, standalone_mode=False))
