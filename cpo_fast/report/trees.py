"""What the report shows of the search trees of a run: the trees themselves, the pairs they give, and an audit of those.

The pairs are the ones that training would take with the run's configuration (`config.yaml` beside the trees, else the
`collect.yaml` of their search, rule `all` without both): the same rules, the same draws, each sequence of tokens once. The
audit counts over every tree of the file. The trees themselves are as many as fit into a number of bytes, evenly spaced in
the file. Token ids stay in the file: a thought here is its text, its value and its log-prob. A gold answer is used for one
mark, right or wrong, and not shown.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from cpo_fast.config import Config, PairsConfig, load_config
from cpo_fast.data.pair_files import NO_LOSER, NO_RIVAL, OUTSIDE_QUESTIONS, REPEATED
from cpo_fast.data.pair_rules import TreeExample, draw, response_ids, select_pairs
from cpo_fast.report.grading import Grader, grader
from cpo_fast.tree import Node, SearchTree, comparable, whole_trees

COLUMNS = ("parent", "text", "length", "value", "logp", "scored", "tokens", "count", "visits", "flags", "answer")
KEPT, TERMINAL, COMPLETE, CUT = 1, 2, 4, 8  # of `flags`; cut: generation ended at the token cap
MAX_LISTED = 200  # odd pairs, and trees without pairs of a reason: a list to look into, not to read through
TEXT_LIMITS = (None, 20_000, 2_000, 200, 20)  # characters kept of a text, for trees that would fill the page alone
SHARE_OF_ONE = 8  # a tree takes this part of the page at most, as far as cutting its texts can make it

Json = dict[str, Any]


def trees_payload(run: Path, budget_bytes: int) -> Json | None:
    """The trees of `run/trees.jsonl` and the audit of their pairs as JSON values, or None without that file.

    A line that is no tree is left out, and so is a last line without a newline, as a search that is running or was killed
    leaves it: `damaged` says of each which line it is and why.

    Args:
        run: the folder of a run.
        budget_bytes: what the result may take as ASCII JSON in which `<`, `>` and `&` are escaped too.

    Raises:
        DataError: the file cannot be read. ConfigError: the configuration cannot.
    """
    path = run / "trees.jsonl"
    if not path.exists():
        return None
    trees, damaged = whole_trees(path)
    source = next((name for name in ("config.yaml", "collect.yaml") if (run / name).exists()), "")
    config = load_config(run / source) if source else Config()
    taken = take_pairs(trees, config.pairs, config.seed)
    payload: Json = {
        "path": str(path),
        "total": len(trees),
        "shown": len(trees),
        "damaged": damaged[:MAX_LISTED],
        "num_damaged": len(damaged),
        "columns": COLUMNS,
        "settings": {
            "rule": config.pairs.rule,
            "rejected_fraction": config.pairs.rejected_fraction,
            "num_questions": config.pairs.num_questions,
            "seed": config.seed,
            "method": config.train.method,
            "source": source,
        },
        "audit": _audit(trees, taken, config),
        "trees": [],
    }
    room = budget_bytes - embedded_bytes(payload)
    grade = _grader(config)
    shown = [_fitted(number, tree, taken, grade(tree), room // SHARE_OF_ONE) for number, tree in enumerate(trees)]
    payload["trees"] = [shown[place] for place in _evenly([embedded_bytes(one) + 1 for one in shown], room)]
    payload["shown"] = len(payload["trees"])
    return payload


def embedded_bytes(value: Any) -> int:
    """Bytes of `value` as JSON inside a script element, at most."""
    text = json.dumps(value, separators=(",", ":"))
    return len(text) + 5 * sum(map(text.count, "<>&"))  # each becomes \u003c or the like


@dataclass
class TakenPairs:
    """The pairs that training takes of many trees.

    Attributes:
        pairs: by id of every tree that gives some.
        unused: how many couples of winner and loser became no pair, by reason.
        without: reason by id of every tree that gives none, in the words of `cpo-fast pairs`.
    """

    pairs: dict[str, list[TreeExample]] = field(default_factory=dict)
    unused: Counter[str] = field(default_factory=Counter)
    without: dict[str, str] = field(default_factory=dict)

    def by_step(self) -> dict[int, int]:
        """How many pairs there are at each step (0: whole paths), ascending."""
        counts = Counter(pair.step for pairs in self.pairs.values() for pair in pairs)
        return dict(sorted(counts.items()))


def take_pairs(trees: Sequence[SearchTree], config: PairsConfig, seed: int) -> TakenPairs:
    """The pairs of rows as `TreeFileReader.rows` makes them, without the rows: neither prompts nor texts are read."""
    taken = TakenPairs()
    winners = [tree.id for tree in trees if tree.winning_nodes]
    questions = set(winners) if config.num_questions is None else draw(winners, config.num_questions, seed, "questions")
    seen: set[tuple[Any, ...]] = set()
    for tree in trees:
        if tree.id not in questions:
            taken.without[tree.id] = OUTSIDE_QUESTIONS if tree.winning_nodes else tree.status
            continue
        selection = select_pairs(tree, config, seed)
        unused = Counter(reason for _, reason in selection.unused)
        root = (tree.prompt_hash, tree.num_shared_tokens, tree.question_token_ids)
        for pair in selection.examples:
            responses = (tuple(response_ids(tree, pair.parent, last)) for last in pair.last)
            ids = (root, tuple(tree.path_ids(pair.parent)), *responses)
            if ids in seen:
                unused[REPEATED] += 1
            else:
                taken.pairs.setdefault(tree.id, []).append(pair)
            seen.add(ids)
        taken.unused.update(unused)
        if tree.id not in taken.pairs:
            fallback = NO_RIVAL if config.rule == "fpo" else NO_LOSER
            taken.without[tree.id] = unused.most_common(1)[0][0] if unused else fallback
    return taken


def _grader(config: Config) -> Callable[[SearchTree], str]:
    """Whether a tree's answer is `right` or `wrong`, as its task says, `ungraded` without gold, or there is `none`."""
    tasks: dict[str, Grader] = {}

    def grade(tree: SearchTree) -> str:
        if tree.answer is None or tree.gold is None:
            return "none" if tree.answer is None else "ungraded"
        if tree.task not in tasks:
            tasks[tree.task] = grader(tree.task, config)[0]
        return "right" if tasks[tree.task](tree.answer, tree.gold) else "wrong"

    return grade


def _fitted(number: int, tree: SearchTree, taken: TakenPairs, outcome: str, max_bytes: int) -> Json:
    """A tree as the page reads it, its texts cut if it took more than `max_bytes` with whole ones."""
    values: Json = {}
    for limit in TEXT_LIMITS:
        values = {
            "number": number + 1,
            "id": tree.id[:limit],
            "task": tree.task[:limit],
            "question": tree.question[:limit],
            "answer": None if tree.answer is None else tree.answer[:limit],
            "outcome": outcome,
            "status": tree.status,
            "detail": tree.detail[:limit],
            "winning": tree.winning_nodes,
            "without": taken.without.get(tree.id, ""),
            "pairs": [(pair.step, *pair.node_ids) for pair in taken.pairs.get(tree.id, ())],
            "nodes": [_row(node, limit) for node in tree.nodes],
        }
        if embedded_bytes(values) <= max_bytes:
            break
    return values


def _row(node: Node, limit: int | None) -> tuple[Any, ...]:
    """A node in the order of `COLUMNS`. `length` is None where the text is whole."""
    return (
        node.parent,
        node.text[:limit],
        len(node.text) if len(node.text[:limit]) < len(node.text) else None,
        None if node.value is None else float(f"{node.value:.6g}"),
        round(sum(node.logps), 4) if node.logps else None,
        len(node.logps),
        len(node.token_ids),
        node.count,
        node.visits,
        KEPT * node.kept | TERMINAL * node.terminal | COMPLETE * node.complete | CUT * (node.stop == "length"),
        None if node.answer is None else node.answer[:limit],
    )


def _evenly(sizes: Sequence[int], room: int) -> list[int]:
    """Places of as many trees as fit into `room`, evenly spaced."""

    def places(count: int) -> list[int]:
        return [index * len(sizes) // count for index in range(count)]

    def fits(count: int) -> bool:
        return sum(sizes[place] for place in places(count)) <= room

    low, high = 0, len(sizes)
    while low < high:  # of unequal trees more may take less: what is found fits, and need not be the most
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return places(low)


def _audit(trees: Sequence[SearchTree], taken: TakenPairs, config: Config) -> Json:
    """Counts over every tree. Trees are named by their number in the file, from 1, pairs by their place in the tree."""
    numbers = {tree.id: number for number, tree in enumerate(trees, start=1)}
    steps: dict[int, list[tuple[Node, Node]]] = {}
    odd: list[tuple[int, int, int, float, float]] = []
    for tree_id, pairs in taken.pairs.items():
        for place, pair in enumerate(pairs):
            chosen, rejected = pair.last
            steps.setdefault(pair.step, []).append((chosen, rejected))
            if _is_odd(chosen, rejected):
                odd.append((numbers[tree_id], place, pair.step, comparable(chosen.value), comparable(rejected.value)))
    without: dict[str, list[int]] = {}
    for tree_id, reason in taken.without.items():
        without.setdefault(reason, []).append(numbers[tree_id])
    nodes = [node for tree in trees for node in tree.nodes]
    rules = get_args(PairsConfig.model_fields["rule"].annotation)
    others = {rule: take_pairs(trees, config.pairs.model_copy(update={"rule": rule}), config.seed) for rule in rules}
    repeated = sorted(
        (
            (node.count, -number, node.id)
            for number, tree in enumerate(trees, 1)
            for node in tree.nodes
            if node.count > 1
        ),
        reverse=True,
    )
    return {
        "rules": {rule: {"steps": made.by_step(), "trees": len(made.pairs)} for rule, made in others.items()},
        "steps": [{"step": step, **_of_step(steps[step])} for step in sorted(steps)],
        "num_pairs": sum(map(len, steps.values())),
        "num_odd": len(odd),
        "odd": odd[:MAX_LISTED],
        "without": {reason: {"count": len(each), "trees": each[:MAX_LISTED]} for reason, each in without.items()},
        "unused": dict(taken.unused.most_common()),
        "num_thoughts": len(nodes),
        "num_samples": sum(node.count for node in nodes) + sum(tree.num_empty for tree in trees),
        "num_merged": sum(node.count - 1 for node in nodes),
        "num_empty": sum(tree.num_empty for tree in trees),
        "repeated": [(-number, node_id, count) for count, number, node_id in repeated[:10]],
    }


def _is_odd(chosen: Node, rejected: Node) -> bool:
    # without a value on either side nothing was compared
    return None not in (chosen.value, rejected.value) and comparable(chosen.value) <= comparable(rejected.value)


def _of_step(pairs: Sequence[tuple[Node, Node]]) -> Json:
    """What one step's row of the audit says."""
    both = [(chosen, rejected) for chosen, rejected in pairs if None not in (chosen.value, rejected.value)]
    return {
        "pairs": len(pairs),
        "chosen_value": _mean([comparable(chosen.value) for chosen, _ in both]),
        "rejected_value": _mean([comparable(rejected.value) for _, rejected in both]),
        "without_value": len(pairs) - len(both),
        "odd": sum(_is_odd(*pair) for pair in pairs),
        "chosen_logp": _mean([sum(chosen.logps) / len(chosen.logps) for chosen, _ in pairs if chosen.logps]),
        "rejected_logp": _mean([sum(rejected.logps) / len(rejected.logps) for _, rejected in pairs if rejected.logps]),
    }


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None
