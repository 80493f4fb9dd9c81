"""What a demonstration found, in words: a table for someone who is new to this, two chains, and whether the gain is real.

Everything is read off the two evaluations and the summary of the search. A gain is called real if a chance difference
would rarely look like it (exact McNemar test, p < 0.05) and it is at least ten points.
"""

from cpo_fast.demo.recipes import Recipe
from cpo_fast.evaluate import Comparison, Evaluation, QuestionResult, wilson_interval
from cpo_fast.search.statistics import CollectResult
from cpo_fast.train.loop import TrainResult

MAX_P = 0.05
MIN_GAIN = 0.10

HEADINGS = ("chain, before", "chain, after", "search, by vote")


def table_rows(base: Evaluation, adapter: Evaluation, collected: CollectResult) -> list[tuple[str, ...]]:
    """What a row is about, and its cells under `HEADINGS`."""
    asked = [_accuracy_cells(one.num_correct, one.num_graded) for one in (base, adapter)]
    columns = [*asked, _accuracy_cells(collected.num_correct, collected.num_gold)]
    tokens = [base.tokens.mean, adapter.tokens.mean, collected.num_generated_tokens / collected.num_questions]
    return [
        *zip(("right answers", "accuracy", "95 % interval, Wilson"), *columns, strict=True),
        ("tokens a question", *(f"{mean:.0f}" for mean in tokens)),
    ]


def _accuracy_cells(num_correct: int, num_graded: int) -> tuple[str, str, str]:
    low, high = wilson_interval(num_correct, num_graded)
    return f"{num_correct} of {num_graded}", f"{num_correct / num_graded:.1%}", f"{low:.1%} to {high:.1%}"


def notes(
    comparison: Comparison, collected: CollectResult, num_pairs: int, trained: TrainResult, recipe: Recipe
) -> list[str]:
    """What stands under the table: over which questions it is, how sure, and what it took."""
    others = " others" if recipe.asked.path != recipe.config.task.path else ", those among them"
    resumed = f" ({collected.num_resumed} from an earlier run)" if collected.num_resumed else ""
    num_lost, num_gained = comparison.num_only_first, comparison.num_only_second
    vote = f"The vote is over the {collected.num_questions} questions searched"
    changed = f"{num_gained} questions were wrong before and right after, {num_lost} the other way round"
    work = f"It took {collected.num_questions} searches{resumed}, {num_pairs} pairs and {trained.num_steps} optimizer steps"
    return [
        f"{vote}, the chains over {comparison.num_questions}{others}.",
        f"{changed}: exact McNemar p = {comparison.mcnemar_p:.2g}.",
        f"{work}: {collected.seconds:.0f} s of search and {trained.seconds:.0f} s of training in this run.",
    ]


def first_gained(base: Evaluation, adapter: Evaluation) -> tuple[QuestionResult, QuestionResult] | None:
    """Both results of the first question that was wrong before and is right after, None where there is no such one."""
    pairs = zip(base.results, adapter.results, strict=True)
    return next(((before, after) for before, after in pairs if not before.correct and after.correct), None)


def verdict(adapter: Evaluation, comparison: Comparison, collected: CollectResult) -> str:
    """The last word: what one chain gained, or that this run did not show it."""
    p, accuracy = comparison.mcnemar_p, comparison.metrics["accuracy"]
    assert p is not None, "every question of a demonstration has a reference answer"
    gain = accuracy.difference
    rose = f"one chain went from {accuracy.first:.1%} to {accuracy.second:.1%} of {comparison.num_graded} questions"
    short = [f"{100 * gain:+.1f} points are less than {100 * MIN_GAIN:.0f}"] if gain < MIN_GAIN else []
    short += [f"chance alone does that often (exact McNemar p = {p:.2g})"] if p >= MAX_P else []
    if short:
        return f"This run did not show the gain: {rose}; {' and '.join(short)}."
    num_tokens = collected.num_generated_tokens / collected.num_questions
    return (
        f"This run shows the gain: {rose}, at {adapter.tokens.mean:.0f} generated tokens a question where the search that "
        f"taught it takes {num_tokens:.0f}."
    )
