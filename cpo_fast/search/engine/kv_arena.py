"""Where the keys and values of cached tokens are, and a prefix tree that says which KV slot holds which token.

    storage of a layer [2, C, Hkv, D]      key or value, KV slot, key head, element

Layers may differ in key heads and head size. A slot is the same token's in all of them.

Each node of the prefix tree, and each request that is being generated, owns one contiguous interval of the C slots.
There are no pages and no block tables. Intervals are handed out best fit and merge with free neighbours when they are
given back. The last slot is the padding slot: rows that only fill up a forward write there.

What two prompts share, by longest common prefix of their tokens, is one node of the tree. A prompt is a path: for each
node on it, how many of its tokens the prompt uses. A computed node is never split. Without `KVTrie.adopt` the split into
nodes, and therefore float rounding where that depends on it, follows from this question's own prompts, in order.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from cpo_fast.models import free_device_bytes

CPU_SHARE = 0.25  # of the memory that is free on a CPU, where the arena has no device of its own
CUDA_SHARE = 0.8  # the rest is for the activations of a prefill and the logits of a decode batch
MAX_DEFAULT_TOKENS = 1 << 20  # more than 16 questions with 50 states a level ever hold
# a prompt shares part of a computed node from so many tokens on where fewer cost more in separate sums than one read saves
MIN_SHARED = 16


class KVArena:
    """KV slots, allocated in contiguous intervals.

    Args:
        shapes: key heads and head size of each layer (`arena_shapes`).
        num_tokens: C - 1, how many tokens fit.
        dtype, device: of the storage. Those of the model's keys.

    Attributes:
        padding_slot: the slot that padding rows write.
        layers: (keys, values) of each layer, views [C, Hkv, D] of its storage.
        bytes_per_token: over all layers.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, int]], num_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_tokens = num_tokens
        self.padding_slot = num_tokens
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        for shape in shapes:
            # one slot more than tokens fit: the padding slot
            storage = torch.empty((2, num_tokens + 1, *shape), dtype=dtype, device=device)
            storage[:, self.padding_slot] = 0
            self.layers.append((storage[0], storage[1]))
        self.bytes_per_token = kv_bytes_per_token(shapes, dtype)
        # the free intervals, never adjacent: (start, stop) ascending, and (length, start) ascending
        self._free = [(0, num_tokens)]
        self._by_length = [(num_tokens, 0)]

    def allocate(self, count: int) -> int | None:
        """First slot of an interval of `count` >= 1 slots, now owned. None where no free interval is large enough."""
        fitting = bisect_left(self._by_length, (count,))
        if fitting == len(self._by_length):
            return None
        length, start = self._by_length.pop(fitting)  # the shortest that fits, and of those the first
        index = bisect_left(self._free, (start,))
        if length == count:
            del self._free[index]
        else:
            self._free[index] = (start + count, start + length)
            insort(self._by_length, (length - count, start + count))
        return start

    def release(self, start: int, count: int) -> None:
        stop = start + count
        # joined with free neighbours on either side, so that intervals never adjoin
        index = bisect_left(self._free, (stop,))  # the first interval behind it
        if index < len(self._free) and self._free[index][0] == stop:
            stop = self._take(index)[1]
        if index > 0 and self._free[index - 1][1] == start:
            index -= 1
            start = self._take(index)[0]
        self._free.insert(index, (start, stop))
        insort(self._by_length, (stop - start, start))

    def _take(self, index: int) -> tuple[int, int]:
        start, stop = self._free.pop(index)
        del self._by_length[bisect_left(self._by_length, (stop - start, start))]
        return start, stop

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy keys and values of all layers from slots to others. No slot is both."""
        device = self.layers[0][0].device
        source, target = (torch.tensor(slots, device=device) for slots in (sources, targets))
        for storage in itertools.chain(*self.layers):
            storage.index_copy_(0, target, storage.index_select(0, source))

    def drop(self, node: KVNode) -> None:
        """Give back the slots of a node, whose tokens are computed again when a prompt needs them."""
        assert node.start is not None, "a node that is not stored"
        self.release(node.start, len(node))
        node.start = None


def kv_bytes_per_token(shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values over all layers, of so many key heads and such a head size each."""
    return sum(2 * num_heads * head_dim * dtype.itemsize for num_heads, head_dim in shapes)


def default_num_tokens(shapes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> int:
    """How many tokens the arena holds when the configuration does not say: a share of the memory that is free now."""
    share = CUDA_SHARE if device.type == "cuda" else CPU_SHARE
    num_bytes = int(free_device_bytes(device) * share)
    return max(1, min(MAX_DEFAULT_TOKENS, num_bytes // kv_bytes_per_token(shapes, dtype)))


Ids = npt.NDArray[np.int64]


@dataclass(eq=False)
class KVNode:
    """Tokens of the tree that are computed and kept together.

    Attributes:
        ids: [n] their ids.
        parent: the node before it. `parent_end` of its tokens precede this node. None at the start of a prompt.
        position: position of the first token.
        number: unique among the nodes of all trees on one base. Running requests stand in this order.
        start: first KV slot. None while nothing is stored.
        fixed: was computed once, so it is never split any more.
        num_users: running requests and prefills that read it.
    """

    ids: Ids
    parent: KVNode | None
    parent_end: int
    position: int
    number: int
    start: int | None = None
    fixed: bool = False
    num_users: int = 0

    def __len__(self) -> int:
        return len(self.ids)


KVPath = list[tuple[KVNode, int]]  # root first. Each node with how many of its tokens are used


@dataclass(eq=False)
class KVTrie:
    """A prefix tree of prompts. A question's stands on `base`, that of the run's permanent prompts, and only reads it.

    `min_shared` is of how many tokens on a prompt shares part of a computed node.
    """

    base: KVTrie | None = None
    min_shared: int = MIN_SHARED
    nodes: list[KVNode] = field(default_factory=list)
    _children: dict[tuple[int, int], dict[int, list[KVNode]]] = field(default_factory=dict)  # and by their first token
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        if self.base is not None:
            self._numbers = self.base._numbers  # requests of all questions stand in one order

    def insert(self, prompts: Sequence[Sequence[int]], max_shared: Sequence[int] | None = None) -> list[KVPath]:
        """Add prompts and return their paths, in order.

        Args:
            prompts: ids, each prompt may be empty.
            max_shared: for each prompt, how many of its tokens may lie in nodes that are computed already. None: all.
        """
        limits = max_shared if max_shared is not None else list(map(len, prompts))
        # the samples of a state, and the labels of a verdict, ask one after the other for the same prompt: one walk
        runs = [(key, len(list(same))) for key, same in itertools.groupby(zip(prompts, limits, strict=True))]
        ends = [self._walk(np.asarray(prompt, dtype=np.int64), limit) for (prompt, limit), _ in runs]
        paths: list[KVPath] = []
        # not before all are walked: a later prompt may split a node above an end
        for end, (_, count) in zip(ends, runs, strict=True):
            paths += [[] if end is None else _path_through(*end)] * count
        return paths

    def adopt(self, path: KVPath, ids: Sequence[int], start: int) -> KVNode:
        """Add tokens that a request has computed behind a path, as a node whose first slot is `start`."""
        parent, offset = path[-1] if path else (None, 0)
        position = 0 if parent is None else parent.position + offset
        node = self._add(np.asarray(ids, dtype=np.int64), parent, offset, position)
        node.start, node.fixed = start, True
        return node

    def take_out(self, nodes: Set[KVNode]) -> list[KVNode]:
        """Take nodes out. What follows them must be among them. Returns them in the order in which they were made."""
        gone = [node for node in self.nodes if node in nodes]
        self.nodes = [node for node in self.nodes if node not in nodes]
        for node in gone:
            self._siblings(node).remove(node)
        return gone

    def _walk(self, ids: Ids, limit: int) -> tuple[KVNode, int] | None:
        """Lay a prompt into the tree. Returns its last node and how many tokens of that it uses. None: it is empty."""
        parent: KVNode | None = None
        offset = 0  # tokens of the parent that are used
        done = 0
        while done < ids.size:
            child, shared = self._best_child(parent, offset, ids[done:], limit - done)
            if child is None:
                child = self._add(ids[done:], parent, offset, done)
                shared = len(child)
            # of one that was computed the first tokens are used, and the prompt continues in a new child
            elif shared < len(child) and not child.fixed:
                child = self._split(child, shared)
            parent, offset, done = child, shared, done + shared
        return None if parent is None else (parent, offset)

    def _best_child(self, parent: KVNode | None, offset: int, ids: Ids, limit: int) -> tuple[KVNode | None, int]:
        best: KVNode | None = None
        longest = 0
        for child in self._children_of(_key(parent, offset), int(ids[0])):
            length = _common_prefix(child.ids, ids)
            if child.fixed:
                length = min(length, limit)
                if length < len(child) and length < self.min_shared:
                    continue
            if length > longest:
                best, longest = child, length
        return best, longest

    def _children_of(self, key: tuple[int, int], token: int) -> Iterator[KVNode]:
        """Nodes below so many tokens of a parent, as `_key` names them, that begin with `token`."""
        # the base first: of equally long nodes, the one that all questions have is taken
        for trie in (self,) if self.base is None else (self.base, self):
            below = trie._children.get(key)
            if below is not None:
                yield from below.get(token, ())

    def _siblings(self, node: KVNode) -> list[KVNode]:
        """The nodes of this trie that begin where `node` does with the same token, itself among them."""
        return self._children[_key(node.parent, node.parent_end)][int(node.ids[0])]

    def _add(self, ids: Ids, parent: KVNode | None, offset: int, position: int) -> KVNode:
        node = KVNode(ids, parent, offset, position, next(self._numbers))
        self.nodes.append(node)
        self._children.setdefault(_key(parent, offset), {}).setdefault(int(ids[0]), []).append(node)
        return node

    def _split(self, node: KVNode, length: int) -> KVNode:
        """Split a node that was never computed: it keeps its end. Returns the new node of its first `length` tokens."""
        siblings = self._siblings(node)
        top = KVNode(node.ids[:length], node.parent, node.parent_end, node.position, next(self._numbers))
        self.nodes.append(top)
        siblings[siblings.index(node)] = top
        # all children of a node that was never computed hang at its end, so only their key changes
        children = self._children.pop(_key(node, len(node)), {})
        node.ids, node.parent, node.parent_end = node.ids[length:], top, length
        node.position += length
        for child in itertools.chain(*children.values()):
            child.parent_end = len(node)
        self._children[_key(node, len(node))] = children
        self._children[_key(top, length)] = {int(node.ids[0]): [node]}
        return top


def path_to(node: KVNode) -> KVPath:
    """The nodes above `node`, root first, each with how many of its tokens precede it."""
    path: KVPath = []
    end = node.parent_end
    above = node.parent
    while above is not None:
        path.append((above, end))
        end, above = above.parent_end, above.parent
    path.reverse()
    return path


def _path_through(last: KVNode, used: int) -> KVPath:
    # of a node that may still be split everything is used, however much of it is left
    return [*path_to(last), (last, used if last.fixed else len(last))]


def _key(parent: KVNode | None, offset: int) -> tuple[int, int]:
    # children hang below a number of a node's tokens, below none at the start of a prompt
    return -1 if parent is None else parent.number, offset


def _common_prefix(first: Ids, second: Ids) -> int:
    length = min(first.size, second.size)
    different = first[:length] != second[:length]
    at = int(different.argmax())  # 0 also where none is
    return at if different[at] else length
