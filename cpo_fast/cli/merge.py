"""`cpo-fast merge CONFIG -o FOLDER`: one model out of base and adapter, compared with both before it is kept."""

import json
from pathlib import Path

import click

from cpo_fast.config import load_config


@click.command("merge")
@click.argument("config_path", metavar="CONFIG.yaml")
@click.argument("overrides", nargs=-1, metavar="[section.key=value ...]")
@click.option("-o", "--output", required=True, help="Folder for the merged model; must be new or empty.")
@click.option(
    "--max-kl", default=1e-2, show_default=True, help="Largest mean divergence from base plus adapter, in nats."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def merge_command(config_path: str, overrides: tuple[str, ...], output: str, max_kl: float, as_json: bool) -> None:
    """Merge model.adapter into model.path in float32, check the result on prompts, and save it.

    It is saved in the dtype of model.path's files, or in model.dtype where that is no auto.
    """
    config = load_config(config_path, overrides)  # its errors come before torch is loaded

    from cpo_fast.models import merge
    from cpo_fast.tasks import load_task

    task = load_task(config)
    # the task's own prompts, cut at different places, so that many kinds of position are compared
    blocks = task.few_shot.split("\n\n")
    texts = ["\n\n".join(blocks[: count + 1]) for count in range(len(blocks))]
    result = merge(config, Path(output), [text for text in texts if text.strip()], max_kl)
    if as_json:
        values = {"model": str(result.path), "mean_kl": result.mean_kl, "max_kl": result.max_kl}
        click.echo(json.dumps({**values, "positions": result.num_positions}))
        return
    click.echo(f"merged model: {result.path}")
    divergence = f"mean {result.mean_kl:.2e}, max {result.max_kl:.2e} nats over {result.num_positions} tokens"
    click.echo(f"KL from base plus adapter: {divergence}")
