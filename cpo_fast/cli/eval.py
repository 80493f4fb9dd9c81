"""`cpo-fast eval`: accuracy, seconds and tokens per question by greedy chain and by tree of thought, and what differs."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cpo_fast.config import Config, load_config
from cpo_fast.errors import DataError
from cpo_fast.interrupts import stopped_by_signals
from cpo_fast.progress import stage

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from cpo_fast.evaluate import Comparison, Evaluation, Overview


@click.command(name="eval")
@click.argument("config", type=click.Path(), required=False)
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option(
    "--compare",
    "compares",
    is_flag=True,
    help="Evaluate nothing; compare eval-*.jsonl, or all those of run folders, on the same questions: --compare FIRST "
    "SECOND ... Each is held against the first. Prints, writes no file.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def eval_command(config: str | None, overrides: tuple[str, ...], compares: bool, as_json: bool) -> None:
    """Answer every question of the task with the model and, if set, its adapter.

    eval.method says how: cot (one greedy chain, the default), tot (tree of thought and its vote) or both. Writes
    eval-LABEL.jsonl (one question a line) and eval-LABEL.json into the run's folder, LABEL being base or the adapter's
    folder, with -tot for trees. All of them stand side by side, compared in pairs, in eval.json, eval.md and eval.csv.
    """
    if compares:
        paths = [path for path in (config, *overrides) if path is not None]
        if any(path.endswith((".yaml", ".yml")) or "=" in Path(path).name for path in paths):
            raise click.UsageError("--compare takes result files or run folders, and no CONFIG and no overrides")
        _compare(paths, as_json)
    elif config is None:
        raise click.UsageError("give a CONFIG, or --compare with result files or run folders")
    else:
        settings = load_config(config, overrides)
        _say_what_eval_path_overrides(settings, overrides)
        _evaluate(settings, as_json)


def _say_what_eval_path_overrides(settings: Config, overrides: "Sequence[str]") -> None:
    of_task = ("task.path=", "task.num_questions=", "task.skip_questions=")
    without_effect = [each for each in overrides if each.startswith(of_task)]
    if settings.eval.path and without_effect:
        asked = f"all questions of eval.path ({settings.eval.path}) are asked"
        click.echo(f"{asked}: no effect of {', '.join(without_effect)} without eval.path=null", err=True)


def _evaluate(settings: Config, as_json: bool) -> None:
    from rich.console import Console

    from cpo_fast.environment import environment_kept
    from cpo_fast.evaluate import evaluate_methods, run_overview

    kept = "evaluations that were finished are kept; the same command asks again"
    with environment_kept(settings.run, "eval"), stopped_by_signals(kept), stage("evaluation") as shown:
        evaluations = evaluate_methods(settings, on_question=partial(shown.at, unit="questions"))
    run = Path(settings.run)
    overview = run_overview(run, settings.seed)
    overview.write(run)
    if as_json:
        click.echo(json.dumps(overview.to_dict()))
        return
    _show(Console(), overview)
    names = ", ".join(f"eval-{evaluation.label}.jsonl" for evaluation in evaluations)
    click.echo(f"one line per question: {names} in {run}; the tables: eval.json, eval.md, eval.csv")


def _compare(paths: "Sequence[str]", as_json: bool) -> None:
    from dataclasses import asdict

    from cpo_fast.evaluate import compare, folder_evaluations, read_evaluation
    from cpo_fast.evaluate.result import GIVE

    found: list[tuple[str, Evaluation]] = []
    for path in paths:
        if Path(path).is_dir():
            evaluations, notes = folder_evaluations(Path(path))
            if not evaluations and not notes:
                raise DataError(f"{path}: the folder holds no evaluation; {GIVE}")
            found += [(str(Path(path) / each.label), each) for each in evaluations]
            for note in notes:
                click.echo(_printable(f"{path}: {note}"), err=True)
        else:
            found.append((path, read_evaluation(path)))
    if len(found) < 2:
        raise click.UsageError(f"--compare takes two evaluations or more, and there are {len(found)}")
    names, evaluations = [name for name, _ in found], [each for _, each in found]
    comparisons = [
        compare(evaluations[0], other, (names[0], name)) for name, other in zip(names[1:], evaluations[1:], strict=True)
    ]
    if as_json:
        listed = [{"name": name, **each.summary()} for name, each in found]
        many = {"evaluations": listed, "comparisons": [asdict(each) for each in comparisons]}
        click.echo(json.dumps(asdict(comparisons[0]) if len(comparisons) == 1 else many))
        return
    from rich.console import Console

    console = Console()
    if len(comparisons) == 1:
        console.print(_table("Evaluations", names, evaluations))
        _show_comparisons(console, comparisons)
    else:
        _show_against_first(console, names, evaluations, comparisons)


def _show_against_first(
    console: "Console", names: "Sequence[str]", evaluations: "Sequence[Evaluation]", comparisons: "Sequence[Comparison]"
) -> None:
    from rich.table import Table
    from rich.text import Text

    from cpo_fast.evaluate.tables import against_first_cells, comparison_title, merged_headings

    rows = against_first_cells(evaluations, comparisons)
    title = f"{comparisons[0].num_questions} questions, each evaluation against the first"
    table = Table("", *merged_headings(rows), title=title, title_justify="left")
    for name, row in zip(names, rows, strict=True):
        table.add_row(Text(name), *(Text(row.get(heading, "")) for heading in merged_headings(rows)))
    console.print(table)
    for comparison in comparisons:
        for sentence in comparison.stated:
            click.echo(_printable(f"{comparison_title(comparison)}: {sentence}"))


def evaluation_table(evaluations: "Sequence[Evaluation]") -> "Table":
    """One column per evaluation."""
    return _table("Evaluation", [evaluation.label for evaluation in evaluations], evaluations)


def _show(console: "Console", overview: "Overview") -> None:
    from cpo_fast.evaluate.tables import agreement_line

    console.print(evaluation_table(overview.evaluations))
    _show_comparisons(console, overview.comparisons)
    for line in (*map(agreement_line, overview.agreements), *overview.notes):
        click.echo(_printable(line))


def _show_comparisons(console: "Console", comparisons: "Sequence[Comparison]") -> None:
    from cpo_fast.evaluate.tables import bootstrap_line, comparison_cells, comparison_title

    if not comparisons:
        return
    titles = [comparison_title(comparison) for comparison in comparisons]
    console.print(_cells("Compared, question by question", titles, [comparison_cells(each) for each in comparisons]))
    for comparison, title in zip(comparisons, titles, strict=True):
        for sentence in comparison.stated:
            click.echo(_printable(f"{title}: {sentence}"))
    click.echo(bootstrap_line(comparisons[0]))  # all have the same seed and number of resamples


def _table(title: str, headers: "Sequence[str]", evaluations: "Sequence[Evaluation]") -> "Table":
    from cpo_fast.evaluate.tables import evaluation_cells

    return _cells(title, headers, [evaluation_cells(evaluation) for evaluation in evaluations])


def _cells(title: str, headers: "Sequence[str]", columns: "Sequence[dict[str, str]]") -> "Table":
    from rich.table import Table
    from rich.text import Text

    from cpo_fast.evaluate.tables import merged_headings

    table = Table(title=title, title_justify="left")
    table.add_column("")
    for header in headers:
        # as plain text: brackets in a path are no markup
        table.add_column(Text(header), justify="right")
    for heading in merged_headings(columns):
        table.add_row(heading, *(Text(column.get(heading, "")) for column in columns))
    return table


def _printable(text: str) -> str:
    # an id or a library's message must not steer the terminal
    return "".join(character if character.isprintable() else "?" for character in text)
