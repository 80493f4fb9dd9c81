"""Prompts as a trie of nodes: what two prompts share by token-level longest common prefix is one node.

A node owns the keys and values of its tokens, all in one interval of the arena. A prompt is a path: for each node on it,
how many of its tokens the prompt reads. Nodes that were computed once are never cut: a prompt that leaves such a node
in its middle reads only the beginning of it, and its own continuation hangs there. So how a prompt falls into nodes
follows from the prompts of its own question alone, in the order they came, and with it how sums are grouped.

A trie may stand on another one (a question's on that of the run's permanent prompts), which it reads and never changes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
# a node of fewer tokens costs more in separate sums than reading it once saves; only whole permanent prompts are cut here
MIN_SHARED = 16


@dataclass(eq=False)
class Node:
    """Tokens of the trie that are computed and kept together.

    Attributes:
        ids: [n] their ids.
        parent: the node before it; `parent_end` of its tokens precede this node. None at the start of a prompt.
        position: position of the first token.
        number: its name among the nodes of all tries on one base; sorts rows.
        start: first arena row; None while nothing is stored.
        fixed: was computed once, and is never cut any more.
        num_users: running rows and prefills that read it.
    """

    ids: Ids
    parent: Node | None
    parent_end: int
    position: int
    number: int
    start: int | None = None
    fixed: bool = False
    num_users: int = 0

    def __len__(self) -> int:
        return int(self.ids.size)


Path = list[tuple[Node, int]]  # root first; each node with how many of its tokens are read


@dataclass(eq=False)
class Trie:
    """Nodes below `base`'s."""

    base: Trie | None = None
    nodes: list[Node] = field(default_factory=list)
    _children: dict[tuple[int, int], list[Node]] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        if self.base is not None:
            self._numbers = self.base._numbers

    def insert(self, prompts: Sequence[Sequence[int]], max_shared: Sequence[int] | None = None) -> list[Path]:
        """Add prompts and return their paths, in order.

        Args:
            prompts: ids, each prompt may be empty.
            max_shared: for each prompt, how many of its tokens may lie in nodes that are there already; None: all.
        """
        arrays = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
        limits = max_shared if max_shared is not None else [array.size for array in arrays]
        for array, limit in zip(arrays, limits, strict=True):
            self._walk(array, limit, add=True)
        # a second walk, because a later prompt may have cut a node of an earlier one
        return [self._walk(array, limit, add=False) for array, limit in zip(arrays, limits, strict=True)]

    def _walk(self, ids: Ids, limit: int, add: bool) -> Path:
        path: Path = []
        parent: Node | None = None
        offset = 0  # tokens of the parent that are read
        done = 0
        while done < ids.size:
            child, shared = self._best_child(parent, offset, ids[done:], limit - done)
            if child is None:
                assert add, "a prompt was not inserted"
                child = self._add(ids[done:], parent, offset, done)
                shared = len(child)
            elif shared < len(child) and not child.fixed:
                child = self._cut(child, shared)
            path.append((child, shared))
            parent, offset, done = child, shared, done + shared
        return path

    def _best_child(self, parent: Node | None, offset: int, ids: Ids, limit: int) -> tuple[Node | None, int]:
        best: Node | None = None
        longest = 0
        for child in self._children_of(parent, offset):
            length = _common_prefix(child.ids, ids)
            if child.fixed:
                length = min(length, limit)
                if length < len(child) and length < MIN_SHARED:
                    continue
            if length > longest:
                best, longest = child, length
        return best, longest

    def _children_of(self, parent: Node | None, offset: int) -> list[Node]:
        key = (-1 if parent is None else parent.number, offset)
        inherited = self.base._children_of(parent, offset) if self.base is not None else []
        return [*inherited, *self._children.get(key, [])]

    def _add(self, ids: Ids, parent: Node | None, offset: int, position: int) -> Node:
        node = Node(ids, parent, offset, position, next(self._numbers))
        self.nodes.append(node)
        self._children.setdefault((-1 if parent is None else parent.number, offset), []).append(node)
        return node

    def _cut(self, node: Node, length: int) -> Node:
        """Cut a node that was never computed; returns the new node of its first `length` tokens."""
        siblings = self._children[-1 if node.parent is None else node.parent.number, node.parent_end]
        top = Node(node.ids[:length], node.parent, node.parent_end, node.position, next(self._numbers))
        self.nodes.append(top)
        siblings[siblings.index(node)] = top
        node.ids, node.parent, node.parent_end = node.ids[length:], top, length
        node.position += length
        # children hang at the end of a node that was never computed, so only their key changes
        self._children[node.number, len(node)] = self._children.pop((node.number, length + len(node)), [])
        for child in self._children[node.number, len(node)]:
            child.parent_end = len(node)
        self._children[top.number, length] = [node]
        return top


def _common_prefix(first: Ids, second: Ids) -> int:
    length = min(first.size, second.size)
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if different.size else length
