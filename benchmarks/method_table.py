"""The tables of `benchmarks.method` from its records: accuracies with intervals, paired tests and costs.

    python -m benchmarks.method_table [--summary] [benchmarks/results/method.jsonl]

A cell is compared with its base on the same questions, seed by seed, by the exact McNemar test. The primary comparison is
CPO `all` against the base. The p-values of all others are corrected by Holm's method over the whole table.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import table
from benchmarks.method_plan import BASE, CPO
from cpo_fast.evaluate.statistics import mcnemar_exact, wilson_interval

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
    """A row a cell as Markdown: accuracy of each seed, their mean, tokens of an answer, seconds of training."""
    cells: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for one in records:
        cells[one["base"], one["variant"], one["cell"]].append(one)
    lines = ["| base | asked | cell | mean | each seed | tokens | training, s |", "|---|---|---|---|---|---|---|"]
    for (base, variant, cell), found in cells.items():
        shares = [share(one) for one in found]
        seconds = [one["training"]["seconds"] for one in found if "seconds" in one["training"]]
        trained = f"{sum(seconds) / len(seconds):.0f}" if seconds else ""
        each = " ".join(f"{value:.1%}" for value in shares)
        tokens = sum(one["tokens"] for one in found) / len(found)
        lines.append(
            f"| {base} | {variant} | {cell} | {sum(shares) / len(shares):.1%} | {each} | {tokens:.0f} | {trained} |"
        )
    return "\n".join(lines) + "\n"


def latest(path: Path) -> list[Record]:
    """The newest record of every cell of a results file, whichever run made it."""
    found: dict[tuple[Any, ...], Record] = {}
    for line in path.read_text().splitlines():
        for one in json.loads(line)["results"]["cells"]:
            found[tuple(one[key] for key in ("base", "seed", "cell", "variant", "part"))] = one
    return list(found.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables of a results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", type=Path, default=Path(__file__).parent / "results" / "method.jsonl")
    parser.add_argument("--summary", action="store_true", help="a row a cell, over seeds, as Markdown")
    arguments = parser.parse_args(argv)
    sys.stdout.write((summary if arguments.summary else report)(latest(arguments.path)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
