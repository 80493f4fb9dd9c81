"""`cpo-fast eval`: greedy chain-of-thought accuracy, seconds and tokens per question of one model."""

import json
from typing import TYPE_CHECKING

import click

from cpo_fast.config import load_config

if TYPE_CHECKING:
    from rich.table import Table

    from cpo_fast.evaluate import Evaluation


@click.command(name="eval")
@click.argument("config", type=click.Path(dir_okay=False))
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
def eval_command(config: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Answer every question of the task once, greedily, with the model and, if set, its adapter.

    Writes eval-base or eval-adapter, .json (summary) and .jsonl (one question a line), into the run's folder.
    """
    settings = load_config(config, overrides)

    from rich.console import Console
    from rich.progress import Progress

    from cpo_fast.evaluate import evaluate

    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("questions", total=None)
        evaluation = evaluate(
            settings, on_question=lambda done, total: progress.update(bar, completed=done, total=total)
        )
    if as_json:
        click.echo(json.dumps(evaluation.summary()))
        return
    Console().print(evaluation_table([evaluation]))
    click.echo(f"one line per question: {settings.run}/eval-{evaluation.label}.jsonl")


def evaluation_table(evaluations: "list[Evaluation]") -> "Table":
    """One column per evaluation; a batch's seconds, divided by its questions, say so."""
    from rich.table import Table

    table = Table(title="Greedy chain of thought", title_justify="left")
    table.add_column("")
    for evaluation in evaluations:
        table.add_column(evaluation.label, justify="right")
    columns = [_column(evaluation) for evaluation in evaluations]
    for heading in columns[0]:
        table.add_row(heading, *(column[heading] for column in columns))
    return table


def _column(evaluation: "Evaluation") -> dict[str, str]:
    accuracy, interval = evaluation.accuracy, evaluation.interval
    seconds, tokens = evaluation.seconds, evaluation.tokens
    divided = "" if evaluation.batch_size == 1 else ", divided"
    return {
        "correct": f"{evaluation.num_correct} of {evaluation.num_graded}",
        "accuracy": "no reference answers" if accuracy is None else f"{accuracy:.1%}",
        "95 % interval (Wilson)": "" if interval is None else f"{interval[0]:.1%} to {interval[1]:.1%}",
        "without a readable answer": str(evaluation.num_unanswered),
        "batch size": f"{evaluation.batch_size}",
        "seconds per question": f"{seconds.mean:.2f} (p50 {seconds.p50:.2f}, p95 {seconds.p95:.2f}){divided}",
        "tokens per question": f"{tokens.mean:.1f} (p50 {tokens.p50:.0f}, p95 {tokens.p95:.0f})",
    }
