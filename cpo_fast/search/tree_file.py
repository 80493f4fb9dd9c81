"""The growing `trees.jsonl` of a run: one append a question, safe to kill at any moment, ordered at the end.

A killed writer leaves at most a last line without its newline; it is cut off when the file is opened again. Trees that
another model, configuration, seed or prompt made are refused: a file holds the trees of one search only. One process
writes a file.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cpo_fast.errors import DataError
from cpo_fast.files import append_line, write_jsonl
from cpo_fast.tasks import Question
from cpo_fast.tree import SearchTree, read_trees


@dataclass(frozen=True)
class Provenance:
    """What decides the trees of a run besides the questions. Fields as in `tree.SearchTree`."""

    task: str
    prompt_hash: str
    model_hash: str
    adapter_hash: str
    seed: int
    config_hash: str


# how a refusal names the field that differs
_FIELD_NAMES = {
    "task": "task",
    "prompt_hash": "few-shot prompt or tokenizer",
    "model_hash": "model",
    "adapter_hash": "adapter",
    "seed": "seed",
    "config_hash": "search configuration",
}


class TreeFile:
    """`trees.jsonl` of a run.

    Args:
        path: the file; it need not exist.
        provenance: what the trees in it must have been made with.
        questions: the questions of this run; a tree with the id of one must be about the same text.

    Raises:
        DataError: a line is not a tree, or a tree is of another search.
    """

    def __init__(self, path: Path, provenance: Provenance, questions: Sequence[Question]) -> None:
        self.path = path
        self._questions = questions
        self.trees: dict[str, SearchTree] = {}  # by question id, in file order
        if path.exists():
            _cut_torn_line(path)
            texts = {question.id: question.text for question in questions}
            for tree in read_trees(path):
                self._check(tree, provenance, texts)
                self.trees[tree.id] = tree

    def append(self, tree: SearchTree) -> None:
        """Add one finished question; after return it survives a crash."""
        append_line(self.path, tree.to_dict())
        self.trees[tree.id] = tree

    def order(self) -> None:
        """Rewrite the file atomically in question order; trees of other questions follow in the order they had."""
        ids = [question.id for question in self._questions if question.id in self.trees]
        asked = set(ids)
        ids += [identity for identity in self.trees if identity not in asked]
        write_jsonl(self.path, (self.trees[identity].to_dict() for identity in ids))

    def _check(self, tree: SearchTree, provenance: Provenance, texts: dict[str, str]) -> None:
        for field, name in _FIELD_NAMES.items():
            found, expected = getattr(tree, field), getattr(provenance, field)
            if found != expected:
                raise DataError(
                    f"{self.path}: tree '{tree.id}' was searched with another {name} ({found or 'none'}, this run has "
                    f"{expected or 'none'}); set another folder in 'run', or delete the file to search again"
                )
        if texts.get(tree.id, tree.question) != tree.question:
            raise DataError(
                f"{self.path}: tree '{tree.id}' is about another question than '{tree.id}' in task.path; set another "
                "folder in 'run', or delete the file to search again"
            )


def _cut_torn_line(path: Path) -> None:
    """Drop what follows the last newline: the line of a transaction that did not finish."""
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        os.truncate(path, end)
