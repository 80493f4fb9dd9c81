"""Errors that end a command: one clear sentence each, and the exit code that scripts can rely on.

Every message says what is wrong, where (file:line, row or key), why, and how to mend it. Anything else that escapes a
command is a bug of ours and keeps its traceback.
"""

import contextlib
import importlib
import json
import os
import time
from pathlib import Path
from typing import Any


class CpoFastError(Exception):
    """Base of every error a user can cause and mend. `exit_code` is what the command line returns."""

    exit_code = 1


class ConfigError(CpoFastError):
    """The configuration or the command line is wrong (exit code 2)."""

    exit_code = 2


class DataError(CpoFastError):
    """An input file or row is wrong (exit code 3)."""

    exit_code = 3


class CheckpointError(CpoFastError):
    """An adapter or a checkpoint is missing, damaged, or of another run (exit code 4)."""

    exit_code = 4


class EnvironmentProblem(CpoFastError):
    """A library, a device or a launcher is missing or does not fit (exit code 5)."""

    exit_code = 5


class NonFiniteError(CpoFastError):
    """The loss or the gradient is not a finite number (exit code 7)."""

    exit_code = 7


class Interrupted(CpoFastError):
    """A signal ended a run, which has saved its state (exit code 143, or 130 for an interrupt)."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.exit_code)  # one rank tells the others


class OutOfMemory(CpoFastError):
    """Something does not fit into memory that the configuration can change (exit code 6)."""

    exit_code = 6


FAILURES = "CPO_FAST_FAILURES"  # variable of a launcher: the folder where every rank that fails leaves a note


def note_failure(exit_code: int, text: str) -> None:
    """Leave this rank's exit code and last sentence where the launcher that asks for it looks."""
    folder, rank = os.environ.get(FAILURES), os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    world_size = os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if folder:
        with contextlib.suppress(OSError):
            note = json.dumps({"exit_code": exit_code, "text": text, "at": time.time(), "world_size": world_size})
            aside = Path(folder, f".{rank}.tmp")
            aside.write_text(note, encoding="utf-8")
            aside.replace(Path(folder, f"{rank}.json"))


def first_line(error: BaseException) -> str:
    """The first line of a library's message, at most 240 characters without a full stop, or the error's class if empty."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:240].rstrip(".")


def failure_detail(error: BaseException) -> str:
    """What is kept of the error that ended one question: its class and the first line of its message, 300 characters."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]


def require_library(name: str) -> Any:
    """Import an optional library. Raises EnvironmentProblem with the line that installs it when it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EnvironmentProblem(
            f"cannot import {name} ({first_line(error)}); install it with: pip install 'cpo-fast[train]'"
        ) from None
