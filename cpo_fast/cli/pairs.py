"""`cpo-fast pairs TREES [-o PAIRS]`: preference pairs from search trees."""

import json
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table


@click.command("pairs")
@click.argument("trees_path", metavar="TREES.jsonl")
@click.option("-o", "--output", "pairs_path", help="Where to write; default pairs.jsonl beside the trees.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def pairs_command(trees_path: str, pairs_path: str | None, as_json: bool) -> None:
    """Turn every winning step of every tree into pairs: winner against each sibling that lost."""
    from cpo_fast.data.pairs import write_pairs

    target = Path(pairs_path) if pairs_path else Path(trees_path).with_name("pairs.jsonl")
    counts = write_pairs(trees_path, target)
    if as_json:
        click.echo(json.dumps({"pairs": str(target), **asdict(counts)}))
        return
    console = Console()
    table = Table(title=f"{counts.num_pairs} pairs from {counts.num_trees} trees")
    table.add_column("step")
    table.add_column("pairs", justify="right")
    for step, count in counts.pairs_by_step.items():
        table.add_row(str(step), str(count))
    console.print(table)
    for reason, count in counts.trees_without_pairs.items():
        console.print(f"{count} trees without pairs: {reason}", highlight=False)
    console.print(f"pairs: {target}", highlight=False, soft_wrap=True)
