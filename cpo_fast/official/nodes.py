"""One search of the CPO paper's own program as nodes: chains cut back into thoughts, thoughts written as lines.

A candidate of that program is a whole chain. Its parent is the longest candidate of the level above that it continues
and after which the mark of its step stands. Only marks are written anew, as every task here writes them, so that search,
training and evaluation share one format:

    step 2, <text>                               ->  Step 2: <text>
    step 3, so the final answer is: <text>       ->  Answer: <text>
    step 4, the answer (arabic numerals) is <x>  ->  Answer: <x>

The words themselves stay as they are in the file, lower-cased as it has them. What becomes no thought is reported with its
reason.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cpo_fast.official.reader import Entry
from cpo_fast.tasks import Task
from cpo_fast.tasks.task_file import Marks
from cpo_fast.tree import ROOT, Node

# with case and whitespace, what the program changed in its last level after it had used it
_FOLDED_AWAY = frozenset("\"'-:")
# quotes and hyphens of the parent's end may stand before the mark: folding does not see them
_STEP = re.compile(r"[\s\"':-]*(?:answer:\s*)?step\s*(\d{1,3})\s*[,:.]?", re.IGNORECASE)
_CONCLUSION = re.compile(r"(?:so |therefore,? )?the (?:final answer|answer \(arabic numerals\)) is\s*:?", re.IGNORECASE)


@dataclass(frozen=True)
class Dropped:
    """A candidate that became no node: its level and index in the file, and why."""

    level: int
    index: int
    reason: str


class _NoThought(Exception):
    """Why a candidate becomes no node."""


@dataclass
class _Draft:
    """A node whose duplicates are still coming in."""

    id: int
    parent: int
    text: str
    depth: int
    values: list[float]


def build_nodes(
    entry: Entry, task: Task, tokenize: Callable[[str, str], list[int]]
) -> tuple[list[Node], list[int], list[Dropped], int]:
    """The nodes of one search.

    Args:
        entry: the search.
        task: reads answers.
        tokenize: token ids of a line, given the text of the lines before it. Raises ValueError where they do not
            separate.

    Returns:
        (nodes, ids of the winning ones, dropped candidates, recorded winners that are no complete node here). The
        winning answer is that of the first recorded winner that is complete here. Every complete node with it wins.
    """
    drafts: dict[tuple[int, str], _Draft] = {}  # by parent and line; the place of each is its node's id
    dropped: list[Dropped] = []
    above = {"": ROOT}  # folded chains of the level above, and the node each became
    for step, level in enumerate(entry.levels, start=1):
        # of several candidates above that a chain continues, the longest is tried first
        lengths = sorted({len(chain) for chain in above}, reverse=True)
        chains: dict[str, int] = {}
        for index, (chain, value) in enumerate(zip(level.candidates, level.values, strict=True)):
            folded, ends = _fold(chain)
            parents = [(length, above[folded[:length]]) for length in lengths if folded[:length] in above]
            try:
                parent, line = _thought(chain, ends, parents, step, task.file.marks, is_last=step == len(entry.levels))
            except _NoThought as error:
                dropped.append(Dropped(step - 1, index, str(error)))
                continue
            draft = drafts.setdefault((parent, line), _Draft(len(drafts), parent, line, step, []))
            draft.values.append(value)
            chains[folded] = draft.id
        above = chains
    nodes = _nodes(list(drafts.values()), task, tokenize)
    winners, num_lost = _winners(entry.winners, above, nodes)
    return nodes, winners, dropped, num_lost


def _fold(text: str) -> tuple[str, list[int]]:
    """The characters that chains are compared by, and after each its place in the text."""
    folded: list[str] = []
    ends: list[int] = []
    for position, character in enumerate(text, start=1):
        for lower in character.lower():  # two characters of a dotted capital I
            if not lower.isspace() and lower not in _FOLDED_AWAY:
                folded.append(lower)
                ends.append(position)
    return "".join(folded), ends


def _thought(
    chain: str, ends: Sequence[int], parents: Sequence[tuple[int, int]], step: int, marks: Marks, is_last: bool
) -> tuple[int, str]:
    """(parent node, line) of the last thought of a chain. Raises _NoThought.

    Args:
        chain: the whole text. ends: as `_fold` gives it.
        parents: (folded length, node) of every chain that this one continues, longest first.
        step: from 1. marks: of the task. is_last: whether chains end on this level.
    """
    if not parents:
        raise _NoThought("continues no candidate of the level above")
    for length, parent in parents:
        rest = chain[ends[length - 1] if length else 0 :]
        mark = _STEP.match(rest)
        if mark and int(mark[1]) == step:
            return parent, _line(" ".join(rest[mark.end() :].split()), step, marks, is_last)
    raise _NoThought("no mark of its step")


def _line(body: str, step: int, marks: Marks, is_last: bool) -> str:
    if not body:
        raise _NoThought("empty thought")
    conclusion = _CONCLUSION.search(body) if is_last else None
    if conclusion is None:
        return f"{marks.step.replace('{n}', str(step))} {body}\n"
    if conclusion.start() > 0:
        raise _NoThought("answer in the middle of prose")  # neither a step nor an answer line
    return f"{marks.answer} {body[conclusion.end() :].strip()}".strip() + "\n"


def _nodes(drafts: Sequence[_Draft], task: Task, tokenize: Callable[[str, str], list[int]]) -> list[Node]:
    parents = {draft.parent for draft in drafts}
    texts: list[str] = []  # of each draft's whole chain
    nodes: list[Node] = []
    for draft in drafts:
        before = "" if draft.parent == ROOT else texts[draft.parent]
        texts.append(before + draft.text)
        answer = task.parse_answer(draft.text)
        nodes.append(
            Node(
                id=draft.id,
                parent=draft.parent,
                depth=draft.depth,
                text=draft.text,
                token_ids=tuple(tokenize(before, draft.text)),
                value=sum(draft.values) / len(draft.values),
                evaluations=tuple({"imported": value} for value in draft.values),
                kept=draft.id in parents or answer is not None,  # expanded, or a vote
                terminal=task.is_answer_line(draft.text),
                complete=answer is not None,
                count=len(draft.values),
                answer=answer,
                stop="newline",
            )
        )
    return nodes


def _winners(recorded: Sequence[str], last_level: dict[str, int], nodes: Sequence[Node]) -> tuple[list[int], int]:
    """Ids of the complete nodes in the recorded winner's answer group, and how many recorded winners are none here."""
    found = [last_level.get(_fold(chain)[0]) for chain in recorded]
    complete = [nodes[place] for place in found if place is not None and nodes[place].complete]
    num_lost = len(recorded) - len(complete)
    if not complete:
        return [], num_lost
    return [node.id for node in nodes if node.complete and node.answer == complete[0].answer], num_lost
