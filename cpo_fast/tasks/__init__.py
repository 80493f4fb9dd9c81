"""Task families: where questions come from, how prompts are built, and what an answer is. Imports no torch."""

from cpo_fast.errors import ConfigError
from cpo_fast.tasks.arithmetic import ArithmeticTask
from cpo_fast.tasks.fact_verification import FactVerificationTask
from cpo_fast.tasks.multi_hop_qa import MultiHopQATask
from cpo_fast.tasks.prompts import (
    common_prefix_length,
    encode_prompt,
    encode_question,
    evaluator_text,
    question_text,
    shared_text,
)
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
    """The task of a configuration's `task.name`.

    Args:
        name: a data set.
        demonstration_seed: order of the chain-of-thought demonstrations; None keeps the written one.
        evaluator_seed: order of the demonstrations of verdicts; None keeps the written one.

    Raises:
        ConfigError: there is no task of that name.
    """
    if name not in _FAMILIES:
        raise ConfigError(f"task.name: '{name}' is not a task; choose one of {', '.join(sorted(_FAMILIES))}")
    return _FAMILIES[name](name, demonstration_seed, evaluator_seed)


__all__ = [
    "ArithmeticTask",
    "FactVerificationTask",
    "MultiHopQATask",
    "Question",
    "Task",
    "common_prefix_length",
    "encode_prompt",
    "encode_question",
    "evaluator_text",
    "get_task",
    "question_text",
    "shared_text",
]
