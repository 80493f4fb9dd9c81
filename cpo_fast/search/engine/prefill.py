"""Compute nodes of the trie: their keys and values into the arena, and the logits at places that are scored."""

from collections.abc import Sequence

import numpy as np
import torch

from cpo_fast.search.engine.arena import Arena
from cpo_fast.search.engine.plans import chunks, depth_first, prefill_plan
from cpo_fast.search.engine.trie import Node
from cpo_fast.search.engine.wave import padding_rows
from cpo_kernels.integrations.transformers.decode import decode_forward, next_logits
from cpo_kernels.integrations.transformers.parts import ModelParts
from cpo_kernels.transfer import to_device

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
