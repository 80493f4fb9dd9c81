"""The engine of a run: model and tokenizer with every prompt that all questions share already in the cache.

What two unlike questions have in common is what all have in common. It does not depend on a run's own questions, so a
restart splits its forwards in the same places and rounds the same.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from cpo_fast.config import Config, SearchConfig
from cpo_fast.errors import ConfigError, EnvironmentProblem
from cpo_fast.search.engine import Engine
from cpo_fast.tasks import Question, Task, common_prefix_length, encode_prompt, encode_question, evaluator_text
from cpo_fast.tasks.task import ANSWER_MARK

PROBES = (Question("", "A"), Question("", "7"))
# a state that ends in a step, and one that ends in an answer, have evaluator prompts of their own
_STATES: tuple[tuple[str, ...], ...] = ((), (f"{ANSWER_MARK} 0\n",))


def evaluator_prompts(task: Task, tokenizer: Any, question: Question, chat: bool) -> list[list[int]]:
    """Token ids of a question's evaluator prompts: after a step, and after an answer."""
    texts = [evaluator_text(tokenizer, task, question, lines, chat) for lines in _STATES]
    return [encode_prompt(tokenizer, text, chat) for text in texts]


def load_searched_model(config: Config) -> tuple[Any, Any]:
    """Model and tokenizer that `config.model` names.

    Raises:
        ConfigError: an adapter is to be merged and none is set; as `load_model` besides.
    """
    if config.search.merge_adapter and config.model.adapter is None:
        raise ConfigError(
            "search.merge_adapter: there is no adapter to merge; set model.adapter to its folder, or "
            "search.merge_adapter=false"
        )
    from cpo_fast.models import load_model

    return load_model(config.model)


def searched_weights(model: Any, settings: SearchConfig) -> AbstractContextManager[None]:
    """The weights that `settings` wants searched, for the length of a `with`; build the engine inside it."""
    if not settings.merge_adapter:
        return nullcontext()
    from cpo_fast.search.merged_adapter import merged_adapter

    return merged_adapter(model)


def build_engine(task: Task, model: Any, tokenizer: Any, settings: SearchConfig, chat: bool) -> Engine:
    """The engine that `settings` names, with the few-shot prompt and the evaluator's prompts prefilled once.

    Raises:
        ConfigError: the arena engine cannot compute this model exactly.
        EnvironmentProblem: its kernels are wrong on this device.
        OutOfMemory: the shared prompts do not fit into the arena.
    """
    prefixes = shared_prefixes(task, tokenizer, chat)
    engine = _engine(model, tokenizer, settings, max(map(len, prefixes)))
    for prefix in prefixes:
        engine.cache_prefix(prefix)
    return engine


def shared_prefixes(task: Task, tokenizer: Any, chat: bool) -> list[list[int]]:
    """Leading token ids that all prompts of a kind have in common: the question prompts', then the evaluator's."""
    prompts, others = (
        [encode_question(tokenizer, task, probe, chat), *evaluator_prompts(task, tokenizer, probe, chat)]
        for probe in PROBES
    )
    return [one[: common_prefix_length(one, other)] for one, other in zip(prompts, others, strict=True)]


def _engine(model: Any, tokenizer: Any, settings: SearchConfig, num_shared: int) -> Engine:
    """The engine for prompts that all have more than `num_shared` tokens."""
    if settings.engine == "arena":
        from cpo_fast.search.engine.arena_engine import ArenaEngine
        from cpo_kernels.integrations.transformers.parts import model_parts
        from cpo_kernels.integrations.transformers.refusals import sliding_window
        from cpo_kernels.self_check import KernelCheckError

        try:
            engine = ArenaEngine(model, tokenizer, settings)
        except KernelCheckError as error:
            raise EnvironmentProblem(str(error)) from error
        except ValueError as error:
            raise ConfigError(f"search.engine: arena: {error}; set search.engine=hf") from None
        window = sliding_window(model_parts(model).config)
        if window is not None and num_shared >= window:
            raise ConfigError(
                f"search.engine: arena: every prompt of the task has more than {num_shared} tokens and the model has a "
                f"sliding window of {window}; set search.engine=hf"
            )
        return engine
    from cpo_fast.search.engine.huggingface import HuggingFaceEngine

    return HuggingFaceEngine(model, tokenizer, settings.batch_size)
