"""`trees.jsonl` to rows that can be trained on: preference pairs by a rule, or winning paths as completions.

A row carries the texts that other libraries read, the exact ids of the search, and where it came from. Rows are written to
JSON lines, or to parquet where the name ends so, and what was left out beside them, to `<name>.dropped.jsonl`, with the
reason. Training on trees takes the very same rows (`TreeFileReader.rows`). Same trees, configuration and seed: same bytes.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpo_fast.config import TREE_METHODS, PairsConfig
from cpo_fast.data.examples import RESPONSES
from cpo_fast.data.pair_rules import (
    NOT_BELOW,
    NOT_LOWEST,
    SAME_TOKENS,
    Selection,
    TreeExample,
    draw,
    response,
    select_children,
    select_pairs,
    select_valued_paths,
    select_winning_paths,
)
from cpo_fast.files import write_jsonl
from cpo_fast.rows import Row, write_parquet
from cpo_fast.tasks import Question, get_task
from cpo_fast.tree import Node, Prompt, SearchTree, read_prompt, read_trees

OUTSIDE_QUESTIONS = "outside pairs.num_questions"
REPEATED = "the same tokens under another question"
NO_LOSER = "no losing sibling"
NO_RIVAL = "no other complete path"
# why a tree with a winner gave no row: what another rule may change
_OF_THE_RULE = {NO_LOSER, NO_RIVAL, NOT_BELOW, NOT_LOWEST, SAME_TOKENS}


@dataclass
class TreeRows:
    """Rows of many trees and everything that became none.

    Attributes:
        rows: in tree order.
        unused: one record an example that was left out: tree, step, nodes and reason.
        trees_without: reason by id of every tree that gave no row, in tree order.
        num_trees: trees that gave rows.
    """

    rows: list[Row] = field(default_factory=list)
    unused: list[Row] = field(default_factory=list)
    trees_without: dict[str, str] = field(default_factory=dict)
    num_trees: int = 0

    @property
    def unused_by_reason(self) -> dict[str, int]:
        return dict(Counter(record["reason"] for record in self.unused).most_common())

    @property
    def trees_without_by_reason(self) -> dict[str, int]:
        return dict(Counter(self.trees_without.values()).most_common())

    @property
    def shares(self) -> str:
        """`8 of 120 trees (none in 95: no other complete path; 17: no_answer)`: which gave rows, and why the others not."""
        total = self.num_trees + len(self.trees_without)
        reasons = "; ".join(f"{count}: {reason}" for reason, count in self.trees_without_by_reason.items())
        return f"{self.num_trees} of {total} trees" + (f" (none in {reasons})" if reasons else "")

    def warning(self, rule: str) -> str:
        """A sentence where `rule`, as `pairs.rule=fpo`, made rows of fewer than half of the trees with a winner."""
        num_lost = sum(reason in _OF_THE_RULE for reason in self.trees_without.values())
        if num_lost <= self.num_trees:
            return ""
        return f"{rule} takes {len(self.rows)} rows from {self.shares}; collect more questions, or choose another one"


def write_rows(
    trees_path: str | Path,
    rows_path: str | Path,
    config: PairsConfig | None = None,
    seed: int = 0,
    method: str = "preference",
) -> TreeRows:
    """Write the rows of `trees_path` atomically, and what was left out beside them.

    Args:
        trees_path, rows_path: from where to where, JSON lines or `*.parquet`.
        config: default: rule `all`, everything. Method `sft` uses its `num_questions` alone.
        seed: of the draws. method: as `train.method`.

    Raises:
        DataError: the trees are not readable, at file:line. EnvironmentProblem: parquet without pyarrow.
    """
    config = config or PairsConfig()
    reader = TreeFileReader(trees_path)
    made = reader.rows(config, seed, reader.draw_questions(config.num_questions, seed), method)
    if Path(rows_path).suffix == ".parquet":
        write_parquet(rows_path, made.rows)
    else:
        write_jsonl(rows_path, made.rows)
    write_dropped(unused_path(rows_path), made.unused)
    return made


def unused_path(rows_path: str | Path) -> Path:
    """The file beside `rows_path` that says what `write_rows` left out."""
    return Path(rows_path).with_name(f"{Path(rows_path).stem}.dropped.jsonl")


def write_dropped(path: str | Path, records: list[Row]) -> None:
    """Write what was left out. With nothing left out, remove what an earlier run left there."""
    if records:
        write_jsonl(path, records)
    else:
        Path(path).unlink(missing_ok=True)


class TreeFileReader:
    """A `trees.jsonl` with the prompts that stand beside it. Raises DataError with file:line."""

    def __init__(self, path: str | Path) -> None:
        self.trees = read_trees(path)
        hashes = dict.fromkeys(tree.prompt_hash for tree in self.trees)
        self.prompts = {prompt_hash: read_prompt(path, prompt_hash) for prompt_hash in hashes}

    @property
    def questions(self) -> list[str]:
        """Ids of the trees with a winning path."""
        # whatever the rule makes of them, so that every rule and supervised fine-tuning draw the same questions
        return [tree.id for tree in self.trees if tree.winning_nodes]

    def draw_questions(self, count: int | None, seed: int) -> set[str]:
        """The questions to use: `count` drawn by the seed, or all for None."""
        return set(self.questions) if count is None else draw(self.questions, count, seed, "questions")

    def rows(self, config: PairsConfig, seed: int, questions: AbstractSet[str], method: str) -> TreeRows:
        """Rows for `train.method` of the trees named in `questions`, each sequence of tokens once."""
        made = TreeRows()
        seen: set[tuple[Any, ...]] = set()  # ids of rows: two questions of a file may be the same
        for tree in self.trees:
            if not tree.winning_nodes or tree.id not in questions:
                made.trees_without[tree.id] = OUTSIDE_QUESTIONS if tree.winning_nodes else tree.status
                continue
            selection = _select(tree, config, seed, method)
            make_row = valued_row if method in TREE_METHODS else tree_row
            unused, num_before = list(selection.unused), len(made.rows)
            for example in selection.examples:
                row = make_row(tree, self.prompts[tree.prompt_hash], example)
                ids = tuple(tuple(value) for key, value in row.items() if key.endswith("_token_ids"))
                ids += tuple(tuple(thought["token_ids"]) for each in row.get("responses", ()) for thought in each)
                if ids in seen:
                    unused.append((example, REPEATED))
                else:
                    made.rows.append(row)
                seen.add(ids)
            made.unused += [
                {"tree": tree.id, "step": example.step, "nodes": list(example.node_ids), "reason": reason}
                for example, reason in unused
            ]
            if len(made.rows) > num_before:
                made.num_trees += 1
            else:
                fallback = NO_RIVAL if config.rule == "fpo" or method == "full_step" else NO_LOSER
                reasons = Counter(reason for _, reason in unused).most_common(1)
                made.trees_without[tree.id] = reasons[0][0] if reasons else fallback
        return made


def _select(tree: SearchTree, config: PairsConfig, seed: int, method: str) -> Selection:
    if method == "sft":
        return select_winning_paths(tree)
    if method == "full_step":
        return select_valued_paths(tree, config, seed)
    return select_children(tree) if method in TREE_METHODS else select_pairs(tree, config, seed)


def valued_row(tree: SearchTree, prompt: Prompt, example: TreeExample) -> Row:
    """What an objective of `TREE_METHODS` reads: each response as its thoughts, with all that the tree knows of them."""
    names = ("text", "token_ids", "value", "count", "logps")
    return {
        "prompt": state_text(tree, prompt, example.parent),
        "prompt_token_ids": [*tree.root_ids(prompt), *tree.path_ids(example.parent)],
        "responses": [
            [
                {name: getattr(node, name) for name in names} | {"final": ends_chain(node)}
                for node in response(tree, example.parent, last)
            ]
            for last in example.last
        ],
        "task": tree.task,
        "tree": tree.id,
        "step": example.step,
    }


def tree_row(tree: SearchTree, prompt: Prompt, example: TreeExample) -> Row:
    """One line of `pairs.jsonl` or `sft.jsonl`: the texts that others read, the exact ids, and the provenance."""
    names = RESPONSES["preference" if len(example.last) == 2 else "sft"]
    responses = {name: response(tree, example.parent, last) for name, last in zip(names, example.last, strict=True)}
    row: Row = {"prompt": state_text(tree, prompt, example.parent)}
    row |= {name: _text(nodes) for name, nodes in responses.items()}
    # the ids of the search, root as tokenised and thoughts as generated: text tokenised again may give others
    row["prompt_token_ids"] = [*tree.root_ids(prompt), *tree.path_ids(example.parent)]
    row |= {f"{name}_token_ids": [t for node in nodes for t in node.token_ids] for name, nodes in responses.items()}
    row |= {f"{name}_final": ends_chain(nodes[-1]) for name, nodes in responses.items()}
    row |= {"task": tree.task, "tree": tree.id}
    if "completion" in responses:
        return row | {"node": example.last[0].id, "value": example.last[0].value}
    row["step"] = example.step
    row |= {f"{name}_node": nodes[-1].id for name, nodes in responses.items()}
    row |= {f"{name}_value": nodes[-1].value for name, nodes in responses.items()}
    visits = {f"{name}_visits": nodes[-1].visits for name, nodes in responses.items()}
    return row if None in visits.values() else row | visits


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
    """The pairs of one step of the chain (0: whole paths), to be read before training on them.

    Attributes:
        num_pairs, num_states: pairs, and the distinct states they continue.
        chosen_value, rejected_value: mean over the pairs whose thought has a value, or None.
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


def audit_pairs(rows: Iterable[Row]) -> dict[int, StepAudit]:
    """A `StepAudit` for every step, ascending, of rows as `pairs.jsonl` holds them."""
    steps: dict[int, list[Row]] = {}
    for row in rows:
        steps.setdefault(row["step"], []).append(row)
    return {step: _audit(steps[step]) for step in sorted(steps)}


def _audit(rows: Sequence[Row]) -> StepAudit:
    chosen = [len(row["chosen_token_ids"]) for row in rows]
    rejected = [len(row["rejected_token_ids"]) for row in rows]
    lengths = zip((len(row["prompt_token_ids"]) for row in rows), chosen, rejected, strict=True)
    return StepAudit(
        num_pairs=len(rows),
        # trees of two questions may have equal prompts
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
