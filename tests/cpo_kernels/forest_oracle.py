"""The forest from its definition alone: a row is a distinct prefix. Quadratic in length, shares nothing with csrc."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def oracle_forest(sequences: Sequence[Sequence[int]], pad_to_multiple_of: int = 1) -> dict[str, Any]:
    """Every array of `Forest` as lists, and `num_tokens`."""
    children: dict[tuple[int, ...], list[tuple[int, ...]]] = {(): []}
    for sequence in sequences:
        for length in range(1, len(sequence) + 1):
            prefix = tuple(sequence[:length])
            if prefix not in children:
                children[prefix] = []
                children[prefix[:-1]].append(prefix)

    line: list[tuple[int, ...]] = []

    def visit(prefix: tuple[int, ...]) -> None:
        line.append(prefix)
        for child in children[prefix]:
            visit(child)

    for root in children[()]:
        visit(root)

    row_of = {prefix: row for row, prefix in enumerate(line)}
    subtree_end = [max(row_of[other] for other in line if other[: len(prefix)] == prefix) + 1 for prefix in line]
    forest = {
        "tokens": [prefix[-1] for prefix in line],
        "position_ids": [len(prefix) - 1 for prefix in line],
        "subtree_end": subtree_end,
        "parent_row": [row_of.get(prefix[:-1], -1) for prefix in line],
        "path_rows": [row_of[tuple(s[:length])] for s in sequences for length in range(1, len(s) + 1)],
        "path_offsets": np.cumsum([0] + [len(s) for s in sequences]).tolist(),
        "num_tokens": len(line),
    }
    while len(forest["tokens"]) % pad_to_multiple_of:
        for name, value in (("tokens", 0), ("position_ids", 0), ("parent_row", -1)):
            forest[name].append(value)
        subtree_end.append(len(subtree_end) + 1)
    return forest


def random_sequences(rng: np.random.Generator, num_sequences: int = 12, max_length: int = 14) -> list[list[int]]:
    """Sequences over two to four ids: prefixes, repeats, single tokens and branches at every depth are all common."""
    alphabet = int(rng.integers(2, 5))
    return [
        rng.integers(0, alphabet, int(rng.integers(1, max_length + 1))).tolist()
        for _ in range(int(rng.integers(1, num_sequences + 1)))
    ]
