"""Seeded draws that depend on names alone: equal seed and name give an equal number, whatever stands around them.

    uniform(seed, names) = first 53 bits of SHA-256(seed, names) / 2^53

There is no generator state, so row order, file order and other questions change nothing, and draws are nested: what a
share of 0.2 takes, a share of 0.3 takes too.
"""

import hashlib
from collections.abc import Iterable

from cpo_fast.files import canonical_json


def uniform(seed: int, *names: str | int) -> float:
    """A number in [0, 1) for these names; different purposes pass different first names."""
    content = canonical_json([seed, *names])
    digest = hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def draw(names: Iterable[str], count: int, seed: int, purpose: str) -> set[str]:
    """`count` of the distinct `names` (all of them if there are fewer): those with the smallest numbers."""
    return set(sorted(set(names), key=lambda name: (uniform(seed, purpose, name), name))[:count])
