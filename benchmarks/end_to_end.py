"""The whole line against the obvious alternative: search, pairs, training, evaluation, stage by stage in one run.

    ours         `collect`, `pairs`, `train` and `eval`
    alternative  the same search by batched `generate`, TRL's DPOTrainer with PEFT's LoRA, chains by batched `generate`

Questions, prompts, settings and seeds are the same. The trees differ, because `generate` draws other random numbers, and
both train on the pairs of ours. Every stage runs in a process of its own, one side after the other. First, trees, adapters
and chains must agree as far as they are defined to (`benchmarks.end_to_end_check`); otherwise nothing is shown.

    python -m benchmarks.end_to_end [--set reasoner|smollm2] [--clock wall|cpu] [--rounds 1] [--num-questions N] ...
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.end_to_end_stages import OURS, STAGES, THEIRS, run_stage
from benchmarks.harness import CLOCKS, Check, InexactError, gate, record, show
from cpo_fast.config import Config, TaskConfig, dump_config, load_config

ROOT = Path(__file__).resolve().parents[1]
SIDES = (OURS, THEIRS)


@dataclass(frozen=True)
class LineSet:
    """What is searched, trained and asked.

    Attributes:
        config: of all stages. asked: the questions of both evaluations.
        rows: of the alternative's batches. num_checked: trees that are grown again.
    """

    config: Config
    asked: TaskConfig
    rows: int
    num_checked: int


def reasoner(folder: Path) -> LineSet:
    """The tiny reasoner: 120 questions searched, 300 others asked, in large batches on both sides."""
    example = ROOT / "examples/reasoner"
    questions = example / "questions/plain"
    config = load_config(
        example / "config.yaml",
        [
            f"run={folder / OURS}",
            f"model.path={example / 'base-0'}",
            f"task.file={example / 'plain.yaml'}",
            f"task.path={questions / 'search-0.jsonl'}",
            "task.num_questions=120",
            "search.batch_size=2048",
            "search.questions_in_flight=64",
            "eval.batch_size=300",
        ],
    )
    asked = config.task.model_copy(update={"path": str(questions / "dev.jsonl"), "num_questions": None})
    return LineSet(config, asked, 1024, 12)


def smollm2(folder: Path) -> LineSet:
    """SmolLM2-135M on the demonstration's word problems: two searched, four asked, two steps of four pairs."""
    from cpo_fast.demo.model import convert_demo_model
    from cpo_fast.demo.recipes import smollm2_recipe

    config = smollm2_recipe(convert_demo_model(), str(folder / OURS), quick=True, seed=0).config
    changes = {
        "model": {"dtype": "float32", "device": "cpu"},
        "train": {"batch_pairs": 4},
        "eval": {"max_new_tokens": 64},
    }
    config = config.model_copy(
        update={name: getattr(config, name).model_copy(update=keys) for name, keys in changes.items()}
    )
    asked = config.task.model_copy(update={"skip_questions": 2, "num_questions": 4})
    return LineSet(config, asked, 64, 1)


SETS: dict[str, Callable[[Path], LineSet]] = {"reasoner": reasoner, "smollm2": smollm2}


class StageError(Exception):
    """A stage did not end well."""


def in_process(folder: Path, module: str, *arguments: str, threads: int) -> None:
    """Run a module of the benchmark in a process of its own, what it prints in a log file of the folder.

    Raises:
        StageError: it failed. Ends with its last words.
    """
    log = folder / f"{'-'.join(arguments)}.log"
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    with open(log, "w", encoding="utf-8") as screen:
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{module}", str(folder), *arguments],
            stdout=screen, stderr=subprocess.STDOUT, env=environment, check=False,
        )  # fmt: skip
    if done.returncode:
        raise StageError(f"{' '.join(arguments)}: exit code {done.returncode}: {log.read_text()[-2000:]}")


def measure(folder: Path, chosen: LineSet, arguments: argparse.Namespace, first: str) -> list[dict[str, Any]]:
    """Every stage of both sides, `first` first, in an empty folder."""
    config = chosen.config
    _write_plan(folder, chosen, config)
    results = []
    for stage in STAGES:
        if stage == "train":
            num_pairs = next(one["num_pairs"] for one in results if one["side"] == OURS and one["stage"] == "pairs")
            config = within_one_pass(config, num_pairs)
            _write_plan(folder, chosen, config)
        for side in sorted(SIDES, key=lambda side: side != first):
            if arguments.together:
                found = run_stage(folder, side, stage)
            else:
                in_process(folder, "end_to_end_stages", side, stage, threads=arguments.threads)
                found = json.loads((folder / f"{side}-{stage}.json").read_text())
            results.append(found)
    return results


def within_one_pass(config: Config, num_pairs: int) -> Config:
    """As many steps as whole batches of the pairs allow, so that both sides take the same pairs in the same batches."""
    steps = min(config.train.max_steps or num_pairs, num_pairs // config.train.batch_pairs)
    if not steps:
        raise StageError(f"{num_pairs} pairs make no batch of {config.train.batch_pairs}; search more questions")
    return config.model_copy(update={"train": config.train.model_copy(update={"max_steps": steps, "num_epochs": None})})


def _write_plan(folder: Path, chosen: LineSet, config: Config) -> None:
    (folder / "collect.yaml").write_text(dump_config(config))
    (folder / "asked.yaml").write_text(dump_config(config.model_copy(update={"task": chosen.asked})))
    (folder / "plan.json").write_text(json.dumps({"rows": chosen.rows}))


def checks_of(folder: Path, chosen: LineSet, arguments: argparse.Namespace) -> list[Check]:
    """The comparisons of what a round left in its folder."""
    if arguments.together:
        from benchmarks.end_to_end_check import check

        return check(folder, chosen.num_checked)
    in_process(folder, "end_to_end_check", str(chosen.num_checked), threads=arguments.threads)
    return [Check(**one) for one in json.loads((folder / "checks.json").read_text())]


def table_rows(rounds: Sequence[Sequence[dict[str, Any]]], clock: str) -> list[dict[str, Any]]:
    """A row a stage, the sum last: for tokens, seconds and bytes ours, the alternative's, and the latter over the former.

    Seconds are medians over the rounds, bytes the largest.
    """
    everything = [found for results in rounds for found in results]
    rows: list[dict[str, Any]] = []
    for stage in STAGES:
        row: dict[str, Any] = {"stage": stage}
        for side in SIDES:
            found = [one for one in everything if (one["side"], one["stage"]) == (side, stage)]
            peaks = [one["peak_bytes"] for one in found if one["peak_bytes"] is not None]
            row[side] = {
                "tokens": found[0]["tokens"],
                "seconds": statistics.median(one[clock] for one in found),
                "import_seconds": statistics.median(one["import_cpu"] for one in found),
                "bytes": max(peaks, default=None),
                "accuracy": found[0].get("accuracy"),
            }
        rows.append(row)
    total: dict[str, Any] = {"stage": "all"}
    for side in SIDES:
        sums = {name: sum(row[side][name] for row in rows) for name in ("tokens", "seconds", "import_seconds")}
        peaks = [row[side]["bytes"] for row in rows if row[side]["bytes"] is not None]
        total[side] = {**sums, "bytes": max(peaks, default=None), "accuracy": None}
    rows.append(total)
    for row in rows:
        row["ratio"] = {
            name: row[THEIRS][name] / row[OURS][name] if row[OURS][name] else None
            for name in ("tokens", "seconds", "bytes")
        }
    return rows


def show_rows(title: str, rows: Sequence[dict[str, Any]], clock: str, caption: Sequence[str]) -> None:
    """The table."""
    formats: dict[str, Callable[[Any], str]] = {
        "tokens": lambda value: f"{value:,}",
        "seconds": lambda value: f"{value:.2f}",
        "bytes": lambda value: "" if value is None else f"{value / 2**20:.0f}",
    }
    lines = []
    for row in rows:
        line = [row["stage"]]
        for name, form in formats.items():
            ratio = row["ratio"][name]
            line += [form(row[OURS][name]), form(row[THEIRS][name]), "" if ratio is None else f"{ratio:.2f}"]
        line += ["" if (found := row[side]["accuracy"]) is None else f"{found:.1%}" for side in SIDES]
        lines.append(line)
    short = "altern."
    columns = ["stage", "tokens", short, "x", f"s ({clock})", short, "x", "MiB", short, "x", "accuracy", short]
    show(title, columns, lines, "\n".join(caption))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=sorted(SETS), default="reasoner", help="model and questions")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="cpu", help="cpu: for a machine shared with others")
    parser.add_argument("--rounds", type=int, default=1, help="runs of everything, the sides in turn first")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of every stage")
    parser.add_argument("--num-questions", type=int, help="questions that are searched; default by set")
    parser.add_argument("--num-asked", type=int, help="questions that are asked; default by set")
    parser.add_argument("--steps", type=int, help="optimizer steps; default by set")
    parser.add_argument("--batch-pairs", type=int, help="pairs a step; default by set")
    parser.add_argument("--rows", type=int, help="rows of the alternative's batches; default by set")
    parser.add_argument("--num-checked", type=int, help="trees that are grown again; default by set")
    parser.add_argument("--together", action="store_true", help="all in this process: memory is not measured")
    parser.add_argument("--folder", type=Path, help="an empty folder that keeps all files")
    parser.add_argument("--no-record", action="store_true")
    return parser.parse_args(argv)


def line_set(arguments: argparse.Namespace, folder: Path) -> LineSet:
    """The set that was chosen, at the sizes that were asked for."""
    chosen = SETS[arguments.set](folder)
    config, asked = chosen.config, chosen.asked
    wanted = {
        "task": {"num_questions": arguments.num_questions},
        "train": {"max_steps": arguments.steps, "batch_pairs": arguments.batch_pairs},
    }
    for name, keys in wanted.items():
        given = {key: value for key, value in keys.items() if value is not None}
        config = config.model_copy(update={name: getattr(config, name).model_copy(update=given)})
    if arguments.num_asked is not None:
        asked = asked.model_copy(update={"num_questions": arguments.num_asked})
    num_checked = chosen.num_checked if arguments.num_checked is None else arguments.num_checked
    return LineSet(config, asked, arguments.rows or chosen.rows, num_checked)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, check, record and show; 1 when the sides disagree or a stage fails."""
    arguments = parse(argv)
    with tempfile.TemporaryDirectory(prefix="end_to_end-") as scratch:
        folder = arguments.folder or Path(scratch)
        rounds = []
        try:
            for number in range(arguments.rounds):
                place = folder / str(number)
                place.mkdir(parents=True)
                chosen = line_set(arguments, place)
                rounds.append(measure(place, chosen, arguments, SIDES[number % 2]))
            checks = checks_of(folder / "0", line_set(arguments, folder / "0"), arguments)
            gate(checks)
        except (InexactError, StageError) as error:
            sys.stderr.write(f"{error}\n")
            return 1
        config = load_config(folder / "0" / "collect.yaml")
    rows = table_rows(rounds, arguments.clock)
    num_pairs = {one["side"]: one["num_pairs"] for one in rounds[0] if one["stage"] == "pairs"}
    num_asked = rounds[0][-1]["num_asked"]
    steps, batch = config.train.max_steps, config.train.batch_pairs
    facts = {
        "set": arguments.set, "clock": arguments.clock, "rounds": arguments.rounds, "threads": arguments.threads,
        "num_questions": config.task.num_questions, "num_asked": num_asked, "steps": steps, "batch_pairs": batch,
        "num_pairs": num_pairs, "rows_of_alternative": chosen.rows, "separate_processes": not arguments.together,
    }  # fmt: skip
    if not arguments.no_record:
        command = " ".join(["python -m benchmarks.end_to_end", *(sys.argv[1:] if argv is None else argv)])
        record("end_to_end", command, checks, {**facts, "rows": rows, "stages": [list(each) for each in rounds]})
    title = (
        f"{arguments.set}: {config.task.num_questions} questions searched ({num_pairs[OURS]} and {num_pairs[THEIRS]} "
        f"pairs), {steps} steps of {batch} pairs, {num_asked} questions asked twice"
    )
    total = rows[-1]
    imports = [f"{total[side]['import_seconds']:.1f}" for side in SIDES]
    caption = [
        f"Checked: {', '.join(f'{one.name} {one.error:.1e}' for one in checks)}.",
        "Tokens: positions that went through the model, padding and reference passes included, backward passes not.",
        f"Seconds: after the imports, which took {' and '.join(imports)} CPU seconds in all.",
        "MiB: the largest resident memory beyond that of the imports.",
        "Accuracy: of votes (collect) and of greedy chains (eval). Both sides train on the pairs of ours.",
    ]
    show_rows(title, rows, arguments.clock, caption)
    return 0


if __name__ == "__main__":
    sys.exit(main())
