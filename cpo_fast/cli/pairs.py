"""`cpo-fast pairs TREES.jsonl | CONFIG.yaml [section.key=value ...]`: training files from search trees, and their audit."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cpo_fast.config import load_config

if TYPE_CHECKING:
    from rich.console import Console

    from cpo_fast.data.pair_files import PairCounts, SftCounts


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

    from rich.console import Console

    from cpo_fast.data.pair_files import write_pairs, write_sft

    write: Callable[..., PairCounts | SftCounts] = write_sft if sft else write_pairs
    counts = write(trees, target, config.pairs, config.seed)
    if as_json:
        click.echo(json.dumps({"examples" if sft else "pairs": str(target), **asdict(counts)}))
        return
    _show(Console(), counts)
    click.echo(f"{'examples' if sft else 'pairs'}: {target}")


def _show(console: "Console", counts: "PairCounts | SftCounts") -> None:
    from cpo_fast.data.pair_files import PairCounts

    if isinstance(counts, PairCounts):
        console.print(_step_table(counts))
        without = counts.trees_without_pairs
    else:
        lines = f"{counts.num_examples} winning paths from {counts.num_trees} trees, "
        console.print(f"{lines}{counts.num_completion_tokens} tokens to learn", highlight=False)
        without = counts.trees_without_examples
    for reason, count in without.items():
        console.print(f"{count} trees without any: {reason}", highlight=False, markup=False)
    if isinstance(counts, PairCounts):
        for reason, count in counts.dropped.items():
            console.print(f"{count} not used: {reason}", highlight=False, markup=False)
        if counts.dropped_path:
            click.echo(f"not used: {counts.dropped_path}")


def _step_table(counts: "PairCounts") -> Any:
    from rich.table import Table

    table = Table(
        title=f"{counts.num_pairs} pairs from {counts.num_trees} trees",
        caption=f"{counts.num_repeated} more stand under another question already",
    )
    table.add_column("step")
    for name in (
        "pairs",
        "states",
        "chosen value",
        "rejected value",
        "chosen tokens",
        "rejected tokens",
        "longest row",
    ):
        table.add_column(name, justify="right")
    for step, audit in counts.steps.items():
        table.add_row(
            str(step) if step else "whole",
            str(audit.num_pairs),
            str(audit.num_states),
            *("-" if value is None else f"{value:.2f}" for value in (audit.chosen_value, audit.rejected_value)),
            f"{audit.chosen_tokens:.1f}",
            f"{audit.rejected_tokens:.1f}",
            str(audit.max_tokens),
        )
    return table
