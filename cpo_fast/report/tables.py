"""The tables of the page: evaluations, searches, rounds, configuration, environment and hashes, each read off runs."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cpo_fast.errors import DataError, first_line
from cpo_fast.evaluate.comparison import Agreement, Comparison, compare
from cpo_fast.evaluate.result import Evaluation, QuestionResult
from cpo_fast.evaluate.statistics import spread, wilson_interval
from cpo_fast.evaluate.tables import (
    against_first_cells,
    agreement_line,
    bootstrap_line,
    comparison_cells,
    comparison_title,
    evaluation_cells,
    merged_headings,
)
from cpo_fast.files import short_hash
from cpo_fast.report.rounds import round_cells
from cpo_fast.report.runs import Run, default_config, number

MAX_CHANGED = 20  # questions shown of a comparison that are right after and wrong before, and as many the other way
MAX_ALL_CHANGED = 100  # of all comparisons together
MAX_CHAIN_CHARACTERS = 1_200
NONE = "–"


@dataclass(frozen=True)
class Cell:
    """A cell: its text, whether it is to be seen, or the ends of an interval in [0, 1] around a share, to be drawn."""

    text: str
    marked: bool = False
    interval: tuple[float, float, float] | None = None


Row = tuple[str | Cell, ...]


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows. `text` columns, by place, hold words and not numbers."""

    caption: str
    headings: tuple[str, ...]
    rows: tuple[Row, ...]
    text: tuple[int, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Changed:
    """A question that one of two evaluations answers right."""

    id: str
    question: str
    gold: str
    first: QuestionResult
    second: QuestionResult


@dataclass(frozen=True)
class Compared:
    """The second evaluation against the first: the test in a table, sentences, and questions that were gained and lost.

    `num_gained` and `num_lost` count them all, of which the tuples hold the first ones.
    """

    title: str
    table: Table
    sentences: tuple[str, ...]
    gained: tuple[Changed, ...]
    lost: tuple[Changed, ...]
    num_gained: int
    num_lost: int


@dataclass(frozen=True)
class Asked:
    """Evaluations on the same questions."""

    title: str
    accuracy: Table
    details: Table
    compared: tuple[Compared, ...]
    sentences: tuple[str, ...]


def named_evaluations(runs: Sequence[Run]) -> list[tuple[str, Evaluation]]:
    """All evaluations of all runs and rounds, each under a name that tells it apart."""
    every = [(run, evaluation) for each in runs for run in each.all for evaluation in run.evaluations]
    is_alone = len({run.name for run, _ in every}) == 1
    return [
        (evaluation.label if is_alone else f"{run.name}: {evaluation.label}", evaluation) for run, evaluation in every
    ]


def evaluation_groups(runs: Sequence[Run]) -> list[Asked]:
    """Evaluations by the questions that they asked, the first of each against the others."""
    groups: dict[str, list[tuple[str, Evaluation]]] = {}
    for name, evaluation in named_evaluations(runs):
        asked = sorted((result.id, result.question, result.gold or "") for result in evaluation.results)
        groups.setdefault(short_hash(json.dumps(asked)), []).append((name, evaluation))
    seed = next((run.config["seed"] for run in runs if isinstance(run.config.get("seed"), int)), 0)
    num_changed = max(2, min(MAX_CHANGED, MAX_ALL_CHANGED // max(1, sum(map(len, groups.values())))))
    return [_asked(group, seed, num_changed) for group in groups.values()]


def _asked(group: Sequence[tuple[str, Evaluation]], seed: int, num_changed: int) -> Asked:
    names, evaluations = [name for name, _ in group], [evaluation for _, evaluation in group]
    comparisons = []
    sentences = []
    for name, other in zip(names[1:], evaluations[1:], strict=True):
        try:
            comparisons.append(compare(evaluations[0], other, (names[0], name), seed))
        except DataError as error:
            sentences.append(f"not compared: {error}")
    first = evaluations[0]
    whole = len(comparisons) == len(evaluations) - 1
    rows = against_first_cells(evaluations, comparisons) if whole else [evaluation_cells(each) for each in evaluations]
    unneeded = set() if len({each.method for each in evaluations}) > 1 else {"method"}
    unneeded |= set() if len(comparisons) > 1 else {"of all these tests (Holm)"}
    headings = [heading for heading in merged_headings(rows) if heading not in unneeded]
    if not whole:
        headings = [heading for heading in headings if heading in ("correct", "accuracy", "95 % interval (Wilson)")]
    accuracy = []
    for name, evaluation, cells in zip(names, evaluations, rows, strict=True):
        row: list[str | Cell] = [name, *(cells.get(heading, NONE) for heading in headings)]
        picture = Cell("")
        if evaluation.interval is not None and evaluation.accuracy is not None:
            low, high = evaluation.interval
            picture = Cell("", interval=(low, evaluation.accuracy, high))
        accuracy.append((*row[:1], picture, *row[1:]))
    columns = [evaluation_cells(each) for each in evaluations]
    details = [(heading, *(column.get(heading, NONE) for column in columns)) for heading in merged_headings(columns)]
    title = f"{first.num_questions} questions of {first.task}"
    against = f", each against {names[0]}" if len(group) > 1 else ""
    return Asked(
        title=title,
        accuracy=Table(
            f"Right answers to {title}{against}",
            ("evaluation", "0 to 100 %", *(heading.replace("McNemar p", "McNemar\u00a0p") for heading in headings)),
            tuple(accuracy),
            text=(1,),
        ),
        details=Table("Latency, tokens and the rest, per evaluation", ("measure", *names), tuple(details)),
        compared=tuple(
            _compared(first, other, comparison, num_changed)
            for other, comparison in zip(evaluations[1:], comparisons if whole else [], strict=whole)
        ),
        sentences=tuple(sentences),
    )


def _compared(first: Evaluation, second: Evaluation, comparison: Comparison, num_changed: int) -> Compared:
    theirs = {result.id: result for result in second.results}
    pairs = [(one, theirs[one.id]) for one in first.results if one.correct is not None]
    changed = [
        Changed(one.id, one.question, one.gold or "", one, other)
        for one, other in pairs
        if one.correct != other.correct
    ]
    gained, lost = ([each for each in changed if each.first.correct is was] for was in (False, True))
    title = comparison_title(comparison)
    return Compared(
        title=title,
        table=Table(
            f"Question by question: {title}", ("measure", "value"), tuple(comparison_cells(comparison).items())
        ),
        sentences=(*comparison.stated, bootstrap_line(comparison)),
        gained=tuple(gained[:num_changed]),
        lost=tuple(lost[:num_changed]),
        num_gained=len(gained),
        num_lost=len(lost),
    )


def agreement_sentences(runs: Sequence[Run]) -> list[str]:
    """How often chains answer as trees have voted, where `cpo-fast eval` has counted it."""
    sentences = []
    for run in (run for each in runs for run in each.all):
        for row in run.agreements:
            try:
                found = Agreement(*(row[name] for name in ("label", "source", "num_voted", "num_agree")))
                sentences.append(f"{run.name}: {agreement_line(found)}")
            except (KeyError, TypeError, ZeroDivisionError):
                continue
    return sentences


def rounds_table(run: Run) -> Table | None:
    """One row a round, None where there are none."""
    if run.rounds is None or not run.rounds["rounds"]:
        return None
    rows: list[Row] = []
    headings: list[str] = []
    note = ""
    for place, one in enumerate(run.rounds["rounds"]):
        try:
            cells = round_cells(one)
            is_best = one.get("round") == run.rounds.get("best_round")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            note = f"a round is not as this version writes it and is left out ({first_line(error)})"
            continue
        headings = list(cells)
        name = f"{one.get('round', place)}{', best' if is_best else ''}"
        rows.append((name, *(Cell(text, marked=is_best) for text in cells.values())))
    if not rows:
        return None
    return Table(f"Rounds of {run.name}", ("round", *headings), tuple(rows), note=note)


def search_tables(runs: Sequence[Run]) -> list[Table]:
    """What the searches found and cost, one column a run, and the thoughts by depth."""
    searched = [run for each in runs for run in each.all if run.votes is not None]
    if not searched:
        return []
    columns = [_search_cells(run) for run in searched]
    cells = tuple((heading, *(column.get(heading, NONE) for column in columns)) for heading in merged_headings(columns))
    tables = [Table("What the search found and cost", ("measure", *(run.name for run in searched)), cells)]
    for run in searched:
        rows = tuple(_depth_rows(run.statistics))
        if rows:
            headings = ("depth", "thoughts", "kept", "judged", "mean value", "lowest", "highest")
            tables.append(Table(f"Thoughts by depth: {run.name}", headings, rows))
    return tables


def _search_cells(run: Run) -> dict[str, str]:
    votes = run.votes
    assert votes is not None
    cells = {"trees": f"{votes.num_trees:,}"}
    cells |= {f"trees with status {name}": f"{count:,}" for name, count in sorted(votes.statuses.items())}
    if votes.num_gold:
        low, high = wilson_interval(votes.num_right, votes.num_gold)
        cells["vote right"] = f"{votes.num_right} of {votes.num_gold} ({votes.num_right / votes.num_gold:.1%})"
        cells["95 % interval (Wilson)"] = f"{low:.1%} to {high:.1%}"
        cells["graded by"] = votes.grading
    if run.statistics:
        samples, unique, generated, useful = (
            _sum(run.statistics, f"num_{name}") for name in ("samples", "unique", "generated_tokens", "useful_tokens")
        )
        count = len(run.statistics)
        cells["thoughts generated"] = f"{samples:,.0f}"
        cells["thoughts, duplicates merged"] = f"{unique:,.0f} ({unique / count:.1f} a tree)"
        for name, label in (("duplicates", "duplicates"), ("empty", "empty"), ("cut", "cut at the token limit")):
            cells[label] = _share(_sum(run.statistics, f"num_{name}"), samples)
        cells["winning paths"] = f"{_sum(run.statistics, 'num_winning'):,.0f}"
        cells["tokens generated"] = f"{generated:,.0f} ({generated / count:,.0f} a tree)"
        cells["of them on winning paths"] = _share(useful, generated)
    if run.timings:
        seconds = spread(run.timings)
        cells["seconds from start to end of a question"] = (
            f"{seconds.mean:.1f} (p50 {seconds.p50:.1f}, p95 {seconds.p95:.1f})"
        )
    if run.num_pairs is not None:
        cells["pairs"] = f"{run.num_pairs:,}"
    return cells


def _sum(rows: Iterable[dict[str, Any]], key: str) -> float:
    return math.fsum(value for row in rows if math.isfinite(value := number(row.get(key))))


def _share(part: float, whole: float) -> str:
    return f"{part:,.0f}" + (f" ({part / whole:.1%})" if whole else "")


def _depth_rows(statistics: Sequence[dict[str, Any]]) -> Iterator[Row]:
    depths: dict[int, list[dict[str, Any]]] = {}
    for tree in statistics:
        for one in tree.get("depths") or ():
            if isinstance(one, dict) and math.isfinite(depth := number(one.get("depth"))):
                depths.setdefault(int(depth), []).append(one)
    for depth, found in sorted(depths.items()):
        judged = [
            one for one in found if number(one.get("num_judged")) > 0 and math.isfinite(number(one.get("mean_value")))
        ]
        weight = _sum(judged, "num_judged")
        means = math.fsum(number(one["mean_value"]) * number(one["num_judged"]) for one in judged)
        lows, highs = (
            [value for one in judged if math.isfinite(value := number(one.get(key)))]
            for key in ("min_value", "max_value")
        )
        yield (
            str(depth),
            *(f"{_sum(found, f'num_{name}'):,.0f}" for name in ("thoughts", "kept", "judged")),
            f"{means / weight:.2f}" if weight else NONE,
            f"{min(lows):.2f}" if lows else NONE,
            f"{max(highs):.2f}" if highs else NONE,
        )


def config_tables(runs: Sequence[Run]) -> tuple[Table | None, Table | None]:
    """The settings that runs changed or differ in, and all others. A value that is not the default is marked."""
    known = [run for run in runs if run.config]
    if not known:
        return None, None
    default = default_config()
    keys = list(dict.fromkeys([*default, *(key for run in known for key in run.config)]))
    changed: list[Row] = []
    others: list[Row] = []
    for key in keys:
        usual = _value(default.get(key))
        values = [_value(run.config[key]) if key in run.config else NONE for run in known]
        differs = len(set(values)) > 1
        row: Row = (
            Cell(f"{key} (differs)" if differs else key, marked=differs),
            *(Cell(value, marked=value not in (usual, NONE)) for value in values),
            usual if key in default else NONE,
        )
        (changed if differs or any(value not in (usual, NONE) for value in values) else others).append(row)
    headings = ("key", *(f"{run.name}, {run.config_file}" for run in known), "default")
    text = tuple(range(1, len(headings)))
    return (
        Table("Settings that differ from the defaults, or between the runs", headings, tuple(changed), text),
        Table("All other settings: the defaults", headings, tuple(others), text),
    )


def _value(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value, ensure_ascii=False, default=str)


def hash_table(runs: Sequence[Run]) -> Table | None:
    """What decided the results, by its hash, and which parts of a run have it: base, adapter, data, prompts, settings."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for run in (run for each in runs for run in each.all):
        for what, value, where in _hashes(run):
            found.setdefault((run.name, what, value), []).append(where)
    rows = tuple((what, value, ", ".join(places), name) for (name, what, value), places in found.items())
    headings = ("of", "hash", "of which part", "run")
    return Table("What the results follow from, by hash", headings, rows, (1, 2, 3)) if rows else None


_HASHES = {
    "model_hash": "base",
    "adapter_hash": "adapter",
    "prompt_hash": "prompt",
    "task_hash": "task section",
    "settings_hash": "settings",
    "config_hash": "settings",
}


def _hashes(run: Run) -> Iterator[tuple[str, str, str]]:
    """(what, hash, part of the run) of everything that has one."""
    for key, what in (("model", "base"), ("model.adapter", "adapter"), ("data", "data")):
        if run.identity.get(key):
            yield what, str(run.identity[key]), "training"
    for key, value in (run.votes.hashes if run.votes is not None else {}).items():
        if key in _HASHES and value:
            yield _HASHES[key], str(value), "search"
    for evaluation in run.evaluations:
        for key, what in _HASHES.items():
            if getattr(evaluation, key, ""):
                yield what, getattr(evaluation, key), f"evaluation {evaluation.label}"


def files_table(runs: Sequence[Run]) -> Table | None:
    """The files that count, with size and SHA-256 as they are now."""
    rows = [
        (f"{run.path.name}/{name}", f"{size:,}", digest)
        for each in runs
        for run in each.all
        for name, size, digest in run.files
    ]
    if not rows:
        return None
    return Table("Files as they are now", ("file", "bytes", "SHA-256"), tuple(rows), text=(2,))


def environment_table(runs: Sequence[Run]) -> Table | None:
    """By run and command: versions, machine and device, as they were. None where no run has kept them."""
    columns: dict[str, dict[str, str]] = {}
    for run in (run for each in runs for run in each.all):
        for command, values in run.environment.items():
            if isinstance(values, dict):
                columns[f"{run.name}, {command}"] = {str(key): _value(value) for key, value in values.items()}
        engines: dict[str, str] = {
            key: str(run.metrics[-1][key])
            for key in ("impl/linear_logprob", "impl/tree_attention")
            if run.metrics and key in run.metrics[-1]
        }
        if engines:
            columns.setdefault(f"{run.name}, train", {}).update(engines)
        for evaluation in run.evaluations:
            found = {"device": evaluation.device, "dtype": evaluation.dtype, "search engine": evaluation.engine}
            columns.setdefault(f"{run.name}, evaluation {evaluation.label}", {}).update(found)
    if not columns:
        return None
    alike: dict[str, list[str]] = {}  # commands that ran with the same are one column
    for name, cells in columns.items():
        alike.setdefault(json.dumps(cells), []).append(name)
    distinct = {"; ".join(names): columns[names[0]] for names in alike.values()}
    headings = merged_headings(list(distinct.values()))
    rows = tuple((heading, *(column.get(heading, NONE) for column in distinct.values())) for heading in headings)
    return Table("What it ran with", ("what", *distinct), rows, tuple(range(1, len(distinct) + 1)))
