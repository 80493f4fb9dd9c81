"""The tables of `benchmarks.method` from its records: accuracies with intervals, paired tests and costs.

    python -m benchmarks.method_table [benchmarks/results/method.jsonl]     # every row
    python -m benchmarks.method_table --write                                # into docs/method.md, and the curves

A cell is compared with its base on the same questions, seed by seed, by the exact McNemar test. The primary comparison is
CPO `all` against the base. The p-values of all others are corrected by Holm's method over the whole table.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.harness import table
from benchmarks.method_plan import BASE, CPO, HARD, NUM_TRAINED, TREE
from cpo_fast.evaluate.statistics import mcnemar_exact, wilson_interval

RESULTS = Path(__file__).parent / "results" / "method.jsonl"
DOCUMENT = Path(__file__).parents[1] / "docs" / "method.md"

Record = Mapping[str, Any]


def only_one(first: str, second: str) -> tuple[int, int]:
    """Questions that only the first has right, and only the second."""
    pairs = list(zip(first, second, strict=True))
    return pairs.count(("1", "0")), pairs.count(("0", "1"))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Scandinavian Journal of Statistics 6, 1979): adjusted p-values, in the given order."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def share(record: Record) -> float:
    """Accuracy."""
    result: float = record["num_correct"] / record["num_questions"]
    return result


def bases(records: Sequence[Record]) -> dict[tuple[str, str], Record]:
    """The untrained base's record by base and variant."""
    return {(one["base"], one["variant"]): one for one in records if one["cell"] == BASE}


def against_base(records: Sequence[Record]) -> dict[int, tuple[int, int, float, bool]]:
    """By place in `records`: lost and won against the base, p (corrected unless primary), and whether it is primary."""
    found = bases(records)
    raw: dict[int, tuple[int, int, float, bool]] = {}
    for place, one in enumerate(records):
        base = found.get((one["base"], one["variant"]))
        if base is not None and base is not one:
            lost, won = only_one(base["right"], one["right"])
            raw[place] = lost, won, mcnemar_exact(lost, won), one["cell"] == CPO
    further = [place for place, values in raw.items() if not values[3]]
    for place, p in zip(further, holm([raw[place][2] for place in further]), strict=True):
        lost, won, _, primary = raw[place]
        raw[place] = lost, won, p, primary
    return raw


def report(records: Sequence[Record]) -> str:
    """All tables as text."""
    compared = against_base(records)
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for place, one in enumerate(records):
        groups[one["base"], one["group"], one["variant"]].append(place)
    parts = []
    for (base, group, variant), places in groups.items():
        rows = []
        for place in places:
            one = records[place]
            low, high = wilson_interval(one["num_correct"], one["num_questions"])
            row = [f"{one['cell']}", str(one["seed"]), f"{share(one):.1%}", f"[{low:.1%}, {high:.1%}]"]
            if place in compared:
                lost, won, p, primary = compared[place]
                row += [f"+{won}/-{lost}", f"{p:.1e}" + ("" if primary else " (Holm)")]
            else:
                row += ["", ""]
            training = one["training"]
            row += [
                str(training.get("items", "")),
                f"{training['seconds']:.0f}" if "seconds" in training else "",
                f"{one['tokens']:.0f}",
                f"{one['seconds'] * 1e3:.0f}",
            ]
            rows.append(row)
        columns = ["cell", "seed", "accuracy", "95 %", "against base", "p", "items", "train s", "tokens", "ms"]
        parts.append(f"{base}, {group}, asked {variant}\n{table(columns, rows)}\n")
    return "\n".join(parts)


def summary(records: Sequence[Record]) -> str:
    """A row a cell as Markdown, of the records of one base: accuracy of each seed and their mean, the largest p against
    the base (Holm-corrected unless primary), questions won and lost over the seeds, items, costs.
    """
    compared = against_base(records)
    cells: dict[tuple[str, str], list[int]] = defaultdict(list)
    for place, one in enumerate(records):
        cells[one["cell"], one["variant"]].append(place)
    variants = {variant for _, variant in cells}
    lines = [
        "| cell | mean | each seed | won, lost | largest p | items | training, s | tokens | ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (cell, variant), places in cells.items():
        found = [records[place] for place in places]
        shares = [share(one) for one in found]
        tests = [compared[place] for place in places if place in compared]
        trainings = [one["training"] for one in found if "seconds" in one["training"]]
        row = [
            cell + (f", asked {variant}" if len(variants) > 1 else ""),
            f"{mean(shares):.1%}",
            " ".join(f"{value:.1%}" for value in shares),
            f"+{sum(won for _, won, _, _ in tests)} -{sum(lost for lost, _, _, _ in tests)}" if tests else "",
            f"{max(p for _, _, p, _ in tests):.0e}" if tests else "",
            f"{mean([one['items'] for one in trainings]):.0f}" if trainings else "",
            f"{mean([one['seconds'] for one in trainings]):.0f}" if trainings else "",
            f"{mean([one['tokens'] for one in found]):.0f}",
            f"{mean([one['seconds'] for one in found]) * 1e3:.0f}",
        ]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def search_costs(searches: Sequence[Record]) -> str:
    """What searches found and cost as Markdown: a row a base, variant and kind of search, means over seeds."""
    kinds: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for one in searches:
        kinds[one["base"], one["variant"], one["search"]].append(one)
    lines = [
        "| base | questions | search | vote right, each seed | tokens a question | s a question |",
        "|---|---|---|---|---|---|",
    ]
    for key, found in kinds.items():
        votes = " ".join(f"{one['num_correct'] / one['num_questions']:.1%}" for one in found)
        tokens = mean([one["num_generated_tokens"] / one["num_questions"] for one in found])
        seconds = mean([one["seconds"] / one["num_questions"] for one in found])
        lines.append(f"| {' | '.join(key)} | {votes} | {tokens:.0f} | {seconds:.2f} |")
    return "\n".join(lines) + "\n"


def round_costs(records: Sequence[Record]) -> str:
    """What each round searched and learned, as Markdown, means over seeds: diversity of paths, vote, pairs, accuracy."""
    rounds: dict[str, list[Record]] = defaultdict(list)
    for one in records:
        if "stages" in one["training"]:
            rounds[one["cell"]].append(one)
    lines = [
        "| round | asked | vote | thoughts a state | chains a question | winning | answers | pairs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    names = ("thoughts_per_state", "paths_per_question", "winning_paths_per_question", "answers_per_question")
    for cell, found in rounds.items():
        searched = [one["training"]["stages"]["collect"] for one in found]
        row = [
            cell,
            f"{mean([share(one) for one in found]):.1%}",
            f"{mean([one['vote_accuracy'] for one in searched]):.1%}",
        ]
        row += [f"{mean([one[name] for one in searched]):.2f}" for name in names]
        row.append(f"{mean([one['training']['items'] for one in found]):.0f}")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def repeated(records: Sequence[Record], recorded: Sequence[Record]) -> str:
    """Whether rows came out as they are recorded, question by question: a sentence, and the names of those that did not."""
    known = {identity(one): one["right"] for one in recorded}
    again = [one for one in records if identity(one) in known]
    other = [one for one in again if one["right"] != known[identity(one)]]
    names = "".join(f"  {one['base']}/{one['seed']}/{one['cell']} asked {one['variant']}\n" for one in other)
    return f"{len(again) - len(other)} of {len(again)} recorded rows came out the same, question by question\n{names}"


def identity(record: Record) -> tuple[Any, ...]:
    """What makes two records be of the same row."""
    return tuple(record[key] for key in ("base", "seed", "cell", "variant", "part"))


def latest(path: Path) -> list[Record]:
    """The newest record of every cell of a results file, whichever run made it."""
    found: dict[tuple[Any, ...], Record] = {}
    for line in path.read_text().splitlines():
        for one in json.loads(line)["results"]["cells"]:
            found[identity(one)] = one
    return list(found.values())


def latest_searches(path: Path) -> list[Record]:
    """The newest record of every search of a results file."""
    found: dict[tuple[Any, ...], Record] = {}
    for line in path.read_text().splitlines():
        for one in json.loads(line)["results"].get("searches", []):
            found[tuple(one[key] for key in ("base", "variant", "search", "seed"))] = one
    return list(found.values())


def documented(path: Path) -> dict[str, str]:
    """The tables of docs/method.md by the name that their marks have there."""
    records = latest(path)
    names = dict.fromkeys(one["base"] for one in records)
    tables = {name: summary([one for one in records if one["base"] == name]) for name in names}
    return tables | {"searches": search_costs(latest_searches(path)), "rounds": round_costs(records)}


def in_place(text: str, tables: Mapping[str, str]) -> str:
    """A document with its tables between `<!-- method NAME -->` and `<!-- end -->` written anew.

    Raises:
        ValueError: a table has no place in it.
    """
    for name, content in tables.items():
        pattern = re.compile(rf"(<!-- method {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = pattern.subn(lambda mark, content=content: mark[1] + content + mark[2], text)
        if count != 1:
            raise ValueError(f"the document has {count} places for the table {name!r}, not one")
    return text


def draw(records: Sequence[Record], path: Path) -> None:
    """Accuracy with 95 % intervals over the number of questions, the share of rejected thoughts, and rounds, as PNG.

    A dot a seed, a line through the means.
    """
    from matplotlib.figure import Figure

    hard = [one for one in records if one["variant"] == HARD.name and one["base"] == "hard-0"]
    full = [(one, {"questions": NUM_TRAINED, "rejected thoughts": 100}) for one in hard if one["cell"] == CPO]
    panels: dict[str, dict[str, list[tuple[float, Record]]]] = {
        "questions": {CPO: [(of["questions"], one) for one, of in full]},
        "rejected thoughts": {CPO: [(of["rejected thoughts"], one) for one, of in full]},
        "rounds": {},
    }
    for one in hard:
        number = re.search(r"\d+", one["cell"])
        if one["group"] in ("questions", "rejected thoughts") and number:
            panels[one["group"]][CPO].append((float(number[0]), one))
        elif one["group"] == "rounds":
            title, place = one["cell"].split(", round ")
            panels["rounds"].setdefault(title, []).append((float(place), one))
    labels = {"questions": "questions trained on", "rejected thoughts": "% of the rejected thoughts", "rounds": "round"}
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    levels = {one["cell"]: 100 * share(one) for one in hard if one["cell"] in (BASE, TREE)}
    for axis, (group, lines) in zip(axes, panels.items(), strict=True):
        for color, (title, points) in enumerate(lines.items()):
            for x, one in points:
                low, high = wilson_interval(one["num_correct"], one["num_questions"])
                axis.plot([x, x], [100 * low, 100 * high], color=f"C{color}", alpha=0.3, linewidth=1)
                axis.plot([x], [100 * share(one)], ".", color=f"C{color}")
            places = sorted({x for x, _ in points})
            means = [100 * mean([share(one) for at, one in points if at == x]) for x in places]
            axis.plot(places, means, color=f"C{color}", label=title)
        for style, (cell, level) in zip((":", "--"), levels.items(), strict=False):
            axis.axhline(level, color="gray", linestyle=style, linewidth=1, label=cell)
        axis.set_xlabel(labels[group])
        axis.legend(fontsize=8)
    axes[0].set_ylabel("% right of 600 hard questions")
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables of a results file, or write them where they are shown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", type=Path, default=RESULTS)
    parser.add_argument(
        "--write", action="store_true", help="the tables into docs/method.md and the curves beside the file"
    )
    arguments = parser.parse_args(argv)
    if arguments.write:
        DOCUMENT.write_text(in_place(DOCUMENT.read_text(), documented(arguments.path)))
        draw(latest(arguments.path), arguments.path.with_suffix(".png"))
    else:
        sys.stdout.write(report(latest(arguments.path)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
