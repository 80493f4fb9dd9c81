"""Errors that end a command: one clear sentence each, and the exit code that scripts can rely on.

Every message says what is wrong, where (file:line, row or key), why, and how to mend it. What else escapes a command is
put into a sentence by `outcome`: what other libraries and the system raise, by kind, and the rest as a fault of ours.
"""

import contextlib
import errno
import importlib
import json
import os
import time
import traceback
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
    """Import a large library. Raises EnvironmentProblem with the line that installs it when it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EnvironmentProblem(
            f"cannot import {name} ({first_line(error)}); install it with: pip install {name}"
        ) from None


AT = "at: "  # how a note on an exception begins that says what was being done (see `cpo_fast.progress`)
KEPT = "kept: "  # and one on an interrupt that says what the command leaves to work with (see `cpo_fast.interrupts`)
OUTPUT_CLOSED = 128 + 13  # exit code of a program whose reader has gone, as SIGPIPE ends one
FAULT = "this is likely a fault of cpo-fast: `cpo-fast --debug` before the command shows where, please report it"
# by the library whose class it is: exit code, what it is about and what to do
_OF_LIBRARIES = {
    "safetensors": (CheckpointError.exit_code, "a file of tensors is damaged", "fetch or write it again"),
    "pyarrow": (DataError.exit_code, "a table cannot be read", "write it again, or give the rows as JSON lines"),
    "datasets": (DataError.exit_code, "a data set cannot be read", "check its name, or give the rows as JSON lines"),
    "jinja2": (ConfigError.exit_code, "the tokenizer's chat template failed", "mend it, or use a model with another"),
    "yaml": (ConfigError.exit_code, "a file is not valid YAML", "mend it"),
    "huggingface_hub": (EnvironmentProblem.exit_code, "the hub does not answer", "try again, or give a folder"),
    "requests": (EnvironmentProblem.exit_code, "the network does not answer", "try again, or give a folder"),
    "httpx": (EnvironmentProblem.exit_code, "the network does not answer", "try again, or give a folder"),
}
_REPORT = Path(__file__).with_name("report")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WRONG_PATH = (FileNotFoundError, IsADirectoryError, NotADirectoryError, FileExistsError)


def outcome(error: BaseException, command: str = "") -> tuple[int, str]:
    """The exit code and the sentence of any exception that ends a command. The sentence is empty where none is due.

    What is no `CpoFastError` names the command and, where a note says it, what was being done.

    Args:
        command: `train`, for instance.
    """
    if isinstance(error, CpoFastError):
        return error.exit_code, f"{'' if isinstance(error, Interrupted) else 'error: '}{error}"
    if isinstance(error, BrokenPipeError):
        return OUTPUT_CLOSED, ""
    at, kept = _noted(error, AT), _noted(error, KEPT)
    if isinstance(error, KeyboardInterrupt):
        return 130, f"interrupted{f' at {at}' if at else ''}{f'; {kept}' if kept else ''}"
    exit_code, reason = _explained(error)
    return exit_code, f"error: {', '.join(filter(None, (f'cpo-fast {command}'.strip(), at)))}: {reason}"


def _noted(error: BaseException, kind: str) -> str:
    """The first note of this kind on an exception, or nothing."""
    return next((note.removeprefix(kind) for note in getattr(error, "__notes__", ()) if note.startswith(kind)), "")


def _explained(error: BaseException) -> tuple[int, str]:
    """Exit code and sentence of an exception of Python or of a library, by its kind."""
    kind, text = type(error).__name__, first_line(error)
    library = type(error).__module__.partition(".")[0]
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error):
        return OutOfMemory.exit_code, (
            f"memory ran out ({text}); close other programs, or lower train.max_tokens for a training, "
            "search.batch_size and search.arena_tokens for a search"
        )
    if library == "jinja2" and _is_of_report(error):
        return 1, f"{kind}: {text}; {FAULT}"
    if library in _OF_LIBRARIES:
        exit_code, what, remedy = _OF_LIBRARIES[library]
        return exit_code, f"{what} ({text}); {remedy}"
    if isinstance(error, OSError):
        return _of_system(error)
    if isinstance(error, UnicodeEncodeError) and error.encoding.lower() != "utf-8":
        return EnvironmentProblem.exit_code, f"text cannot be written as {error.encoding}; set PYTHONUTF8=1"
    if isinstance(error, UnicodeError):
        return DataError.exit_code, f"text is not UTF-8 ({text}); save the file as UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return DataError.exit_code, f"a file is not valid JSON ({text}); mend it, or write it again"
    if isinstance(error, RecursionError):
        return DataError.exit_code, "an input is nested too deeply; look for brackets within brackets in it"
    if isinstance(error, ImportError):
        return (
            EnvironmentProblem.exit_code,
            f"a library cannot be used ({text}); `cpo-fast doctor` says what to install",
        )
    if kind == "AcceleratorError":
        return EnvironmentProblem.exit_code, f"the GPU failed ({text}); look at nvidia-smi, and try again"
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, ValueError) and frames and "cpo_kernels" in Path(frames[-1].filename).parts:
        return ConfigError.exit_code, text  # these refuse by a sentence for whoever calls
    return 1, f"{kind}: {text}; {FAULT}"


def _is_of_report(error: BaseException) -> bool:
    """Whether a template of the report was read or filled when it was raised, and not a tokenizer's."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(_REPORT in Path(frame.filename).parents for frame in frames)


def _of_system(error: OSError) -> tuple[int, str]:
    name = error.filename2 or error.filename
    shown = "" if name is None else f"{os.fsdecode(name) if isinstance(name, str | bytes) else name}: "
    reason = error.strerror or first_line(error)
    if error.errno in _FULL:
        return EnvironmentProblem.exit_code, f"{shown}cannot be written ({reason}); free some space"
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return EnvironmentProblem.exit_code, f"{shown}cannot be used ({reason}); choose another path, or allow it"
    if isinstance(error, _WRONG_PATH) or error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return ConfigError.exit_code, f"{shown}cannot be used ({reason}); check the path"
    return EnvironmentProblem.exit_code, f"{shown}the system refused ({reason}); mend that, and try again"
