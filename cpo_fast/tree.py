"""The search tree: what a search found for one question, and the line of `trees.jsonl` that keeps it.

A node is one thought under its parent. The root state (the question itself) is not a node and has id -1. The tokens
of a state are

    prompt.token_ids[:num_shared_tokens] + question_token_ids + the token_ids of the nodes on its path

exactly as the model read and generated them. The few-shot prompt is the same for every question of a task, so it is
stored once, in `prompts/<hash>.json` beside the trees. Lines are canonical JSON without times, hosts or ranks: the same
search gives the same bytes. Gold answers ride along for information and nothing here uses them.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr, TypeAdapter, ValidationError

from cpo_fast.errors import DataError
from cpo_fast.files import canonical_json, parsed_line, read_jsonl, short_hash, unreadable, write_atomic

SCHEMA_VERSION = 2
ROOT = -1  # the id of the root state, as a parent

# ok: at least one winning path; abstained: an answer won, but none of its chains has `search.min_value`; no_answer:
# thoughts, but no complete chain; no_candidates: not one usable thought under the root; failed: the search of this question
# raised, `detail` says what
Status = Literal["ok", "abstained", "no_answer", "no_candidates", "failed"]
Stop = Literal["newline", "eos", "length"]
# strict types take no text for a number and no true for a 1, lists become tuples; only `SearchTree.from_dict` looks at them
TokenIds = tuple[Annotated[StrictInt, Field(ge=0)], ...]
Logp = Annotated[StrictFloat, Field(le=0, allow_inf_nan=False)]
MAX_VALUE = 1e100  # of a verdict: means of larger ones would overflow
LOGP_DECIMALS = 6  # of a float32 log-prob near -10 the seventh is noise


def rounded_logps(logps: Iterable[float]) -> tuple[float, ...]:
    """Log-probs as `Node.logps` holds them."""
    # adding 0.0 makes 0.0 of -0.0, so that equal values are equal bytes
    return tuple(round(logp, LOGP_DECIMALS) + 0.0 for logp in logps)


@dataclass(frozen=True)
class Node:
    """One thought: a line of the chain, under the state it continues.

    Attributes:
        id: place in `SearchTree.nodes`: in the order in which states were expanded, then by sample index. Parents come
            before their children.
        parent: id of the parent node, or -1 under the root state.
        depth: step in the chain, from 1.
        text: the thought as decoded, its newline included, which people, evaluators and answers read.
        token_ids: the ids as generated, which are trained and scored.
        value: verdict of the evaluator, larger is better, or None when every sampled verdict was unparseable.
        evaluations: what `value` was made from: {"likely": log-prob, "impossible": log-prob}, or one
            {"label": "likely" | "impossible" | None, "text": str} a sampled verdict, or one {"imported": value} for
            each candidate of another program's search that is merged here.
        kept: expanded, or complete and so part of the vote.
        terminal: the search never continues it: an answer line, or a chain that broke off.
        complete: an answer line with a readable answer that ended by newline or end-of-sequence.
        count: how many samples of this parent had this text (merged by collapsed whitespace).
        visits: simulations of a Monte Carlo tree search that went through it, or ended there. None, and not written, in
            trees of other searches.
        answer: the normalised answer of a complete node, else None.
        stop: why generation ended: a newline, end-of-sequence, or the token cap.
        logps: natural log-prob of each generated token, rounded to `LOGP_DECIMALS`: of every id and, after `eos`, of the
            end-of-sequence. Under the model itself: temperature 1, nothing filtered. Empty in an imported tree.
    """

    id: StrictInt
    parent: StrictInt
    depth: StrictInt
    text: StrictStr
    token_ids: TokenIds
    value: StrictInt | StrictFloat | None
    evaluations: tuple[dict[str, Any], ...]
    kept: StrictBool
    terminal: StrictBool
    complete: StrictBool
    count: StrictInt
    visits: StrictInt | None = field(default=None, kw_only=True)
    answer: StrictStr | None
    stop: Stop
    logps: tuple[Logp, ...] = ()


@dataclass(frozen=True)
class SearchTree:
    """Everything a search found for one question.

    Attributes:
        id: the question's id. task: name of its task. question: its text. gold: normalised reference answer or None.
        prompt_hash: names the few-shot prompt, `prompts/<prompt_hash>.json`.
        num_shared_tokens: how many leading ids of that prompt the tokenised question prompt shares.
        question_token_ids: the rest of the tokenised question prompt.
        question_prompt: its text after that of the few-shot prompt, template included. `Prompt.text` + this + the
            thoughts is what the model read.
        nodes: every generated thought that is not empty, losers included.
        winning_nodes: ids of the complete nodes in the winning answer group, without those valued below
            `search.min_value`, ascending.
        answer: the winning answer or None. num_empty: samples dropped because they were only whitespace.
        status: see `Status`. detail: the reason when failed, where it was imported from, else "".
        model_hash, adapter_hash ("" without one), config_hash: what produced the tree. seed: the run's seed.
        equal_for: "settings" where only a search with the same settings, of speed and memory too, on the same device finds
            the same tree (16 bits, a GPU, a mixture of experts), else "" and not written.
        num_thought_tokens: tokens generated for thoughts, those of duplicates and of empty samples included.
        num_verdict_tokens: tokens generated for sampled verdicts. Both 0 in an imported tree, which does not tell.
    """

    id: StrictStr
    task: StrictStr
    question: StrictStr
    gold: StrictStr | None
    prompt_hash: StrictStr
    num_shared_tokens: StrictInt
    question_token_ids: TokenIds
    nodes: tuple[Node, ...]
    winning_nodes: TokenIds
    answer: StrictStr | None
    num_empty: StrictInt
    status: Status
    detail: StrictStr
    model_hash: StrictStr
    adapter_hash: StrictStr
    seed: StrictInt
    config_hash: StrictStr
    num_thought_tokens: StrictInt = 0
    num_verdict_tokens: StrictInt = 0
    question_prompt: StrictStr = ""
    equal_for: StrictStr = ""
    schema_version: StrictInt = SCHEMA_VERSION

    def children(self, node_id: int) -> list[Node]:
        """The generated children of a node (or of the root state, -1), in sample order."""
        return [node for node in self.nodes if node.parent == node_id]

    def path(self, node_id: int) -> list[Node]:
        """The nodes from the first thought down to `node_id`. Empty for the root state."""
        return path_to(self.nodes, node_id)

    def path_ids(self, node_id: int) -> list[int]:
        """Token ids of the thoughts from the first down to `node_id`, without the prompt."""
        return [token for node in self.path(node_id) for token in node.token_ids]

    def root_ids(self, prompt: "Prompt") -> list[int]:
        """Token ids of the root state: few-shot prompt and question, as tokenised together.

        Raises:
            ValueError: `prompt` is not the one this tree was searched with.
        """
        if prompt.hash != self.prompt_hash:
            raise ValueError(f"tree '{self.id}' was searched with prompt {self.prompt_hash}, got prompt {prompt.hash}")
        return [*prompt.token_ids[: self.num_shared_tokens], *self.question_token_ids]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values. `canonical_json(tree.to_dict())` is the line of `trees.jsonl`."""
        # by hand: `asdict` copies every number of every node by a call of its own
        nodes = tuple(
            _without_absent(vars(node) | {"evaluations": tuple(map(dict, node.evaluations))}) for node in self.nodes
        )
        return _without_absent(vars(self) | {"nodes": nodes})

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> "SearchTree":
        """Inverse of `to_dict`.

        Raises:
            ValueError: a field is missing, unknown, of a wrong type, or the nodes do not form a tree.
        """
        version = row.get("schema_version")
        if version != SCHEMA_VERSION:
            origin = "another version of cpo_fast wrote it; collect again into another folder"
            raise ValueError(
                f"schema_version is {version!r}, this version reads {SCHEMA_VERSION}: "
                f"{'no search wrote it' if version is None else origin}"
            )
        # names first: pydantic fills in defaults and drops what it does not know, and an older or a cut line must not pass
        # for a whole one
        _check_names(cls, row, "tree")
        for position, node in enumerate(row["nodes"] if isinstance(row["nodes"], list) else ()):
            _check_names(Node, node, f"node {position}")
        try:
            tree = _TREE.validate_python(row)
        except ValidationError as error:
            raise ValueError(_type_sentence(error)) from None
        for position, node in enumerate(tree.nodes):
            _check_node(node, position, tree.nodes)
        for winner in tree.winning_nodes:
            if winner >= len(tree.nodes) or not tree.nodes[winner].complete:
                raise ValueError(f"winning node {winner} is not a complete node of this tree")
        return tree


def comparable(value: float | None) -> float:
    """A node's value as it ranks: None, no readable verdict, comes last."""
    return float("-inf") if value is None else value


def path_to(nodes: Sequence[Node], node_id: int) -> list[Node]:
    """As `SearchTree.path`, for nodes that are no tree yet: each is named by its place."""
    path: list[Node] = []
    while node_id != ROOT:
        path.append(nodes[node_id])
        node_id = nodes[node_id].parent
    return path[::-1]


@dataclass(frozen=True)
class Prompt:
    """A task's few-shot text and its token ids, tokenised alone. `hash` names both."""

    hash: str
    text: str
    token_ids: tuple[int, ...]

    @classmethod
    def build(cls, text: str, token_ids: Sequence[int]) -> "Prompt":
        """A prompt named by the first 16 hex digits of the SHA-256 of its text and ids."""
        content = canonical_json({"text": text, "token_ids": list(token_ids)})
        return cls(short_hash(content), text, tuple(token_ids))

    def save(self, trees_path: str | Path) -> Path:
        """Write `prompts/<hash>.json` beside `trees_path` and return its path."""
        path = Path(trees_path).parent / "prompts" / f"{self.hash}.json"
        write_atomic(path, canonical_json(asdict(self)) + "\n")
        return path


def read_prompt(trees_path: str | Path, prompt_hash: str) -> Prompt:
    """Load the prompt `prompt_hash` stored beside a `trees.jsonl`.

    Raises:
        DataError: the hash is none, or the file is missing, damaged, or its content does not have that hash.
    """
    if not re.fullmatch("[0-9a-f]{16}", prompt_hash):  # it becomes a file name: a tree must not point elsewhere
        raise DataError(
            f"{trees_path}: prompt_hash {prompt_hash!r} is not 16 hexadecimal digits; the tree was not made here"
        )
    path = Path(trees_path).parent / "prompts" / f"{prompt_hash}.json"
    rows = [row for _, row in read_jsonl(path)]
    if len(rows) != 1 or not isinstance(rows[0].get("text"), str) or not isinstance(rows[0].get("token_ids"), list):
        raise DataError(f"{path}: expected one JSON object with 'text' and 'token_ids'; collect again")
    prompt = Prompt.build(rows[0]["text"], rows[0]["token_ids"])
    if prompt.hash != prompt_hash:
        raise DataError(f"{path}: the content has hash {prompt.hash}; the file was changed after the search")
    return prompt


def read_trees(path: str | Path, drop_torn_tail: bool = False) -> list[SearchTree]:
    """Every tree of a `trees.jsonl`, in file order.

    `drop_torn_tail` ignores a last line without a newline, as a killed `collect` leaves it.

    Raises:
        DataError: a line is not a search tree, or an id appears twice. Names file:line.
    """
    trees: list[SearchTree] = []
    first_line: dict[str, int] = {}
    for number, row in read_jsonl(path, drop_torn_tail):
        trees.append(_tree_of_line(path, number, row, first_line))
    return trees


def whole_trees(path: str | Path) -> tuple[list[SearchTree], list[str]]:
    """The trees of a `trees.jsonl` that can be read, in file order, and a sentence for each line that is none.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        *lines, rest = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise unreadable(path, error) from None
    trees: list[SearchTree] = []
    damaged: list[str] = []
    first_line: dict[str, int] = {}
    for number, raw in enumerate(lines, start=1):
        if raw.strip():
            try:
                trees.append(_tree_of_line(path, number, parsed_line(path, number, raw), first_line))
            except DataError as error:
                damaged.append(f"line {str(error).removeprefix(f'{path}:')}")
    if rest.strip():
        damaged.append(f"line {len(lines) + 1}: half-written, as by a search that is running or was stopped")
    return trees, damaged


def _tree_of_line(path: str | Path, number: int, row: Any, first_line: dict[str, int]) -> SearchTree:
    """The tree of a line, whose id goes into `first_line`. Raises as `read_trees`."""
    try:
        tree = SearchTree.from_dict(row)
    except ValueError as error:
        if "nodes" not in row and not _TRAINED.isdisjoint(row):
            raise DataError(
                f"{path}:{number}: not a search tree but a row to train on, such as preferences; train takes this file as "
                "data.path, and here the trees.jsonl of cpo-fast collect is due"
            ) from None
        raise DataError(f"{path}:{number}: not a search tree ({error}); mend or delete the line") from None
    if tree.id in first_line:
        raise DataError(f"{path}:{number}: tree '{tree.id}' is already on line {first_line[tree.id]}; delete one")
    first_line[tree.id] = number
    return tree


_TREE = TypeAdapter(SearchTree)
_TRAINED = {"chosen", "rejected", "completion"}  # columns of rows that hold a response
# of trees and nodes, what is not written where it has this value: lines of earlier versions lack it too
_ABSENT = {"equal_for": "", "visits": None}
_LISTS = {  # what a list holds, for its sentence
    "token_ids": "non-negative integers",
    "question_token_ids": "non-negative integers",
    "winning_nodes": "non-negative integers",
    "evaluations": "objects",
    "logps": "finite log-probs",
}


def _check_names(cls: type, row: Any, what: str) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{what} is not an object")
    names = [field.name for field in fields(cls)]
    missing = [name for name in names if name not in row and name not in _ABSENT]
    unknown = [name for name in row if name not in names]
    if missing or unknown:
        raise ValueError(f"{what}: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}")


def _without_absent(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in _ABSENT or value != _ABSENT[name]}


def _type_sentence(error: ValidationError) -> str:
    # of the first field of a wrong type
    first = error.errors(include_url=False)[0]
    # ("status",), ("question_token_ids", 3) or, inside a node, ("nodes", 2, "logps", 0)
    where, what = first["loc"], "tree: "
    if where[0] == "nodes" and len(where) > 2:
        where, what = where[2:], f"node {where[1]}: "
    name, value = str(where[0]), first["input"]
    if first["type"] == "literal_error":
        allowed = get_args(Status if name == "status" else Stop)
        return f"{what.removeprefix('tree: ')}{name} {value!r} is not one of {', '.join(allowed)}"
    if name in _LISTS and len(where) > 1:
        return f"{what.removeprefix('tree: ')}'{name}' is not a list of {_LISTS[name]}"
    return f"{what}'{name}' has type {type(value).__name__}"


def _check_node(node: Node, position: int, nodes: Sequence[Node]) -> None:
    if node.id != position or not ROOT <= node.parent < position:
        raise ValueError(f"node {position}: has id {node.id} and parent {node.parent}; parents come before children")
    if not node.token_ids:
        raise ValueError(f"node {position}: has no tokens")
    num_generated = len(node.token_ids) + (node.stop == "eos")  # whose log-prob is kept, and whose id is not
    if len(node.logps) not in (0, num_generated):  # 0: imported
        raise ValueError(f"node {position}: has {len(node.logps)} logps for {num_generated} generated tokens")
    numbers = [node.value, *(number for each in node.evaluations for number in each.values())]
    for number in numbers:
        if isinstance(number, int | float) and not abs(number) <= MAX_VALUE:  # NaN too
            raise ValueError(f"node {position}: the value {str(number)[:20]} is not a number up to {MAX_VALUE:g}")
    above = None if node.parent == ROOT else nodes[node.parent].visits
    if node.visits is not None and not 0 <= node.visits <= (node.visits if above is None else above):
        raise ValueError(f"node {node.id} has {node.visits} visits and its parent {above}")
    expected_depth = 1 if node.parent == ROOT else nodes[node.parent].depth + 1
    if node.depth != expected_depth:
        raise ValueError(f"node {node.id} has depth {node.depth}, its parent implies {expected_depth}")
