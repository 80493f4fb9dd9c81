"""Search every question of a task and write one tree each: resumable, bounded, and the same bytes on every run.

`run/trees.jsonl` gets one line a question in one append; `run/prompts/<hash>.json` the few-shot prompt, once;
`run/statistics.jsonl` the trees in numbers; `run/timings.jsonl` the seconds from a question's start to its end, which
never go into a tree. Several workers share the questions out by the hash of their ids and exchange nothing; the last to
finish joins their files (see `tree_file`). A killed worker loses the lines that were being generated; what was answered
for questions in flight is kept until their trees are written (see `answer_log`). A question whose
search raises (one that is longer than the model's context, for instance) is recorded with status `failed` and its
reason, and the run goes on. Questions already in the file, failed ones included, are skipped: delete a line to search
its question again.
"""

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from cpo_fast.config import Config
from cpo_fast.errors import ConfigError
from cpo_fast.files import write_jsonl
from cpo_fast.search.answer_log import AnswerLog
from cpo_fast.search.build import build_engine, load_searched_model, searched_weights
from cpo_fast.search.engine import Engine
from cpo_fast.search.provenance import provenance_of
from cpo_fast.search.question_search import QuestionSearch
from cpo_fast.search.root import RootPrompts
from cpo_fast.search.statistics import tree_statistics
from cpo_fast.search.summary import CollectResult, summarise
from cpo_fast.search.tree_file import TreeFile, open_trees
from cpo_fast.search.worker import Worker
from cpo_fast.tasks import Question, Task, get_task
from cpo_fast.tree import SearchTree

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
