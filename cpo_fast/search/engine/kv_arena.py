"""The KV arena: keys and values of every cached token in one tensor, each node's tokens in one piece.

    storage [L, 2, C, Hkv, D]      layer, key or value, arena row, key head, element

A node of the prompt trie and a row that is being generated each own one contiguous interval of the C rows; there are no
pages and no block tables. Permanent intervals (few-shot and evaluator prompts) are handed out from the left and stay;
intervals of questions and of scratch come from what is left, first fit, and merge with their neighbours when they are
given back. The last row is nobody's: rows of a forward that only fill it up write there.

Prompts as a trie of nodes: what two prompts share by token-level longest common prefix is one node.

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
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

CPU_SHARE = 0.25  # of the memory that is free on a CPU, where the arena has no device of its own
CUDA_SHARE = 0.8  # the rest is for the activations of a prefill and the logits of a wave
MAX_DEFAULT_TOKENS = 1 << 20  # more than 16 questions with 50 states a level ever hold


class Arena:
    """Rows of keys and values, allocated in contiguous intervals.

    Args:
        config: a model's text configuration: layers, key heads and head size.
        num_tokens: C - 1, how many tokens fit.
        dtype, device: of the storage; those of the model's keys.

    Attributes:
        num_tokens: as given.
        dump_row: the arena row of fill-up queries.
        layers: (keys, values) of each layer, views [C, Hkv, D] of the storage.
        bytes_per_token: over all layers.
    """

    def __init__(self, config: Any, num_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        heads, head_dim = kv_shape(config)
        self.num_tokens = num_tokens
        self.dump_row = num_tokens
        storage = torch.empty(config.num_hidden_layers, 2, num_tokens + 1, heads, head_dim, dtype=dtype, device=device)
        storage[:, :, self.dump_row] = 0
        self.layers = [(layer[0], layer[1]) for layer in storage]
        self.bytes_per_token = kv_bytes_per_token(config, dtype)
        self._free: list[tuple[int, int]] = [(0, num_tokens)]  # (start, stop), ascending, never adjacent

    @property
    def num_free(self) -> int:
        """Rows that nobody owns; the largest interval may be smaller."""
        return sum(stop - start for start, stop in self._free)

    def allocate(self, count: int) -> int | None:
        """First row of a free interval of `count` >= 1 rows, now owned; None where no free interval is large enough."""
        for index, (start, stop) in enumerate(self._free):
            if stop - start >= count:
                if stop - start == count:
                    del self._free[index]
                else:
                    self._free[index] = (start + count, stop)
                return start
        return None

    def release(self, start: int, count: int) -> None:
        """Give back an interval that `allocate` returned."""
        stop = start + count
        index = next((i for i, (first, _) in enumerate(self._free) if first >= stop), len(self._free))
        if index < len(self._free) and self._free[index][0] == stop:
            stop = self._free.pop(index)[1]
        if index > 0 and self._free[index - 1][1] == start:
            start = self._free.pop(index - 1)[0]
            index -= 1
        self._free.insert(index, (start, stop))


def kv_shape(config: Any) -> tuple[int, int]:
    """Key heads and head size of a model's text configuration."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values over all layers."""
    heads, head_dim = kv_shape(config)
    return int(config.num_hidden_layers * 2 * heads * head_dim * dtype.itemsize)


def default_num_tokens(config: Any, dtype: torch.dtype, device: torch.device) -> int:
    """How many tokens the arena holds when the configuration does not say: a share of the memory that is free now."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # held by torch, in no tensor
        free = int((torch.cuda.mem_get_info(device)[0] + unused) * CUDA_SHARE)
    else:
        import psutil  # type: ignore[import-untyped]  # comes with DeepSpeed and accelerate

        free = int(psutil.virtual_memory().available * CPU_SHARE)
    return max(1, min(MAX_DEFAULT_TOKENS, free // kv_bytes_per_token(config, dtype)))


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
