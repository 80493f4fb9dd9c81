"""Task families: where questions come from, how prompts are built, and what an answer is. Imports no torch."""

from cpo_fast.errors import ConfigError
from cpo_fast.tasks.arithmetic import ArithmeticTask
from cpo_fast.tasks.prompt import common_prefix_length, encode_prompt
from cpo_fast.tasks.task import Question, Task

_TASKS: dict[str, type[Task]] = {"svamp": ArithmeticTask}


def get_task(name: str) -> Task:
    """The task of a configuration's `task.name`. Raises ConfigError for a name that is none."""
    if name not in _TASKS:
        raise ConfigError(f"task.name: '{name}' is not a task; choose one of {', '.join(sorted(_TASKS))}")
    return _TASKS[name]()


__all__ = ["ArithmeticTask", "Question", "Task", "common_prefix_length", "encode_prompt", "get_task"]
