"""One forward: which KV slots each row reads, and the model that computes it.

A row is one token of one path. In a decode step every running request has one row. In a prefill every token of a node
that is computed has one. A plan lists work items, each a contiguous run of rows against one node, so rows stand in
depth-first order: then all rows below a node are one run, and the node is read once for them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from cpo_fast.search.engine.kv_arena import KVArena, KVNode, KVPath, path_to
from cpo_kernels.device import to_device
from cpo_kernels.integrations.transformers.decode import decode_forward, next_logits, row_multiple
from cpo_kernels.integrations.transformers.model import ModelParts
from cpo_kernels.tree_decode import DecodePlan
from cpo_kernels.tree_decode.plan import Item

# a token, by its node and which of the node's tokens it is, and the id whose log-prob after it is wanted
Read = tuple[KVNode, int, int]
# a chunk of a prefill may begin only here in a node, so that chunks never change how its sums are grouped
PREFILL_TILE = 64
TINY_MODEL = 10_000_000  # parameters
LOGIT_ROWS = 256  # rows of logits held at once: 50 MiB in float32 at a vocabulary of 49,152


class ModelRunner:
    """A prepared model over a KV arena.

    Args:
        parts: of the model. arena: of its keys and values. impl: implementation of `tree_decode`.

    Attributes:
        is_tiny: on a CPU, and so small that a forward costs what its calls cost.
    """

    def __init__(self, parts: ModelParts, arena: KVArena, impl: str) -> None:
        self.parts, self.arena, self.impl = parts, arena, impl
        self.device = next(parts.causal_lm.parameters()).device
        num_weights = sum(weight.numel() for weight in parts.causal_lm.parameters())
        self.is_tiny = self.device.type == "cpu" and num_weights < TINY_MODEL

    @property
    def vocab_size(self) -> int:
        weight = self.parts.head.weight
        assert isinstance(weight, torch.Tensor)
        return weight.shape[0]

    def num_padding(self, num_rows: int) -> int:
        """Rows to add to a forward so that no row's bits depend on how many there are. None on a GPU."""
        return -num_rows % row_multiple() if self.device.type == "cpu" else 0

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, plan: DecodePlan) -> torch.Tensor:
        """Final hidden states [N, E] of N rows, whose keys and values are written to the arena.

        Args:
            token_ids, positions: [N] int64. plan: of these rows. All on the device of the model.
        """
        return decode_forward(self.parts, token_ids, positions, plan, self.arena.layers, impl=self.impl)

    @torch.inference_mode()
    def try_out(self) -> None:
        """Run padding rows through the model, so that one whose layers no search can serve is refused before it starts.

        Raises:
            ValueError: as `decode_forward`.
        """
        num_rows = 1 + self.num_padding(1)
        plan, _ = decode_plan([], [], [], num_rows, self.arena.padding_slot)
        nothing = torch.zeros(num_rows, dtype=torch.int64, device=self.device)
        self.forward(nothing, nothing, to_device(plan, self.device))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [R, V] float32 of the next token after hidden states [R, E]."""
        return next_logits(self.parts, hidden)


@dataclass(frozen=True)
class Piece:
    """Tokens [first, last) of a node that one forward computes."""

    node: KVNode
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first


def decode_plan(
    paths: Sequence[KVPath],
    first_slots: Sequence[int],
    lengths: Sequence[int],
    num_padding: int,
    padding_slot: int,
    share: bool = True,
) -> tuple[DecodePlan, int]:
    """The plan of a decode step: each row reads a path and its request's own slots, the last of which it writes.

    Args:
        paths: of each row, rows in depth-first order, every node stored.
        first_slots, lengths: the own slots of each row's request, the one it writes included.
        num_padding: rows to add that read nothing but themselves.
        padding_slot: where these write.
        share: False reads every node once for each row, as an engine without a tree would. For measurements.

    Returns:
        The plan, and how many keys of nodes it reads, a shared one once.
    """
    items = _shared_items([(row, 1, path) for row, path in enumerate(paths)], share)
    starts = np.asarray([*first_slots, *[padding_slot] * num_padding], dtype=np.int64)  # [N]
    counts = np.asarray([*lengths, *[1] * num_padding], dtype=np.int64)  # [N]
    num_keys = sum(num_keys for _, _, _, num_keys, _ in items)
    return DecodePlan.build(starts + counts - 1, items, starts, counts), num_keys


def prefill_plan(pieces: Sequence[Piece], num_padding: int, padding_slot: int) -> DecodePlan:
    """The plan of one forward that computes pieces of nodes, parents before children. Every node has its slots."""
    queries: list[tuple[int, int, KVPath]] = []
    own: list[Item] = []
    slots: list[np.ndarray] = []
    row = 0
    for piece in pieces:
        start = piece.node.start
        assert start is not None, "a node without KV slots"
        assert piece.first % PREFILL_TILE == 0, "a chunk that begins inside a tile"
        queries.append((row, len(piece), path_to(piece.node)))
        own.append((row, len(piece), start, piece.last, piece.first + 1))  # causal: the first row reads so many keys
        slots.append(np.arange(start + piece.first, start + piece.last))
        row += len(piece)
    slots.append(np.full(num_padding, padding_slot))
    starts = np.full(row + num_padding, padding_slot)
    lengths = np.concatenate([np.zeros(row, np.int64), np.ones(num_padding, np.int64)])
    return DecodePlan.build(np.concatenate(slots), [*_shared_items(queries), *own], starts, lengths)


def _shared_items(queries: Sequence[tuple[int, int, KVPath]], share: bool = True) -> list[Item]:
    """Items of runs of rows (first, count, path) over the nodes of their paths, level by level."""
    items: list[Item] = []
    if share:  # the samples of a state have one path
        grouped = [list(same) for _, same in groupby(queries, key=lambda query: id(query[2]))]
        queries = [(same[0][0], sum(count for _, count, _ in same), same[0][2]) for same in grouped]
    # root first, which is the order in which a row's partial attentions are merged
    for depth in range(max((len(path) for _, _, path in queries), default=0)):
        queries = [query for query in queries if len(query[2]) > depth]
        # neighbours apart, or `tree_decode` would put their items together again
        at_depth = queries if share else queries[::2] + queries[1::2]
        expected, last_node, last_used = -1, None, 0  # the row that would go on with the last item
        for first, count, path in at_depth:
            node, used = path[depth]
            assert node.start is not None, "a path through a node that is not stored"
            if share and first == expected and node is last_node and used == last_used:
                items[-1] = (items[-1][0], items[-1][1] + count, node.start, used, used)
            else:
                items.append((first, count, node.start, used, used))
            expected, last_node, last_used = first + count, node, used
    return items


@torch.inference_mode()
def compute_nodes(
    runner: ModelRunner, nodes: Sequence[KVNode], max_tokens: int, reads: Sequence[Read] = ()
) -> dict[Read, float]:
    """Prefill: compute keys and values of nodes that have their slots.

    Args:
        nodes: any order. What lies above them is stored or among them.
        max_tokens: of one forward.
        reads: what is wanted after tokens of these nodes.

    Returns:
        For each of `reads`: natural log-prob of the id, a float64 log-softmax.
    """
    wanted: dict[KVNode, dict[int, dict[int, None]]] = {}  # ids by token; no sets, because sets have no order
    for node, offset, token in reads:
        wanted.setdefault(node, {}).setdefault(offset, {})[token] = None
    found: dict[Read, float] = {}
    for pieces in _chunks(_depth_first(nodes), max_tokens):
        padding = runner.num_padding(sum(map(len, pieces)))
        tokens = np.concatenate([piece.node.ids[piece.first : piece.last] for piece in pieces])
        positions = np.concatenate([piece.node.position + np.arange(piece.first, piece.last) for piece in pieces])
        hidden = runner.forward(  # [N, E]
            to_device(torch.from_numpy(np.pad(tokens, (0, padding))), runner.device),
            to_device(torch.from_numpy(np.pad(positions, (0, padding))), runner.device),
            to_device(prefill_plan(pieces, padding, runner.arena.padding_slot), runner.device),
        )
        rows = list(_wanted_rows(pieces, wanted))
        for first in range(0, len(rows), LOGIT_ROWS):
            some = rows[first : first + LOGIT_ROWS]
            logits = runner.logits(hidden[[row for row, _, _ in some]])
            logps = torch.log_softmax(logits.double(), dim=-1)  # [R, V] float64
            targets = [
                (place, (node, offset, token))
                for place, (_, node, offset) in enumerate(some)
                for token in wanted[node][offset]
            ]
            index = torch.tensor([(place, read[2]) for place, read in targets], device=runner.device)
            values = logps[index[:, 0], index[:, 1]].tolist()  # only these leave the device
            for (_, read), value in zip(targets, values, strict=True):
                found[read] = value
    for node in nodes:
        node.fixed = True
    return found


def _wanted_rows(pieces: Sequence[Piece], wanted: Mapping[KVNode, Iterable[int]]) -> Iterator[tuple[int, KVNode, int]]:
    """Rows of a forward that are read, in order: each with its node and which of the node's tokens it is."""
    row = 0
    for piece in pieces:
        for offset in sorted(wanted.get(piece.node, ())):
            if piece.first <= offset < piece.last:
                yield row + offset - piece.first, piece.node, offset
        row += len(piece)


def _chunks(nodes: Sequence[KVNode], max_tokens: int) -> list[list[Piece]]:
    """Cut nodes, parents before children, into forwards of at most `max_tokens` tokens (at least one tile)."""
    limit = max(PREFILL_TILE, max_tokens)
    forwards: list[list[Piece]] = [[]]
    room = limit
    for node in nodes:
        first = 0
        while first < len(node):
            last = min(len(node), first + room)
            if last < len(node):
                last -= (last - first) % PREFILL_TILE
            if last == first:  # not one tile has room here
                forwards.append([])
                room = limit
                continue
            forwards[-1].append(Piece(node, first, last))
            room -= last - first
            first = last
    return [forward for forward in forwards if forward]


def _depth_first(nodes: Sequence[KVNode]) -> list[KVNode]:
    """Nodes by their whole path, so that those below one node stand together and parents come first."""
    return sorted(nodes, key=lambda node: [*(above.number for above, _ in path_to(node)), node.number])
