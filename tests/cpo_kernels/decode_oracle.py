"""Random search frontiers for `tree_decode`, with each row's visible keys written out, and dense attention over them.

A frontier is a tree of nodes at random places of an arena; its leaves are states, each with a few rows that decode behind
a private suffix. After them come the rows of one node that is prefilled. Arena rows that no row may see are NaN, so a key
too many shows in the result whatever its weight.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.functional import scaled_dot_product_attention

from cpo_kernels.tree_decode import DecodePlan
from cpo_kernels.tree_decode.plan import QUERY_TILE, Item

Path = list[tuple[int, int]]  # (start, length) of every node in the arena, root first


@dataclass
class Frontier:
    """Rows that decode, in depth-first order, then the rows of one prefilled node; N rows in all."""

    paths: list[Path] = field(default_factory=list)  # of each row that decodes
    suffixes: list[tuple[int, int]] = field(default_factory=list)  # (start, length) of each, its new key included
    prefill_path: Path = field(default_factory=list)
    prefill_node: tuple[int, int] = (0, 0)
    num_arena_rows: int = 0

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.paths) + self.prefill_node[1]

    def visible(self, window: int | None = None) -> list[list[int]]:
        """The arena rows that each row sees: its path, or the last `window` of it."""
        seen = [
            [key for start, length in [*path, suffix] for key in range(start, start + length)]
            for path, suffix in zip(self.paths, self.suffixes, strict=True)
        ]
        above = [key for start, length in self.prefill_path for key in range(start, start + length)]
        start, length = self.prefill_node
        seen += [[*above, *range(start, start + place + 1)] for place in range(length)]
        return seen if window is None else [keys[-window:] for keys in seen]

    def plan(self, split: int = 256) -> DecodePlan:
        """All rows in one forward; rows under one node share an item."""
        items: list[Item] = []
        for level in range(max((len(path) for path in self.paths), default=0)):
            nodes = [path[level] if level < len(path) else None for path in self.paths]
            row = 0
            while row < len(nodes):
                stop = row + 1
                while stop < len(nodes) and nodes[stop] == nodes[row]:
                    stop += 1
                node = nodes[row]
                if node is not None:
                    items.append((row, stop - row, *node, node[1]))
                row = stop
        prefill_items, prefill_slots = self._prefill(0, self.prefill_node[1], len(self.paths))
        return self._build(self.suffixes, items + prefill_items, prefill_slots, split)

    def decode_plan(self, rows: Sequence[int], split: int = 256, most_own: int | None = None) -> DecodePlan:
        """Some decoding rows, in this order, nothing shared. Of a suffix all but the last `most_own` keys are a node."""
        items: list[Item] = []
        suffixes: list[tuple[int, int]] = []
        for place, row in enumerate(rows):
            start, length = self.suffixes[row]
            own = min(length, most_own or length)
            path = [*self.paths[row], (start, length - own)][: len(self.paths[row]) + (own < length)]
            items += [(place, 1, *node, node[1]) for node in path]
            suffixes.append((start + length - own, own))
        return self._build(suffixes, items, [], split)

    def prefill_plan_by_row(self) -> DecodePlan:
        """All tokens of the prefilled node, as rows whose own keys it is."""
        start, length = self.prefill_node
        items = [(row, 1, *node, node[1]) for row in range(length) for node in self.prefill_path]
        return self._build([(start, row + 1) for row in range(length)], items, [], 256)

    def prefill_plan(self, first: int, last: int, split: int = 256) -> DecodePlan:
        """Tokens [first, last) of the prefilled node; `first` is a multiple of QUERY_TILE."""
        assert first % QUERY_TILE == 0
        return self._build([], *self._prefill(first, last, 0), split)

    def _prefill(self, first: int, last: int, row: int) -> tuple[list[Item], list[int]]:
        if first == last:
            return [], []
        start = self.prefill_node[0]
        items = [(row, last - first, *node, node[1]) for node in self.prefill_path]
        return [*items, (row, last - first, start, last, first + 1)], list(range(start + first, start + last))

    def _build(
        self, suffixes: Sequence[tuple[int, int]], items: Sequence[Item], prefill_slots: list[int], split: int
    ) -> DecodePlan:
        slots = [start + length - 1 for start, length in suffixes] + prefill_slots
        starts = [start for start, _ in suffixes] + [0] * len(prefill_slots)
        lengths = [length for _, length in suffixes] + [0] * len(prefill_slots)
        return DecodePlan.build(slots, items, starts, lengths, split)


def random_frontier(
    seed: int, depth: int = 3, max_node: int = 40, max_suffix: int = 40, num_prefilled: int = 10, max_rows: int = 3
) -> Frontier:
    """A ragged tree of up to `depth` levels, node lengths 1 to max_node, 1 to max_rows rows a state."""
    generator = random.Random(seed)
    frontier = Frontier()

    def allocate(length: int) -> int:
        start = frontier.num_arena_rows + generator.randint(0, 3)
        frontier.num_arena_rows = start + length + 1
        return start

    def grow(path: Path, level: int) -> None:
        if level == depth or (level and generator.random() < 0.2):
            for _ in range(generator.randint(1, max_rows)):
                length = generator.choice([1, generator.randint(1, max_suffix), max_suffix])
                frontier.paths.append(path)
                frontier.suffixes.append((allocate(length), length))
            frontier.prefill_path = path
            return
        for _ in range(1 if level == 0 else generator.randint(1, 3)):
            length = generator.choice([1, generator.randint(1, max_node), max_node])
            grow([*path, (allocate(length), length)], level + 1)

    grow([], 0)
    frontier.prefill_node = (allocate(num_prefilled), num_prefilled)
    return frontier


@dataclass(frozen=True)
class Inputs:
    """What `tree_decode` takes for a frontier, before the new keys and values are stored."""

    q: torch.Tensor  # [N, H, D]
    k_new: torch.Tensor  # [N, Hkv, D]
    v_new: torch.Tensor  # [N, Hkv, D]
    arena: torch.Tensor  # [2, C, Hkv, D], the second layer of an arena of two

    def rows(self, rows: Sequence[int]) -> "Inputs":
        """Those of some rows, over a copy of the arena."""
        at = torch.tensor(rows, dtype=torch.int64, device=self.q.device)
        return Inputs(self.q[at], self.k_new[at], self.v_new[at], self.arena.clone())


def random_inputs(
    frontier: Frontier, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> Inputs:
    """Normal queries, keys and values; NaN in every arena row that nobody sees or that is written by the call."""
    generator = torch.Generator().manual_seed(seed)
    arena = torch.randn((2, 2, frontier.num_arena_rows + 7, kv_heads, head_dim), generator=generator)
    seen = {key for keys in frontier.visible() for key in keys}
    unseen = torch.tensor([key not in seen for key in range(arena.shape[2])])
    unseen[frontier.plan().slots] = True
    arena[:, :, unseen] = float("nan")
    q, k_new, v_new = (
        (1.5 * torch.randn((frontier.num_rows, n, head_dim), generator=generator)).to(device, dtype)
        for n in (heads, kv_heads, kv_heads)
    )
    return Inputs(q, k_new, v_new, arena.to(device, dtype)[1])


def dense_attention(
    frontier: Frontier,
    inputs: Inputs,
    scale: float,
    dtype: torch.dtype,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """SDPA of each row over its own keys, all of it in `dtype`, [N, H, D]. Written out under a soft-cap or sinks."""
    arena = inputs.arena.clone()
    slots = frontier.plan().slots.to(arena.device)
    arena[0, slots], arena[1, slots] = inputs.k_new, inputs.v_new
    outs = []
    for row, keys in enumerate(frontier.visible(window)):
        k, v = arena[:, torch.tensor(keys, device=arena.device)].to(dtype).transpose(1, 2)  # [Hkv, n, D]
        q = inputs.q[row].to(dtype).unsqueeze(1)  # [H, 1, D]
        if softcap is None and sinks is None:
            outs.append(scaled_dot_product_attention(q[None], k[None], v[None], scale=scale, enable_gqa=True)[0, :, 0])
            continue
        k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], dim=0) for x in (k, v))
        scores = q @ k.transpose(1, 2) * scale  # [H, 1, n]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if sinks is not None:  # as Transformers' gpt-oss: a column more, which is left out after the softmax
            scores = torch.cat([scores, sinks.to(dtype)[:, None, None]], dim=-1)
        outs.append((scores.softmax(dim=-1)[..., : len(keys)] @ v)[:, 0])
    return torch.stack(outs)
