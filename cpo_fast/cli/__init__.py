"""The `cpo-fast` command: a click group whose commands are imported only when they run.

Every command module holds one click command named like the file. Whatever ends a command prints as one line and sets the
exit code (`cpo_fast.errors.outcome`). `--debug` shows the traceback too.
"""

import contextlib
import difflib
import importlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import click

from cpo_fast import __version__
from cpo_fast.errors import OUTPUT_CLOSED, ConfigError, note_failure, outcome
from cpo_fast.progress import shown
from cpo_fast.ranks import find_ranks
from cpo_fast.threads import one_for_tiny_models

# name -> one line of help; the module cpo_fast.cli.<name> is loaded only when the command is used
COMMANDS = {
    "collect": "search: grow one tree of thoughts per question into trees.jsonl",
    "pairs": "turn trees.jsonl into preference pairs (pairs.jsonl)",
    "train": "train a LoRA adapter on trees, pairs or any preference JSONL",
    "eval": "accuracy, seconds and tokens of chain and tree of thought; paired comparisons",
    "iterate": "rounds of collect, pairs, train and eval, until one does not help",
    "report": "one HTML file of runs: curves, evaluations, trees, settings",
    "merge": "merge an adapter into its base model, checked against both",
    "plan": "rows, tokens, steps, memory and disk of a training, before it starts",
    "doctor": "versions, devices, what is missing and the line that installs it",
    "demo": "collect, pairs, train and eval on a tiny model that is shipped, in a minute",
}

# library -> what installs it; a missing module of ours is a bug
INSTALLS = {
    **{name: name for name in ("torch", "transformers", "peft", "safetensors", "deepspeed", "jinja2")},
    **dict.fromkeys(("datasets", "pyarrow"), "'cpo-fast[data]'"),
    "gguf": "'cpo-fast[demo]'",
}


class Escaped(Exception):
    """Carries past click what that would turn into an interrupt or an exit code of its own."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


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

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        try:
            return super().make_context(*args, **kwargs)
        except (OSError, EOFError, KeyboardInterrupt) as error:  # --help prints here
            raise Escaped(error) from error

    def invoke(self, ctx: click.Context) -> Any:
        with contextlib.suppress(ConfigError):  # the command will say what is wrong with its launcher
            if find_ranks().rank == 0:
                ctx.with_resource(shown())
        ctx.with_resource(one_for_tiny_models())
        try:
            return super().invoke(ctx)
        except (OSError, EOFError, KeyboardInterrupt) as error:
            raise Escaped(error) from error

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
    """Teach a language model to reason in one chain by learning from its own search tree.

    Long work shows what it is at in one line on a terminal, and elsewhere on stderr, after 30 seconds without a word.
    """
    # PEFT asks every model for an attribute that transformers has renamed
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
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
    """Entry point of the console script: run the group, and end with a line and an exit code whatever happens."""
    # read by OpenMP when torch loads. By default a thread that waits for another spins, and where other work wants the
    # cores it spins away the time slice in which that one could have come
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(guarded(lambda: cli.main(standalone_mode=False)))


def guarded(run: Callable[[], Any]) -> int:
    """Call `run`, and return the exit code of what came of it, after one sentence to stderr where it failed.

    `--debug` adds the traceback. A rank leaves a note for its launcher.
    """
    try:
        result = run()
        sys.stdout.flush()  # a reader that has gone is noticed here, and not while the interpreter ends
        return result if isinstance(result, int) else 0  # click returns what --help exits with
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # rich makes this of it
            return _ended(end.__context__)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except click.exceptions.Abort as abort:
        return _ended(abort.__cause__ or KeyboardInterrupt())
    except click.ClickException as error:
        shown = _of_setting(error)
        note_failure(shown.exit_code, shown.format_message())
        shown.show()
        return shown.exit_code
    except Escaped as escaped:
        return _ended(escaped.error)
    except BaseException as error:
        return _ended(error)


def _of_setting(error: click.ClickException) -> click.ClickException:
    """The error, with how to write a setting where one was written as an option."""
    from cpo_fast.config.other_names import hint

    if not isinstance(error, click.NoSuchOption):
        return error
    name = error.option_name.lstrip("-")
    known = hint(name)
    if "." not in name and not known:
        return error
    how = f"Settings have no dashes and come after the file: CONFIG.yaml {name}=VALUE{known}"
    return click.UsageError(f"No such option '{error.option_name}'. {how}", error.ctx)


def _ended(error: BaseException) -> int:
    """Say what became of the command, and return its exit code."""
    exit_code, sentence = outcome(error, next((each for each in sys.argv[1:] if each in COMMANDS), ""))
    if isinstance(error, ModuleNotFoundError):
        library = (error.name or "").partition(".")[0]
        if library in INSTALLS:
            sentence = f"error: this command needs {library}; install it: pip install {INSTALLS[library]}"
    note_failure(exit_code, sentence.removeprefix("error: "))
    if exit_code == OUTPUT_CLOSED:
        _discard_output()
    with contextlib.suppress(OSError):  # nobody listens any more
        if "--debug" in sys.argv[1:] and exit_code not in (130, OUTPUT_CLOSED):
            traceback.print_exception(error)
        if sentence:
            click.echo(f"{_who()}{sentence}", err=True)
    return exit_code


def _discard_output() -> None:
    """Let the interpreter, which flushes what was printed last, write into nothing."""
    with contextlib.suppress(OSError, ValueError):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, sys.stdout.fileno())
        os.close(descriptor)
