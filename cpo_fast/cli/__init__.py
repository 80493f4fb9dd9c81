"""The `cpo-fast` command: a click group whose commands are imported only when they run.

Every command module holds one click command named like the file. Errors a user can mend (`CpoFastError`) print as one
line and set the exit code. `--debug` shows their traceback.
"""

import difflib
import importlib
import logging
import sys

import click

from cpo_fast import __version__
from cpo_fast.errors import ConfigError, CpoFastError, EnvironmentProblem, Interrupted, failure_detail, note_failure
from cpo_fast.ranks import find_ranks

# name -> one line of help; the module cpo_fast.cli.<name> is loaded only when the command is used
COMMANDS = {
    "collect": "search: grow one tree of thoughts per question into trees.jsonl",
    "pairs": "turn trees.jsonl into preference pairs (pairs.jsonl)",
    "train": "train a LoRA adapter on trees, pairs or any preference JSONL",
    "eval": "accuracy, seconds and tokens of chain and tree of thought; paired comparisons",
    "merge": "merge an adapter into its base model, checked against both",
    "plan": "rows, tokens, steps, memory and disk of a training, before it starts",
    "doctor": "versions, devices, what is missing and the line that installs it",
    "demo": "collect, pairs, train and eval with a 135M model on shipped word problems",
}

# library -> the extra that brings it
OPTIONAL_LIBRARIES = {
    **dict.fromkeys(("torch", "transformers", "peft", "safetensors", "deepspeed", "jinja2"), "train"),
    **dict.fromkeys(("datasets", "pyarrow"), "data"),
    "gguf": "demo",
}


class LazyGroup(click.Group):
    """Lists commands without importing them, and suggests the nearest name for an unknown one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"cpo_fast.cli.{cmd_name}"), f"{cmd_name}_command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        # an option before the command is click's to refuse
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            nearest = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean '{nearest[0]}'?" if nearest else f"the commands are {', '.join(COMMANDS)}"
            raise click.UsageError(f"there is no command '{args[0]}'; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # click would import every command for its help
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="cpo-fast")
@click.option("--debug", is_flag=True, help="Show the traceback of an error, of a question that fails too.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with a model. Never set by a file.")
@click.option("--trust-task-code", is_flag=True, help="Run the Python file of task.module. Never set by a file.")
@click.pass_context
def cli(ctx: click.Context, debug: bool, trust_remote_code: bool, trust_task_code: bool) -> None:
    """Teach a language model to reason in one chain by learning from its own search tree."""
    ctx.obj = {"debug": debug, "trust-remote-code": trust_remote_code, "trust-task-code": trust_task_code}
    if debug:
        logging.basicConfig()
        logging.getLogger("cpo_fast").setLevel(logging.DEBUG)
    if trust_remote_code:
        from cpo_fast.models import allow_remote_code

        click.echo("warning: code in the model's folder will run with your rights", err=True)
        allow_remote_code()
    if trust_task_code:
        from cpo_fast.tasks import allow_task_code

        click.echo("warning: the code of task.module will run with your rights", err=True)
        allow_task_code()


def _who() -> str:
    """Which of several ranks speaks."""
    try:
        ranks = find_ranks()
    except ConfigError:
        return ""
    return f"rank {ranks.rank}: " if ranks.world_size > 1 else ""


def main() -> None:
    """Entry point of the console script: run the group, map errors to one line and an exit code."""
    debug = "--debug" in sys.argv[1:]  # an error leaves no context to read it from
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        note_failure(130, "interrupted")
        click.echo("interrupted", err=True)
        sys.exit(130)  # 128 + SIGINT, as shells say it
    except click.ClickException as error:
        note_failure(error.exit_code, error.format_message())
        error.show()
        sys.exit(error.exit_code)
    except CpoFastError as error:
        note_failure(error.exit_code, str(error))
        if debug:
            raise
        click.echo(f"{_who()}{'' if isinstance(error, Interrupted) else 'error: '}{error}", err=True)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        note_failure(EnvironmentProblem.exit_code, str(error))
        library = (error.name or "").partition(".")[0]
        if debug or library not in OPTIONAL_LIBRARIES:  # a missing module of ours is a bug, with its traceback
            raise
        extra = OPTIONAL_LIBRARIES[library]
        click.echo(f"error: this command needs {library}; install it: pip install 'cpo-fast[{extra}]'", err=True)
        sys.exit(EnvironmentProblem.exit_code)
    except Exception as error:
        note_failure(1, failure_detail(error))
        raise
