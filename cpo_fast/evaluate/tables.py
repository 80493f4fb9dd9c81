"""Evaluations and comparisons as text: the cells that the terminal and Markdown show, and CSV for spreadsheets.

Cells are for people and rounded. CSV and JSON hold the numbers as they are.
"""

import csv
import io
from collections.abc import Sequence

from cpo_fast.evaluate.comparison import Agreement, Comparison, Difference
from cpo_fast.evaluate.result import Evaluation
from cpo_fast.evaluate.statistics import Spread, holm

METHODS = {"cot": "greedy chain", "tot": "tree of thought"}


def evaluation_cells(evaluation: Evaluation) -> dict[str, str]:
    """Heading to cell, in the order of the table's rows."""
    interval, num_questions = evaluation.interval, evaluation.num_questions
    ungraded = num_questions - evaluation.num_graded
    accuracy = "no reference answers" if evaluation.accuracy is None else f"{evaluation.accuracy:.1%}"
    return {
        "method": METHODS[evaluation.method],
        "correct": f"{evaluation.num_correct} of {evaluation.num_graded}" + (f", {ungraded} ungraded" * bool(ungraded)),
        "accuracy": accuracy,
        "95 % interval (Wilson)": "" if interval is None else f"{interval[0]:.1%} to {interval[1]:.1%}",
        # a task names its own metrics
        **{name.replace("_", " "): f"{value:.1%}" for name, value in evaluation.metrics.items()},
        "without a readable answer": f"{evaluation.num_unanswered} of {num_questions}",
        "seconds per question": _spread(evaluation.seconds, 2),
        "timed, each alone": f"{evaluation.num_timed} of {num_questions}",  # seconds never stand without it
        "tokens per question": _spread(evaluation.tokens, 1),
        "seconds once, for shared prompts": f"{evaluation.setup_seconds:.2f}",
        "seconds for all": f"{evaluation.total_seconds:.2f}, {evaluation.batch_size} at once",
    }


def comparison_cells(comparison: Comparison) -> dict[str, str]:
    """Heading to cell, in the order of the table's rows."""
    p = comparison.mcnemar_p
    return {
        "questions": f"{comparison.num_questions}, {comparison.num_graded} graded",
        "both right": str(comparison.num_both),
        "only the first right": str(comparison.num_only_first),
        "only the second right": str(comparison.num_only_second),
        "exact McNemar p": "" if p is None else f"{p:.3g}",
        **{f"{name.replace('_', ' ')} gained": _gain(value) for name, value in comparison.metrics.items()},
        "seconds, second / first": _ratio(comparison.seconds_ratio),
        "tokens, second / first": _ratio(comparison.tokens_ratio),
    }


def against_first_cells(evaluations: Sequence[Evaluation], comparisons: Sequence[Comparison]) -> list[dict[str, str]]:
    """One row an evaluation: its accuracy, and how it differs from the first one, question by question.

    Args:
        evaluations: two or more on the same questions.
        comparisons: of the first with each other one, in order.
    """
    p_values = [comparison.mcnemar_p for comparison in comparisons]
    corrected = holm([p for p in p_values if p is not None]) if None not in p_values else [None] * len(p_values)
    rows = []
    for place, evaluation in enumerate(evaluations):
        cells = evaluation_cells(evaluation)
        row = {name: cells[name] for name in ("method", "correct", "accuracy", "95 % interval (Wilson)")}
        row["tokens per question"] = f"{evaluation.tokens.mean:.1f}"
        if place:
            comparison, p = comparisons[place - 1], corrected[place - 1]
            row["right where the first is wrong"] = str(comparison.num_only_second)
            row["wrong where it is right"] = str(comparison.num_only_first)
            row["exact McNemar p"] = comparison_cells(comparison)["exact McNemar p"]
            row["of all these tests (Holm)"] = "" if p is None else f"{p:.3g}"
        rows.append(row)
    return rows


def agreement_line(agreement: Agreement) -> str:
    """One sentence on how often a chain answers as a tree has voted."""
    return (
        f"{agreement.label} gives the voted answer of {agreement.source} for {agreement.num_agree} of "
        f"{agreement.num_voted} questions ({agreement.share:.1%})"
    )


def bootstrap_line(comparison: Comparison) -> str:
    """One sentence on how the intervals of a comparison were made."""
    return (
        f"brackets: {comparison.confidence:.0%} percentile interval of a paired bootstrap, "
        f"{comparison.num_resamples} resamples, seed {comparison.seed}"
    )


def comparison_title(comparison: Comparison) -> str:
    """What is compared with what, the first before the arrow."""
    return f"{comparison.first} → {comparison.second}"


def markdown_text(
    evaluations: Sequence[Evaluation],
    comparisons: Sequence[Comparison],
    agreements: Sequence[Agreement],
    notes: Sequence[str],
) -> str:
    """The contents of `eval.md`."""
    lines = ["# Evaluation", ""]
    if evaluations:
        lines += [f"Task {evaluations[0].task}, model {_escape(evaluations[0].model)}.", ""]
        headers = [evaluation.label for evaluation in evaluations]
        lines += _table(headers, [evaluation_cells(evaluation) for evaluation in evaluations])
    for comparison in comparisons:
        lines += [f"## {_escape(comparison_title(comparison))}", ""]
        lines += _table([comparison.second], [comparison_cells(comparison)])
        lines += [f"- {_escape(sentence)}" for sentence in (*comparison.stated, bootstrap_line(comparison))] + [""]
    remarks = [*map(agreement_line, agreements), *notes]
    if remarks:
        lines += ["## Remarks", "", *(f"- {_escape(remark)}" for remark in remarks), ""]
    return "\n".join(lines)


def csv_text(evaluations: Sequence[Evaluation]) -> str:
    """The contents of `eval.csv`: one row an evaluation, one column a number, metrics as `metric_<name>`."""
    rows = [_flat(evaluation) for evaluation in evaluations]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    target = io.StringIO()
    writer = csv.DictWriter(target, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return target.getvalue()


def merged_headings(columns: Sequence[dict[str, str]]) -> list[str]:
    """Every heading of any column, each where it first stands."""
    # columns of other tasks have other metrics
    return list(dict.fromkeys(heading for column in columns for heading in column))


def _flat(evaluation: Evaluation) -> dict[str, object]:
    row: dict[str, object] = {}
    for name, value in evaluation.summary().items():
        if name == "interval":
            row["interval_low"], row["interval_high"] = value or ("", "")
        elif name == "metrics":
            row |= {f"metric_{metric}": mean for metric, mean in value.items()}
        elif isinstance(value, dict):
            row |= {f"{name}_{part}": number for part, number in value.items()}
        else:
            row[name] = "" if value is None else value
    return row


def _table(headers: Sequence[str], columns: Sequence[dict[str, str]]) -> list[str]:
    lines = ["| | " + " | ".join(map(_escape, headers)) + " |", "|---|" + "---:|" * len(columns)]
    for heading in merged_headings(columns):
        cells = [heading, *(column.get(heading, "") for column in columns)]
        lines.append("| " + " | ".join(map(_escape, cells)) + " |")
    return [*lines, ""]


def _escape(text: str) -> str:
    # a path or an id inside Markdown: one line, no cell border, no tag
    for character, instead in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("\r", " "), ("\n", " ")):
        text = text.replace(character, instead)
    return text


def _spread(spread: Spread, num_decimals: int) -> str:
    mean, p50, p95 = (f"{value:.{num_decimals}f}" for value in (spread.mean, spread.p50, spread.p95))
    return f"{mean} (p50 {p50}, p95 {p95})"


def _gain(value: Difference) -> str:
    # adding 0.0 makes the minus zero of a rounded trifle a plain zero
    gain, low, high = (round(100 * share, 1) + 0.0 for share in (value.difference, *value.interval))
    return f"{gain:+.1f} points [{low:+.1f}, {high:+.1f}]"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
