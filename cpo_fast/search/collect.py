"""Search every question of a task and write one tree each: resumable, bounded, and the same bytes on every run.

`run/trees.jsonl` gets one line a question in one append; `run/prompts/<hash>.json` the few-shot prompt, once;
`run/statistics.jsonl` the trees in numbers; `run/timings.jsonl` the seconds from a question's start to its end, which
never go into a tree. Several workers share the questions out by the hash of their ids and exchange nothing; the last to
finish joins their files (see `tree_file`). A killed worker loses the lines that were being generated; what was answered
for questions in flight is kept until their trees are written (see `answer_log`). A question whose
search raises (one that is longer than the model's context, for instance) is recorded with status `failed` and its
reason, and the run goes on. Questions already in the file, failed ones included, are skipped: delete a line to search
its question again.

The engine of a run: model and tokenizer with every prompt that all questions share already in the cache.

What two unlike questions have in common is what all have in common. It does not depend on a run's own questions, so a
restart splits its forwards in the same places and rounds the same.

The search of one question from its prompt to its line in `trees.jsonl`, whatever became of it.
"""

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cpo_fast.config import Config, SearchConfig
from cpo_fast.errors import ConfigError, EnvironmentProblem
from cpo_fast.files import write_jsonl
from cpo_fast.search.answer_cache import AnswerLog
from cpo_fast.search.engine import Engine, Search
from cpo_fast.search.statistics import CollectResult, summarise, tree_statistics
from cpo_fast.search.tree_search import SearchOutcome, search_question
from cpo_fast.search.tree_store import Provenance, TreeFile, Worker, open_trees, provenance_of
from cpo_fast.tasks import (
    Question,
    Task,
    common_prefix_length,
    encode_prompt,
    encode_question,
    evaluator_text,
    get_task,
)
from cpo_fast.tasks.prompts import RootPrompts
from cpo_fast.tasks.task import ANSWER_MARK
from cpo_fast.tree import SearchTree

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
    from cpo_fast.adapters import merged_adapter

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
        from cpo_kernels.integrations.transformers.model import model_parts, sliding_window
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


logger = logging.getLogger(__name__)


class QuestionSearch:
    """One question's search and tree.

    Args:
        config: `seed`, `task.chat` and `search` are used.
        task, question: what is asked.
        roots: the question's prompt as the model reads it. tokenizer: for the evaluator's prompts.
        provenance: written into the tree.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        question: Question,
        roots: RootPrompts,
        tokenizer: Any,
        provenance: Provenance,
    ) -> None:
        self._config = config
        self._task = task
        self._question = question
        self._roots = roots
        self._tokenizer = tokenizer
        self._provenance = provenance
        # what a failed search leaves of these stands in its tree
        self._question_prompt = ""
        self._root_ids: list[int] = []

    def grow(self) -> Search[SearchOutcome]:
        """The search itself, for an engine to drive."""
        self._question_prompt = self._roots.question_part(self._question)
        self._root_ids = self._roots.encode(self._question)
        config = self._config
        outcome = yield from search_question(
            self._tokenizer,
            self._task,
            self._question,
            self._root_ids,
            config.search,
            config.seed,
            config.task.chat,
        )
        return outcome

    def tree(self, result: SearchOutcome | Exception) -> SearchTree:
        """The tree of what `grow` returned, or of status `failed` with the reason that it raised."""
        detail = ""
        if isinstance(result, Exception):
            logger.debug("question %r failed", self._question.id, exc_info=result)  # the tree tells the reason
            first_line = (str(result).splitlines() or [""])[0]
            detail = f"{type(result).__name__}: {first_line}"[:300]
            outcome = SearchOutcome(nodes=(), winning_nodes=(), answer=None, num_empty=0, status="failed")
        else:
            outcome = result
        num_shared_tokens = self._roots.num_shared_tokens(self._root_ids)
        return SearchTree(
            id=self._question.id,
            question=self._question.text,
            question_prompt=self._question_prompt,
            gold=self._question.gold,
            num_shared_tokens=num_shared_tokens,
            question_token_ids=tuple(self._root_ids[num_shared_tokens:]),
            nodes=outcome.nodes,
            winning_nodes=outcome.winning_nodes,
            answer=outcome.answer,
            num_empty=outcome.num_empty,
            status=outcome.status,
            detail=detail,
            num_thought_tokens=outcome.num_thought_tokens,
            num_verdict_tokens=outcome.num_verdict_tokens,
            **asdict(self._provenance),
        )


# (how many of this worker's questions are finished, how many it has, the newest tree, seconds from its start to its end)
Progress = Callable[[int, int, SearchTree, float], None]


def collect(
    config: Config,
    model: Any = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
    worker: Worker | None = None,
) -> CollectResult:
    """Run the search for every question of `config.task` that is not finished yet.

    Args:
        config: `run`, `seed`, `model`, `task` and `search` are used.
        model, tokenizer: an already loaded pair; None loads `config.model`.
        progress: called after each question that was searched.
        worker: this process among several that collect together, each of which searches its own questions; None is one
            alone.

    Raises:
        ConfigError: no question file or no model is configured, or `search.merge_adapter` cannot be done exactly.
        DataError: the question file or the existing trees are not usable; see `tree_file`.
        EnvironmentProblem: another process collects as the same worker.
    """
    worker = worker or Worker()
    task, questions = load_questions(config)
    if (model is None) != (tokenizer is None):
        raise ValueError("pass model and tokenizer together, or neither")
    if model is None:
        model, tokenizer = load_searched_model(config)
    roots = RootPrompts(task, tokenizer, config.task.chat)
    provenance = provenance_of(config, task, roots, model)
    trees_path = Path(config.run) / "trees.jsonl"
    with open_trees(trees_path, provenance, questions, worker) as file:
        num_resumed = sum(question.id in file.trees for question in questions)
        roots.prompt.save(trees_path)
        own = [question for question in questions if worker.owns(question.id)]
        searches = {
            question.id: QuestionSearch(config, task, question, roots, tokenizer, provenance)
            for question in own
            if question.id not in file.trees
        }
        answers = AnswerLog(Path(config.run) / "answers", provenance)
        answers.forget(file.trees)
        seconds = 0.0
        if searches:
            with searched_weights(model, config.search), closing(answers):
                engine = build_engine(task, model, tokenizer, config.search, config.task.chat)
                seconds = _run(engine, searches, file, answers, len(own), progress)
        is_whole = file.finish()
        trees = [file.trees[question.id] for question in questions if question.id in file.trees]
    if is_whole:
        write_jsonl(Path(config.run) / "statistics.jsonl", (tree_statistics(tree).to_dict() for tree in trees))
    path = trees_path if is_whole else file.own_path
    return summarise(path, trees, task, len(questions), num_resumed, seconds)


def _run(
    engine: Engine,
    searches: dict[str, QuestionSearch],
    file: TreeFile,
    answers: AnswerLog,
    num_own: int,
    progress: Progress | None,
) -> float:
    """Drive the searches to their end, each tree into the file at once; wall seconds."""
    started = time.perf_counter()
    for name, result, seconds in engine.run(((name, searches[name].grow()) for name in list(searches)), answers):
        tree = searches.pop(name).tree(result)
        file.append(tree, seconds)
        answers.forget([name])
        if progress is not None:
            progress(num_own - len(searches), num_own, tree, seconds)
    return time.perf_counter() - started


def load_task(config: Config) -> Task:
    """The task that `config.task` names, its demonstrations in the order that the configuration and the seed give."""
    return get_task(
        config.task.name,
        demonstration_seed=config.seed if config.task.shuffle_demonstrations else None,
        evaluator_seed=config.seed if config.search.shuffle_evaluator else None,
    )


def load_questions(config: Config) -> tuple[Task, list[Question]]:
    """The task and the questions that `config.task` names; imports no torch.

    Raises:
        ConfigError: `task.path` is empty or skips every question. DataError: the file is not usable.
    """
    task = load_task(config)
    if not config.task.path:
        raise ConfigError("task.path is empty; set it to the question file, such as SVAMP.json or a JSONL of questions")
    questions = task.load(config.task.path, config.task.num_questions, config.task.skip_questions)
    if not questions:
        raise ConfigError(f"task.skip_questions: {config.task.skip_questions} leaves no question of {config.task.path}")
    return task, questions
