"""Search every question of a task and write one tree each: resumable, bounded, and the same bytes on every run.

    run/trees.jsonl            one line a question, appended when its search ends (see `tree_store`)
    run/prompts/<hash>.json    the prompt part that all questions share, once
    run/statistics.jsonl       the trees in numbers
    run/timings.jsonl          the seconds from a question's start to its end, which never go into a tree
    run/collect.yaml           the configuration, every setting of it

A killed run loses the lines that were being generated (see `answer_cache`). A question whose search raises is recorded
with status `failed` and its reason, and the run goes on. Questions already in the file, failed ones included, are skipped:
delete a line to search its question again.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from cpo_fast import progress as progress_line
from cpo_fast.config import Config, SearchConfig, keep_config
from cpo_fast.dtype import dtype_name
from cpo_fast.errors import ConfigError, EnvironmentProblem
from cpo_fast.files import write_jsonl
from cpo_fast.interrupts import Kept, stopped_by_signals
from cpo_fast.search.answer_cache import AnswerFiles
from cpo_fast.search.engine import Engine
from cpo_fast.search.search_settings import KEPT, search_settings
from cpo_fast.search.state_evaluator import check_evaluator
from cpo_fast.search.statistics import CollectResult, summarise, tree_statistics
from cpo_fast.search.tree_search import search_question
from cpo_fast.search.tree_store import ALONE, TreeStore, Worker, open_trees, provenance_of
from cpo_fast.tasks import Prompts, load_questions
from cpo_fast.tasks.unknown_text import unknown_questions
from cpo_fast.tree import SearchTree

logger = logging.getLogger(__name__)

# (how many of this worker's questions are finished, how many it has, the newest tree, seconds from its start to its end)
Progress = Callable[[int, int, SearchTree, float], None]


def load_searched_model(config: Config) -> tuple[Any, Any]:
    """Model and tokenizer that `config.model` names.

    Raises:
        ConfigError: an adapter is to be merged and none is set, or the engine cannot compute it. Besides, what
            `load_model` raises.
    """
    if config.search.merge_adapter and config.model.adapter is None:
        raise ConfigError(
            "search.merge_adapter: there is no adapter to merge; set model.adapter to its folder, or "
            "search.merge_adapter=false"
        )
    from cpo_fast.models import check_forest_adapter, check_model_path, load_model

    check_model_path(config.model.path)  # before libraries load
    if config.model.adapter is not None and config.search.engine == "arena" and not config.search.merge_adapter:
        check_forest_adapter(config.model)
    return load_model(config.model)


def searched_weights(model: Any, config: SearchConfig) -> AbstractContextManager[None]:
    """The weights that `config` wants searched, for the length of a `with`."""
    if not config.merge_adapter:
        return nullcontext()
    from cpo_fast.adapters import merged_adapter

    return merged_adapter(model)


def configured_engine(config: SearchConfig, prompts: Prompts, model: Any, **options: Any) -> Engine:
    """The engine that `config` names, nothing computed yet. `options` are of `ArenaEngine`. Raises as `build_engine`."""
    if config.engine == "hf":
        from cpo_fast.search.engine.huggingface import HuggingFaceEngine

        return HuggingFaceEngine(model, prompts.tokenizer, config.side_by_side()[0])
    from cpo_fast.search.engine.arena_engine import ArenaEngine
    from cpo_kernels.integrations.transformers.model import model_parts
    from cpo_kernels.integrations.transformers.proof import path_limit
    from cpo_kernels.self_check import KernelCheckError

    try:
        engine = ArenaEngine(model, prompts.tokenizer, config, **options)
    except KernelCheckError as error:
        raise EnvironmentProblem(str(error)) from error
    except ValueError as error:
        raise ConfigError(f"search.engine: arena: {error}; set search.engine=hf") from None
    # else every question would fail by itself
    limit = path_limit(model_parts(model))
    num_shared = max(map(len, prompts.prefixes))
    if limit is not None and num_shared >= limit[0]:
        raise ConfigError(
            f"search.engine: arena: every prompt of the task has more than {num_shared} tokens and the model has "
            f"{limit[1]}; set search.engine=hf"
        )
    return engine


EngineMaker = Callable[[SearchConfig, Prompts, Any], Engine]  # as `configured_engine`


def build_engine(
    config: SearchConfig, prompts: Prompts, model: Any, make_engine: EngineMaker = configured_engine
) -> Engine:
    """An engine with what all prompts share already computed.

    Raises:
        ConfigError: the arena engine cannot compute this model exactly.
        EnvironmentProblem: its kernels are wrong on this device.
        OutOfMemory: the shared prompts do not fit into the arena.
    """
    progress_line.doing("reading the shared prompts")
    engine = make_engine(config, prompts, model)
    for prefix in prompts.prefixes:
        engine.cache_prefix(prefix)
    progress_line.doing("")
    progress_line.counted_by(getattr(engine, "counts", None))
    return engine


def max_thoughts(config: SearchConfig) -> int:
    """The most thoughts that the search of one question samples, level by level or in simulations."""
    levels = 1 + config.num_kept * (config.max_steps - 1)
    return min(
        config.max_nodes, config.num_candidates * (config.num_simulations if config.strategy == "mcts" else levels)
    )


def collect(
    config: Config,
    model: Any = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
    worker: Worker = ALONE,
    make_engine: EngineMaker = configured_engine,
) -> CollectResult:
    """Run the search for every question of `config.task` that is not finished yet.

    Args:
        config: `run`, `seed`, `model`, `task` and `search` are used.
        model, tokenizer: an already loaded pair. None loads `config.model`.
        progress: called after each question that was searched.
        worker: this process among several that collect together, each of which searches its own questions.
        make_engine: gives what answers the searches.

    Raises:
        ConfigError: no question file or no model is configured, `search.merge_adapter` cannot be done exactly, or
            `search.evaluator` cannot judge for this task.
        DataError: the question file or the existing trees are not usable. See `tree_store`.
        EnvironmentProblem: another process collects as the same worker.
        Interrupted: SIGTERM or SIGUSR1 came; what is finished is kept.
    """
    with stopped_by_signals("nothing was searched yet; the same command begins") as kept:
        return _collect(config, model, tokenizer, progress, worker, make_engine, kept)


def _collect(
    config: Config,
    model: Any,
    tokenizer: Any,
    progress: Progress | None,
    worker: Worker,
    make_engine: EngineMaker,
    kept: Kept,
) -> CollectResult:
    task, questions = load_questions(config)
    check_evaluator(config.search, task)
    if (model is None) != (tokenizer is None):
        raise ValueError("pass model and tokenizer together, or neither")
    if model is None:
        model, tokenizer = load_searched_model(config)
    prompts = Prompts(task, tokenizer, config.task.chat)
    if sentence := unknown_questions(tokenizer, ((one.id, one.text) for one in questions)):
        logger.warning("%s", sentence)
    provenance = provenance_of(config, prompts, model)
    run = Path(config.run)
    settings = search_settings(config, task, dtype_name(model.dtype))
    with open_trees(run / "trees.jsonl", provenance, questions, worker, settings) as store:
        prompts.shared.save(store.path)
        keep_config(run / KEPT, config)  # not before the trees that are there have been found to be of it
        num_resumed = sum(question.id in store.trees for question in questions)
        # skipped: what is finished, failed ones included
        own = [question for question in questions if worker.owns(question.id)]
        missing = [question for question in own if question.id not in store.trees]
        kept.say = partial(_remains, store, [question.id for question in own])
        answers = AnswerFiles(run / "answers", provenance)
        answers.discard(store.trees)  # of a kill between writing a tree and forgetting its answers
        seconds = 0.0
        if missing:
            with (
                progress_line.stage("search", unit="questions") as shown,
                searched_weights(model, config.search),
                closing(answers),
            ):
                # inside, because what the engine stores follows from the merged weights
                engine = build_engine(config.search, prompts, model, make_engine)
                started = time.perf_counter()
                searches = ((each.id, search_question(config, prompts, each, provenance)) for each in missing)
                num_done = len(own) - len(missing)
                shown.at(num_done, len(own))
                shown.max_thoughts = max_thoughts(config.search)
                for name, tree, tree_seconds in engine.run(searches, answers):
                    assert isinstance(tree, SearchTree), "a search returns its tree, failed or not"
                    store.append(tree, tree_seconds)
                    answers.discard([name])  # only now that the tree is on disk
                    num_done += 1
                    shown.at(num_done, len(own))
                    if progress is not None:
                        progress(num_done, len(own), tree, tree_seconds)
                seconds = time.perf_counter() - started
        is_whole = store.finish()
        trees = [store.trees[question.id] for question in questions if question.id in store.trees]
    counted = [tree_statistics(tree) for tree in trees]
    if is_whole:
        write_jsonl(run / "statistics.jsonl", (one.to_dict() for one in counted))
    path = store.path if is_whole else store.own_path
    num_other = len(store.trees) - len(trees)
    return summarise(path, trees, counted, task, len(questions), num_resumed, seconds, num_other)


def _remains(store: TreeStore, own: Sequence[str]) -> str:
    """What a search that is stopped has kept, and how it goes on."""
    num_done = sum(name in store.trees for name in own)
    return (
        f"{num_done} of {len(own)} questions are finished and kept in {store.path.parent}, with the answers to those under "
        "way; the same command goes on from there"
    )
