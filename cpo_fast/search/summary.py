"""What a run of `collect` came to, over the trees of all its questions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpo_fast.search.evaluate import num_unparseable
from cpo_fast.search.statistics import tree_statistics
from cpo_fast.tasks import Task
from cpo_fast.tree import SearchTree


@dataclass(frozen=True)
class CollectResult:
    """Summary of the trees of this run's questions.

    Attributes:
        trees_path: the file, or this worker's part of it while other workers' questions are missing.
        num_questions: how many were asked; num_resumed of them were found finished.
        num_missing: of them not finished yet: other workers'. 0 in the file that all are in.
        statuses: how many trees per status.
        num_thoughts: nodes, duplicates merged. num_samples: generated thoughts, duplicates and empty ones counted.
        num_empty: samples dropped because they were only whitespace. num_cut: nodes cut at the token cap.
        num_winning_paths: over all trees.
        num_generated_tokens: of all samples and sampled verdicts. num_useful_tokens: of the thoughts on winning paths.
        num_verdicts, num_unparseable: sampled verdicts on distinct thoughts, and those that could not be read.
        num_gold: questions with a reference answer. num_correct: whose vote equals it; for information only.
        first_failure: reason of the first failed question, or "".
        seconds: wall time of this call's searches, loading left out.
    """

    trees_path: str
    num_questions: int
    num_missing: int
    num_resumed: int
    statuses: dict[str, int]
    num_thoughts: int
    num_samples: int
    num_empty: int
    num_cut: int
    num_winning_paths: int
    num_generated_tokens: int
    num_useful_tokens: int
    num_verdicts: int
    num_unparseable: int
    num_gold: int
    num_correct: int
    first_failure: str
    seconds: float

    @property
    def vote_accuracy(self) -> float | None:
        """Share of the questions with a reference answer whose vote equals it; None without any."""
        return self.num_correct / self.num_gold if self.num_gold else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, `vote_accuracy` included."""
        return {**asdict(self), "vote_accuracy": self.vote_accuracy}


def summarise(
    trees_path: Path, trees: Sequence[SearchTree], task: Task, num_questions: int, num_resumed: int, seconds: float
) -> CollectResult:
    """Count the trees; arguments as the fields of `CollectResult`."""
    nodes = [node for tree in trees for node in tree.nodes]
    counted = [tree_statistics(tree) for tree in trees]
    with_gold = [(tree, tree.gold) for tree in trees if tree.gold is not None]
    return CollectResult(
        trees_path=str(trees_path),
        num_questions=num_questions,
        num_missing=num_questions - len(trees),
        num_resumed=num_resumed,
        statuses=dict(Counter(tree.status for tree in trees)),
        num_thoughts=len(nodes),
        num_samples=sum(one.num_samples for one in counted),
        num_empty=sum(one.num_empty for one in counted),
        num_cut=sum(one.num_cut for one in counted),
        num_winning_paths=sum(one.num_winning for one in counted),
        num_generated_tokens=sum(one.num_generated_tokens for one in counted),
        num_useful_tokens=sum(one.num_useful_tokens for one in counted),
        num_verdicts=sum("label" in record for node in nodes for record in node.evaluations),
        num_unparseable=sum(num_unparseable(node.evaluations) for node in nodes),
        num_gold=len(with_gold),
        num_correct=sum(task.is_correct(tree.answer, gold) for tree, gold in with_gold),
        first_failure=next((f"{tree.id}: {tree.detail}" for tree in trees if tree.status == "failed"), ""),
        seconds=round(seconds, 3),
    )
