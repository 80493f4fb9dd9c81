"""Does the method work? Every cell of `benchmarks.method_plan` on a small reasoner, and a table of what came.

    python -m benchmarks.method [--only TEXT] [--workers 2] [--part test|dev] [--tune] [--folder build/method] [--no-record]

`--only "hard-0/0/CPO all"` runs the cells whose name (base/seed/cell) holds the text, and what they need. What is finished
in the folder is not run again unless its settings have changed. The same machine and versions give the same table: all is
float32, one thread a worker, and random numbers are named, not drawn in turn.

A cell is what a user would run: `collect`, `train`, `eval`, or `iterate`. No gold label is read before `eval`.
"""

import argparse
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.harness import record
from benchmarks.method_plan import (
    EVAL,
    LORA,
    NUM_TRAINED,
    PLAN,
    ROUNDS,
    SEARCH,
    SEEDS,
    TRAIN,
    TUNING,
    Base,
    Cell,
    Search,
    Variant,
)
from benchmarks.method_table import RESULTS, latest, repeated, report

DONE = "done.json"


@dataclass(frozen=True, eq=False)
class Place:
    """A cell of one base and seed."""

    base: Base
    seed: int
    cell: Cell

    @property
    def name(self) -> str:
        return f"{self.base.name}/{self.seed}/{self.cell.name}"


def places(only: str = "", plan: Sequence[Base] = PLAN, seeds: Sequence[int] = SEEDS) -> list[Place]:
    """Those whose name holds `only`."""
    found = [
        Place(base, seed, cell)
        for base in plan
        for seed in seeds
        for cell in base.cells
        if seed == seeds[0] or not cell.one_seed
    ]
    return [place for place in found if only in place.name]


def settings(
    base: Base, seed: int, variant: Variant, run: Path, *more: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """A configuration as plain values: the plan's, then each of `more` over it, section by section."""
    values: dict[str, Any] = {
        "run": str(run),
        "seed": seed,
        "model": {"path": str(base.path), "dtype": "float32", "device": "cpu"},
        "task": {"file": str(variant.task_file)},
        "search": SEARCH | {"max_steps": variant.max_steps},
        "pairs": {"num_questions": NUM_TRAINED},
        "lora": LORA,
        "train": TRAIN | {"lr": base.rate, "max_steps": base.steps},
        "eval": EVAL | {"max_new_tokens": 24 * variant.max_steps},
    }
    for sections in more:
        for section, keys in sections.items():
            values[section] = values.get(section, {}) | dict(keys)
    return values


def once(folder: Path, values: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make()` returned for these values, now or in an earlier run that left it in `folder`."""
    wanted = json.loads(json.dumps(values))
    done = folder / DONE
    if done.is_file():
        stored = json.loads(done.read_text())
        if stored["settings"] == wanted:
            found: dict[str, Any] = stored["result"]
            return found
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    result = make()
    done.write_text(json.dumps({"settings": wanted, "result": result}))
    return result


def search(base: Base, search: Search, seed: int, folder: Path) -> dict[str, Any]:
    """Collect the trees of a search. Gold is only counted, never searched by."""
    from cpo_fast.config import validate_config
    from cpo_fast.search.collect import collect

    run = folder / base.name / str(seed) / "trees" / f"{search.variant.name} {search.name}"
    task = {"path": str(search.variant.questions(f"search-{seed}")), "num_questions": search.num_questions}
    values = settings(base, seed, search.variant, run, {"task": task, "search": search.settings})

    def make() -> dict[str, Any]:
        return collect(validate_config(values)).to_dict()

    return once(run, values, make)


def answer(place: Place, part: str, folder: Path) -> list[dict[str, Any]]:
    """Train what the cell says, then ask the questions of `part`: one record a variant and, of rounds, a round."""
    from cpo_fast.config import validate_config
    from cpo_fast.evaluate import evaluate

    base, seed, cell = place.base, place.seed, place.cell
    run = folder / base.name / str(seed) / cell.name
    trained = [{"adapter": None}]
    if cell.searches:
        trained = (train_rounds if cell.rounds else train_once)(place, run, folder)
    records = []
    for variant in cell.asked:
        for number, one in enumerate(trained, 1):
            title = f", round {number}" if cell.rounds else ""
            own = run / f"{part} {variant.name}{title}"
            asked: dict[str, Mapping[str, Any]] = {
                "model": {"adapter": one["adapter"]},
                "task": {"path": str(variant.questions(part))},
                "eval": {"method": cell.method, "max_new_tokens": variant.max_new_tokens},
            }
            if cell.method == "cot":
                asked["search"] = {"max_steps": variant.max_lines}
            values = settings(base, seed, variant, own, asked)

            def make(values: dict[str, Any] = values) -> dict[str, Any]:
                result = evaluate(validate_config(values))
                return {
                    "num_questions": result.num_questions,
                    "num_correct": result.num_correct,
                    "right": "".join("1" if one.correct else "0" for one in result.results),
                    "tokens": result.tokens.mean,
                    "seconds": result.seconds.mean,
                    "total_seconds": result.total_seconds,
                }

            found = once(own, values | {"trained": one}, make)
            training = {key: value for key, value in one.items() if key != "adapter"}
            records.append({
                "base": base.name, "seed": seed, "group": cell.group, "cell": cell.name + title,
                "variant": variant.name, "part": part, "training": training, **found,
            })  # fmt: skip
    return records


def train_once(place: Place, run: Path, folder: Path) -> list[dict[str, Any]]:
    """The adapter of a cell and what it cost."""
    from cpo_fast.config import validate_config

    base, seed, cell = place.base, place.seed, place.cell
    trees = [Path(search(base, one, seed, folder)["trees_path"]) for one in cell.searches]
    data: dict[str, Any] = {"path": str(trees[0])}
    if len(trees) > 1:
        data = {"mixture": [{"path": str(path)} for path in trees]}
    own = run / "training"
    values = settings(base, seed, cell.searches[0].variant, own, {"data": data}, cell.settings)

    def make() -> dict[str, Any]:
        from cpo_fast.train.loop import train

        result = train(validate_config(values))
        return {
            "adapter": str(result.adapter_path),
            "items": result.num_items,
            "steps": result.num_steps,
            "seconds": result.seconds,
            "alarm": result.alarm,
        }

    return [once(own, values, make)]


def train_rounds(place: Place, run: Path, folder: Path) -> list[dict[str, Any]]:
    """The adapters of a cell's rounds, the first round's first, and what each cost, its search included."""
    from cpo_fast.config import validate_config

    base, seed, cell = place.base, place.seed, place.cell
    (one,) = cell.searches
    own = run / "rounds"
    sections: dict[str, Mapping[str, Any]] = {
        "task": {"path": str(one.variant.questions(f"search-{seed}")), "num_questions": NUM_TRAINED},
        "iterate": {"num_rounds": ROUNDS, "stop_on": "never"},
    }
    values = settings(base, seed, one.variant, own, sections, cell.settings)

    def make() -> dict[str, Any]:
        from cpo_fast.iterate import iterate

        return {"rounds": iterate(validate_config(values))["rounds"]}

    found = []
    for made in once(own, values, make)["rounds"][1:]:
        stages = made["stages"]
        found.append({
            "adapter": str(own / f"round-{made['round']}" / "adapter"),
            "items": stages["pairs"]["num_pairs"],
            "seconds": sum(stage["seconds"] for stage in stages.values()),
            "stages": stages,
        })  # fmt: skip
    return found


def _quiet(folder: Path) -> None:
    """One thread, and what libraries print goes into a file: two workers on one screen say nothing."""
    import logging

    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DEEPSPEED_LOG_LEVEL": "error"}
    screen = open(folder / f"worker-{os.getpid()}.log", "a", buffering=1)  # noqa: SIM115 - for the life of the worker
    os.dup2(screen.fileno(), 1)
    os.dup2(screen.fileno(), 2)
    logging.disable(logging.INFO)
    import torch

    torch.set_num_threads(1)


def run_all(
    chosen: Sequence[Place], part: str, folder: Path, workers: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every cell, searches first. Records of the cells in the plan's order, and of their searches."""
    folder.mkdir(parents=True, exist_ok=True)
    needed = dict.fromkeys(
        (place.base, one, place.seed) for place in chosen if not place.cell.rounds for one in place.cell.searches
    )
    records: dict[Place, list[dict[str, Any]]] = {}
    searches = {}
    with ProcessPoolExecutor(workers, get_context("spawn"), _quiet, (folder,)) as pool:
        searching = {pool.submit(search, *key, folder): key for key in needed}
        for number, searched in enumerate(as_completed(searching), 1):
            base, one, seed = searching[searched]
            found = searched.result()
            vote = found["vote_accuracy"]
            kept = ("num_questions", "num_correct", "num_generated_tokens", "num_verdicts", "seconds")
            searches[searching[searched]] = {
                "base": base.name, "seed": seed, "variant": one.variant.name, "search": one.name,
                **{key: found[key] for key in kept},
            }  # fmt: skip
            say(f"search {number}/{len(needed)} {base.name}/{seed}/{one.variant.name} {one.name}: vote {vote:.3f}")
        asking = {pool.submit(answer, place, part, folder): place for place in chosen}
        for number, asked in enumerate(as_completed(asking), 1):
            place = asking[asked]
            records[place] = asked.result()
            shares = [f"{one['variant']} {one['num_correct'] / one['num_questions']:.3f}" for one in records[place]]
            say(f"cell {number}/{len(chosen)} {place.name}: {', '.join(shares)}")
    return [record for place in chosen for record in records[place]], [searches[key] for key in needed]


def say(text: str) -> None:
    """One line of progress."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cells, print the table, record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="cells whose base/seed/name holds this")
    parser.add_argument("--workers", type=int, default=2, help="cells at a time, a thread each")
    parser.add_argument("--part", choices=("test", "dev"), default="test", help="the questions that are asked")
    parser.add_argument("--tune", action="store_true", help="the grid that settings were chosen from, on dev questions")
    parser.add_argument("--folder", type=Path, default=Path("build/method"), help="where runs are kept")
    parser.add_argument("--no-record", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.tune:
        arguments.part = "dev"
    chosen = places(arguments.only, TUNING if arguments.tune else PLAN)
    if not chosen:
        parser.error(f"no cell's name holds {arguments.only!r}")
    started = time.perf_counter()
    records, searches = run_all(chosen, arguments.part, arguments.folder, arguments.workers)
    sys.stdout.write(report(records))
    if not arguments.tune and RESULTS.is_file():
        sys.stdout.write(repeated(records, latest(RESULTS)))
    if not arguments.no_record:
        command = " ".join(["python -m benchmarks.method", *(argv if argv is not None else sys.argv[1:])])
        name = "method_tuning" if arguments.tune else "method" if arguments.part == "test" else "method_dev"
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)  # of the workers, which have ended
        cost = {"seconds": time.perf_counter() - started, "cpu_seconds": spent.ru_utime + spent.ru_stime}
        record(name, command, [], {"cells": records, "searches": searches, "cost": cost})
    return 0


if __name__ == "__main__":
    sys.exit(main())
