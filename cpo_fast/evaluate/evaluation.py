"""Ask every question of a task, by greedy chain or by tree of thought, and measure answers, seconds and tokens.

The prompt is the task's own, tokenised as the search tokenises it, so a model is measured on the very format it was
trained on. Everything runs through the search engine. The first `eval.latency_questions` chains are asked one at a time,
which is what seconds are quoted from, and the others `eval.batch_size` side by side. A tree is always searched alone,
answers by its vote, and is not kept.
"""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpo_fast.config import Config, SearchConfig, config_hash, keep_config
from cpo_fast.dtype import dtype_name
from cpo_fast.errors import CpoFastError, failure_detail
from cpo_fast.evaluate.chain import Chain, chain_search
from cpo_fast.evaluate.result import Evaluation, Method, QuestionResult, RunIdentity, free_label, summarise
from cpo_fast.files import canonical_json, short_hash
from cpo_fast.repeats import Repeats
from cpo_fast.search.collect import EngineMaker, build_engine, configured_engine, load_searched_model, searched_weights
from cpo_fast.search.engine import Engine, Requests, SampleRequest, Search, run_search
from cpo_fast.search.state_evaluator import check_evaluator
from cpo_fast.search.tree_search import search_question
from cpo_fast.tasks import Prompts, Question, Task, load_questions
from cpo_fast.tasks.prompts import ANY_QUESTION
from cpo_fast.tasks.unknown_text import unknown_questions
from cpo_fast.tree import ROOT, comparable

logger = logging.getLogger(__name__)

KEPT = "eval.yaml"


def evaluate(
    config: Config,
    model: Any = None,
    tokenizer: Any = None,
    on_question: Callable[[int, int], None] | None = None,
    make_engine: EngineMaker = configured_engine,
) -> Evaluation:
    """Ask every question by the one method that `config.eval.method` names, and write both files into `config.run`.

    Args:
        config: model (with `model.adapter` for a trained one), task, eval (whose `path` takes the place of the task's),
            and search: `search.max_steps` caps the lines of a chain as it does in a tree, and `search.merge_adapter` says
            how the adapter takes part in either.
        model, tokenizer: those that `config.model` names, already loaded. None loads them.
        on_question: called with (questions done, questions in all) after each.
        make_engine: gives what answers chains and searches.

    Raises:
        CpoFastError: the questions or the model cannot be read (see `load_questions` and `load_model`), or not one
            question could be asked.
        ValueError: `eval.method` is both (`evaluate_methods` does that), or a model comes without its tokenizer.
    """
    if config.eval.method == "both":
        raise ValueError("expected eval.method cot or tot, got both; call evaluate_methods")
    return evaluate_methods(config, model, tokenizer, on_question, make_engine)[0]


def evaluate_methods(
    config: Config,
    model: Any = None,
    tokenizer: Any = None,
    on_question: Callable[[int, int], None] | None = None,
    make_engine: EngineMaker = configured_engine,
) -> list[Evaluation]:
    """As `evaluate`, for every method that `config.eval.method` names: the same model asked the same questions.

    The newest configuration stays beside the results, in `eval.yaml`.
    """
    if (model is None) != (tokenizer is None):
        raise ValueError("pass model and tokenizer together, or neither")
    asked_by = config
    # what is recorded names the questions that were asked, by whichever key
    config = config.model_copy(update={"task": config.task.asking(config.eval.path)})
    task, questions = load_questions(config)
    if sentence := task.unreadable_gold(questions):
        logger.warning("%s", sentence)
    methods: tuple[Method, ...] = ("cot", "tot") if config.eval.method == "both" else (config.eval.method,)
    if "tot" in methods:
        check_evaluator(config.search, task)
    if model is None:
        # after the questions, whose mistakes then show before a model is loaded
        model, tokenizer = load_searched_model(config)
    if unknown := unknown_questions(tokenizer, ((one.id, one.text) for one in questions)):
        logger.warning("%s", unknown)
    asker = _Asker(config, questions, model, Prompts(task, tokenizer, config.task.chat), make_engine)
    evaluations = []
    with searched_weights(model, config.search):
        for number, method in enumerate(methods):
            first, total = number * len(questions), len(methods) * len(questions)

            def answered(num_answers: int, first: int = first, total: int = total) -> None:
                if on_question is not None:
                    on_question(first + num_answers, total)

            evaluations.append(_finished(config, task, asker, method, answered))
            keep_config(Path(config.run) / KEPT, asked_by)
    return evaluations


def _finished(
    config: Config, task: Task, asker: "_Asker", method: Method, answered: Callable[[int], None]
) -> Evaluation:
    """The evaluation by one method, both its files written."""
    setup_seconds = asker.setup_seconds
    started = time.perf_counter()
    results = asker.ask_all(method, answered)
    seconds = time.perf_counter() - started
    if all(result.stop == "failed" for result in results):
        raise CpoFastError(f"every question failed; the first, '{results[0].id}': {results[0].detail}")
    label = free_label(Path(config.run), config.model.adapter, method)
    evaluation = summarise(label, method, task.name, asker.identity(method), results, setup_seconds, seconds)
    evaluation.write(Path(config.run))
    return evaluation


@dataclass(frozen=True)
class QuestionAnswer:
    """What either method gives back for one question. Fields as in `QuestionResult`."""

    answer: str | None
    num_tokens: int
    seconds: float | None
    stop: str
    text: str
    num_verdict_tokens: int = 0
    detail: str = ""


class _Asker:
    """One model, one task, its questions."""

    def __init__(
        self, config: Config, questions: list[Question], model: Any, prompts: Prompts, make_engine: EngineMaker
    ) -> None:
        self._config = config
        self._questions = questions
        self._model = model
        self._prompts = prompts
        self._task = prompts.task
        self._make_engine = make_engine
        self._engine_and_setup: tuple[Engine, float] | None = None

    def ask_all(self, method: Method, answered: Callable[[int], None]) -> list[QuestionResult]:
        """The results of all questions, in order. `answered` is called with how many there are, after each."""
        questions = self._questions
        num_alone = len(questions) if method == "tot" else self._config.eval.latency_questions
        results: dict[str, QuestionResult] = {}
        repeats = Repeats()

        def take(question: Question, answer: QuestionAnswer) -> None:
            if answer.stop == "failed" and repeats.says(answer.detail):
                logger.warning("question %r failed: %s", question.id, answer.detail)
            results[question.id] = self._result(question, answer)  # a gold answer is read when an answer is there
            answered(len(results))

        try:
            for question in questions[:num_alone]:
                take(question, self._alone(method, question))
            by_name = {question.id: question for question in questions[num_alone:]}
            searches = ((name, self._chain(question)) for name, question in by_name.items())
            for name, outcome, _ in self._engine[0].run(searches):
                if isinstance(outcome, Exception):
                    take(by_name[name], _failed(name, outcome, None))
                else:
                    take(by_name[name], self._of_chain(outcome, None))
        finally:
            for sentence in repeats.rest():
                logger.warning("%s", sentence)
        return [results[question.id] for question in questions]

    @property
    def setup_seconds(self) -> float:
        """What is paid once, before the first question."""
        return self._engine[1]

    def identity(self, method: Method) -> RunIdentity:
        from cpo_fast.adapters import adapter_hash
        from cpo_fast.models import model_hash

        config = self._config
        settings: dict[str, Any] = {
            "max_steps": config.search.max_steps,
            "max_new_tokens": config.eval.max_new_tokens,
            "merge_adapter": config.search.merge_adapter,  # rounds otherwise than a live adapter
        }
        if method == "tot":
            settings = {"search": config.search.result_settings(), "seed": config.seed}
        prompts = self._prompts.one_of_each(ANY_QUESTION)
        return RunIdentity(
            model=config.model.path,
            model_hash=model_hash(config.model.path),
            adapter_hash=adapter_hash(config.model.adapter),
            dtype=dtype_name(self._model.dtype),
            device=str(self._model.device),
            task_hash=config_hash(config.task),
            # a chain reads no evaluator prompt
            prompt_hash=short_hash(canonical_json(prompts if method == "tot" else prompts[:1])),
            settings_hash=short_hash(canonical_json(settings)),
            engine=config.search.engine,
            batch_size=config.eval.batch_size if method == "cot" and config.search.engine == "arena" else 1,
            adapter=config.model.adapter or "",
        )

    def _alone(self, method: Method, question: Question) -> QuestionAnswer:
        engine, _ = self._engine
        start = time.perf_counter()
        try:
            if method == "tot":
                return tree_answer(engine, self._config, self._prompts, question)
            chain = run_search(engine, self._chain(question))
            return self._of_chain(chain, time.perf_counter() - start)
        except Exception as error:  # one bad question must not end a run of thousands; the reason is kept with it
            return _failed(question.id, error, time.perf_counter() - start)

    def _chain(self, question: Question) -> Search[Chain]:
        return chain_search(
            self._prompts.tokenizer,
            self._prompts.encode(question),
            self._task,
            self._config.eval.max_new_tokens,
            self._config.search.max_steps,
        )

    def _of_chain(self, chain: Chain, seconds: float | None) -> QuestionAnswer:
        return QuestionAnswer(chain.answer(self._task), chain.num_tokens, seconds, chain.stop, chain.text)

    def _result(self, question: Question, answer: QuestionAnswer) -> QuestionResult:
        gold = question.gold
        return QuestionResult(
            id=question.id,
            question=question.text,
            gold=gold,
            answer=answer.answer,
            correct=None if gold is None else self._task.is_correct(answer.answer, gold),
            scores={} if gold is None else self._task.score_answer(answer.answer, gold),
            num_tokens=answer.num_tokens,
            num_verdict_tokens=answer.num_verdict_tokens,
            seconds=answer.seconds,
            stop=answer.stop,
            chain=answer.text,
            detail=answer.detail,
        )

    @property
    def _engine(self) -> tuple[Engine, float]:
        """The search engine with every shared prompt in its cache, and the seconds that took. Made when first used."""
        if self._engine_and_setup is None:
            start = time.perf_counter()
            search = chains_side_by_side(self._config)
            engine = build_engine(search, self._prompts, self._model, self._make_engine)
            # what a first call pays once is no question's cost
            warm_up = SampleRequest(tuple(self._prompts.encode(ANY_QUESTION)), "warm-up", 0.0, 1.0, 2)
            with suppress(ValueError):  # every question will fail as this one does, and say why
                engine.answer(Requests((warm_up,), keep=False))
            self._engine_and_setup = engine, time.perf_counter() - start
        return self._engine_and_setup


def chains_side_by_side(config: Config) -> SearchConfig:
    """Settings of an engine that runs `eval.batch_size` chains at a time."""
    at_once = config.eval.batch_size
    sizes = {"questions_in_flight": at_once, "batch_size": max(at_once, config.search.side_by_side()[0])}
    return config.search.model_copy(update=sizes)


def _failed(name: str, error: Exception, seconds: float | None) -> QuestionAnswer:
    logger.debug("question %r failed", name, exc_info=error)
    return QuestionAnswer(None, 0, seconds, "failed", "", detail=failure_detail(error))


def tree_answer(engine: Engine, config: Config, prompts: Prompts, question: Question) -> QuestionAnswer:
    """Search one question alone and vote. The text is the best winning path, and empty without a winner."""
    start = time.perf_counter()
    tree = run_search(engine, search_question(config, prompts, question))
    seconds = time.perf_counter() - start
    # max keeps the first of equals; there is no winner when nothing was complete
    best = max(tree.winning_nodes, key=lambda winner: comparable(tree.nodes[winner].value), default=ROOT)
    return QuestionAnswer(
        answer=tree.answer,
        # losers, duplicates and empty thoughts included: a tree is charged all that it generated
        num_tokens=tree.num_thought_tokens + tree.num_verdict_tokens,
        seconds=seconds,
        stop=tree.status,
        text="".join(node.text for node in tree.path(best)),
        num_verdict_tokens=tree.num_verdict_tokens,
        detail=tree.detail,
    )
