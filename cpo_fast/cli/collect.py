"""`cpo-fast collect`: search every question of a task and write `trees.jsonl`."""

import sys
from typing import Any

import click

from cpo_fast.config import load_config
from cpo_fast.errors import ConfigError, CpoFastError


@click.command("collect")
@click.argument("config_path", metavar="CONFIG.yaml", type=click.Path(dir_okay=False))
@click.argument("overrides", metavar="[section.key=value ...]", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object on stdout.")
def collect_command(config_path: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Search: grow one tree of thoughts per question into RUN/trees.jsonl.

    Questions that the file already holds are skipped, so a run that was stopped continues where it was.
    """
    config = load_config(config_path, overrides)
    if not config.model.path:
        raise ConfigError(f"{config_path}: model.path is empty; set it to a model's folder or hub id")
    from cpo_fast.search.collect import collect, load_questions

    _, questions = load_questions(config)  # a bad question file is reported before torch is loaded
    if sys.stderr.isatty():
        result = _collect_with_bar(config, collect, len(questions))
    else:
        result = collect(config, progress=_print_line)
    if as_json:
        from cpo_fast.files import canonical_json

        click.echo(canonical_json(result.to_dict()))
    else:
        _print_table(result)
    if result.statuses.get("failed", 0) == result.num_questions:
        raise CpoFastError(f"every question failed; the first: {result.first_failure}")


def _collect_with_bar(config: Any, collect: Any, num_questions: int) -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("collect"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        bar_id = bar.add_task("collect", total=num_questions)
        result = collect(config, progress=lambda number, *_: bar.update(bar_id, completed=number))
        bar.update(bar_id, completed=num_questions)
    return result


def _print_line(number: int, total: int, tree: Any, seconds: float) -> None:
    """One plain line a question on stderr, for logs; stdout stays for the summary."""
    reason = f" ({tree.detail})" if tree.detail else ""
    click.echo(
        f"{number}/{total} {tree.id}: {tree.status}{reason}, {len(tree.nodes)} thoughts, "
        f"{len(tree.winning_nodes)} winning paths, answer {tree.answer}, {seconds:.1f} s",
        err=True,
    )


def _print_table(result: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    statuses = ", ".join(f"{count} {status}" for status, count in sorted(result.statuses.items()))
    rows = [
        ("questions", f"{result.num_questions} ({result.num_resumed} finished before)"),
        ("statuses", statuses),
        ("samples", f"{result.num_samples} ({result.num_empty} empty)"),
        ("unique thoughts", f"{result.num_thoughts} ({result.num_cut} cut at the token cap)"),
        ("winning paths", str(result.num_winning_paths)),
        ("seconds", f"{result.seconds:.1f}"),
    ]
    if result.num_verdicts:
        rows.append(("unparseable verdicts", f"{result.num_unparseable} of {result.num_verdicts}"))
    if result.vote_accuracy is not None:
        rows.append(
            (
                "vote accuracy",
                f"{result.vote_accuracy:.3f} ({result.num_correct} of {result.num_gold}, information only)",
            )
        )
    table = Table(show_header=False)
    for name, value in rows:
        table.add_row(name, value)
    Console().print(table)
    click.echo(f"trees: {result.trees_path}")
