"""How the cost of a search grows: with k, depth, the length of the shared prefix, and questions in flight.

One factor at a time around a middle point, random searches on the model of `benchmarks.collect`. `unshared` is the same
engine reading every shared node once a row: what it costs not to have a tree. Labels are scored, so a question's verdicts
are one forward a level.

    python -m benchmarks.collect_cost [--set cpu|gpu|tiny] [--factors k,depth] ...
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from benchmarks.harness import CLOCKS, InexactError, TimeUp, record, show
from benchmarks.search_options import add_options, begin
from benchmarks.search_ours import OURS, Variant, decode_batch, play, variants
from benchmarks.search_script import SearchShape, draw_script

FACTORS = ("k", "depth", "prefix", "in flight")
VALUES: dict[str, dict[str, tuple[int, ...]]] = {
    "cpu": {"k": (5, 10, 20), "depth": (1, 2, 3), "prefix": (128, 256, 512, 1024), "in flight": (1, 2, 4)},
    "gpu": {"k": (5, 10, 15, 20), "depth": (1, 2, 4), "prefix": (128, 256, 512, 1024), "in flight": (1, 4, 16)},
    "tiny": {"k": (2, 3), "depth": (1, 2), "prefix": (16, 32), "in flight": (1, 2)},
}
MIDDLE = {
    "cpu": {"k": 10, "depth": 2, "prefix": 256, "in flight": 4},
    "gpu": {"k": 10, "depth": 4, "prefix": 512, "in flight": 16},
    "tiny": {"k": 3, "depth": 2, "prefix": 16, "in flight": 2},
}
UNSHARED = "unshared"


@dataclass(frozen=True)
class Point:
    """One place of the table, and what ours took there."""

    factor: str
    value: int
    k: int
    depth: int
    prefix: int
    in_flight: int
    num_questions: int
    num_tokens: int
    num_prefilled: int
    mean_rows: float
    occupancy: float
    kv_bytes: int
    seconds: float
    unshared_kv_bytes: int
    unshared_seconds: float


def points(size: str, factors: Sequence[str]) -> list[tuple[str, dict[str, int]]]:
    """The middle point with one factor moved, for every value of every factor."""
    return [(factor, MIDDLE[size] | {factor: value}) for factor in factors for value in VALUES[size][factor]]


def measure(
    chosen: Any, shape: SearchShape, place: dict[str, int], factor: str, arguments: argparse.Namespace
) -> Point:
    """Play the searches of one place, with and without shared reads in turn."""
    on_gpu = next(chosen.model.parameters()).device.type == "cuda"
    shape = replace(
        shape, few_shot=place["prefix"], evaluator=place["prefix"], num_candidates=place["k"], depth=place["depth"],
        num_verdicts=0,
    )  # fmt: skip
    num_questions = arguments.num_questions or max(VALUES[arguments.set]["in flight"])
    script = draw_script(shape, num_questions, arguments.seed)
    settings = {"questions_in_flight": place["in flight"]}
    both = {
        OURS: replace(variants(on_gpu, place["k"])[OURS], settings=settings),
        UNSHARED: Variant(partial(decode_batch(on_gpu), share=False), settings),
    }
    clock = CLOCKS[arguments.clock]
    runs: dict[str, list[Any]] = {name: [] for name in both}
    for variant in both.values():
        play(chosen.model, chosen.warm_up, chosen.settings, variant, clock)
    for _ in range(arguments.repeats):
        for name, variant in both.items():
            runs[name].append(play(chosen.model, script, chosen.settings, variant, clock))
    ours, unshared = runs[OURS][0], runs[UNSHARED][0]
    return Point(
        factor, place[factor], place["k"], place["depth"], place["prefix"], place["in flight"], num_questions,
        ours.num_tokens, ours.num_prefilled, ours.mean_rows, ours.occupancy, ours.kv_bytes,
        statistics.median(run.seconds for run in runs[OURS]), unshared.kv_bytes,
        statistics.median(run.seconds for run in runs[UNSHARED]),
    )  # fmt: skip


def show_points(title: str, found: Sequence[Point], caption: str) -> None:
    """The table."""
    columns = [
        "", "value", "questions", "tokens", "prefilled", "rows a step", "occupancy", "s/question", "tokens/s",
        "KV GiB", "unshared KV GiB", "unshared s/question", "x",
    ]  # fmt: skip
    lines = [
        [p.factor, str(p.value), str(p.num_questions), f"{p.num_tokens:,}", f"{p.num_prefilled:,}",
         f"{p.mean_rows:.0f}", f"{p.occupancy:.0%}", f"{p.seconds / p.num_questions:.2f}",
         f"{p.num_tokens / p.seconds:.0f}", f"{p.kv_bytes / 2**30:.2f}", f"{p.unshared_kv_bytes / 2**30:.2f}",
         f"{p.unshared_seconds / p.num_questions:.2f}", f"{p.unshared_seconds / p.seconds:.2f}"]
        for p in found
    ]  # fmt: skip
    show(title, columns, lines, caption)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, repeats=1)
    parser.add_argument("--factors", help=f"which of {', '.join(FACTORS)}, with commas; default: all")
    arguments = parser.parse_args(argv)
    arguments.set = arguments.set or ("gpu" if arguments.device.type == "cuda" else "cpu")
    arguments.factors = arguments.factors.split(",") if arguments.factors else list(FACTORS)
    unknown = [factor for factor in arguments.factors if factor not in FACTORS]
    if unknown:
        parser.error(f"no factor is called {unknown[0]!r}; choose from {', '.join(FACTORS)}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Check, time, record and show; 1 when ours is inexact."""
    arguments = parse(argv)
    try:
        chosen, _, checks, deadline = begin(arguments, lambda chosen: draw_script(replace(chosen.shape, depth=1), 2))
    except InexactError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    found, left_out = [], []
    known: dict[tuple[int, ...], Point] = {}  # the middle is a place of every factor
    for factor, place in points(arguments.set, arguments.factors):
        key = tuple(place.values())
        if key not in known and time.monotonic() > deadline:
            left_out.append(f"{factor} {place[factor]}")
            continue
        try:
            if key not in known:
                known[key] = measure(chosen, chosen.shape, place, factor, arguments)
        except TimeUp:
            deadline = 0.0
            left_out.append(f"{factor} {place[factor]}")
            continue
        found.append(replace(known[key], factor=factor, value=place[factor]))
    if not arguments.no_record:
        command = " ".join(["python -m benchmarks.collect_cost", *(sys.argv[1:] if argv is None else argv)])
        body = {"set": arguments.set, "model": chosen.name, "clock": arguments.clock, "middle": MIDDLE[arguments.set]}
        record("collect_cost", command, checks, body | {"points": [asdict(p) for p in found], "left_out": left_out})
    middle = ", ".join(f"{factor} {value}" for factor, value in MIDDLE[arguments.set].items())
    low, high = chosen.shape.thought
    caption = [
        f"n = {chosen.shape.num_kept} states kept, thoughts of {low} to {high} tokens. x: shared nodes read once a row.",
        f"Before timing: {', '.join(f'{check.name} {check.error:.1e}' for check in checks)}.",
    ]
    caption += [f"left out, the time was up: {', '.join(left_out)}"] if left_out else []
    show_points(f"{chosen.name}, one factor at a time around {middle}", found, "\n".join(caption))
    return 0


if __name__ == "__main__":
    sys.exit(main())
