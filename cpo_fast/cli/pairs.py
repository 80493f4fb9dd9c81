"""`cpo-fast pairs TREES.jsonl | CONFIG.yaml [section.key=value ...]`: training files from search trees, and their audit."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cpo_fast.config import load_config

if TYPE_CHECKING:
    from rich.table import Table

    from cpo_fast.data.pair_files import StepAudit, TreeRows


@click.command("pairs")
@click.argument("input_path", metavar="TREES.jsonl|CONFIG.yaml")
@click.argument("overrides", nargs=-1, metavar="[section.key=value ...]")
@click.option("-o", "--output", "output_path", help="Where to write (.jsonl or .parquet); default beside the trees.")
@click.option("--sft", is_flag=True, help="Write prompt and completion of the winning paths instead of pairs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def pairs_command(
    input_path: str, overrides: tuple[str, ...], output_path: str | None, sft: bool, as_json: bool
) -> None:
    """Turn search trees into preference pairs: at every step of a winning path, winner against siblings that lost.

    With a CONFIG.yaml the trees are those of its run folder. Section `pairs` says which pairs: pairs.rule=all, lower,
    lowest or fpo, pairs.rejected_fraction, pairs.num_questions.
    """
    from_config = Path(input_path).suffix in (".yaml", ".yml")
    config = load_config(input_path if from_config else None, overrides)
    trees = Path(config.run) / "trees.jsonl" if from_config else Path(input_path)
    target = Path(output_path) if output_path else trees.with_name("sft.jsonl" if sft else "pairs.jsonl")

    from cpo_fast.data.pair_files import write_rows

    made = write_rows(trees, target, config.pairs, config.seed, "sft" if sft else "preference")
    if sft:
        _report_completions(made, target, as_json)
    else:
        _report_pairs(made, target, config.pairs.rule, as_json)


def _report_completions(made: "TreeRows", target: Path, as_json: bool) -> None:
    values = {
        "examples": str(target),
        "num_examples": len(made.rows),
        "num_trees": made.num_trees,
        "trees_without_examples": made.trees_without_by_reason,
        "num_completion_tokens": sum(len(row["completion_token_ids"]) for row in made.rows),
    }
    if as_json:
        click.echo(json.dumps(values))
        return
    click.echo(
        f"{len(made.rows)} winning paths from {made.num_trees} trees, {values['num_completion_tokens']} tokens to learn"
    )
    _print_trees_without(made)
    click.echo(f"examples: {target}")


def _report_pairs(made: "TreeRows", target: Path, rule: str, as_json: bool) -> None:
    from cpo_fast.data.pair_files import REPEATED, audit_pairs, unused_path

    steps, dropped = audit_pairs(made.rows), made.unused_by_reason
    dropped_path = str(unused_path(target)) if made.unused else None
    if as_json:
        values = {
            "pairs": str(target),
            "num_pairs": len(made.rows),
            "pairs_by_step": {step: audit.num_pairs for step, audit in steps.items()},
            "num_trees": made.num_trees,
            "trees_without_pairs": made.trees_without_by_reason,
            "warning": made.warning(f"pairs.rule={rule}"),
            "dropped": dropped,
            "num_repeated": dropped.get(REPEATED, 0),
            "steps": {step: asdict(audit) for step, audit in steps.items()},
            "dropped_path": dropped_path,
        }
        click.echo(json.dumps(values))
        return
    from rich.console import Console

    title = f"{len(made.rows)} pairs from {made.num_trees} trees"
    caption = f"{dropped[REPEATED]} more stand under another question already" if REPEATED in dropped else None
    Console().print(_step_table(steps, title, caption))
    _print_trees_without(made)
    if warning := made.warning(f"pairs.rule={rule}"):
        click.echo(f"warning: {warning}")
    for reason, count in dropped.items():
        click.echo(f"{count} not used: {reason}")
    if dropped_path:
        click.echo(f"not used: {dropped_path}")
    click.echo(f"pairs: {target}")


def _print_trees_without(made: "TreeRows") -> None:
    for reason, count in made.trees_without_by_reason.items():
        click.echo(f"{count} trees without any: {reason}")


def _step_table(steps: "dict[int, StepAudit]", title: str, caption: str | None) -> "Table":
    from rich.table import Table

    table = Table("step", title=title, caption=caption)
    names = "pairs,states,chosen value,rejected value,chosen tokens,rejected tokens,longest row"
    for name in names.split(","):
        table.add_column(name, justify="right")
    for step, audit in steps.items():
        values = (audit.chosen_value, audit.rejected_value)
        table.add_row(
            str(step) if step else "whole",  # pairs of whole chains have step 0
            str(audit.num_pairs),
            str(audit.num_states),
            *("-" if value is None else f"{value:.2f}" for value in values),
            f"{audit.chosen_tokens:.1f}",
            f"{audit.rejected_tokens:.1f}",
            str(audit.max_tokens),
        )
    return table
