"""Tiles that the attention kernels could be compiled for, and a way to put one of them in the shipped one's place.

The alternatives are those whose machine code was read: on compute capability 9.0 the shipped backward lets both warp
groups compute the same scores, on 8.0 it waits for shared memory, and the tiles named here do neither.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cpo_kernels.tree_attention import triton_backward, triton_forward
from cpo_kernels.triton_tiles import Tile, padded_head_dim

SHIPPED = "shipped"
BLOCK_KV = 64  # keys of a schedule's block where no tile wants more


@dataclass(frozen=True)
class Variant:
    """One set of tiles. None leaves the shipped one."""

    name: str
    forward: Tile | None = None
    grad_q: Tile | None = None
    grad_kv: Tile | None = None

    @property
    def block_kv(self) -> int:
        """Keys of a block of the schedule: at least those of the tile."""
        return max(BLOCK_KV, self.grad_kv.block_kv if self.grad_kv else 0)


def variants(capability: int, head_dim: int) -> list[Variant]:
    """The shipped tiles, then the alternatives.

    Args:
        capability: of the device, 90 for 9.0; 0 is the interpreter, where one alternative shows that all of this runs.
        head_dim: D. Alternatives are known for 128.
    """
    found = [Variant(SHIPPED)]
    if capability == 0:
        return [*found, Variant("dkv 16x32", grad_kv=Tile(16, 32, 4, 1))]
    if padded_head_dim(head_dim) != 128:
        return found
    found += [
        Variant("dq 64x64, 4 warps", grad_q=Tile(64, 64, 4, 2)),
        Variant("dq 128x64, 8 warps", grad_q=Tile(128, 64, 8, 2)),
    ]
    if capability >= 90:
        found += [
            Variant("dkv 32x128, 8 warps", grad_kv=Tile(32, 128, 8, 2)),
            Variant("dkv 64x128, 8 warps", grad_kv=Tile(64, 128, 8, 2)),
            Variant("forward 64x64, 4 warps", forward=Tile(64, 64, 4, 2)),
        ]
    else:
        found.append(Variant("dkv 64x64, 8 warps", grad_kv=Tile(64, 64, 8, 2)))
    return found


@contextmanager
def installed(variant: Variant, head_dim: int) -> Iterator[None]:
    """The variant's tiles in the tables of 16-bit inputs, for the calls made within, backward calls too."""
    places = (
        (triton_forward.TILES, variant.forward),
        (triton_backward.QUERY_TILES, variant.grad_q),
        (triton_backward.KEY_TILES, variant.grad_kv),
    )
    kept = []
    for table, tile in places:
        key = max(padded_head_dim(head_dim), min(table))
        kept.append((table, key, table[key]))
        table[key] = tile or table[key]
    try:
        yield
    finally:
        for table, key, tile in kept:
            table[key] = tile
