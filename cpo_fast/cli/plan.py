"""`cpo-fast plan CONFIG [section.key=value ...]`: what a training will do and need, before anything is trained."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from cpo_fast.config import load_config
from cpo_fast.files import write_atomic

if TYPE_CHECKING:
    from cpo_fast.config import Config
    from cpo_fast.train.plan import Plan

GIB = 1 << 30
FEW_TOKENS = 4096  # of a micro-batch under ZeRO 3, computed for A100s and not measured


@click.command("plan")
@click.argument("config_path", metavar="CONFIG.yaml")
@click.argument("overrides", nargs=-1, metavar="[section.key=value ...]")
@click.option("--gpus", "num_ranks", type=click.IntRange(min=1), default=1, help="How many GPUs will train.")
@click.option("--deepspeed", "json_path", metavar="FILE", help="Write the DeepSpeed configuration that will be used.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def plan_command(
    config_path: str, overrides: tuple[str, ...], num_ranks: int, json_path: str | None, as_json: bool
) -> None:
    """Count rows, tokens and steps exactly, and predict memory, disk and how busy the GPUs will be."""
    config = load_config(config_path, overrides)

    from cpo_fast.data.load import check_data
    from cpo_fast.models import check_model_path

    check_data(config)  # before the libraries load
    check_model_path(config.model.path)

    from cpo_fast.train.plan import make_plan

    plan = make_plan(config, num_ranks)
    if json_path is not None:
        write_atomic(json_path, json.dumps(plan.deepspeed, indent=2) + "\n")
    if as_json:
        click.echo(json.dumps(asdict(plan)))
        return
    console = Console()
    console.print(_counts(plan))
    console.print(_memory(plan))
    for sentence in warnings(plan, config):
        console.print(f"warning: {sentence}", highlight=False, soft_wrap=True)


def _counts(plan: "Plan") -> Table:
    table = Table(title="training")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("rows trained on", f"{plan.num_examples:,}")
    table.add_row("rows held out", f"{plan.num_held_out:,}")
    for reason, count in plan.dropped.items():
        table.add_row(f"rows dropped: {reason}", f"{count:,}")
    table.add_row("optimizer steps", f"{plan.num_steps:,} ({plan.num_warmup:,} of warm-up)")
    table.add_row("tokens of an epoch as rows", f"{plan.row_tokens:,}")
    saved = plan.row_tokens / plan.forest_tokens
    table.add_row("tokens of an epoch, shared", f"{plan.forest_tokens:,} ({saved:.1f} times fewer)")
    if plan.num_ranks > 1:
        table.add_row(f"on {plan.num_ranks} GPUs together", f"{plan.rank_tokens:,}")
        table.add_row("GPUs busy", f"{plan.efficiency:.0%} of a step")
    table.add_row("tokens of a micro-batch", f"{plan.micro_batch_tokens:,.0f}")
    table.add_row("a checkpoint", f"{plan.checkpoint_bytes / 1e6:,.1f} MB")
    table.add_row("disk at the end", f"{plan.disk_bytes / 1e6:,.1f} MB")
    return table


def _memory(plan: "Plan") -> Table:
    where = "of a GPU" if plan.device == "cuda" else "on the CPU"
    table = Table(title=f"predicted memory {where}, ZeRO stage {plan.stage}")
    table.add_column("")
    table.add_column("GiB", justify="right")
    for name, size in plan.memory.items():
        if f"{size / GIB:.2f}" != "0.00":
            table.add_row(name, f"{size / GIB:.2f}")
    table.add_row("all", f"{sum(plan.memory.values()) / GIB:.2f}")
    if plan.loading_bytes > sum(plan.memory.values()):
        table.add_row("while the base is loaded", f"{plan.loading_bytes / GIB:.2f}")
    other = f"all, {'without' if plan.recomputes else 'with'} gradient checkpointing"
    table.add_row(other, f"{(plan.kept_bytes if plan.recomputes else plan.checkpointed_bytes) / GIB:.2f}")
    table.add_row("to be used here", f"{plan.room / GIB:.2f}")
    return table


def warnings(plan: "Plan", config: "Config") -> list[str]:
    """What a user would want to change before starting."""
    found = []
    if plan.checkpointed_bytes > plan.room:
        found.append(
            "a step does not fit, with gradient checkpointing neither; lower train.max_tokens, set train.zero_stage=3 on "
            "more GPUs, or train.offload=all"
        )
    elif plan.kept_bytes > plan.room:
        found.append("a step fits with gradient checkpointing alone, which train.gradient_checkpointing=auto turns on")
    if plan.copied_bytes:
        found.append(
            f"the base's files are {' and '.join(plan.file_dtypes)}, other than model.dtype makes of them here: each rank "
            f"casts a copy of {plan.copied_bytes / GIB:.2f} GiB in host memory, where files of that dtype are mapped and "
            "shared by the ranks of a host; convert the files, or set model.dtype to theirs"
        )
    if plan.num_ranks > 1 and config.train.batch_pairs < plan.wanted_pairs:
        found.append(
            f"train.batch_pairs={config.train.batch_pairs} keeps {plan.num_ranks} GPUs busy for {plan.efficiency:.0%} of a "
            f"step; {plan.wanted_pairs} would fill them, with other steps than {config.train.batch_pairs}"
        )
    if plan.stage == 3 and plan.micro_batch_tokens < FEW_TOKENS:
        found.append(
            f"a micro-batch has {plan.micro_batch_tokens:,.0f} tokens: under ZeRO 3, below {FEW_TOKENS:,}, gathering "
            "weights takes longer than computing; raise train.batch_pairs or train.max_tokens"
        )
    return found
