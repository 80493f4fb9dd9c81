"""`cpo-fast iterate CONFIG [section.key=value ...]`: rounds of collect, pairs, train and eval, and their table."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import click

from cpo_fast.cli.report import written_report
from cpo_fast.config import Config, dump_config, load_config
from cpo_fast.files import write_atomic
from cpo_fast.interrupts import stopped_by_signals
from cpo_fast.progress import say
from cpo_fast.report.rounds import round_cells


@click.command("iterate")
@click.argument("config_path", metavar="CONFIG.yaml", type=click.Path(dir_okay=False))
@click.argument("overrides", metavar="[section.key=value ...]", nargs=-1)
@click.option(
    "--gpus",
    "num_ranks",
    type=click.IntRange(min=1),
    help="Search and train on so many GPUs of this host, one rank each.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@click.pass_context
def iterate_command(
    ctx: click.Context, config_path: str, overrides: tuple[str, ...], num_ranks: int | None, as_json: bool
) -> None:
    """Make rounds: search with the model of the round before, make pairs, train on, and ask the questions of dev.

    \b
    iterate.method         cpo, or sft_cpo: imitate the winning paths first
    iterate.num_rounds     how many at most
    iterate.new_questions  the next task.num_questions in each round
    iterate.stop_on        accuracy on train.dev_path ends the rounds and
                           chooses the best, by gold answers; agreement
                           with the votes of train.dev_trees does so
                           without them; or never
    iterate.min_gain, iterate.patience   which rounds have helped
    train.reference_model  base: the reference stays the first model

    Round T writes what the single commands write, into RUN/round-T. RUN/iterate.json says what each one brought, and
    RUN/adapter is the best round's. The same command goes on where an earlier one was stopped. Questions of eval.path
    are not asked: they are for a last `cpo-fast eval`.
    """
    config = load_config(config_path, overrides)

    from cpo_fast.cli.collect import QuestionLines
    from cpo_fast.cli.train import TrainingScreen
    from cpo_fast.environment import environment_kept
    from cpo_fast.iterate import Watch, iterate
    from cpo_fast.models import check_model_path

    check_model_path(config.model.path)  # before the libraries load
    run_command = None
    if num_ranks is not None and num_ranks > 1:
        flags = [f"--{name}" for name, is_on in (ctx.obj or {}).items() if is_on]
        run_command = partial(run_on_ranks, num_ranks=num_ranks, flags=flags, as_json=as_json)
    kept = "the same command goes on from there"
    with (
        environment_kept(config.run, "iterate"),
        stopped_by_signals(kept),
        TrainingScreen(quiet=as_json) as screen,
        QuestionLines() as lines,
    ):
        watch = Watch(partial(say, err=as_json), lines, screen.update)
        summary = iterate(config, watch, run_command)
    if as_json:
        click.echo(json.dumps(summary))
    else:
        _show(summary, config)
    click.echo(written_report(config.run), err=as_json)


def run_on_ranks(command: str, config: Config, num_ranks: int, flags: Sequence[str], as_json: bool) -> None:
    """Run collect or train on so many ranks of this host, and eval on one, each in a process of its own.

    Raises:
        CpoFastError: it has failed, and said why. With its exit code.
    """
    from cpo_fast.iterate import stage_ended
    from cpo_fast.launchers import Host, launch

    folder = Path(config.run)
    path = folder / f"{command}.yaml"
    write_atomic(path, dump_config(config))
    hosts = [Host("", 1 if command == "eval" else num_ranks)]
    with _output_to_errors() if as_json else nullcontext():
        code = launch([*flags, command, str(path)], "auto", hosts, folder, config.train.grace)
    if code:
        raise stage_ended(code)


@contextmanager
def _output_to_errors() -> Iterator[None]:
    """Let processes that are started inside write to stderr: one JSON object is due on stdout."""
    sys.stdout.flush()
    before = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(before, 1)
        os.close(before)


def _show(summary: dict[str, Any], config: Config) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"Rounds of {config.iterate.method}", title_justify="left")
    table.add_column("")
    for one in summary["rounds"]:
        mark = ", best" if one["round"] == summary["best_round"] else ""
        table.add_column(f"round {one['round']}{mark}", justify="right")
    columns = [round_cells(one) for one in summary["rounds"]]
    for name in columns[0] if columns else ():
        table.add_row(name, *(Text(column[name]) for column in columns))
    Console().print(table)
    click.echo(f"ended: {summary['stopped']}")
    if summary["adapter"] is None:
        click.echo("no adapter: the model that the rounds began with is the best, and it has none")
    else:
        click.echo(f"adapter: {summary['adapter']}, of round {summary['best_round']}")
    click.echo(f"every round's numbers: {Path(config.run) / 'iterate.json'}")
