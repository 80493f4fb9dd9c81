"""Tasks: where questions come from, how prompts are built, and what an answer is. Imports no torch."""

import importlib.util
import sys
from functools import cache
from pathlib import Path

from cpo_fast.config import Config, TaskConfig
from cpo_fast.errors import ConfigError, failure_detail
from cpo_fast.files import short_hash
from cpo_fast.tasks.prompts import Prompts, common_prefix_length, encode_prompt, with_clock
from cpo_fast.tasks.task import Question, Task
from cpo_fast.tasks.task_file import TaskFile, read_task_file

# the data sets that ship, and the task file beside this module that each is read by
_FILES = {
    **dict.fromkeys(("svamp", "gsm8k"), "arithmetic.yaml"),
    **dict.fromkeys(("bamboogle", "2wikimultihopqa", "hotpotqa"), "multi_hop_qa.yaml"),
    **dict.fromkeys(("fever", "feverous", "vitaminc"), "fact_verification.yaml"),
}
_code_allowed = False


def allow_task_code() -> None:
    """Let this process run the Python file that `task.module` names. On the command line only a flag calls this."""
    global _code_allowed
    _code_allowed = True


@cache
def _shipped(file: str) -> TaskFile:
    return read_task_file(Path(__file__).with_name(file))[0]


def get_task(name: str, demonstration_seed: int | None = None, evaluator_seed: int | None = None) -> Task:
    """The task of a data set that ships, or ConfigError. The seeds are as in `Task`."""
    return Task(name, _named_file(name), demonstration_seed, evaluator_seed)


def _named_file(name: str) -> TaskFile:
    if name not in _FILES:
        raise ConfigError(
            f"task.name: '{name}' is not a task; choose one of {', '.join(sorted(_FILES))}, or write your own and set "
            "task.file"
        )
    return _shipped(_FILES[name])


def task_name(config: TaskConfig) -> str:
    """What trees and evaluations call the task: `task.name`, or the name of the file with a hash.

    The hash is the first 16 hex digits of the SHA-256 of the task file, or of it (if there is one) and the module's file.
    A tree carries this name, so that a run does not continue trees of another task file.

    Raises:
        ConfigError: a file cannot be read.
    """
    paths = [path for path in (config.file, _module_path(config.module)[0] if config.module else None) if path]
    if not paths:
        return config.name
    try:
        content = b"".join(Path(path).read_bytes() for path in paths)
    except OSError as error:
        key = "file" if error.filename == config.file else "module"
        raise ConfigError(f"task.{key}: cannot read {error.filename} ({error.strerror}); check the path") from None
    return f"{Path(config.file).stem if config.file else config.name}@{short_hash(content)}"


def load_task(config: Config) -> Task:
    """The task that `config.task` names, its demonstrations in the order that the configuration and the seed give.

    Raises:
        ConfigError: the task file or the module cannot be used, or the module may not run (see `allow_task_code`).
    """
    section = config.task
    make = _task_class(section.module) if section.module else Task
    file = _named_file(section.name) if section.file is None else read_task_file(section.file)[0]
    return make(
        task_name(section),
        file,
        demonstration_seed=config.seed if section.shuffle_demonstrations else None,
        evaluator_seed=config.seed if config.search.shuffle_evaluator else None,
    )


def _module_path(module: str) -> tuple[str, str]:
    """(file, class) of `my_task.py:MyTask`."""
    path, _, name = module.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise ConfigError(f"task.module: expected a file and a class, such as my_task.py:MyTask, got '{module}'")
    return path, name


def _task_class(module: str) -> type[Task]:
    path, name = _module_path(module)
    if not _code_allowed:
        raise ConfigError(
            f"task.module: {path} is Python code, which is not run; if you have read it, cpo-fast --trust-task-code"
        )
    if not Path(path).is_file():
        raise ConfigError(f"task.module: there is no file {path}; check the path")
    spec = importlib.util.spec_from_file_location(f"cpo_fast_task_{short_hash(str(Path(path).resolve()))}", path)
    assert spec is not None, "a file that ends in .py has a loader"
    assert spec.loader is not None, "and so has its specification"
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # dataclasses look their module up
    try:
        spec.loader.exec_module(loaded)
    except Exception as error:  # whatever code of others raises
        raise ConfigError(f"task.module: {path} cannot be loaded ({failure_detail(error)}); mend it") from error
    found = getattr(loaded, name, None)
    if not isinstance(found, type) or not issubclass(found, Task):
        raise ConfigError(f"task.module: {path} has no class {name} that derives from cpo_fast.tasks.Task")
    return found


def load_questions(config: Config) -> tuple[Task, list[Question]]:
    """The task and the questions that `config.task` names.

    Raises:
        ConfigError: `task.path` is empty or skips every question. DataError: the file is not usable.
    """
    task = load_task(config)
    if not config.task.path:
        raise ConfigError("task.path is empty; set it to the question file, such as SVAMP.json or a JSONL of questions")
    questions = task.load(config.task.path, config.task.num_questions, config.task.skip_questions)
    if not questions:  # a file without any was refused by `load`
        raise ConfigError(f"task.skip_questions: {config.task.skip_questions} leaves no question of {config.task.path}")
    return task, questions


__all__ = [
    "Prompts",
    "Question",
    "Task",
    "allow_task_code",
    "common_prefix_length",
    "encode_prompt",
    "get_task",
    "load_questions",
    "load_task",
    "task_name",
    "with_clock",
]
