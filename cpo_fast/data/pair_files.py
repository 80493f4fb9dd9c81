"""Search trees to rows of training files: preference pairs, and supervised examples from winning paths.

A row carries the texts that other libraries read, the exact ids of the search, and where it came from. The same rows are
written to files and trained on directly, so the two cannot differ.

What a set of preference rows looks like, step by step: counts, values and lengths, to be read before training on it.

`trees.jsonl` to files that can be trained on: preference pairs by a rule, and supervised examples.

Rows go to JSON lines, or to parquet where the name ends so. What was left out goes beside them, to
`<name>.dropped.jsonl`, with the reason. Same trees, settings and seed: same bytes.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpo_fast.config import PairsConfig
from cpo_fast.data.pair_rules import TreePair, draw, response, response_ids, select_pairs, winning_paths
from cpo_fast.files import write_jsonl
from cpo_fast.rows import write_parquet
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


@dataclass(frozen=True)
class StepAudit:
    """The pairs of one step of the chain (0: whole paths).

    Attributes:
        num_pairs, num_states: pairs, and the distinct states they continue.
        chosen_value, rejected_value: mean over the pairs whose thought has a value; None when none has.
        num_without_value: pairs with a thought that no verdict was readable for.
        chosen_tokens, rejected_tokens: mean length of the responses in tokens.
        max_tokens: longest prompt + response in tokens.
    """

    num_pairs: int
    num_states: int
    chosen_value: float | None
    rejected_value: float | None
    num_without_value: int
    chosen_tokens: float
    rejected_tokens: float
    max_tokens: int


def audit_pairs(rows: Iterable[dict[str, Any]]) -> dict[int, StepAudit]:
    """A `StepAudit` for every step, ascending, of rows as `pairs.jsonl` holds them."""
    steps: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        steps.setdefault(row["step"], []).append(row)
    return {step: _audit(steps[step]) for step in sorted(steps)}


def _audit(rows: Sequence[dict[str, Any]]) -> StepAudit:
    chosen = [len(row["chosen_token_ids"]) for row in rows]
    rejected = [len(row["rejected_token_ids"]) for row in rows]
    lengths = zip((len(row["prompt_token_ids"]) for row in rows), chosen, rejected, strict=True)
    return StepAudit(
        num_pairs=len(rows),
        num_states=len({(row["tree"], tuple(row["prompt_token_ids"])) for row in rows}),
        chosen_value=_mean([row["chosen_value"] for row in rows if row["chosen_value"] is not None]),
        rejected_value=_mean([row["rejected_value"] for row in rows if row["rejected_value"] is not None]),
        num_without_value=sum(row["chosen_value"] is None or row["rejected_value"] is None for row in rows),
        chosen_tokens=sum(chosen) / len(rows),
        rejected_tokens=sum(rejected) / len(rows),
        max_tokens=max(prompt + max(first, second) for prompt, first, second in lengths),
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class PairCounts:
    """What `write_pairs` did.

    Attributes:
        num_pairs, pairs_by_step: pairs written, in all and by step (from 1; 0: whole paths).
        num_trees: trees that gave pairs.
        trees_without_pairs: how many gave none, by reason.
        dropped: couples of winner and loser that became no pair, by reason.
        num_repeated: of these, couples whose tokens stand under another question already.
        steps: values and lengths by step.
        dropped_path: the file with one line a dropped couple, or None when there is none.
    """

    num_pairs: int
    pairs_by_step: dict[int, int]
    num_trees: int
    trees_without_pairs: dict[str, int]
    dropped: dict[str, int]
    num_repeated: int
    steps: dict[int, StepAudit]
    dropped_path: str | None


@dataclass(frozen=True)
class SftCounts:
    """What `write_sft` did: examples, trees that gave some, trees that gave none by reason, learnt tokens."""

    num_examples: int
    num_trees: int
    trees_without_examples: dict[str, int]
    num_completion_tokens: int


def write_pairs(
    trees_path: str | Path, pairs_path: str | Path, settings: PairsConfig | None = None, seed: int = 0
) -> PairCounts:
    """Write the pairs of `trees_path` by the rule of `settings` (default: rule `all`, everything), atomically.

    Raises:
        DataError: the trees are not readable; names file:line. EnvironmentProblem: parquet without pyarrow.
    """
    settings = settings or PairsConfig()
    reader = TreeFileReader(trees_path)
    made = reader.pair_rows(settings, seed, reader.draw_questions(settings.num_questions, seed))
    _write(pairs_path, made.rows)
    dropped_path = write_dropped(_dropped_path(pairs_path), made.unused)
    steps = audit_pairs(made.rows)
    dropped = dict(Counter(record["reason"] for record in made.unused).most_common())
    return PairCounts(
        num_pairs=len(made.rows),
        pairs_by_step={step: audit.num_pairs for step, audit in steps.items()},
        num_trees=made.num_trees,
        trees_without_pairs=_reasons(made),
        dropped=dropped,
        num_repeated=dropped.get(REPEATED, 0),
        steps=steps,
        dropped_path=dropped_path,
    )


def write_sft(
    trees_path: str | Path, sft_path: str | Path, settings: PairsConfig | None = None, seed: int = 0
) -> SftCounts:
    """Write prompt and completion of every winning path, each once; of `settings` num_questions is used.

    Raises:
        DataError: the trees are not readable; names file:line. EnvironmentProblem: parquet without pyarrow.
    """
    reader = TreeFileReader(trees_path)
    made = reader.sft_rows(reader.draw_questions(settings.num_questions if settings else None, seed))
    _write(sft_path, made.rows)
    write_dropped(_dropped_path(sft_path), made.unused)
    num_tokens = sum(len(row["completion_token_ids"]) for row in made.rows)
    return SftCounts(len(made.rows), made.num_trees, _reasons(made), num_tokens)


def write_dropped(path: str | Path, records: list[Row]) -> str | None:
    """Write what was dropped and return the path; with nothing dropped, remove what an earlier run left there."""
    if not records:
        Path(path).unlink(missing_ok=True)
        return None
    write_jsonl(path, records)
    return str(path)


def _write(path: str | Path, rows: list[Row]) -> None:
    if Path(path).suffix == ".parquet":
        write_parquet(path, rows)
    else:
        write_jsonl(path, rows)


def _dropped_path(path: str | Path) -> Path:
    return Path(path).with_name(f"{Path(path).stem}.dropped.jsonl")


def _reasons(made: TreeRows) -> dict[str, int]:
    return dict(Counter(made.trees_without.values()).most_common())
