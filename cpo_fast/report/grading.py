"""Whether an answer of a search is right: by the rules of its task, as far as no code of a task has to run for it."""

from collections.abc import Callable
from contextlib import suppress

from cpo_fast.config import Config
from cpo_fast.errors import CpoFastError
from cpo_fast.tasks import get_task, load_task, task_name
from cpo_fast.tasks.answers import exact_match

Grader = Callable[[str | None, str], bool]  # (answer, gold)


def grader(task: str, config: Config | None) -> tuple[Grader, str]:
    """How answers of the task of this name are graded, and by what, in words.

    By a task that ships, or by the task file that `config` names where that is still the one. Else answers are compared.
    """
    with suppress(CpoFastError):
        return get_task(task).is_correct, f"the rules of {task}"
    with suppress(CpoFastError):
        if config is not None and not config.task.module and task_name(config.task) == task:
            return load_task(config).is_correct, f"the rules of {task}"
    return lambda answer, gold: answer is not None and (answer == gold or exact_match(answer, gold)), "equal words"
