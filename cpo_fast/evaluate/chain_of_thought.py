"""Greedy chain-of-thought accuracy of one model on one set of questions, and the seconds and tokens it took.

The prompt is the task's own few-shot prompt, tokenised as the search tokenises it, so a model is measured on the very
format it was trained on. Two files are written into the run's folder when everything is done: `eval-<label>.jsonl`,
one question a line, and `eval-<label>.json`, the summary. Comparing two models is left to the reader of both.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpo_fast.config import Config, config_hash
from cpo_fast.evaluate.statistics import Spread, spread, wilson_interval
from cpo_fast.files import write_atomic, write_jsonl
from cpo_fast.search.collect import load_questions
from cpo_fast.tasks import encode_prompt

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class QuestionResult:
    """What became of one question: a line of `eval-<label>.jsonl`.

    Attributes:
        id: the question's id.
        gold: normalised reference answer, None when the file has none.
        answer: normalised answer of the chain, None when it reached no readable answer line.
        correct: whether they are equal; None without a reference answer.
        num_tokens: generated tokens, the stopping one included.
        seconds: wall time; with a batch size above 1, the batch's time divided by its questions.
        stop: why the chain ended; see `cpo_fast.evaluate.greedy`.
        chain: the generated text.
    """

    id: str
    gold: str | None
    answer: str | None
    correct: bool | None
    num_tokens: int
    seconds: float
    stop: str
    chain: str


@dataclass(frozen=True)
class Evaluation:
    """The summary: `eval-<label>.json` holds these fields, without `results`.

    Attributes:
        label: `base`, or `adapter` when one is loaded.
        task: name of the task.
        num_questions: questions asked.
        num_graded: those with a reference answer; accuracy is over them.
        num_correct: graded and right.
        num_unanswered: questions whose chain reached no readable answer; wrong when graded.
        accuracy: num_correct / num_graded, None when nothing is graded.
        interval: its Wilson 95 % interval.
        seconds: wall time per question.
        tokens: generated tokens per question.
        batch_size: questions per forward pass; latency is quoted at 1.
        stops: how many chains ended for which reason.
        model: what model.path says.
        model_hash: names the model's files.
        adapter_hash: names the adapter's files; empty without one.
        dtype: precision of the base weights.
        device: where it ran.
        task_hash: hash of the task section.
        eval_hash: hash of the eval section.
        results: one per question, in order.
    """

    label: str
    task: str
    num_questions: int
    num_graded: int
    num_correct: int
    num_unanswered: int
    accuracy: float | None
    interval: tuple[float, float] | None
    seconds: Spread
    tokens: Spread
    batch_size: int
    stops: dict[str, int]
    model: str
    model_hash: str
    adapter_hash: str
    dtype: str
    device: str
    task_hash: str
    eval_hash: str
    results: tuple[QuestionResult, ...]

    def summary(self) -> dict[str, Any]:
        """Everything but the single questions, ready for JSON."""
        values = {name: value for name, value in asdict(self).items() if name != "results"}
        return {"schema_version": SCHEMA_VERSION, **values}


def evaluate(
    config: Config, model: Any = None, tokenizer: Any = None, on_question: Callable[[int, int], None] | None = None
) -> Evaluation:
    """Ask every question once, greedily, and write both files into `config.run`.

    Args:
        config: model (with `model.adapter` for a trained one), task, eval, and `search.max_steps`, which caps the
            lines of a chain as it does in the search.
        model: the model that `config.model` names, already loaded; None loads it. Give its tokenizer too.
        tokenizer: see `model`.
        on_question: called with (questions done, questions in all) after each.

    Raises:
        CpoFastError: the questions or the model cannot be read; see `load_questions` and `load_model`.
    """
    task, questions = load_questions(config)

    # after the questions, whose mistakes then show before a model is loaded
    from cpo_fast.evaluate.greedy import greedy_chains
    from cpo_fast.models import adapter_hash, load_model, model_hash

    if model is None:
        model, tokenizer = load_model(config.model)
    chains = greedy_chains(
        model,
        tokenizer,
        [encode_prompt(tokenizer, task.prompt(question)) for question in questions],
        task,
        max_new_tokens=config.eval.max_new_tokens,
        max_steps=config.search.max_steps,
        batch_size=config.eval.batch_size,
    )
    results = []
    for question, chain in zip(questions, chains, strict=True):
        answer = chain.answer(task)
        correct = None if question.gold is None else task.is_correct(answer, question.gold)
        results.append(
            QuestionResult(
                question.id,
                question.gold,
                answer,
                correct,
                len(chain.token_ids),
                chain.seconds,
                chain.stop,
                chain.text,
            )
        )
        if on_question is not None:
            on_question(len(results), len(questions))
    evaluation = _summarise(
        config, results, str(model.device), model_hash(config.model.path), adapter_hash(config.model.adapter)
    )
    _write(Path(config.run), evaluation)
    return evaluation


def _summarise(
    config: Config, results: list[QuestionResult], device: str, model_hash: str, adapter_hash: str
) -> Evaluation:
    graded = [result for result in results if result.correct is not None]
    num_correct = sum(result.correct is True for result in graded)
    return Evaluation(
        label="base" if config.model.adapter is None else "adapter",
        task=config.task.name,
        num_questions=len(results),
        num_graded=len(graded),
        num_correct=num_correct,
        num_unanswered=sum(result.answer is None for result in results),
        accuracy=num_correct / len(graded) if graded else None,
        interval=wilson_interval(num_correct, len(graded)) if graded else None,
        seconds=spread([result.seconds for result in results]),
        tokens=spread([result.num_tokens for result in results]),
        batch_size=config.eval.batch_size,
        stops=dict(sorted(Counter(result.stop for result in results).items())),
        model=config.model.path,
        model_hash=model_hash,
        adapter_hash=adapter_hash,
        dtype=config.model.dtype,
        device=device,
        task_hash=config_hash(config.task),
        eval_hash=config_hash(config.eval),
        results=tuple(results),
    )


def _write(run: Path, evaluation: Evaluation) -> None:
    write_jsonl(run / f"eval-{evaluation.label}.jsonl", (asdict(result) for result in evaluation.results))
    write_atomic(run / f"eval-{evaluation.label}.json", json.dumps(evaluation.summary(), indent=2) + "\n")
