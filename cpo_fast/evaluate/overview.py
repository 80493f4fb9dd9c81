"""Everything that was evaluated in one run's folder, side by side: written as `eval.json`, `eval.md` and `eval.csv`.

Evaluations on the same questions are compared in pairs. A pair on different questions is named and left out. Where a
tree has answered a question that a chain was asked, the two answers are held against each other.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from cpo_fast.errors import DataError
from cpo_fast.evaluate.comparison import Agreement, Comparison, compare
from cpo_fast.evaluate.result import Evaluation, read_evaluation
from cpo_fast.evaluate.tables import csv_text, markdown_text
from cpo_fast.files import read_jsonl, write_atomic

MAX_ALL_PAIRS = 4  # evaluations of which each is compared with each; of more, each with the first
TREES = "trees.jsonl"


@dataclass(frozen=True)
class Overview:
    """Evaluations of one folder (see `folder_evaluations`), their comparisons, and what was left out and why."""

    evaluations: tuple[Evaluation, ...]
    comparisons: tuple[Comparison, ...]
    agreements: tuple[Agreement, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, single questions left out."""
        return {
            "evaluations": [evaluation.summary() for evaluation in self.evaluations],
            "comparisons": [asdict(comparison) for comparison in self.comparisons],
            "agreements": [{**asdict(agreement), "share": agreement.share} for agreement in self.agreements],
            "notes": list(self.notes),
        }

    def write(self, run: Path) -> None:
        write_atomic(run / "eval.json", json.dumps(self.to_dict(), indent=2) + "\n")
        write_atomic(run / "eval.md", markdown_text(self.evaluations, self.comparisons, self.agreements, self.notes))
        write_atomic(run / "eval.csv", csv_text(self.evaluations))


def run_overview(run: Path, seed: int) -> Overview:
    """Read the evaluations that the folder `run` holds and put them side by side. `seed` is the bootstrap's.

    Raises:
        DataError: a file in it is damaged or of another version.
    """
    evaluations, notes = folder_evaluations(run)
    comparisons = []
    pairs = combinations(evaluations, 2)
    if len(evaluations) > MAX_ALL_PAIRS:
        pairs = ((evaluations[0], other) for other in evaluations[1:])  # type: ignore[assignment]
    for first, second in pairs:
        try:
            comparisons.append(compare(first, second, (first.label, second.label), seed))
        except DataError as error:
            notes.append(f"not compared: {error}")
    for evaluation in evaluations:
        if evaluation.num_graded < evaluation.num_questions:
            num_ungraded = evaluation.num_questions - evaluation.num_graded
            notes.append(f"{evaluation.label}: without a reference answer and not graded: {num_ungraded}")
        if evaluation.num_failed:
            first_failed = next(result for result in evaluation.results if result.stop == "failed")
            notes.append(
                f"{evaluation.label}: failed, and counted as unanswered: {evaluation.num_failed}; the first, "
                f"'{first_failed.id}': {first_failed.detail}"
            )
    return Overview(tuple(evaluations), tuple(comparisons), _agreements(run, evaluations), tuple(notes))


def folder_evaluations(folder: Path, skip_damaged: bool = False) -> tuple[list[Evaluation], list[str]]:
    """The evaluations in a folder, chains before trees and the base before adapters, and sentences on files left out.

    Args:
        skip_damaged: leave out, with a sentence, what else raises.

    Raises:
        DataError: a file is damaged or of another version.
    """
    paths = sorted(folder.glob("eval-*.jsonl"))
    whole = [path for path in paths if path.with_suffix(".json").is_file()]
    notes = [
        f"{path.name} has no summary beside it and is left out; evaluate again" for path in paths if path not in whole
    ]
    found = []
    for path in whole:
        try:
            found.append(read_evaluation(path))
        except DataError as error:
            if not skip_damaged:
                raise
            notes.append(f"left out: {error}")
    return sorted(
        found, key=lambda each: (each.method == "tot", each.label not in ("base", "base-tot"), each.label)
    ), notes


def _agreements(run: Path, evaluations: Sequence[Evaluation]) -> tuple[Agreement, ...]:
    # agreement with the vote is what training moves first, and it needs no reference answer
    # (text of the question, its voted answer) by id; the text, because ids of two files may be alike
    votes: dict[str, dict[str, tuple[str, str | None]]] = {}
    if (run / TREES).exists():
        # a collection may still be growing this file
        rows = read_jsonl(run / TREES, drop_torn_tail=True)
        votes[TREES] = {str(row.get("id")): (str(row.get("question")), row.get("answer")) for _, row in rows}
    for evaluation in evaluations:
        if evaluation.method == "tot":
            votes[evaluation.label] = {each.id: (each.question, each.answer) for each in evaluation.results}
    agreements = []
    for evaluation in evaluations:
        if evaluation.method == "cot":
            for source, voted in votes.items():
                pairs = [
                    (result.answer, voted[result.id][1])
                    for result in evaluation.results
                    if result.id in voted and voted[result.id][0] == result.question
                ]
                pairs = [(answer, vote) for answer, vote in pairs if vote is not None]  # a tree may have no winner
                if pairs:
                    num_agree = sum(answer == vote for answer, vote in pairs)
                    agreements.append(Agreement(evaluation.label, source, len(pairs), num_agree))
    return tuple(agreements)
