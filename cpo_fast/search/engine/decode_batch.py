"""Rows that generate side by side: one forward gives each of them its next token.

A row first reads the last token of its prompt, so that its logits come from the same kind of forward as all that follow;
what stands before is in the trie. Rows stand in depth-first order of their paths, so that every node they share is read
once for all of them. A row that ends leaves at once, and its place is free for another: a row's tokens depend on its own
path and request alone, so who is beside it changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cpo_fast.search.engine.forward_plans import decode_plan, padding_rows
from cpo_fast.search.engine.kv_arena import Arena, Path
from cpo_fast.search.engine.requests import Request
from cpo_fast.search.engine.sampler import NOT_FINITE, BatchSampler
from cpo_fast.search.engine.stopping import Stops
from cpo_fast.tree import Stop
from cpo_kernels.integrations.transformers.decode import decode_forward, next_logits
from cpo_kernels.integrations.transformers.model import ModelParts


@dataclass(eq=False)
class Row:
    """One request that is being generated.

    Attributes:
        request: what is asked. owner, index: whose it is, and which of its items.
        path: nodes of the prompt without its last token. start: first of `max_new_tokens` private arena rows.
        generated, logps: ids and raw log-probs so far; stop: why it ended; failed: its logits were not finite.
    """

    request: Request
    owner: Any
    index: int
    path: Path
    start: int
    generated: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    stop: Stop | None = None
    failed: bool = False

    @property
    def done(self) -> bool:
        """Whether the row has ended."""
        return self.failed or self.stop is not None


@dataclass(eq=False)
class WaveCounts:
    """What a wave has computed: forwards, rows that generated, rows of the forwards, keys read (a shared one once)."""

    num_steps: int = 0
    num_rows: int = 0
    num_places: int = 0
    num_keys: int = 0

    def add(self, num_rows: int, num_places: int, num_keys: int) -> None:
        """Count one forward."""
        self.num_steps += 1
        self.num_rows += num_rows
        self.num_places += num_places
        self.num_keys += num_keys


class Wave:
    """The rows of one forward.

    Args:
        parts: of a prepared model. arena: where keys and values are. stops: says when a row ends.
        share, refill: see `Features`.

    Attributes:
        rows: in depth-first order.
        counts: of what was computed.
    """

    def __init__(self, parts: ModelParts, arena: Arena, stops: Stops, share: bool = True, refill: bool = True) -> None:
        self.rows: list[Row] = []
        self.counts = WaveCounts()
        self._parts = parts
        self._arena = arena
        self._stops = stops
        self._share, self._refill = share, refill
        self._device = next(parts.causal_lm.parameters()).device
        self._sampler: BatchSampler | None = None

    def room(self, max_rows: int) -> int:
        """How many rows may be added now."""
        return max(0, max_rows - len(self.rows)) if self._refill or not self.rows else 0

    def add(self, rows: Sequence[Row]) -> None:
        """Let more rows take part in the next step."""
        self.rows = depth_first_rows([*self.rows, *rows])
        self._sampler = None

    def forget(self) -> None:
        """Nothing is kept between runs that a change of weights could spoil."""

    def drop(self, rows: Sequence[Row]) -> None:
        """Leave rows out from the next step on."""
        gone = {id(row) for row in rows}
        self.rows = [row for row in self.rows if id(row) not in gone]
        self._sampler = None

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """Generate one token for each row; returns the rows that ended with it, which have left the wave."""
        padding = padding_rows(len(self.rows), self._device)
        tokens = [row.generated[-1] if row.generated else row.request.token_ids[-1] for row in self.rows]
        lengths = [len(row.generated) for row in self.rows]
        positions = [len(row.request.token_ids) - 1 + length for row, length in zip(self.rows, lengths, strict=True)]
        plan, num_node_keys = decode_plan(
            [row.path for row in self.rows],
            [row.start for row in self.rows],
            [length + 1 for length in lengths],
            padding,
            self._arena.dump_row,
            self._share,
        )
        num_keys = num_node_keys + sum(lengths) + len(lengths)
        self.counts.add(len(self.rows), len(self.rows) + padding, num_keys)
        hidden = decode_forward(
            self._parts,
            torch.tensor(tokens + [0] * padding, device=self._device),
            torch.tensor(positions + [0] * padding, device=self._device),
            plan.to(self._device),
            self._arena.layers,
        )
        logits = next_logits(self._parts, hidden[: len(self.rows)])
        if self._sampler is None:
            self._sampler = BatchSampler.build(
                [row.request for row in self.rows],
                [row.generated for row in self.rows],
                len(self.rows),
                logits.shape[1],
                self._device,
            )
        chosen, logps = self._sampler.sample(logits, torch.tensor(lengths, device=self._device))
        for row, token, logp in zip(self.rows, chosen.tolist(), logps.tolist(), strict=True):
            row.failed = token == NOT_FINITE
            if not row.failed:
                row.logps.append(logp)
                row.stop = self._stops.take(token, row.generated, row.request.max_new_tokens)
        ended = [row for row in self.rows if row.done]
        if ended:
            self.drop(ended)
        return ended


def depth_first_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows in the order of their paths, so that those below one node stand together."""
    return sorted(rows, key=lambda row: [node.number for node, _ in row.path])
