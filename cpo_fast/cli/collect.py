"""`cpo-fast collect`: search every question of a task, or import searches of the paper's program, to `trees.jsonl`."""

import os
import sys
from typing import Any

import click

from cpo_fast.config import Config, load_config
from cpo_fast.errors import ConfigError, CpoFastError
from cpo_fast.progress import say
from cpo_fast.repeats import Repeats

# ids, answers and reasons in a line of progress: some are written by a model
MAX_SHOWN = 80


@click.command("collect")
@click.argument("config_path", metavar="CONFIG.yaml", type=click.Path(dir_okay=False))
@click.argument("overrides", metavar="[section.key=value ...]", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object on stdout.")
@click.option(
    "--import-official",
    "official_path",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="Do not search: convert the raw tree file of the CPO paper's own program.",
)
@click.option(
    "--worker",
    "worker_option",
    metavar="I/N",
    help="Search the questions of worker I of N, counted from 0. Without it: the rank that torchrun or Slurm gives.",
)
def collect_command(
    config_path: str, overrides: tuple[str, ...], as_json: bool, official_path: str | None, worker_option: str | None
) -> None:
    """Search: grow one tree of thoughts per question into RUN/trees.jsonl.

    Questions that are already finished are skipped, so a run that was stopped continues where it was, with as many
    workers as before or with another number of them. The last worker to finish writes the file.
    """
    config = load_config(config_path, overrides)
    if not config.model.path:
        raise ConfigError(f"{config_path}: model.path is empty; set it to a model's folder or hub id")
    if official_path is not None:
        _import(config, official_path, as_json)
        return
    from cpo_fast.environment import environment_kept
    from cpo_fast.search.collect import collect
    from cpo_fast.search.state_evaluator import check_evaluator
    from cpo_fast.search.tree_store import find_worker
    from cpo_fast.tasks import load_questions

    worker = find_worker(worker_option, os.environ)
    task, _ = load_questions(config)  # a bad question file is reported before torch is loaded
    check_evaluator(config.search, task)
    with environment_kept(config.run, "collect"), QuestionLines() as lines:
        result = collect(config, progress=lines, worker=worker)
    if as_json:
        _print_json(result)
    else:
        _print_summary(result)
    if result.statuses.get("failed", 0) == result.num_questions:
        raise CpoFastError(f"every question failed; the first: {_shown(result.first_failure, 400)}")


def _import(config: Config, official_path: str, as_json: bool) -> None:
    from cpo_fast.official.importer import import_official

    result = import_official(config, official_path)
    if as_json:
        _print_json(result)
        return
    rows = [
        ("entries", f"{result.num_entries}, {result.num_trees} of them trees"),
        ("statuses", _counts(result.statuses)),
        ("candidates", str(result.num_candidates)),
        ("unique thoughts", str(result.num_thoughts)),
        (
            "winning paths",
            f"{result.num_winning_paths} ({result.num_lost_winners} recorded winners are no answer here)",
        ),
    ]
    _print_table(rows)
    for what, reasons in (("entry", result.dropped_entries), ("candidate", result.dropped_candidates)):
        for reason, count in sorted(reasons.items()):
            click.echo(f"left out: {count} x {what}: {reason}")
    click.echo(f"trees: {result.trees_path}; left out: {result.dropped_path}")


class QuestionLines:
    """A line a question for logs. On a terminal, whose line shows how far it is, of failures alone.

    Of many that fail for one reason three have a line each, and the others one at the end of the search, or of the `with`.
    """

    def __init__(self) -> None:
        self._repeats = Repeats()

    def __enter__(self) -> "QuestionLines":
        return self

    def __exit__(self, *_: object) -> None:
        for sentence in self._repeats.rest():
            say(_shown(sentence, 400), err=True)

    def __call__(self, number: int, total: int, tree: Any, seconds: float) -> None:
        """As `search.collect.Progress`."""
        is_failed = tree.status == "failed"
        if self._repeats.says(tree.detail) if is_failed else not sys.stderr.isatty():
            _print_line(number, total, tree, seconds)
        if number == total:
            self.__exit__()


def _print_line(number: int, total: int, tree: Any, seconds: float) -> None:
    """One plain line a question, for logs."""
    reason = f" ({_shown(tree.detail, 300)})" if tree.detail else ""
    answer = None if tree.answer is None else _shown(tree.answer)
    say(
        f"{number}/{total} {_shown(tree.id)}: {tree.status}{reason}, {len(tree.nodes)} thoughts, "
        f"{len(tree.winning_nodes)} winning paths, answer {answer}, {seconds:.1f} s",
        err=True,  # stdout is for the summary
    )


def _shown(text: str, max_length: int = MAX_SHOWN) -> str:
    """Text as a terminal may get it: on one line, without control sequences or half surrogate pairs, not too long."""
    plain = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text[:max_length]
    )
    return plain if len(text) <= max_length else f"{plain}..."


def _counts(statuses: dict[str, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))


def _print_json(result: Any) -> None:
    from cpo_fast.files import canonical_json

    click.echo(canonical_json(result.to_dict()))


def _print_summary(result: Any) -> None:
    missing = f", {result.num_missing} of other workers not finished yet" if result.num_missing else ""
    rows = [
        ("questions", f"{result.num_questions} ({result.num_resumed} finished before{missing})"),
        ("statuses", _counts(result.statuses)),
        ("samples", f"{result.num_samples} ({result.num_empty} empty)"),
        ("unique thoughts", f"{result.num_thoughts} ({result.num_cut} cut at the token cap)"),
        ("winning paths", str(result.num_winning_paths)),
        ("tokens generated", f"{result.num_generated_tokens} ({result.num_useful_tokens} on winning paths)"),
        ("seconds", f"{result.seconds:.1f}"),
    ]
    if result.num_other:
        rows.append(("trees of other questions", f"{result.num_other} (in the same file, trained on too)"))
    if result.num_verdicts:
        rows.append(("unparseable verdicts", f"{result.num_unparseable} of {result.num_verdicts}"))
    if result.vote_accuracy is not None:
        correct = f"{result.num_correct} of {result.num_gold}, information only"
        rows.append(("vote accuracy", f"{result.vote_accuracy:.3f} ({correct})"))
    _print_table(rows)
    click.echo(f"trees: {result.trees_path}")


def _print_table(rows: list[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False)
    for name, value in rows:
        table.add_row(Text(name), Text(value))  # as plain text: brackets are no markup
    Console().print(table)
