"""`cpo-fast train CONFIG [section.key=value ...]`: train a LoRA adapter."""

import json
from typing import Any

import click

from cpo_fast.config import load_config


@click.command("train")
@click.argument("config_path", metavar="CONFIG.yaml")
@click.argument("overrides", nargs=-1, metavar="[section.key=value ...]")
@click.option(
    "--profile",
    "profile_steps",
    type=click.IntRange(min=1),
    metavar="N",
    help="Profile N steps after the first; trace.json and ranges.json go to <run>/profile.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def train_command(config_path: str, overrides: tuple[str, ...], profile_steps: int | None, as_json: bool) -> None:
    """Train a LoRA adapter on trees, pairs, or any prompt/chosen/rejected JSONL."""
    config = load_config(config_path, overrides)

    from cpo_fast.cli.training_screen import TrainingScreen
    from cpo_fast.train.loop import train

    with TrainingScreen(quiet=as_json) as screen:
        result = train(config, progress=screen.update, profile_steps=profile_steps)
    if as_json:
        values: dict[str, Any] = {
            "adapter": str(result.adapter_path),
            "metrics": str(result.metrics_path),
            "num_items": result.num_items,
            "num_held_out": result.num_held_out,
            "num_steps": result.num_steps,
            "best_step": result.best_step,
            "stopped_early": result.stopped_early,
            "alarm": result.alarm,
            "first": result.first,
            "last": result.last,
            "seconds": result.seconds,
        }
        if result.profile_path is not None:
            values["profile"] = str(result.profile_path)
        click.echo(json.dumps(values))
    else:
        screen.summary(result)
