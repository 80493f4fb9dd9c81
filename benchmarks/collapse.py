"""Trainings of the reasoner that collapse and others that do not, and which of both alarms of training tell them apart.

    python -m benchmarks.collapse [--folder runs/collapse] [--only NAME ...] [--no-record]
    python -m benchmarks.collapse --table

Collects the trees of 120 questions to train on (12 of them held out) and of 800 others, with whose votes chains are
compared, and trains `RUNS`. Each that was made is a line of `results/collapse.jsonl`: every step's metrics, and for every
validation those of the held-out pairs, the share of 150 dev questions that chains answer right, and for each of the 800
others whether its chain agrees with the vote (`+`), does not (`-`), comes to no answer (`0`), or contradicts what chains
that were sampled before training said (`x`). Gold answers say here which runs collapsed: those that once lost five points
of their best accuracy. No alarm reads them.

`--table` plays the recorded runs to the alarms of `cpo_fast.train.alarms`, with their defaults, and counts by part.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import peft
import torch

from benchmarks.harness import record, results_folder, show
from cpo_fast.config import Config, TrainConfig, load_config
from cpo_fast.models import load_model
from cpo_fast.ranks import Ranks
from cpo_fast.search.collect import collect
from cpo_fast.train.alarms import ChainAlarm, DriftAlarm
from cpo_fast.train.communication import Communicator
from cpo_fast.train.dev_questions import DevQuestions, load_dev_questions
from cpo_fast.train.loop import train

EXAMPLE = Path("examples/reasoner")
NUM_TRAINED, NUM_VOTED, NUM_DEV = 120, 800, 150
ALONE = Communicator(Ranks(), torch.device("cpu"))
COLLAPSE = 0.05  # of accuracy
HEALTHY = 0.025  # a run is healthy that never lost so much of its best accuracy; what lies between is neither

# each with the seeds from a first one on
GRID: list[tuple[str, dict[str, Any]]] = [
    ("cpo 5e-3, 14 steps", {"lr": 5e-3, "max_steps": 14}),
    ("cpo 1e-3, 24 steps", {"lr": 1e-3, "max_steps": 24}),
    ("cpo 1e-2, 10 steps", {"lr": 1e-2, "max_steps": 10}),
    ("sft 1e-3, 24 steps", {"lr": 1e-3, "max_steps": 24, "method": "sft"}),
    ("cpo 3e-3, 20 steps", {"lr": 3e-3, "max_steps": 20}),
    ("cpo 7e-4, 24 steps", {"lr": 7e-4, "max_steps": 24}),
    ("cpo 7e-3, 12 steps", {"lr": 7e-3, "max_steps": 12}),
    ("sft 5e-4, 24 steps", {"lr": 5e-4, "max_steps": 24, "method": "sft"}),
    ("fpo 3e-3, 14 steps", {"lr": 3e-3, "max_steps": 14, "rule": "fpo"}),
    ("sft 2e-3, 20 steps", {"lr": 2e-3, "max_steps": 20, "method": "sft"}),
    ("fpo 5e-3, 10 steps", {"lr": 5e-3, "max_steps": 10, "rule": "fpo"}),
    ("sft 3e-3, 14 steps", {"lr": 3e-3, "max_steps": 14, "method": "sft"}),
]
# The rule of the chain alarm was chosen on parts 1 and 2, which an earlier one was declared for. Parts 3 and 4 are declared
# with it and its limits before any of them was made, and before any model was asked the questions that they are played on
PARTS = {
    1: (61, "base-0", "votes"),
    2: (73, "base-1", "votes"),
    3: (85, "base-0", "votes-2"),
    4: (97, "base-1", "votes-2"),
}
PART_OF = {
    f"{name}, {base}, seed {seed}": part
    for part, (first_seed, base, _) in PARTS.items()
    for seed, (name, _) in enumerate(GRID, first_seed)
}
RUNS: dict[str, dict[str, Any]] = {
    run: dict(GRID)[run.split(", base")[0]] | {"eval_every": 1, "base": PARTS[part][1]} for run, part in PART_OF.items()
}
KEPT = ("loss", "pairs", "entropy", "mean_token_accuracy", "grad_norm", "rewards/accuracies", "rewards/margins",
        "logps/chosen_per_token", "logps/rejected_per_token", "logps/chosen_drift", "logps/chosen_drift_p10")  # fmt: skip


def config_of(folder: Path, name: str) -> Config:
    """The example's settings, with those of one run."""
    options = dict(RUNS[name])
    base = options.pop("base")
    seed, rule = int(name.rsplit(" ", 1)[1]), options.pop("rule", "all")
    overrides = [
        f"run={folder / 'runs' / name.replace(',', '').replace(' ', '-')}",
        f"seed={seed}",
        f"model.path={EXAMPLE / base}",
        f"data.path={search(folder, base, 'search-0', NUM_TRAINED)}",
        "data.held_out=0.1",
        f"pairs.rule={rule}",
        "train.batch_order=questions",  # a third of the tokens
        "train.eval_every=2",
        "eval.batch_size=150",
        f"train.reference_cache={folder / 'reference'}",
        *(f"train.{key}={value}" for key, value in options.items()),
    ]
    return load_config(EXAMPLE / "config.yaml", overrides)


def search(folder: Path, base: str, name: str, num_questions: int) -> Path:
    """Collect a base's trees of the first so many questions of a file, or find them collected."""
    questions, run = EXAMPLE / "questions" / "plain" / f"{name}.jsonl", folder / base / name
    overrides = [f"run={run}", f"task.path={questions}", f"task.num_questions={num_questions}"]
    collect(load_config(EXAMPLE / "config.yaml", [*overrides, f"model.path={EXAMPLE / base}"]))
    return run / "trees.jsonl"


def share_right(asked: DevQuestions, model: Any) -> float:
    """The share of questions that chains answer right."""
    answers = asked.answers(model, asked.questions)
    return sum(asked.is_as_expected(answers[question.id], question.expected) for question in asked.questions) / NUM_DEV


def flags(voted: DevQuestions, model: Any) -> str:
    """A character for each question: answered as voted, contradicted, answered otherwise, or not at all."""
    asked = voted.ask(model, ALONE)
    assert asked.contradicted is not None
    columns = zip(asked.as_expected, asked.contradicted, asked.answered, strict=True)
    return "".join(
        "+" if agrees else "x" if against else "-" if answers else "0" for agrees, against, answers in columns
    )


def follow(config: Config, dev: Path, votes: Path) -> dict[str, Any]:
    """Train one run and write down what could be seen of it."""
    base, tokenizer = load_model(config.model)
    torch.manual_seed(config.seed)
    lora = peft.LoraConfig(r=config.lora.r, lora_alpha=config.lora.alpha, target_modules=config.lora.target_modules)
    model = peft.get_peft_model(base, lora)  # as `train` makes it, made here to be asked from here

    def questions(**options: str) -> DevQuestions:
        changed = config.model_copy(update={"train": config.train.model_copy(update=options)})
        found = load_dev_questions(changed, tokenizer, (), (), base.config.vocab_size)
        assert found is not None
        return found

    gold, voted = questions(stop_on="accuracy", dev_path=str(dev)), questions(stop_on="agreement", dev_trees=str(votes))
    gold.questions = gold.questions[:NUM_DEV]
    validations: list[dict[str, Any]] = []

    def look(step: int) -> None:
        model.eval()
        seen = {"step": step, "gold": share_right(gold, model), "votes": flags(voted, model)}
        validations.append(seen)
        model.train()

    def watch(values: dict[str, Any], num_steps: int) -> None:
        if "eval_loss" in values:
            look(values["step"])

    model.eval()
    voted.sample(model, ALONE)
    look(0)
    result = train(config, model, tokenizer, progress=watch)
    lines = [json.loads(line) for line in result.metrics_path.read_text().splitlines()]
    held_out = [kept(line, "eval_", config) for line in lines if "eval_loss" in line]
    for validation, values in zip(validations, held_out, strict=True):
        assert validation["step"] == values["step"]
        validation |= {f"held_out/{key}": value for key, value in values.items() if key != "step"}
    steps = [kept(line, "", config) for line in lines if "loss" in line]
    columns = {key: [step[key] for step in steps] for key in steps[0]}
    return {"num_pairs": result.num_items, "validations": validations, "steps": columns}


def kept(line: Mapping[str, Any], prefix: str, config: Config) -> dict[str, Any]:
    """Of one line of metrics.jsonl the kept numbers, and how far rejected responses have drifted."""
    values = {key: line[prefix + key] for key in KEPT if prefix + key in line}
    if f"{prefix}rewards/rejected" in line:
        num_tokens = line[f"{prefix}logps/rejected"] / line[f"{prefix}logps/rejected_per_token"]
        values["logps/rejected_drift"] = line[f"{prefix}rewards/rejected"] / config.train.beta / num_tokens
    return {"step": line["step"]} | {key: float(f"{value:.4g}") for key, value in values.items()}


def collapsed_at(run: Mapping[str, Any]) -> int | None:
    """The first validation at which five points of the best accuracy before were lost."""
    best = 0.0
    for validation in run["validations"]:
        best = max(best, validation["gold"])
        if best - validation["gold"] >= COLLAPSE - 1e-9:
            return int(validation["step"])
    return None


def chain_alarm(run: Mapping[str, Any], num_questions: int = NUM_VOTED) -> ChainAlarm:
    """The alarm after all validations of a run by the votes on so many questions."""
    alarm = ChainAlarm("agreement")
    for validation in run["validations"]:
        votes = validation["votes"][:num_questions]
        alarm.update(validation["step"], [flag == "+" for flag in votes], [flag == "x" for flag in votes])
    return alarm


def drift_alarm(run: Mapping[str, Any]) -> DriftAlarm:
    """The alarm after all steps of a run. SFT has none."""
    alarm, steps = DriftAlarm(TrainConfig().alarm_nats), run["steps"]
    columns = ("step", "logps/chosen_drift_p10", "rewards/margins", "pairs")
    for step, low, margin, pairs in zip(*(steps.get(name, ()) for name in columns), strict=False):
        alarm.update(step, low, margin, int(pairs))
    return alarm


def kind(run: Mapping[str, Any]) -> str:
    """`collapsed`, `healthy`, or `neither`: by gold answers, which no alarm reads."""
    if collapsed_at(run) is not None:
        return "collapsed"
    return "healthy" if most_lost(run) < HEALTHY else "neither"


def most_lost(run: Mapping[str, Any]) -> float:
    """The most accuracy that a run is at any validation below its best before."""
    gold = [validation["gold"] for validation in run["validations"]]
    return max(best - now for best, now in zip(accumulate(gold, max), gold, strict=True))


def timing(run: Mapping[str, Any]) -> str:
    """When the alarm of chains was raised: `before`, `at` or `after` a collapse, `raised` without one, or `silent`."""
    raised, collapsed = chain_alarm(run).raised_at, collapsed_at(run)
    if raised is None:
        return "silent"
    if collapsed is None:
        return "raised"
    return "before" if raised < collapsed else "at" if raised == collapsed else "after"


def kept_step(run: Mapping[str, Any]) -> int:
    """The step whose adapter `stop_on=agreement` keeps."""
    votes = {validation["step"]: validation["votes"].count("+") for validation in run["validations"]}
    return int(max(votes, key=lambda step: (votes[step], -step)))


def accuracies(run: Mapping[str, Any]) -> tuple[float, float, float]:
    """The best accuracy of a run, that of the adapter that agreement keeps, and the last."""
    gold = {validation["step"]: validation["gold"] for validation in run["validations"]}
    return max(gold.values()), gold[kept_step(run)], run["validations"][-1]["gold"]


def recorded(path: Path | None = None) -> list[dict[str, Any]]:
    """The runs of a file, by default of `results/collapse.jsonl`: those that collapsed first."""
    lines = (path or results_folder() / "collapse.jsonl").read_text(encoding="utf-8").splitlines()
    runs = [json.loads(line)["results"] for line in lines]
    runs = [run | {"part": PART_OF[run["run"]]} for run in runs]
    return sorted(runs, key=lambda run: (collapsed_at(run) is None, run["part"], run["run"]))


def show_table() -> None:
    """For every recorded run: its accuracy, when it collapsed, when each alarm was raised; then counts by part."""
    runs = recorded()
    rows = []
    for run in runs:
        steps = [
            collapsed_at(run),
            chain_alarm(run).raised_at,
            chain_alarm(run, 400).raised_at,
            drift_alarm(run).raised_at,
        ]
        numbers = ["-" if step is None else str(step) for step in steps]
        shares = map("{:.3f}".format, [*accuracies(run), most_lost(run)])
        rows.append([f"{run['run']} ({run['part']})", kind(run), *shares, *numbers])
    columns = ["run (part)", "", "best", "kept", "last", "lost", "5 points lost", "chains", "of 400 q.", "drift"]
    caption = (
        "accuracy at best, of the adapter that stop_on=agreement keeps, at the end; the most that was lost of the best "
        "before; steps of collapse and alarms"
    )
    show("collapses and alarms", columns, rows, caption)
    show_counts(runs)


COUNTED = [
    *(("collapsed", timing) for timing in ("before", "at", "after", "silent")),
    *((kind, timing) for kind in ("healthy", "neither") for timing in ("silent", "raised")),
]


def show_counts(runs: Sequence[Mapping[str, Any]]) -> None:
    """For every part: how many runs of each kind, and when the alarm of chains was raised in them."""
    rows = []
    for part in sorted({run["part"] for run in runs}):
        found = [run for run in runs if run["part"] == part]
        pairs = [(kind(run), timing(run)) for run in found]
        short = [accuracies(run)[0] - accuracies(run)[1] for run in found if kind(run) == "collapsed"]
        rows.append([str(part), *(str(pairs.count(pair)) for pair in COUNTED), f"{max(short, default=0.0):.3f}"])
    columns = ["part", *(f"{kind} {timing}" for kind, timing in COUNTED), "kept below best"]
    caption = (
        "runs by when the alarm of chains was raised; of collapses, the most that the kept adapter is below the best"
    )
    show("alarm of chains by part", columns, rows, caption)


def main(argv: Sequence[str] | None = None) -> int:
    """Collect, train, record; or show what is recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/collapse"))
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--no-record", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.table:
        show_table()
        return 0
    torch.set_num_threads(1)
    folder = arguments.folder
    command = "python -m benchmarks.collapse " + " ".join(argv if argv is not None else sys.argv[1:])
    for name in arguments.only:
        _, base, asked = PARTS[PART_OF[name]]
        votes = search(folder, base, asked, NUM_VOTED)
        started = time.process_time()
        found = follow(config_of(folder, name), EXAMPLE / "questions" / "plain" / "dev.jsonl", votes)
        sys.stdout.write(f"{name}: {[v['gold'] for v in found['validations']]} {time.process_time() - started:.0f} s\n")
        sys.stdout.flush()
        if not arguments.no_record:
            record("collapse", command.strip(), [], {"run": name, "options": RUNS[name], **found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
