"""Plans of one forward: which arena rows each query reads, for rows that generate and for nodes that are computed.

A plan's item is a contiguous run of queries against one node, so queries must stand in depth-first order: then all
queries below a node are one run, and the node is read once for them. Items are listed level by level, root first, which
is the order in which a query's partial attentions are merged.

Compute nodes of the trie: their keys and values into the arena, and the logits at places that are scored.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cpo_fast.search.engine.kv_arena import Arena, Node, Path
from cpo_kernels.device import to_device
from cpo_kernels.integrations.transformers.decode import decode_forward, next_logits, row_multiple
from cpo_kernels.integrations.transformers.model import ModelParts
from cpo_kernels.tree_decode import DecodePlan

Item = tuple[int, int, int, int, int]  # query start, number of queries, key start, number of keys, first visible
# a chunk of a prefill may begin only here in a node, so that chunks never change how its sums are grouped
PREFILL_TILE = 64


@dataclass(frozen=True)
class Piece:
    """Tokens [first, last) of a node that one forward computes."""

    node: Node
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first


def path_to(node: Node) -> Path:
    """The nodes above `node`, root first, each with how many of its tokens precede it."""
    path: Path = []
    end = node.parent_end
    above = node.parent
    while above is not None:
        path.append((above, end))
        end, above = above.parent_end, above.parent
    path.reverse()
    return path


def decode_plan(
    paths: Sequence[Path],
    suffix_start: Sequence[int],
    suffix_len: Sequence[int],
    num_padding: int,
    dump_row: int,
    share: bool = True,
) -> tuple[DecodePlan, int]:
    """The plan of rows that each read a path and their own private rows; the last of these receives the new key.

    Args:
        paths: of each row, rows in depth-first order, every node stored.
        suffix_start, suffix_len: private arena rows of each row, its new one included.
        num_padding: rows to add that read nothing but themselves.
        dump_row: where these write.
        share: False reads every node once for each row, as an engine without a tree would; for measurements.

    Returns:
        The plan, and how many keys of nodes it reads, a shared one once.
    """
    items = _shared_items([(row, 1, path) for row, path in enumerate(paths)], share)
    starts = np.asarray([*suffix_start, *[dump_row] * num_padding], dtype=np.int64)
    lengths = np.asarray([*suffix_len, *[1] * num_padding], dtype=np.int64)
    return DecodePlan.build(starts + lengths - 1, items, starts, lengths), keys_read(items)


def prefill_plan(pieces: Sequence[Piece], num_padding: int, dump_row: int) -> DecodePlan:
    """The plan of one forward that computes pieces of nodes, parents before children; every node has its rows."""
    queries: list[tuple[int, int, Path]] = []
    own: list[Item] = []
    slots: list[np.ndarray] = []
    row = 0
    for piece in pieces:
        start = piece.node.start
        assert start is not None, "a node without arena rows"
        assert piece.first % PREFILL_TILE == 0, "a chunk that begins inside a tile"
        queries.append((row, len(piece), path_to(piece.node)))
        own.append((row, len(piece), start, piece.last, piece.first + 1))
        slots.append(np.arange(start + piece.first, start + piece.last))
        row += len(piece)
    slots.append(np.full(num_padding, dump_row))
    starts = np.full(row + num_padding, dump_row)
    lengths = np.concatenate([np.zeros(row, np.int64), np.ones(num_padding, np.int64)])
    return DecodePlan.build(np.concatenate(slots), [*_shared_items(queries), *own], starts, lengths)


def _shared_items(queries: Sequence[tuple[int, int, Path]], share: bool = True) -> list[Item]:
    """Items of runs of queries (first, count, path) over the nodes of their paths, level by level."""
    items: list[Item] = []
    for depth in range(max((len(path) for _, _, path in queries), default=0)):
        at_depth = [(first, count, *path[depth]) for first, count, path in queries if len(path) > depth]
        if not share:  # neighbours apart, or `tree_decode` would put their items together again
            at_depth = at_depth[::2] + at_depth[1::2]
        expected = -1
        runs: list[list[int]] = []  # first query, number of queries, key start, number of keys, name of the node
        for first, count, node, used in at_depth:
            assert node.start is not None, "a path through a node that is not stored"
            if share and runs and first == expected and runs[-1][3:] == [used, node.number]:
                runs[-1][1] += count
            else:
                runs.append([first, count, node.start, used, node.number])
            expected = first + count
        items.extend((first, count, start, used, used) for first, count, start, used, _ in runs)
    return items


def chunks(nodes: Sequence[Node], max_tokens: int) -> list[list[Piece]]:
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
            if last == first:
                forwards.append([])
                room = limit
                continue
            forwards[-1].append(Piece(node, first, last))
            room -= last - first
            first = last
    return [forward for forward in forwards if forward]


def depth_first(nodes: Sequence[Node]) -> list[Node]:
    """Nodes by their whole path, so that those below one node stand together and parents come first."""
    return sorted(nodes, key=lambda node: [*(above.number for above, _ in path_to(node)), node.number])


def keys_read(plan_items: Sequence[Item]) -> int:
    """Keys that a list of items reads once each."""
    return sum(num_keys for _, _, _, num_keys, _ in plan_items)


LOGIT_ROWS = 256  # rows of logits held at once: 50 MiB in float32 at a vocabulary of 49,152

# a token, by its node and which of the node's tokens it is, and the id whose log-prob after it is wanted
Read = tuple[Node, int, int]


@torch.inference_mode()
def compute_nodes(
    parts: ModelParts, arena: Arena, nodes: Sequence[Node], max_tokens: int, reads: Sequence[Read] = ()
) -> dict[tuple[int, int, int], float]:
    """Fill nodes, which have their arena rows, in forwards of at most `max_tokens` tokens.

    Args:
        parts: of a prepared model. arena: of its keys and values.
        nodes: any order; what lies above them is stored or among them.
        max_tokens: of one forward.
        reads: what is wanted after tokens of these nodes.

    Returns:
        For each of `reads`, by (number of the node, token, id): natural log-prob of the id, a float64 log-softmax.
    """
    device = next(parts.causal_lm.parameters()).device
    wanted: dict[tuple[int, int], dict[int, None]] = {}
    for node, offset, token in reads:
        wanted.setdefault((node.number, offset), {})[token] = None
    found: dict[tuple[int, int, int], float] = {}
    for pieces in chunks(depth_first(nodes), max_tokens):
        num_tokens = sum(map(len, pieces))
        padding = padding_rows(num_tokens, device)
        tokens = np.concatenate([piece.node.ids[piece.first : piece.last] for piece in pieces])
        positions = np.concatenate([piece.node.position + np.arange(piece.first, piece.last) for piece in pieces])
        hidden = decode_forward(
            parts,
            to_device(torch.from_numpy(np.pad(tokens, (0, padding))), device),
            to_device(torch.from_numpy(np.pad(positions, (0, padding))), device),
            prefill_plan(pieces, padding, arena.dump_row).to(device),
            arena.layers,
        )
        names = [(piece.node.number, offset) for piece in pieces for offset in range(piece.first, piece.last)]
        rows = [row for row, name in enumerate(names) if name in wanted]
        for first in range(0, len(rows), LOGIT_ROWS):
            some = rows[first : first + LOGIT_ROWS]
            logps = torch.log_softmax(next_logits(parts, hidden[some]).double(), dim=-1)
            places = [(place, token) for place, row in enumerate(some) for token in wanted[names[row]]]
            index = torch.tensor(places, device=device)
            values = logps[index[:, 0], index[:, 1]].tolist()  # only these leave the device
            keys = [(*names[some[place]], token) for place, token in places]
            found.update(zip(keys, values, strict=True))
    for node in nodes:
        node.fixed = True
    return found


def padding_rows(num_rows: int, device: torch.device) -> int:
    """Rows to add to a forward so that no row's bits depend on how many there are; none on a GPU."""
    return -num_rows % row_multiple() if device.type == "cpu" else 0
