"""Search trees to rows of training files: preference pairs, and supervised examples from winning paths.

A row carries the texts that other libraries read, the exact ids of the search, and where it came from. The same rows are
written to files and trained on directly, so the two cannot differ.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpo_fast.config import PairsConfig
from cpo_fast.data.draw import draw
from cpo_fast.data.rules import TreePair, response, response_ids, select_pairs, winning_paths
from cpo_fast.tasks import Question, get_task
from cpo_fast.tree import ROOT, Node, Prompt, SearchTree, read_prompt, read_trees

Row = dict[str, Any]

OUTSIDE_QUESTIONS = "outside pairs.num_questions"
REPEATED = "the same tokens under another question"
NO_LOSER = "no losing sibling"
NO_RIVAL = "no other complete path"


@dataclass(frozen=True)
class TreeRows:
    """Rows of many trees and everything that became none.

    Attributes:
        rows: in tree order.
        unused: one record a pair or path that was left out: tree, step, nodes and reason.
        trees_without: reason by id of every tree that gave no row, in tree order.
        num_trees: trees that gave rows.
    """

    rows: list[Row]
    unused: list[Row]
    trees_without: dict[str, str]
    num_trees: int


class TreeFileReader:
    """A `trees.jsonl` with the prompts that stand beside it."""

    def __init__(self, path: str | Path) -> None:
        """Read every tree and prompt. Raises DataError with file:line."""
        self.trees = read_trees(path)
        hashes = dict.fromkeys(tree.prompt_hash for tree in self.trees)
        self.prompts = {prompt_hash: read_prompt(path, prompt_hash) for prompt_hash in hashes}

    @property
    def questions(self) -> list[str]:
        """Ids of the trees with a winning path: whatever the rule, the same questions are drawn from these."""
        return [tree.id for tree in self.trees if tree.winning_nodes]

    def draw_questions(self, count: int | None, seed: int) -> set[str]:
        """The questions to use: `count` drawn by the seed, or all for None."""
        return set(self.questions) if count is None else draw(self.questions, count, seed, "questions")

    def pair_rows(self, settings: PairsConfig, seed: int, questions: AbstractSet[str]) -> TreeRows:
        """Preference pairs of the trees named in `questions`, by the rule of `settings`."""
        collector = _Collector()
        for tree in self.trees:
            if not self._wanted(tree, questions, collector):
                continue
            prompt = self.prompts[tree.prompt_hash]
            selection = select_pairs(tree, settings, seed)
            reasons = [reason for _, reason in selection.unused]
            for pair, reason in selection.unused:
                collector.leave_out(tree, pair.step, [pair.chosen, pair.rejected], reason)
            for pair in selection.pairs:
                row = pair_row(tree, prompt, pair)
                key = tuple(tuple(row[f"{name}_token_ids"]) for name in ("prompt", "chosen", "rejected"))
                if not collector.take(row, key):
                    collector.leave_out(tree, pair.step, [pair.chosen, pair.rejected], REPEATED)
                    reasons.append(REPEATED)
            fallback = NO_RIVAL if settings.rule == "fpo" else NO_LOSER
            collector.close(tree, reasons[0] if reasons else fallback)
        return collector.result()

    def sft_rows(self, questions: AbstractSet[str]) -> TreeRows:
        """Prompt and completion of every winning path of the trees named in `questions`, each sequence once."""
        collector = _Collector()
        for tree in self.trees:
            if not self._wanted(tree, questions, collector):
                continue
            for path in winning_paths(tree):
                row = sft_row(tree, self.prompts[tree.prompt_hash], path)
                key = (tuple(row["prompt_token_ids"]), tuple(row["completion_token_ids"]))
                if not collector.take(row, key):
                    collector.leave_out(tree, 0, [path[-1]], REPEATED)
            collector.close(tree, REPEATED)
        return collector.result()

    @staticmethod
    def _wanted(tree: SearchTree, questions: AbstractSet[str], collector: "_Collector") -> bool:
        if tree.winning_nodes and tree.id in questions:
            return True
        reason = OUTSIDE_QUESTIONS if tree.winning_nodes else tree.status
        collector.close(tree, reason)
        return False


class _Collector:
    """Rows and what was left out, tree by tree; a key that was seen before is refused."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.unused: list[Row] = []
        self.trees_without: dict[str, str] = {}
        self.num_trees = 0
        self.seen: set[tuple[tuple[int, ...], ...]] = set()
        self.closed_rows = 0

    def take(self, row: Row, key: tuple[tuple[int, ...], ...]) -> bool:
        if key in self.seen:
            return False
        self.seen.add(key)
        self.rows.append(row)
        return True

    def leave_out(self, tree: SearchTree, step: int, nodes: Sequence[Node], reason: str) -> None:
        ids = [node.id for node in nodes]
        self.unused.append({"tree": tree.id, "step": step, "nodes": ids, "reason": reason})

    def close(self, tree: SearchTree, reason: str) -> None:
        if len(self.rows) > self.closed_rows:
            self.num_trees += 1
        else:
            self.trees_without[tree.id] = reason
        self.closed_rows = len(self.rows)

    def result(self) -> TreeRows:
        return TreeRows(self.rows, self.unused, self.trees_without, self.num_trees)


def pair_row(tree: SearchTree, prompt: Prompt, pair: TreePair) -> Row:
    """One line of `pairs.jsonl`: the three texts that TRL and others read, the exact ids, and the provenance.

    The ids are those of the search: root ids as tokenised, thoughts as generated.
    """
    return {
        "prompt": state_text(tree, prompt, pair.parent),
        "chosen": _text(response(tree, pair.parent, pair.chosen)),
        "rejected": _text(response(tree, pair.parent, pair.rejected)),
        "prompt_token_ids": [*tree.root_ids(prompt), *tree.path_ids(pair.parent)],
        "chosen_token_ids": response_ids(tree, pair.parent, pair.chosen),
        "rejected_token_ids": response_ids(tree, pair.parent, pair.rejected),
        "chosen_final": ends_chain(pair.chosen),
        "rejected_final": ends_chain(pair.rejected),
        "task": tree.task,
        "tree": tree.id,
        "step": pair.step,
        "chosen_node": pair.chosen.id,
        "rejected_node": pair.rejected.id,
        "chosen_value": pair.chosen.value,
        "rejected_value": pair.rejected.value,
    }


def sft_row(tree: SearchTree, prompt: Prompt, path: Sequence[Node]) -> Row:
    """One line of `sft.jsonl`: the question's prompt and a whole winning path, as text and as the ids of the search."""
    return {
        "prompt": state_text(tree, prompt, ROOT),
        "completion": _text(path),
        "prompt_token_ids": tree.root_ids(prompt),
        "completion_token_ids": [token for node in path for token in node.token_ids],
        "completion_final": ends_chain(path[-1]),
        "task": tree.task,
        "tree": tree.id,
        "node": path[-1].id,
        "value": path[-1].value,
    }


def state_text(tree: SearchTree, prompt: Prompt, node_id: int) -> str:
    """The text of a state as the model read it: shared prompt, the question's part, the thoughts down to the node."""
    asked = tree.question_prompt
    if not asked:  # a tree that was not made by a search need not repeat what the task says
        task = get_task(tree.task)
        asked = task.prompt(Question(tree.id, tree.question)).removeprefix(task.few_shot)
    return prompt.text + asked + _text(tree.path(node_id))


def ends_chain(node: Node) -> bool:
    """Whether end-of-sequence belongs after this thought: the chain ends here and was not cut at the token cap."""
    return node.terminal and node.stop != "length"


def _text(nodes: Sequence[Node]) -> str:
    return "".join(node.text for node in nodes)
