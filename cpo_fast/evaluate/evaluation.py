"""Ask every question of a task, by greedy chain or by tree of thought, and measure answers, seconds and tokens.

The prompt is the task's own, tokenised as the search tokenises it, so a model is measured on the very format it was
trained on. With `eval.batch_size: 1` chains run through the search engine, one question at a time, which is what
latency is quoted at. Larger batches run through `generate`, and a question's seconds are its batch's divided by its
questions. A tree is always searched alone, answers by its vote, and is not kept.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpo_fast.config import Config, config_hash
from cpo_fast.dtype import dtype_name
from cpo_fast.errors import CpoFastError, failure_detail
from cpo_fast.evaluate.result import Evaluation, Method, QuestionResult, RunIdentity, summarise
from cpo_fast.files import canonical_json, short_hash
from cpo_fast.search.collect import EngineMaker, build_engine, configured_engine, load_searched_model, searched_weights
from cpo_fast.search.engine import Engine, Requests, SampleRequest, run_search
from cpo_fast.search.tree_search import search_question
from cpo_fast.tasks import Prompts, Question, Task, load_questions
from cpo_fast.tasks.prompts import ANY_QUESTION
from cpo_fast.tree import ROOT, comparable

if TYPE_CHECKING:
    from cpo_fast.evaluate.chain import Chain

logger = logging.getLogger(__name__)


def evaluate(
    config: Config,
    model: Any = None,
    tokenizer: Any = None,
    on_question: Callable[[int, int], None] | None = None,
    make_engine: EngineMaker = configured_engine,
) -> Evaluation:
    """Ask every question by the one method that `config.eval.method` names, and write both files into `config.run`.

    Args:
        config: model (with `model.adapter` for a trained one), task, eval, and search: `search.max_steps` caps the
            lines of a chain as it does in a tree, and `search.merge_adapter` says how the adapter takes part in either.
        model, tokenizer: those that `config.model` names, already loaded. None loads them.
        on_question: called with (questions done, questions in all) after each.
        make_engine: gives what answers chains that are asked one at a time, and searches.

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
    """As `evaluate`, for every method that `config.eval.method` names: the same model asked the same questions."""
    if (model is None) != (tokenizer is None):
        raise ValueError("pass model and tokenizer together, or neither")
    task, questions = load_questions(config)
    methods: tuple[Method, ...] = ("cot", "tot") if config.eval.method == "both" else (config.eval.method,)
    if model is None:
        # after the questions, whose mistakes then show before a model is loaded
        model, tokenizer = load_searched_model(config)
    asker = _Asker(config, questions, model, Prompts(task, tokenizer, config.task.chat), make_engine)
    evaluations = []
    with searched_weights(model, config.search):
        for number, method in enumerate(methods):
            results = []  # gold answers are read here, when an answer is generated
            for result in asker.ask_all(method):
                results.append(result)
                if on_question is not None:
                    on_question(number * len(questions) + len(results), len(methods) * len(questions))
            evaluations.append(_finished(config, task, asker, method, results))
    return evaluations


def _finished(config: Config, task: Task, asker: "_Asker", method: Method, results: list[QuestionResult]) -> Evaluation:
    """The evaluation of these results, both its files written."""
    if all(result.stop == "failed" for result in results):
        raise CpoFastError(f"every question failed; the first, '{results[0].id}': {results[0].detail}")
    label = ("base" if config.model.adapter is None else "adapter") + ("-tot" if method == "tot" else "")
    evaluation = summarise(label, method, task.name, asker.identity(method), results, asker.setup_seconds(method))
    evaluation.write(Path(config.run))
    return evaluation


@dataclass(frozen=True)
class QuestionAnswer:
    """What either method gives back for one question. Fields as in `QuestionResult`."""

    answer: str | None
    num_tokens: int
    seconds: float
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

    def ask_all(self, method: Method) -> Iterator[QuestionResult]:
        answers = self._batched_chains() if self._is_batched(method) else self._one_by_one(method)
        for question, answer in zip(self._questions, answers, strict=True):
            yield self._result(question, answer)

    def setup_seconds(self, method: Method) -> float:
        """What `method` paid once, before the first question."""
        return 0.0 if self._is_batched(method) else self._engine[1]

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
            engine="generate" if self._is_batched(method) else config.search.engine,
            batch_size=config.eval.batch_size if method == "cot" else 1,
        )

    def _is_batched(self, method: Method) -> bool:
        return method == "cot" and self._config.eval.batch_size > 1

    def _batched_chains(self) -> Iterator[QuestionAnswer]:
        from cpo_fast.evaluate.chain import greedy_chains

        chains = greedy_chains(
            self._model,
            self._prompts.tokenizer,
            [self._prompts.encode(question) for question in self._questions],
            self._task,
            max_new_tokens=self._config.eval.max_new_tokens,
            max_steps=self._config.search.max_steps,
            batch_size=self._config.eval.batch_size,
        )
        return (self._of_chain(chain) for chain in chains)

    def _one_by_one(self, method: Method) -> Iterator[QuestionAnswer]:
        engine, _ = self._engine
        ask = self._chain if method == "cot" else self._tree
        for question in self._questions:
            start = time.perf_counter()
            try:
                answer = ask(engine, question)
            except Exception as error:  # one bad question must not end a run of thousands; the reason is kept with it
                logger.debug("question %r failed", question.id, exc_info=error)
                answer = QuestionAnswer(
                    None, 0, time.perf_counter() - start, "failed", "", detail=failure_detail(error)
                )
            if answer.stop == "failed":
                logger.warning("question %r failed: %s", question.id, answer.detail)
            yield answer

    def _chain(self, engine: Engine, question: Question) -> QuestionAnswer:
        from cpo_fast.evaluate.chain import engine_chain

        caps = {"max_new_tokens": self._config.eval.max_new_tokens, "max_steps": self._config.search.max_steps}
        prompt_ids = self._prompts.encode(question)
        return self._of_chain(engine_chain(engine, self._prompts.tokenizer, prompt_ids, self._task, **caps))

    def _of_chain(self, chain: "Chain") -> QuestionAnswer:
        return QuestionAnswer(chain.answer(self._task), chain.num_tokens, chain.seconds, chain.stop, chain.text)

    def _tree(self, engine: Engine, question: Question) -> QuestionAnswer:
        return tree_answer(engine, self._config, self._prompts, question)

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
            engine = build_engine(self._config.search, self._prompts, self._model, self._make_engine)
            # what a first call pays once is no question's cost
            warm_up = SampleRequest(tuple(self._prompts.encode(ANY_QUESTION)), "warm-up", 0.0, 1.0, 2)
            with suppress(ValueError):  # every question will fail as this one does, and say why
                engine.answer(Requests((warm_up,), keep=False))
            self._engine_and_setup = engine, time.perf_counter() - start
        return self._engine_and_setup


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
