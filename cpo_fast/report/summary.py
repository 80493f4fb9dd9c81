"""What a run is and what came of it, in a few sentences that claim no more than its files show."""

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePath

from cpo_fast.errors import DataError
from cpo_fast.evaluate.comparison import Comparison, compare
from cpo_fast.evaluate.result import Evaluation
from cpo_fast.evaluate.statistics import wilson_interval
from cpo_fast.report.runs import Run, Votes, number

MAX_P = 0.05  # of a test, above which a difference is called no difference
METHODS = {"cot": "one greedy chain", "tot": "a tree of thought"}
TRAININGS = {
    "preference": "preference pairs (CPO)",
    "sft": "imitation of winning paths (SFT)",
    "cpo": "preference pairs of each round's search (CPO)",
    "sft_cpo": "imitation, then preference pairs, of each round's search",
}


@dataclass(frozen=True)
class Figure:
    """A number at the head of a run: what it is, the number, and what it is over."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Summary:
    """The head of one run: its kind, facts as (name, value), numbers and sentences. `warnings` are what must be seen."""

    kind: str
    facts: tuple[tuple[str, str], ...]
    figures: tuple[Figure, ...]
    sentences: tuple[str, ...]
    warnings: tuple[str, ...]


def summary(run: Run) -> Summary:
    """The head of one run."""
    said = [("Alarm. ", part, each) for part in run.all for each in part.alarms]
    said += [("", part, each) for part in run.all for each in part.remarks]
    return Summary(
        kind=kind(run),
        facts=tuple(_facts(run)),
        figures=tuple(_figures(run)),
        sentences=tuple(_sentences(run)),
        warnings=tuple(
            f"{before}{_start(text if part is run else f'{part.name}: {text}')}." for before, part, text in said
        ),
    )


def kind(run: Run) -> str:
    """What commands have worked in this folder, in words."""
    if run.rounds is not None:
        return "rounds of search and training"
    parts = [
        name
        for name, is_there in (
            ("search", run.votes is not None),
            ("training", bool(run.metrics)),
            ("evaluation", bool(run.evaluations)),
        )
        if is_there
    ]
    if run.config_file == "demo.yaml" or (run.path / "demo.yaml").is_file():
        return f"demonstration ({', '.join(parts) or 'nothing yet'})"
    return ", ".join(parts) or "a configuration, and nothing measured yet"


def method(run: Run) -> str:
    """How it is trained, in words, "" where nothing says so."""
    name = run.config.get("train.method" if run.rounds is None else "iterate.method")
    return "" if name is None else TRAININGS.get(str(name), str(name))


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    config, first = run.config, next(iter(run.evaluations), None)
    base = config.get("model.path") or (first.model if first else "")
    if base:
        yield "base", PurePath(str(base)).name or str(base)
    if config.get("model.adapter"):
        yield "starts from", str(config["model.adapter"])
    if (run.metrics or run.rounds is not None) and method(run):
        yield "method", method(run)
    data = config.get("data.path")
    if data and run.metrics:
        yield "data", PurePath(str(data)).name
    if run.identity.get("data"):
        yield "data hash", str(run.identity["data"])
    task = first.task if first else run.votes.task if run.votes else ""
    if task:
        yield "task", task
    if "seed" in config:
        yield "seed", str(config["seed"])
    yield "folder", str(run.path)


def _figures(run: Run) -> Iterator[Figure]:
    pairs = compared(run.evaluations)
    for one, other, _ in pairs[:1]:
        if one.accuracy is not None and other.accuracy is not None:
            yield Figure("accuracy before", f"{one.accuracy:.1%}", f"{one.num_correct} of {one.num_graded} questions")
            yield Figure(
                "accuracy after", f"{other.accuracy:.1%}", f"{other.num_correct} of {other.num_graded} questions"
            )
    for one in [] if pairs else [each for each in run.evaluations if each.accuracy is not None][:1]:
        yield Figure("accuracy", f"{one.accuracy:.1%}", f"{one.num_correct} of {one.num_graded}, {one.label}")
    if run.votes is not None and run.votes.num_gold:
        votes = run.votes
        yield Figure(
            "the search's vote", f"{votes.num_right / votes.num_gold:.1%}", f"{votes.num_right} of {votes.num_gold}"
        )
    if run.num_pairs is not None:
        yield Figure("pairs", f"{run.num_pairs:,}", "in pairs.jsonl")
    if run.metrics:
        computed, rows = (
            sum(filter(math.isfinite, (number(line.get(key)) for line in run.metrics))) for key in _TOKENS
        )
        yield Figure("steps", f"{_last_step(run):,g}", _of_steps(run))
        if rows:
            yield Figure("tokens saved", f"{1 - computed / rows:.1%}", f"{computed:,.0f} computed for {rows:,.0f}")
    if run.rounds is not None:
        yield Figure("rounds", str(max(0, len(run.rounds["rounds"]) - 1)), f"best: {_best_round(run)}")
        scores = _scores(run)
        for label, place in (
            ("dev accuracy, first model", 0),
            ("dev accuracy, best round", _best_round(run)),
        ):
            if place in scores:
                yield Figure(label, f"{scores[place]:.1%}", f"round {place}")


_TOKENS = ("tokens/computed", "tokens/rows")


def _last_step(run: Run) -> float:
    return max(filter(math.isfinite, (number(line.get("step")) for line in run.metrics)), default=0.0)


def _best_round(run: Run) -> int | None:
    best = run.rounds.get("best_round") if run.rounds is not None else None
    return best if isinstance(best, int) else None


def _of_steps(run: Run) -> str:
    planned = number(run.config.get("train.max_steps"))
    return f"of {planned:,g} at most" if math.isfinite(planned) else ""


def _sentences(run: Run) -> Iterator[str]:
    pairs = compared(run.evaluations)
    for one, other, comparison in pairs:
        yield versus(one, other, comparison)
    told = {id(each) for one, other, _ in pairs for each in (one, other)}
    for evaluation in run.evaluations:
        if id(evaluation) not in told and evaluation.accuracy is not None and evaluation.interval is not None:
            yield f"{evaluation.label}: {METHODS[evaluation.method]} answers {_right(evaluation)}."
    if run.rounds is not None:
        yield from _of_rounds(run)
    if run.metrics:
        yield from _of_training(run)
    if run.votes is not None:
        yield _of_search(run.votes)
    measured = run.evaluations or any("eval_accuracy" in line for line in run.metrics) or run.rounds is not None
    if run.metrics and not measured:
        yield "No evaluation in this folder says whether answers got better."
    if pairs:
        yield "This is one run with one seed, and the intervals are over questions alone."


def compared(evaluations: Sequence[Evaluation]) -> list[tuple[Evaluation, Evaluation, Comparison]]:
    """Each adapter's evaluation beside that of the base by the same method, where both asked the same graded questions."""
    found = []
    for other in evaluations:
        for one in evaluations:
            if one.method == other.method and not one.adapter_hash and other.adapter_hash:
                try:
                    comparison = compare(one, other, (one.label, other.label), num_resamples=1)
                except DataError:
                    continue
                if comparison.num_graded:
                    found.append((one, other, comparison))
                    break
    return found


def versus(one: Evaluation, other: Evaluation, comparison: Comparison) -> str:
    """What the second evaluation gained or lost, and whether chance alone does that."""
    gained, lost, p = comparison.num_only_second, comparison.num_only_first, comparison.mcnemar_p
    assert p is not None, "graded questions were compared"
    counts = f"{gained} questions were gained and {lost} lost (exact McNemar p = {p:.2g})"
    if p >= MAX_P:
        meaning = f"{counts}: chance alone does that often, so this shows no difference"
    else:
        meaning = f"{counts}: the adapter is {'better' if gained > lost else 'worse'} than the base on these questions"
    return (
        f"{_start(METHODS[one.method])} answers {_right(one)} without the adapter and {_right(other)} with it "
        f"({other.label}). {meaning}."
    )


def _right(evaluation: Evaluation) -> str:
    assert evaluation.accuracy is not None, "it is graded"
    assert evaluation.interval is not None, "and so has an interval"
    low, high = evaluation.interval
    return (
        f"{evaluation.num_correct} of {evaluation.num_graded} right ({evaluation.accuracy:.1%}, 95% interval {low:.1%} to "
        f"{high:.1%})"
    )


def _of_training(run: Run) -> Iterator[str]:
    first, last = run.metrics[0], run.metrics[-1]
    step, planned = _last_step(run), number(run.config.get("train.max_steps"))
    losses = [number(line.get("loss")) for line in run.metrics]
    losses = [loss for loss in losses if math.isfinite(loss)]
    if not run.has_adapter:
        of = f" of {planned:g}" if math.isfinite(planned) else ""
        yield f"The training has not ended: its last step here is {step:g}{of}, and there is no adapter yet."
    if losses:
        right = number(last.get("rewards/accuracies"))
        ranked = f", and {right:.0%} of the last step's pairs are ranked right" if math.isfinite(right) else ""
        yield f"The loss went from {losses[0]:.3g} to {losses[-1]:.3g} in {step:g} steps{ranked}."
    for name in ("accuracy", "agreement"):
        scores = {
            number(line.get("step")): number(line[key]) for line in run.metrics if (key := f"eval_{name}") in line
        }
        scores = {at: score for at, score in scores.items() if math.isfinite(at) and math.isfinite(score)}
        if len(scores) > 1:
            best = max(scores, key=lambda at: scores[at])
            begin = (
                f"{scores[number(first.get('step'))]:.1%} before the first step, "
                if number(first.get("step")) == 0
                else ""
            )
            ends = f"{scores[max(scores)]:.1%} after step {max(scores):g}"
            yield f"The {name} on dev questions was {begin}{scores[best]:.1%} at its best after step {best:g}, and {ends}."


def _of_search(votes: Votes) -> str:
    ok = votes.statuses.get("ok", 0)
    text = f"{votes.num_trees} questions were searched, {ok} of them with a winning path"
    if votes.num_gold:
        low, high = wilson_interval(votes.num_right, votes.num_gold)
        text += (
            f"; the vote is right for {votes.num_right} of the {votes.num_gold} that have a reference answer "
            f"({votes.num_right / votes.num_gold:.1%}, 95% interval {low:.1%} to {high:.1%})"
        )
    return f"{text}."


def _of_rounds(run: Run) -> Iterator[str]:
    assert run.rounds is not None
    best, scores = _best_round(run), _scores(run)
    if best in scores and 0 in scores:
        which = "the first model is the best" if best == 0 else f"round {best} is the best"
        num_rounds = len(run.rounds["rounds"]) - 1
        yield (
            f"Of {num_rounds} rounds {which}: dev accuracy {scores[best]:.1%}, where the first model has "
            f"{scores[0]:.1%}. The best was chosen on these questions, so other questions tell what it is worth."
        )
    if run.rounds.get("stopped"):
        yield f"Ended: {run.rounds['stopped']}."
    else:
        yield "The rounds have not ended."


def _scores(run: Run) -> dict[int, float]:
    """Dev accuracy by round, of those that have one."""
    scores = {}
    for one in run.rounds["rounds"] if run.rounds is not None else ():
        with suppress(KeyError, TypeError):
            score = number(one["stages"]["eval"]["accuracy"])
            if math.isfinite(score):
                scores[int(one["round"])] = score
    return scores


def _start(text: str) -> str:
    return text[:1].upper() + text[1:]
