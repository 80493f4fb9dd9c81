"""`cpo-fast train CONFIG [section.key=value ...]`: train a LoRA adapter.

It prints what training logs, one plain line a step where that is no terminal, and a final table.
"""

import json
import logging
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from cpo_fast.config import load_config
from cpo_fast.errors import ConfigError
from cpo_fast.files import write_atomic
from cpo_fast.launchers import LAUNCHERS, SBATCH_GRACE, Host, launch, read_hosts, sbatch_script
from cpo_fast.progress import figures, say
from cpo_fast.ranks import find_ranks

# metric, its label on the progress line, its format
SHOWN = (
    ("loss", "loss", ".4f"),
    ("rewards/accuracies", "accuracy", ".2f"),
    ("rewards/margins", "margin", "+.4f"),
    ("tokens/saved", "saved", ".0%"),
    ("eval_loss", "held-out loss", ".4f"),
    ("eval_accuracy", "chain accuracy", ".3f"),
    ("eval_agreement", "agreement with votes", ".3f"),
)
IN_TABLE = (
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
    "mean_token_accuracy",
    "grad_norm",
    "tokens/saved",
)
LOGGERS = tuple(
    logging.getLogger(f"cpo_fast.{name}") for name in ("train", "data", "models", "adapters", "base_sample")
)


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
@click.option(
    "--allow-mismatch",
    "allow_mismatch",
    multiple=True,
    metavar="KEY",
    help="Go on from checkpoints of a training that differs in this key; may be given several times.",
)
@click.option("--gpus", "num_ranks", type=click.IntRange(min=1), help="Train on so many GPUs of a host, one rank each.")
@click.option(
    "--launch",
    "launcher",
    type=click.Choice(LAUNCHERS),
    help="What starts the ranks: this command (auto), torchrun, deepspeed or Slurm's srun. Without --gpus on all GPUs.",
)
@click.option("--hosts", "hosts_path", metavar="FILE", help="Train on these hosts: lines like 'name slots=8'.")
@click.option("--sbatch", "sbatch_path", metavar="FILE", help="Write a Slurm job to FILE and train nothing.")
@click.option("--nodes", "num_nodes", type=click.IntRange(min=1), help="Nodes of the job of --sbatch.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@click.pass_context
def train_command(
    ctx: click.Context,
    config_path: str,
    overrides: tuple[str, ...],
    profile_steps: int | None,
    allow_mismatch: tuple[str, ...],
    num_ranks: int | None,
    launcher: str | None,
    hosts_path: str | None,
    sbatch_path: str | None,
    num_nodes: int | None,
    as_json: bool,
) -> None:
    """Train a LoRA adapter on trees, pairs, or any prompt/chosen/rejected JSONL.

    The same command goes on where an earlier one was stopped. torchrun, deepspeed and srun start it as well:

    torchrun --nnodes 4 --nproc-per-node 8 ... -m cpo_fast train CONFIG.yaml
    """
    config = load_config(config_path, overrides)
    flags = [name for name, is_on in (ctx.obj or {}).items() if is_on]
    options = ["--profile", str(profile_steps)] if profile_steps else []
    options += [part for key in allow_mismatch for part in ("--allow-mismatch", key)]
    options += ["--json"] if as_json else []
    arguments = [*(f"--{flag}" for flag in flags), "train", *options, config_path, *overrides]
    if sbatch_path is not None:
        if "grace" not in config.train.model_fields_set:
            arguments.append(f"train.grace={SBATCH_GRACE}")
        job = sbatch_script(arguments, num_nodes or 1, num_ranks or _num_gpus(), config.run)
        try:
            Path(config.run).mkdir(parents=True, exist_ok=True)  # Slurm writes its output there
            write_atomic(sbatch_path, job)
        except OSError as error:
            raise ConfigError(
                f"--sbatch: {error.filename} cannot be written ({error.strerror}); choose another file or run folder"
            ) from None
        click.echo(f"wrote {sbatch_path}; look at it, and start it with: sbatch {sbatch_path}")
        return
    if num_nodes is not None:
        raise ConfigError("--nodes is for the job of --sbatch FILE; for hosts without Slurm give --hosts FILE")
    hosts = [Host("", num_ranks or (_num_gpus() if launcher else 1))]
    if hosts_path is not None:
        if launcher == "slurm":
            raise ConfigError("--hosts with --launch slurm: the allocation says which hosts; leave --hosts out")
        hosts = read_hosts(hosts_path, num_ranks)
    if launcher in (None, "auto") and hosts_path is None and int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) > 1:
        launcher = "slurm" if launcher and find_ranks().world_size == 1 else launcher
    if launcher not in (None, "auto") or hosts_path is not None or hosts[0].num_ranks > 1:
        sys.exit(launch(arguments, launcher or "auto", hosts, Path(config.run), config.train.grace, hosts_path))
    is_first = find_ranks().rank == 0

    from cpo_fast.data.load import check_data
    from cpo_fast.environment import environment_kept
    from cpo_fast.models import check_model_path

    check_data(config)  # before the libraries load
    check_model_path(config.model.path)

    from cpo_fast.train.loop import train

    with environment_kept(config.run, "train"), TrainingScreen(quiet=as_json or not is_first) as screen:
        result = train(config, progress=screen.update, profile_steps=profile_steps, allow_mismatch=allow_mismatch)
    if not is_first:
        return
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
            "remarks": result.remarks,
            "first": result.first,
            "last": result.last,
            "seconds": result.seconds,
        }
        if result.profile_path is not None:
            values["profile"] = str(result.profile_path)
        click.echo(json.dumps(values))
    else:
        screen.summary(result)


def _num_gpus() -> int:
    import torch

    return max(1, torch.cuda.device_count())


class _LogToConsole(logging.Handler):
    """Prints log lines above the progress line: which kernels run, whether layers are recomputed, what was scored."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        say(("warning: " if record.levelno >= logging.WARNING else "") + record.getMessage())


def figure(values: dict[str, Any], name: str, form: str) -> str:
    """A metric of a step. Where no reward has moved yet, no pair is ranked right or wrong."""
    is_tied = name == "rewards/accuracies" and values[name] == values.get("rewards/margins") == 0
    return "ties" if is_tied else format(values[name], form)


class TrainingScreen:
    """A context that prints the sentences that training logs, and the figures of each step."""

    def __init__(self, quiet: bool = False) -> None:
        self.console, self.quiet = Console(), quiet
        self.log_to_console = _LogToConsole()

    def __enter__(self) -> "TrainingScreen":
        if not self.quiet:
            self.levels = [each.level for each in LOGGERS]
            for each in LOGGERS:
                each.setLevel(logging.INFO)  # what a caller has set is put back in `__exit__`
                each.addHandler(self.log_to_console)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.quiet:
            for each, level in zip(LOGGERS, self.levels, strict=True):
                each.removeHandler(self.log_to_console)
                each.setLevel(level)

    def update(self, values: dict[str, Any], num_steps: int) -> None:
        """On a terminal the line that moves shows a step's figures, elsewhere a line of their own."""
        text = "  ".join(
            f"{label} {figure(values, name, form)}" for name, label, form in SHOWN if values.get(name) is not None
        )
        figures(text)
        if not self.quiet and not self.console.is_terminal:
            say(f"step {values['step']}/{num_steps}  {text}  {values['seconds']:.1f} s")

    def summary(self, result: Any) -> None:
        """The final table: first and last step side by side, what validation chose, and where the adapter is."""
        table = Table(title=f"{result.num_items} rows, {result.num_steps} steps, {result.seconds:.0f} s")
        table.add_column("")
        table.add_column("first step", justify="right")
        table.add_column("last step", justify="right")
        for name in IN_TABLE:
            if name in result.first:
                table.add_row(name, f"{result.first[name]:.4f}", f"{result.last[name]:.4f}")
        self.console.print(table)
        if result.profile:
            self._profile(result)
        if result.measured_on:
            early = ", stopped early" if result.stopped_early else ""
            place = f"step {result.best_step}" if result.best_step else "step 0, the starting point"
            self.console.print(f"best adapter: {place}, on {result.measured_on}{early}")
        for sentence in (result.alarm, *result.remarks):
            if sentence:
                self.console.print(f"warning: {sentence}", highlight=False, soft_wrap=True)
        self.console.print(f"adapter: {result.adapter_path}", highlight=False, soft_wrap=True)
        self.console.print(f"metrics: {result.metrics_path}", highlight=False, soft_wrap=True)

    def _profile(self, result: Any) -> None:
        on_device = any(total.device_seconds is not None for total in result.profile)
        table = Table(title=f"{result.profile[0].count} profiled steps")
        table.add_column("range")
        for column in ("times", "host seconds", *(["device seconds"] if on_device else []), "of the step"):
            table.add_column(column, justify="right")
        for total in result.profile:
            device = [f"{total.device_seconds:.3f}"] if on_device else []
            table.add_row(total.name, str(total.count), f"{total.host_seconds:.3f}", *device, f"{total.share:.0%}")
        self.console.print(table)
        self.console.print(f"trace: {result.profile_path / 'trace.json'}", highlight=False, soft_wrap=True)
