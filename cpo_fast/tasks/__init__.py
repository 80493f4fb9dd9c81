"""Task families: where questions come from, how prompts are built, and what an answer is. Imports no torch."""

from cpo_fast.config import Config
from cpo_fast.errors import ConfigError
from cpo_fast.tasks.arithmetic import ArithmeticTask
from cpo_fast.tasks.fact_verification import FactVerificationTask
from cpo_fast.tasks.multi_hop_qa import MultiHopQATask
from cpo_fast.tasks.prompts import Prompts, common_prefix_length, encode_prompt, with_clock
from cpo_fast.tasks.task import Question, Task

_FAMILIES: dict[str, type[Task]] = {
    "svamp": ArithmeticTask,
    "gsm8k": ArithmeticTask,
    "bamboogle": MultiHopQATask,
    "2wikimultihopqa": MultiHopQATask,
    "hotpotqa": MultiHopQATask,
    "fever": FactVerificationTask,
    "feverous": FactVerificationTask,
    "vitaminc": FactVerificationTask,
}


def get_task(name: str, demonstration_seed: int | None = None, evaluator_seed: int | None = None) -> Task:
    """The task that `task.name` names, or ConfigError. The seeds are as in `Task`."""
    if name not in _FAMILIES:
        raise ConfigError(f"task.name: '{name}' is not a task; choose one of {', '.join(sorted(_FAMILIES))}")
    return _FAMILIES[name](name, demonstration_seed, evaluator_seed)


def load_task(config: Config) -> Task:
    """The task that `config.task` names, its demonstrations in the order that the configuration and the seed give."""
    return get_task(
        config.task.name,
        demonstration_seed=config.seed if config.task.shuffle_demonstrations else None,
        evaluator_seed=config.seed if config.search.shuffle_evaluator else None,
    )


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
    "ArithmeticTask",
    "FactVerificationTask",
    "MultiHopQATask",
    "Prompts",
    "Question",
    "Task",
    "common_prefix_length",
    "encode_prompt",
    "get_task",
    "load_questions",
    "load_task",
    "with_clock",
]
