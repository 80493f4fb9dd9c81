"""Two evaluations on the same questions: paired tests, what each costs, and what else differed between them.

Every question stands in both, so the tests are paired (`statistics` has their equations). Differences of settings are
stated as sentences, different sets of questions are refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from cpo_fast.errors import DataError
from cpo_fast.evaluate.result import Evaluation, QuestionResult
from cpo_fast.evaluate.statistics import mcnemar_exact, paired_bootstrap

NUM_RESAMPLES = 10_000  # of the bootstrap
CONFIDENCE = 0.95

# what is stated when it differs, for a comparison of two prompts, say, is legitimate if the reader sees that it is one:
# field of the summary, and how a sentence names it
STATED = {
    "task": "task",
    "method": "method",
    "model_hash": "model",
    "adapter_hash": "adapter",
    "prompt_hash": "prompt",
    "task_hash": "task section",
    "settings_hash": "method's configuration",
    "dtype": "dtype",
    "device": "device",
    "engine": "engine",
    "batch_size": "batch size",
}


@dataclass(frozen=True)
class Difference:
    """One metric, paired: means over the graded questions, second - first, and its bootstrap interval."""

    first: float
    second: float
    difference: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """The second evaluation against the first.

    Attributes:
        first, second: their names.
        num_questions: questions in both. num_graded: those with a reference answer. The tests are over them.
        num_both, num_only_first, num_only_second, num_neither: graded questions by who is right.
        mcnemar_p: exact two-sided p-value, or None when nothing is graded.
        metrics: `accuracy` (the task's own verdict) and each metric that both have.
        seconds_ratio, tokens_ratio: mean of the second over mean of the first, or None over zero. Seconds are of the
            questions that were asked alone in both, tokens of all.
        num_resamples, confidence, seed: of the bootstrap.
        stated: a sentence for each thing that differs besides the answers.
    """

    first: str
    second: str
    num_questions: int
    num_graded: int
    num_both: int
    num_only_first: int
    num_only_second: int
    num_neither: int
    mcnemar_p: float | None
    metrics: dict[str, Difference]
    seconds_ratio: float | None
    tokens_ratio: float | None
    num_resamples: int
    confidence: float
    seed: int
    stated: tuple[str, ...]


@dataclass(frozen=True)
class Agreement:
    """How often a greedy chain gives the answer that a tree has voted for."""

    label: str  # the evaluation of the chain
    source: str  # of the votes: the trees' file, or the label of an evaluation
    num_voted: int  # questions of the chain with a voted answer there
    num_agree: int  # those where the chain's answer is the same after normalisation

    @property
    def share(self) -> float:
        return self.num_agree / self.num_voted


def compare(
    first: Evaluation, second: Evaluation, names: tuple[str, str], seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> Comparison:
    """Compare two evaluations. `names` are what messages and tables call them.

    Raises:
        DataError: they are not about the same questions. Names the first that differs.
    """
    pairs = _paired(first, second, names)
    graded = [(one, other) for one, other in pairs if one.correct is not None]
    num_both = sum(one.correct is True and other.correct is True for one, other in graded)
    num_only_first = sum(one.correct is True and other.correct is False for one, other in graded)
    num_only_second = sum(one.correct is False and other.correct is True for one, other in graded)
    timed = [
        (one.seconds, other.seconds) for one, other in pairs if one.seconds is not None and other.seconds is not None
    ]
    first_seconds = sum(one for one, _ in timed)
    return Comparison(
        first=names[0],
        second=names[1],
        num_questions=len(pairs),
        num_graded=len(graded),
        num_both=num_both,
        num_only_first=num_only_first,
        num_only_second=num_only_second,
        num_neither=len(graded) - num_both - num_only_first - num_only_second,
        mcnemar_p=mcnemar_exact(num_only_first, num_only_second) if graded else None,
        metrics=_metrics(graded, seed, num_resamples),
        seconds_ratio=sum(other for _, other in timed) / first_seconds if first_seconds else None,
        tokens_ratio=second.tokens.mean / first.tokens.mean if first.tokens.mean else None,
        num_resamples=num_resamples,
        confidence=CONFIDENCE,
        seed=seed,
        stated=_stated(first, second, names),
    )


def _paired(
    first: Evaluation, second: Evaluation, names: tuple[str, str]
) -> list[tuple[QuestionResult, QuestionResult]]:
    ours, theirs = ({result.id: result for result in each.results} for each in (first, second))
    for identity in chain(ours, theirs):  # both ways round: either may hold a question that the other lacks
        if identity not in ours or identity not in theirs:
            here, there = names if identity in ours else names[::-1]
            raise DataError(
                f"{here} and {there} are not about the same questions: '{identity}' is in {here} only; evaluate both "
                "with the same eval.path, or task.path, task.num_questions and task.skip_questions"
            )
        for field, what in (("question", "the text"), ("gold", "the reference answer")):
            if getattr(ours[identity], field) != getattr(theirs[identity], field):
                raise DataError(
                    f"{names[0]} and {names[1]} are not about the same questions: {what} of '{identity}' differs; "
                    "evaluate both with the same eval.path, or task.path"
                )
    return [(ours[identity], theirs[identity]) for identity in ours]


def _metrics(
    graded: Sequence[tuple[QuestionResult, QuestionResult]], seed: int, num_resamples: int
) -> dict[str, Difference]:
    if not graded:
        return {}
    scores = {"accuracy": [(float(bool(one.correct)), float(bool(other.correct))) for one, other in graded]}
    # a metric that a part of the questions lacks would be a mean over others than `accuracy`
    for name in sorted(set.intersection(*({*one.scores} & {*other.scores} for one, other in graded))):
        scores[name] = [(one.scores[name], other.scores[name]) for one, other in graded]
    return {name: _difference(pairs, seed, num_resamples) for name, pairs in scores.items()}


def _difference(pairs: Sequence[tuple[float, float]], seed: int, num_resamples: int) -> Difference:
    first, second = [one for one, _ in pairs], [other for _, other in pairs]
    means = sum(first) / len(pairs), sum(second) / len(pairs)
    # every metric draws the same questions: equal seeds
    interval = paired_bootstrap(first, second, num_resamples, seed, CONFIDENCE)
    return Difference(*means, means[1] - means[0], interval)


def _stated(first: Evaluation, second: Evaluation, names: tuple[str, str]) -> tuple[str, ...]:
    sentences = []
    for field, name in STATED.items():
        one, other = (str(getattr(each, field)) or "none" for each in (first, second))
        if one != other:
            sentences.append(f"the {name} differs: {one} in {names[0]}, {other} in {names[1]}")
    return tuple(sentences)
